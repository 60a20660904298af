"""What a quantized key-value cache costs a trained language model (examples/tiny_llama), and what it saves.

Perplexity on examples/heldout.txt through the cache: windows of 512 tokens (twice what the model was trained on, so
that most of the past is quantized), 16 at once, every token decoded by itself under jit. "group": tokens that share the
scales of a channel of keys; "residual": newest tokens in full precision. Memory is that of all leaves at 2048 tokens (2
key heads of 64, bfloat16), the tokens in full precision included, over that of bfloat16 keys and values. "int2, KIVI"
is what the paper takes: groups of 32, the newest 128 tokens in full precision.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxq
from jaxq.ops import KVCache, KVCacheSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT, WINDOWS, LENGTH = 512, 16, 2048
HEADS, HEAD_DIM = 2, 64
# KIVI's rule: codes count up from the minimum of their group.
KIVI2 = jaxq.QuantSpec(
    "uint2", jaxq.PerGroup(32, pad=True), offset="min", scale="bfloat16"
)
KIVI4 = KIVI2.replace(format="uint4")
hadamard = jaxq.methods.hadamard
CASES: dict[str, KVCacheSpec] = {
    "int8": KVCacheSpec("int8"),
    "fp8": KVCacheSpec("fp8"),
    "int4": KVCacheSpec("int4"),
    "int4, rotated": KVCacheSpec("int4", rotation=hadamard),
    "int4, KIVI": KVCacheSpec(KIVI4),
    "nf4": KVCacheSpec("nf4"),
    "int2": KVCacheSpec("int2"),
    "int2, rotated": KVCacheSpec("int2", rotation=hadamard),
    "int2, KIVI": KVCacheSpec(KIVI2, group=32, residual=128),
    "int2, KIVI, rotated, groups of 16": KVCacheSpec(
        KIVI2, group=16, residual=64, rotation=hadamard
    ),
}
# Largest loss of perplexity in per cent, and memory, wanted of a case.
TARGETS = {"int8": (0.2, None), "int4": (1.0, 0.3), "int2": (5.0, None)}


@functools.partial(nnx.jit, static_argnames="cache")
def losses(model: Any, tokens: jax.Array, *, cache: Any) -> jax.Array:
    """Negative log-likelihoods `[t - 1, b]` of tokens `[b, t]`, decoded one by one."""
    b, t = tokens.shape

    def step(state, pair):
        now, following = pair  # [b]
        logits, state = model.decode(now[:, None], state)
        log_p = jax.nn.log_softmax(logits[:, 0])
        return state, -jnp.take_along_axis(log_p, following[:, None], axis=-1)[:, 0]

    columns = tokens.T
    return jax.lax.scan(
        step, model.init_cache(b, t, cache=cache), (columns[:-1], columns[1:])
    )[1]


def memory(spec: KVCacheSpec) -> float:
    cache = KVCache.empty(
        spec, batch=1, num_heads=HEADS, length=LENGTH, head_dim=HEAD_DIM
    )
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    return held / (2 * HEADS * LENGTH * HEAD_DIM * 2)


def run() -> dict[str, Any]:
    model, tokenizer = jaxq.models.load(EXAMPLES / "tiny_llama")
    ids = np.asarray(
        tokenizer.encode((EXAMPLES / "heldout.txt").read_text()).ids, np.int32
    )
    tokens = jnp.asarray(ids[: WINDOWS * CONTEXT].reshape(WINDOWS, CONTEXT))

    def perplexity(cache: KVCacheSpec | None) -> float:
        return math.exp(
            np.asarray(losses(model, tokens, cache=cache), np.float64).mean()
        )

    base = perplexity(None)
    rows = []
    for name, spec in CASES.items():
        found = perplexity(spec)
        row = {
            "cache": name,
            "group": spec.group,
            "residual": spec.residual,
            "perplexity": found,
        }
        rows.append(
            {**row, "loss_percent": 100 * (found / base - 1), "memory": memory(spec)}
        )
        print(
            f"{name}: {found:.3f} ({rows[-1]['loss_percent']:+.2f} %), {rows[-1]['memory']:.3f}",
            flush=True,
        )
    return {
        "subject": "kv_cache",
        "float_perplexity": base,
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| cache | group | residual | perplexity | change | target | memory | target |",
        "|---|---|---|---|---|---|---|---|",
        f"| floats | - | - | {result['float_perplexity']:.3f} | - | - | 1 (bfloat16) | - |",
    ]
    for row in result["rows"]:
        loss, size = TARGETS.get(row["cache"], (None, None))
        cells = [
            row["cache"],
            str(row["group"]),
            str(row["residual"]),
            f"{row['perplexity']:.3f}",
            f"{row['loss_percent']:+.2f} %",
            "-" if loss is None else f"at most {loss} %",
            f"{row['memory']:.3f}",
            "-" if size is None else f"at most {size}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
