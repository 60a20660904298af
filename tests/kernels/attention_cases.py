"""Caches, queries and float64 results for the tests of the attention kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.ops import KVCache, KVCacheSpec
from jaxq.ops.kv_cache._arrays import dequantize_groups
from jaxq.ops.kv_cache._groups import group_operands
from jaxq.ops.kv_cache._online_softmax import Queries

# Slots, key heads, query heads of a key head, size of a head.
B, M, R, H = 3, 2, 3, 128


def cache_of(
    spec="int4", length=560, window=None, dtype="float32", group=32, h=H, **sizes
):
    """An empty cache."""
    return KVCache.empty(
        KVCacheSpec(spec, group=group, residual=group),
        **{"batch": B, "num_heads": M} | sizes,
        length=length,
        head_dim=h,
        window=window,
        dtype=dtype,
    )


def filled(cache, lengths):
    """The cache with random tokens. A slot of 0 tokens holds NaN of an earlier text."""
    rng = np.random.default_rng(0)
    b, m, _, h = cache.recent_keys.shape
    shape = (2, b, max(lengths), m, h)
    k, v = jnp.asarray(rng.normal(size=shape), cache.dtype)
    empty = jnp.asarray(lengths) == 0
    old = jnp.where(empty[:, None, None, None], jnp.nan, k).astype(cache.dtype)
    cache = cache.append(old, old).reset(jnp.ones(b, bool))
    return cache.append(k, v, count=jnp.asarray(lengths, jnp.int32))


def operands_of(cache, t):
    """The operands and static facts for queries of the last t tokens."""
    b, m, _, h = cache.recent_keys.shape
    rows = np.random.default_rng(1).normal(size=(b, m, R, t, h))
    positions = cache.lengths[:, None] - t + jnp.arange(t, dtype=jnp.int32)[None]
    queries = Queries(jnp.asarray(rows, cache.dtype), positions, h**-0.5, cache.window)
    return group_operands(cache, queries, 256)


def expected(cache, operands, window):
    """Attention of the queries over the stored tokens, float64 `[b, m, n, h]`."""
    q, positions, tokens, *_ = operands
    k, v = dequantize_groups(
        cache.keys, cache.values, spec=cache.spec, dtype=np.dtype("float32")
    )
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    at = np.asarray(tokens).reshape(len(q), 1, -1)
    distance = np.asarray(positions)[:, :, None] - at  # [b, n, s]
    visible = (at >= 0) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    visible = visible[:, None]  # [b, 1, n, s]
    is_read = (at >= 0)[:, :, :, None]  # [b, 1, s, 1]
    k, v = np.where(is_read, k, 0), np.where(is_read, v, 0)
    scores = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * visible
    total = weights.sum(-1, keepdims=True)
    return weights @ v / np.where(total == 0, 1, total)


def finished(state):
    """The result of attention from a softmax state, float64."""
    _, total, sums = (np.asarray(x, np.float64) for x in state)
    return sums / np.where(total == 0, 1, total)[..., None]


def shapes_of(cache):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
