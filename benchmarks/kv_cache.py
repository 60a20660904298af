"""What a quantized KV cache costs a trained language model, and what it saves.

The model is examples/tiny_llama, and perplexity is that of examples/heldout.txt. Every
token is decoded through the cache under jit, in 16 windows of 512 tokens. The windows
are twice as long as the model's training context, so most of the past is quantized.

"group" is the number of tokens that share the scales of a channel of keys. "residual"
is the number of newest tokens in full precision. Memory is that of all leaves at 2048
tokens (2 key heads of 64, bfloat16), relative to bfloat16 keys and values. It includes
the tokens in full precision. "int2, KIVI" has the sizes of the paper: groups of 32, and
the newest 128 tokens in full precision.
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
from jaxq.methods import hadamard
from jaxq.ops import KVCache, KVCacheSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT, WINDOWS, LENGTH = 512, 16, 2048
HEADS, HEAD_DIM = 2, 64
# The rule of KIVI: codes count up from the minimum of their group.
KIVI2 = jaxq.QuantSpec(
    "uint2", jaxq.PerGroup(32, pad=True), offset="min", scale="bfloat16"
)
KIVI4 = KIVI2.replace(format="uint4")
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
# By case: the largest loss of perplexity in per cent, and the largest memory.
TARGETS = {"int8": (0.2, None), "int4": (1.0, 0.3), "int2": (5.0, None)}


@functools.partial(nnx.jit, static_argnames="cache")
def losses(model: Any, tokens: jax.Array, *, cache: Any) -> jax.Array:
    """Negative log-likelihoods [t - 1, b] of tokens [b, t], decoded one by one."""
    b, t = tokens.shape

    def step(state, pair):
        token, next_token = pair  # each [b]
        logits, state = model.decode(token[:, None], state)
        log_p = jax.nn.log_softmax(logits[:, 0])  # [b, vocab]
        chosen = jnp.take_along_axis(log_p, next_token[:, None], axis=-1)
        return state, -chosen[:, 0]

    columns = tokens.T  # [t, b]
    state = model.init_cache(b, t, cache=cache)
    _, values = jax.lax.scan(step, state, (columns[:-1], columns[1:]))
    return values


def memory(spec: KVCacheSpec) -> float:
    """Bytes of an empty cache, relative to bfloat16 keys and values."""
    cache = KVCache.empty(
        spec, batch=1, num_heads=HEADS, length=LENGTH, head_dim=HEAD_DIM
    )
    num_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    return num_bytes / (2 * HEADS * LENGTH * HEAD_DIM * 2)


def run() -> dict[str, Any]:
    """Perplexity and memory of every case."""
    model, tokenizer = jaxq.models.load(EXAMPLES / "tiny_llama")
    text = (EXAMPLES / "heldout.txt").read_text()
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    tokens = jnp.asarray(ids[: WINDOWS * CONTEXT].reshape(WINDOWS, CONTEXT))

    def perplexity(cache: KVCacheSpec | None) -> float:
        values = np.asarray(losses(model, tokens, cache=cache), np.float64)
        return math.exp(values.mean())

    base = perplexity(None)
    rows = []
    for name, spec in CASES.items():
        value = perplexity(spec)
        row = {
            "cache": name,
            "group": spec.group,
            "residual": spec.residual,
            "perplexity": value,
            "loss_percent": 100 * (value / base - 1),
            "memory": memory(spec),
        }
        rows.append(row)
        print(
            f"{name}: {value:.3f} ({row['loss_percent']:+.2f} %), {row['memory']:.3f}",
            flush=True,
        )
    return {
        "subject": "kv_cache",
        "float_perplexity": base,
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    base = result["float_perplexity"]
    lines = [
        "| cache | group | residual | perplexity | change | target | memory | target |",
        "|---|---|---|---|---|---|---|---|",
        f"| floats | - | - | {base:.3f} | - | - | 1 (bfloat16) | - |",
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
