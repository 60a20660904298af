"""Compiles ragged products ahead of time, with no TPU and no GPU.

    python -m tests.kernels.aot_ragged tpu v6e:2x2
    python -m tests.kernels.aot_ragged cuda

The first needs libtpu, which comes with jax[tpu]. For the second see `aot_gpu.py`. With
more words, only cases run whose name has all of the words. It prints a line for each
case, "ok" or "FAILED" with the error. A case fails as well if XLA writes the codes in
another order before the kernel reads them, or decodes the weights of the experts. The
order is not checked for "tails": a TPU keeps arrays of such sizes in an order of its
own.
"""

import itertools
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # no search for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxq
from tests.kernels.aot_attention import CUSTOM_CALL, MOVES, device_of

# Rows of x, experts, k and n.
DECODE, PREFILL, TAILS = (
    (16, 16, 1024, 1536),
    (2048, 8, 1024, 1536),
    (37, 5, 1130, 1000),
)


def spec(fmt: str, group: int | None, **options) -> jaxq.QuantSpec:
    granularity = jaxq.PerChannel() if group is None else jaxq.PerGroup(group, pad=True)
    is_unsigned = fmt.startswith("uint")
    return jaxq.QuantSpec(fmt, granularity, symmetric=not is_unsigned, **options)


def cases(platform: str) -> dict[str, tuple]:
    """A spec, sizes, the dtype of x and the layout of each case."""
    layouts = ("rows", "columns") if platform == "tpu" else ("rows",)
    out = {}
    for fmt, group, layout in itertools.product(
        ("int4", "uint4", "nf4", "int8", "uint8"), (32, 64, 128, None), layouts
    ):
        weight = spec(fmt, group, scale="bfloat16")
        for name, sizes in (("decode", DECODE), ("prefill", PREFILL)):
            key = f"{fmt} group={group} {layout} {name}"
            out[key] = (weight, sizes, "bfloat16", layout)
    for fmt, layout in itertools.product(("int4", "uint4", "nf4", "int8"), layouts):
        tails = (spec(fmt, 64), TAILS, "bfloat16", layout)
        out[f"{fmt} tails {layout}"] = tails
        for dtype in ("float16", "float32"):
            out[f"{fmt} {dtype} {layout}"] = (spec(fmt, 64), DECODE, dtype, layout)
    return out


def problem_of(platform: str, device, case: tuple) -> str | None:
    """Compiles one case. Returns what is wrong, or None."""
    weight_spec, (m, e, k, n), dtype, layout = case

    def experts() -> jaxq.QTensor:
        w = jax.numpy.zeros((e, k, n), dtype)
        qt = jaxq.quantize(w, weight_spec, contracting=-2, batch=0)
        return jaxq.relayout(qt, layout)

    shapes = (
        jax.ShapeDtypeStruct((m, k), dtype),
        jax.eval_shape(experts),
        jax.ShapeDtypeStruct((e,), "int32"),
    )
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jaxq.ops.ragged_dot).lower(*arguments).compile().as_text()
    if CUSTOM_CALL[platform] not in text:
        return "no kernel runs"
    for kind, shape, operation in re.findall(
        r"= (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", text
    ):
        size = int(np.prod([int(number) for number in shape.split(",")]))
        is_moved = size == shapes[1].data.size and operation in MOVES
        if is_moved and kind in ("u8", "s8") and (m, e, k, n) != TAILS:
            return f"codes {kind}[{shape}] are moved by {operation}"
        if size >= e * k * n and kind in ("f32", "bf16", "f16"):
            return f"weights {kind}[{shape}] are decoded by {operation}"
    return None


def main(platform: str, *names: str) -> None:
    topology, words = "", list(names)
    if platform == "tpu":
        topology = words.pop(0)
    device = device_of(platform, topology)
    compiled = num_cases = 0
    for name, case in cases(platform).items():
        if not all(word in name for word in words):
            continue
        try:
            problem = problem_of(platform, device, case)
        except Exception as error:  # any error of the compiler is the result
            problem = " ".join(str(error).split())[:700]
        num_cases += 1
        compiled += problem is None
        print(f"ok {name}" if problem is None else f"FAILED {name}: {problem}")
        sys.stdout.flush()
    print(f"{compiled} of {num_cases} compiled for {device.device_kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
