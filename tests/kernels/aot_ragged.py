"""Compiles ragged products ahead of time; `ahead_of_time.py` says how.

    python -m tests.kernels.aot_ragged tpu v6e:2x2
    python -m tests.kernels.aot_ragged cuda

A case fails as well if XLA writes the codes in another order before the kernel reads
them, or decodes the weights of the experts. The order is not checked for "tails": a TPU
keeps arrays of such sizes in an order of its own.
"""

import functools
import itertools
import re
import sys

import jax
import numpy as np

import jaxq
from tests.kernels.ahead_of_time import Target, compile_for, run_cases, target_of
from tests.kernels.aot_attention import CUSTOM_CALL, MOVES

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
    """A spec, sizes, the dtype of x and the layout of each case.

    Some cases have the format of quantized rows as well.
    """
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
    for fmt, codes, layout in itertools.product(
        ("int4", "uint4", "int8"), ("int8", "float8_e4m3fn"), layouts
    ):
        for name, sizes in (("decode", DECODE), ("prefill", PREFILL)):
            key = f"{fmt} {codes} codes {layout} {name}"
            out[key] = (spec(fmt, 128), sizes, "bfloat16", layout, codes)
    return out


def problem_of(target: Target, case: tuple) -> str | None:
    """Compiles one case. Returns what is wrong, or None."""
    weight_spec, (m, e, k, n), dtype, layout, *codes = case
    activation = jaxq.QuantSpec(codes[0], jaxq.PerToken()) if codes else None

    def experts() -> jaxq.QTensor:
        w = jax.numpy.zeros((e, k, n), dtype)
        qt = jaxq.quantize(w, weight_spec, contracting=-2, batch=0)
        return jaxq.relayout(qt.with_activation(activation), layout)

    shapes = (
        jax.ShapeDtypeStruct((m, k), dtype),
        jax.eval_shape(experts),
        jax.ShapeDtypeStruct((e,), "int32"),
    )
    text = compile_for(target.device, jaxq.ops.ragged_dot, *shapes)
    if CUSTOM_CALL[target.platform] not in text:
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


def main(*arguments: str) -> None:
    target = target_of(arguments)
    run_cases(target, cases(target.platform), functools.partial(problem_of, target))


if __name__ == "__main__":
    main(*sys.argv[1:])
