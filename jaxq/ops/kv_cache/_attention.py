"""Attention over a quantized KV cache.

A query reads three kinds of tokens: quantized groups, the newest tokens in full
precision, and tokens that are not in the cache yet. Quantized groups are dequantized
one block at a time. The softmax covers all blocks (`_online_softmax.py`).

Letters in shapes: b slots, m key heads, n query heads, r = n / m, t queries, h the size
of a head, g tokens of a group, c = `residual` tokens in full precision, p groups in a
block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.ops.kv_cache._arrays import CacheArrays, newest_in_ring, num_quantized
from jaxq.ops.kv_cache._online_softmax import (
    Block,
    Queries,
    Softmax,
    finish,
    fold,
    fold_many,
    start,
)
from jaxq.qtensor import dequantize


@functools.partial(jax.jit, static_argnames=("scale", "block"))
def attend(
    cache: CacheArrays,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    count: jax.typing.ArrayLike,
    *,
    scale: float,
    block: int,
) -> jax.Array:
    """`softmax(scale q k^T) v` of queries over a cache and, if given, over `k` and `v`.

    Args:
      cache: the cache.
      q: `[b, t, n, h]`.
      k: `[b, t, m, h]`, keys of tokens that are not in the cache yet, or None.
      v: `[b, t, m, h]`, values of the same tokens, or None.
      count: how many of the queries' tokens each slot has appended. Not used unless k
        is None.
      scale: scores are multiplied by this number.
      block: tokens that are dequantized at a time.

    Returns:
      float32 `[b, t, n, h]`.
    """
    spec, lengths = cache.spec, cache.lengths
    b, t, n, h = q.shape
    m = cache.recent_keys.shape[1]
    if spec.rotation is not None:
        q = spec.rotation(q)
        k = None if k is None else spec.rotation(k)
    rows = q.transpose(0, 2, 1, 3).reshape(b, m, n // m, t, h)
    steps = jnp.arange(t, dtype=jnp.int32)[None]  # [1, t]
    first = lengths if k is not None else lengths - count
    queries = Queries(rows, first[:, None] + steps, scale, cache.window)
    state = start(queries)
    if cache.num_groups:
        state = _read_groups(state, cache, queries, block)
    state = _read_recent(state, cache, queries)
    if k is not None and v is not None:
        state = _read_own_tokens(state, lengths, k, v, queries, block)
    return finish(state).reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _read_groups(
    state: Softmax, cache: CacheArrays, queries: Queries, block: int
) -> Softmax:
    """The softmax state after the quantized groups are read."""
    spec, num_groups = cache.spec, cache.num_groups
    b, m, _, h = cache.recent_keys.shape
    per_block = min(num_groups, max(1, block // spec.group))  # p
    filled = num_quantized(cache.lengths, spec)  # [b]
    group_of_place = newest_in_ring(filled - 1, num_groups)  # [b, num_groups]
    num_used = jnp.max(jnp.minimum(filled, num_groups))  # of the longest slot

    def block_at(i: jax.Array) -> Block:
        # The last block ends with the last place, so it may overlap the block before.
        # Places that the block before has read are marked as not valid.
        at = jnp.minimum(i * per_block, num_groups - per_block)
        stored = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, at, per_block, 2),
            (cache.keys, cache.values),
        )
        keys, values = (
            dequantize(qt, dtype=cache.dtype).reshape(b, m, per_block * spec.group, h)
            for qt in stored
        )
        groups = lax.dynamic_slice_in_dim(group_of_place, at, per_block, 1)  # [b, p]
        places = at + jnp.arange(per_block, dtype=jnp.int32)  # [p]
        is_repeated = (places < i * per_block)[None]
        in_group = jnp.arange(spec.group, dtype=jnp.int32)[None, None]
        tokens = groups[:, :, None] * spec.group + in_group  # [b, p, g]
        # The newest c tokens are read in full precision, even if their group is
        # already quantized.
        is_old = tokens < (cache.lengths - spec.residual)[:, None, None]
        valid = ((groups >= 0) & ~is_repeated)[:, :, None] & is_old
        return Block(keys, values, tokens.reshape(b, -1), valid.reshape(b, -1))

    return fold_many(state, -(-num_used // per_block), block_at, queries)


def _read_recent(state: Softmax, cache: CacheArrays, queries: Queries) -> Softmax:
    """The softmax state after the newest tokens are read in full precision."""
    tokens = newest_in_ring(cache.lengths - 1, cache.spec.residual)  # [b, c]
    recent = Block(cache.recent_keys, cache.recent_values, tokens, tokens >= 0)
    return fold(state, recent, queries)


def _read_own_tokens(
    state: Softmax,
    lengths: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Queries,
    block: int,
) -> Softmax:
    """The softmax state after the tokens `k` and `v` of the queries are read.

    These tokens are not in the cache yet.
    """
    b, t = k.shape[:2]
    size = min(t, max(block, 1))
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [b, m, t, h]

    def block_at(i: jax.Array) -> Block:
        # The last block may overlap the block before, as in `_read_groups`.
        at = jnp.minimum(i * size, t - size)
        steps = at + jnp.arange(size, dtype=jnp.int32)
        valid = jnp.broadcast_to((steps >= i * size)[None], (b, size))
        block_keys, block_values = (
            lax.dynamic_slice_in_dim(x, at, size, 2) for x in (keys, values)
        )
        positions = lengths[:, None] + steps[None]
        return Block(block_keys, block_values, positions, valid)

    return fold_many(state, -(-t // size), block_at, queries)
