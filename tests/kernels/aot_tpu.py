"""Compiles the TPU kernels with libtpu's compiler, which needs no TPU.

    python -m tests.kernels.aot_tpu v6e:2x2
    python -m tests.kernels.aot_tpu v6e:2x2 transposed

The second line compiles the kernel of the backward pass.
It needs libtpu, which comes with jax[tpu]. It prints a line for each case, "ok", "not
served" with the reason, or "FAILED" with the error, and then how many compiled.
"""

import functools
import itertools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no search for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxq.kernels import Problem, _tpu, _tpu_transposed
from tests.kernels.problems import CODES, problem, specs


def cases(*, transposed: bool) -> dict[str, Problem]:
    """Every code by every group for few and many rows, and one case of other facts.

    All of it for codes along rows and along columns. The kernel of the backward pass
    takes no int8 x.
    """
    out = {}
    for codes, layout in itertools.product(CODES, ("rows", "columns")):
        name = f"{codes} {layout}"
        make = functools.partial(
            problem,
            codes,
            layout=layout,
            scale_dtype="bfloat16",
            transposed=transposed,
        )
        for m, group in itertools.product((16, 512), (32, 64, 128, None)):
            out[f"{name} group={group} m={m}"] = make(m=m, group=group)
        if not transposed:
            for m in (32, 512):
                out[f"{name} int8 x m={m}"] = make(m=m, x_dtype="int8")
                exact = {"x_codes": "float8_e4m3fn", "out_dtype": "float32"}
                if codes != "codebook4":
                    out[f"{name} float8 x m={m}"] = make(m=m, **exact)
            sums = {"scale_dtype": None, "zero_point": False, "out_dtype": "int32"}
            out[f"{name} int32"] = make(m=32, group=None, x_dtype="int8", **sums)
        for m in (16, 512):
            wide = dict.fromkeys(("x_dtype", "scale_dtype", "out_dtype"), "float32")
            out[f"{name} float32 x m={m}"] = make(m=m, **wide)
        out[f"{name} float16"] = make(
            **dict.fromkeys(("x_dtype", "scale_dtype", "out_dtype"), "float16")
        )
        out[f"{name} tails"] = make(
            e=2, m=5, k=1130, n=96, group=64, scale_dtype="float32"
        )
    return out


def main(topology: str, product: str = "") -> None:
    transposed = product == "transposed"
    kernel = _tpu_transposed if transposed else _tpu
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices[0]
    sharding = SingleDeviceSharding(device)
    compiled = 0
    for name, p in cases(transposed=transposed).items():
        reason = kernel.why_not(p, device.device_kind)
        if reason:
            print(f"not served {name}: {reason}", flush=True)
            continue
        tiles = kernel.default_tiles(p, device.device_kind)

        def run(*arrays, p=p, tiles=tiles):
            return kernel.matmul(*arrays, problem=p, tiles=tiles)

        try:
            jax.jit(run, in_shardings=sharding, out_shardings=sharding).lower(
                *specs(p)
            ).compile()
        except Exception as error:  # any error of the compiler is the result
            print(
                f"FAILED {name} {tiles}: {' '.join(str(error).split())[:500]}",
                flush=True,
            )
        else:
            compiled += 1
            print(f"ok {name}", flush=True)
    print(f"{compiled} compiled for {device.device_kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
