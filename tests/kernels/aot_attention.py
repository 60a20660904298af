"""Compiles the attention kernels ahead of time; `ahead_of_time.py` says how.

    python -m tests.kernels.aot_attention tpu v6e:2x2
    python -m tests.kernels.aot_attention cuda

A case fails as well if XLA writes the codes in another order before the kernel reads
them.
"""

import functools
import re
import sys

import jax
import numpy as np

import jaxq
from tests.kernels.ahead_of_time import Target, compile_for, run_cases, target_of
from tests.kernels.attention_cases import cache_of

# XLA's own fusions are called triton as well.
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}
# Operations that would write codes in another order. A prefetch into the memory of the
# chip (copy-start, copy-done) keeps the order.
MOVES = ("copy", "transpose", "reshape", "fusion", "pad", "concatenate")
# One scale for each token of a head of 256 channels.
ONE_SCALE = jaxq.QuantSpec("int4", jaxq.PerGroup(256))
# The cache, queries of each slot, and query heads of each key head.
CASES = {
    "int8": ({"spec": "int8", "dtype": "bfloat16"}, 1, 8),
    "int4": ({"spec": "int4", "dtype": "bfloat16"}, 1, 8),
    "int4 32 queries": ({"spec": "int4", "dtype": "bfloat16"}, 32, 8),
    "int4 window": ({"spec": "int4", "dtype": "bfloat16", "window": 1000}, 1, 4),
    "int8 float32": ({"spec": "int8", "dtype": "float32"}, 1, 4),
    "int4 float16": ({"spec": "int4", "dtype": "float16"}, 1, 4),
    "int4 heads of 256": ({"spec": ONE_SCALE, "dtype": "bfloat16", "h": 256}, 1, 2),
    "int8 groups of 128": ({"spec": "int8", "dtype": "bfloat16", "group": 128}, 1, 8),
    "int4 short": ({"spec": "int4", "dtype": "bfloat16", "length": 96}, 1, 8),
}


def problem_of(target: Target, case: tuple) -> str | None:
    """Compiles one case. Returns what is wrong, or None."""
    sizes, t, r = case
    sizes = {"length": 8200, "batch": 8, "num_heads": 8} | sizes
    cache = jax.eval_shape(lambda: cache_of(**sizes))
    b, m, _, h = cache.recent_keys.shape
    q = jax.ShapeDtypeStruct((b, t, m * r, h), cache.dtype)
    text = compile_for(target.device, lambda cache, q: cache.attend(q), cache, q)
    if CUSTOM_CALL[target.platform] not in text:
        return "no kernel runs"
    codes = {cache.keys.data.size, cache.values.data.size}
    for kind, shape, operation in re.findall(
        r"= ([us]8)\[([\d,]+)\]\S* ([\w-]+)\(", text
    ):
        size = int(np.prod([int(n) for n in shape.split(",")]))
        if size in codes and operation in MOVES:
            return f"codes {kind}[{shape}] are moved by {operation}"
    return None


def main(*arguments: str) -> None:
    target = target_of(arguments)
    run_cases(target, CASES, functools.partial(problem_of, target))


if __name__ == "__main__":
    main(*sys.argv[1:])
