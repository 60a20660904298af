"""Time of one decode step of attention over a full quantized cache, beside float32 keys and values.

8 slots of 2048 tokens, 2 key heads of 64 with 4 query heads each, one query a slot; cases in turns. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxq.ops import KVCache

SLOTS, LENGTH, HEADS, HEAD_DIM = 8, 2048, 2, 64
CASES = ("int8", "int4", "nf4", "int2")


def run() -> dict[str, Any]:
    """Times of one step, float32 beside quantized caches."""
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(rng.normal(size=(SLOTS, LENGTH, HEADS, HEAD_DIM)), jnp.float32)
        for _ in range(2)
    )
    q = jnp.asarray(rng.normal(size=(SLOTS, 1, 4 * HEADS, HEAD_DIM)), jnp.float32)
    dense = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v))
    read = jax.jit(lambda q, cache: cache.attend(q))
    functions: dict[str, Any] = {"float32": lambda: dense(q, k, v).block_until_ready()}
    for name in CASES:
        sizes = {
            "batch": SLOTS,
            "num_heads": HEADS,
            "length": LENGTH,
            "head_dim": HEAD_DIM,
            "dtype": jnp.float32,
        }
        cache = KVCache.empty(name, **sizes).append(k, v)
        functions[name] = lambda cache=cache: read(q, cache).block_until_ready()
    steps = timing.summary(timing.interleaved(functions, rounds=20), "float32")
    return {"subject": "kv_steps", "steps": steps, "missing": []}


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = ["| cache | step, ms | over float32 |", "|---|---|---|"]
    base = result["steps"]["float32"]["median_ms"]
    for name, taken in result["steps"].items():
        lines.append(
            f"| {name} | {taken['median_ms']:.2f} | {taken['median_ms'] / base:.2f} |"
        )
    return "\n".join(lines)
