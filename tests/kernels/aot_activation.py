"""Compiles the kernels that quantize activations, with no TPU and no GPU.

    python -m tests.kernels.aot_activation tpu v6e:2x2
    python -m tests.kernels.aot_activation cuda

The first needs libtpu, which comes with jax[tpu]. For the second see `aot_gpu.py`. It
prints a line for each case, "ok", "not served" with the reason, or "FAILED" with the
error, and then how many compiled.
"""

import functools
import itertools
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # no search for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.kernels import choose
from jaxq.kernels._activation_problem import activation_problem
from jaxq.kernels._quantize_activation import activation_kernel_form
from tests.kernels.activation_cases import activation_call
from tests.kernels.aot_attention import device_of


def cases() -> dict[str, tuple]:
    """Every format and dtype for rows and groups, and one case of each other fact.

    A case is (format, group, dtype of x, dtype of scales, m, k). No group means one
    scale for each row.
    """
    out = {}
    formats = ("int8", "float8_e4m3fn", "float8_e5m2")
    dtypes = ("bfloat16", "float32", "float16")
    for fmt, dtype, group in itertools.product(formats, dtypes, (None, 128)):
        out[f"{fmt} {dtype} group={group}"] = (fmt, group, dtype, "float32", 256, 4096)
    for group in (32, 64, 256):
        out[f"int8 group={group}"] = ("int8", group, "bfloat16", "float32", 256, 4096)
    for m in (1, 5, 40, 2048):
        for group in (None, 128):
            name = f"float8_e4m3fn m={m} group={group}"
            out[name] = ("float8_e4m3fn", group, "bfloat16", "float32", m, 4096)
    for scale in ("bfloat16", "float16"):
        for group in (None, 128):
            name = f"int8 scales in {scale} group={group}"
            out[name] = ("int8", group, "bfloat16", scale, 256, 4096)
    for k in (14336, 28672, 1024 * 128):
        out[f"int8 k={k}"] = ("int8", None, "bfloat16", "float32", 64, k)
    out["int8 k=14336 float32"] = ("int8", None, "float32", "float32", 64, 14336)
    out["int8 k=1000"] = ("int8", None, "bfloat16", "float32", 64, 1000)
    return out


def main(platform: str, topology: str = "") -> None:
    device = device_of(platform, topology)
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    compiled = 0
    for name, (fmt, group, dtype, scale, m, k) in cases().items():
        call = activation_call((m, k), fmt, group, scale)
        problem = activation_problem((m, k), dtype, call.spec, call.geometry)
        choice = choose(problem, platform, device.device_kind, family="activation")
        if choice.reason is not None:
            print(f"not served {name}: {choice.reason}", flush=True)
            continue
        form = functools.partial(
            activation_kernel_form,
            call=call,
            kernel=choice.backend,
        )
        x = jax.ShapeDtypeStruct((m, k), dtype, sharding=sharding)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(form).lower(x).compile()
        except Exception as error:  # any error of the compiler is the result
            message = " ".join(str(error).split())
            print(f"FAILED {name}: {message[:500]}", flush=True)
        else:
            compiled += 1
            print(f"ok {name}", flush=True)
    print(f"jax {jax.__version__}: {compiled} compiled for {device.device_kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
