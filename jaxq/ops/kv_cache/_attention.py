"""Attention over a quantized KV cache.

A query reads three kinds of tokens: quantized groups, the newest tokens in full
precision, and tokens that are not in the cache yet. The softmax covers all of them
(`_online_softmax.py`).

`_groups.py` reads the quantized groups, by a Pallas kernel or one block at a time. This
file adds the other two kinds of tokens, in plain XLA.

Letters in shapes: b slots, m key heads, n query heads, r = n / m, t queries, h the size
of a head, c = `residual` tokens in full precision.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.meshes import all_explicit_mesh, call_on_auto_axes, explicit_spec
from jaxq.ops._on_parts import call_on_parts
from jaxq.ops.kv_cache._arrays import CacheArrays, newest_in_ring
from jaxq.ops.kv_cache._groups import read_groups
from jaxq.ops.kv_cache._layout import cache_layout
from jaxq.ops.kv_cache._online_softmax import (
    Block,
    Queries,
    Softmax,
    finish,
    fold,
    fold_many,
    start,
)


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
    steps = functools.partial(_attend, scale=scale, block=block)
    # The heads of the result are those of the queries, on the same devices.
    out_spec = PartitionSpec(*explicit_spec(q))
    mesh = all_explicit_mesh((cache, q))
    layout = None
    if mesh is not None:
        layout = cache_layout(cache, q, explicit_spec, mesh)
    if mesh is None or layout is None:
        return call_on_auto_axes(steps, out_spec, cache, q, k, v, count)
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), cache.lengths.shape)
    tokens = None if k is None else layout.tokens
    in_specs = (layout.cache, layout.tokens, tokens, tokens, layout.slots)
    y = call_on_parts(steps, mesh, in_specs, layout.tokens, cache, q, k, v, count)
    return jax.sharding.reshard(y, NamedSharding(mesh, out_spec))


def _attend(
    cache: CacheArrays,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    count: jax.typing.ArrayLike,
    *,
    scale: float,
    block: int,
) -> jax.Array:
    """As `attend`, on a mesh without explicit axes."""
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
    if cache.num_groups:
        state = read_groups(cache, queries, block)
    else:
        state = start(queries)
    state = _read_recent(state, cache, queries)
    if k is not None and v is not None:
        state = _read_own_tokens(state, lengths, k, v, queries, block)
    return finish(state).reshape(b, n, t, h).transpose(0, 2, 1, 3)


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
        # The last block may overlap the block before, as in `_groups.py`.
        at = jnp.minimum(i * size, t - size)
        steps = at + jnp.arange(size, dtype=jnp.int32)
        valid = jnp.broadcast_to((steps >= i * size)[None], (b, size))
        block_keys, block_values = (
            lax.dynamic_slice_in_dim(x, at, size, 2) for x in (keys, values)
        )
        positions = lengths[:, None] + steps[None]
        return Block(block_keys, block_values, positions, valid)

    return fold_many(state, -(-t // size), block_at, queries)
