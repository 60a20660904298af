"""Time of one decode step of attention over a full quantized cache, beside float32.

There are 8 slots of 2048 tokens, and 2 key heads of 64 with 4 query heads each. Each
slot has one query. Cases are measured in turns. Run this on a machine that does nothing
else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

from jaxq.ops import KVCache

SLOTS, LENGTH, HEADS, HEAD_DIM = 8, 2048, 2, 64
CASES = ("int8", "int4", "nf4", "int2")


def run() -> dict[str, Any]:
    """Times of one step: float32 keys and values, and quantized caches."""
    rng = np.random.default_rng(0)
    shape = (SLOTS, LENGTH, HEADS, HEAD_DIM)
    k = jnp.asarray(rng.normal(size=shape), jnp.float32)
    v = jnp.asarray(rng.normal(size=shape), jnp.float32)
    q = jnp.asarray(rng.normal(size=(SLOTS, 1, 4 * HEADS, HEAD_DIM)), jnp.float32)
    dense = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v))
    attend = jax.jit(lambda q, cache: cache.attend(q))
    functions: dict[str, Any] = {"float32": lambda: dense(q, k, v).block_until_ready()}
    for name in CASES:
        cache = KVCache.empty(
            name,
            batch=SLOTS,
            num_heads=HEADS,
            length=LENGTH,
            head_dim=HEAD_DIM,
            dtype=jnp.float32,
        ).append(k, v)
        functions[name] = lambda cache=cache: attend(q, cache).block_until_ready()
    steps = summary(interleaved(functions, rounds=20), "float32")
    return {"subject": "kv_steps", "steps": steps, "missing": []}


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = ["| cache | step, ms | over float32 |", "|---|---|---|"]
    base = result["steps"]["float32"]["median_ms"]
    for name, figures in result["steps"].items():
        median = figures["median_ms"]
        lines.append(f"| {name} | {median:.2f} | {median / base:.2f} |")
    return "\n".join(lines)
