"""What a quantized key-value cache does under jit: tokens enter it, and queries read it. See `_cache.py`."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.ops.kv_cache import _attention
from jaxq.ops.kv_cache._spec import KVCacheSpec
from jaxq.qtensor import PerGroup, QTensor, QuantSpec, dequantize, quantize

if TYPE_CHECKING:
    from jaxq.ops.kv_cache._cache import KVCache


def quantize_groups(
    k: jax.Array, v: jax.Array, *, spec: KVCacheSpec
) -> tuple[QTensor, QTensor]:
    """Whole groups of tokens, `[b, m, groups, group, h]`."""

    def one(
        x: jax.Array, spec: QuantSpec | str | None, axis: int, name: str
    ) -> QTensor:
        assert isinstance(spec, QuantSpec)
        found = spec.granularity
        if isinstance(found, PerGroup) and found.size > x.shape[axis]:
            spec = spec.replace(
                granularity=dataclasses.replace(found, size=x.shape[axis]),
                packing=spec.packing,
            )
        return quantize(
            x,
            spec,
            contracting=axis,
            batch=(0, 1, 2),
            on_nonfinite="propagate",
            name=name,
        )

    return one(k, spec.keys, -2, "keys"), one(v, spec.values, -1, "values")


def num_quantized(lengths: jax.Array, spec: KVCacheSpec) -> jax.Array:
    """Groups that a text of this length has in quantized form: those with a token before the residual window."""
    return jnp.maximum(0, (lengths - spec.residual + spec.group - 1) // spec.group)


def _latest(last: jax.Array, num_places: int) -> jax.Array:
    """In a ring where thing i has place i mod `num_places`, what each place holds; below 0 where nothing yet.

    Args:
      last: int32 `[b]`, the newest thing.

    Returns:
      int32 `[b, num_places]`.
    """
    places = jnp.arange(num_places, dtype=jnp.int32)[None]
    return last[:, None] - (last[:, None] - places) % num_places


def _gather(line: jax.Array, index: jax.Array) -> jax.Array:
    """`[b, m, s, h]` at int32 `[b, i]` -> `[b, m, i, h]`."""
    return jax.vmap(lambda one, i: jnp.take(one, i, axis=1, mode="clip"))(line, index)


@jax.jit
def append(cache: KVCache, k: jax.Array, v: jax.Array, count: jax.Array) -> KVCache:
    spec, before = cache.spec, cache.lengths
    g, c, num_places = spec.group, spec.residual, cache.num_groups
    b, t, m, h = k.shape
    after = before + count  # [b]
    if spec.rotation is not None:
        k = spec.rotation(k)
    # The tokens in full precision, then the new ones: [b, m, c + t, h].
    lines = [
        jnp.concatenate([recent, new.transpose(0, 2, 1, 3)], axis=2)
        for recent, new in ((cache.recent_keys, k), (cache.recent_values, v))
    ]

    def index(position: jax.Array) -> jax.Array:
        """Where in a line the token of that position stands.   # [b, i] -> [b, i]"""
        return jnp.where(
            position < before[:, None], position % c, c + position - before[:, None]
        )

    keys, values = cache.keys, cache.values
    if num_places:
        num_new = -(-t // g)  # at most
        first = num_quantized(before, spec)  # [b]
        found = num_quantized(after, spec) - first  # [b]

        def blocks() -> tuple[QTensor, QTensor]:
            tokens = index(
                first[:, None] * g + jnp.arange(num_new * g, dtype=jnp.int32)[None]
            )
            groups = [
                _gather(line, tokens).reshape(b, m, num_new, g, h) for line in lines
            ]
            return quantize_groups(groups[0], groups[1], spec=spec)

        def nothing() -> tuple[QTensor, QTensor]:
            return jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(blocks)
            )

        # Of g single tokens one completes a group.
        fresh = lax.cond(jnp.any(found > 0), blocks, nothing)
        i = jnp.arange(num_new, dtype=jnp.int32)[None]  # [1, i]
        kept = (i < found[:, None]) & (
            i >= found[:, None] - num_places
        )  # of those that share a place the last
        places = jnp.where(
            kept, (first[:, None] + i) % num_places, num_places
        )  # [b, i], beyond the last: dropped

        def store(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return jax.vmap(lambda one, at, what: one.at[:, at].set(what, mode="drop"))(
                leaf, places, new
            )

        keys, values = jax.tree.map(store, (keys, values), fresh)
    held = index(_latest(after - 1, c))  # a place still empty keeps what it has
    recent = [_gather(line, held) for line in lines]
    return dataclasses.replace(
        cache,
        keys=keys,
        values=values,
        recent_keys=recent[0],
        recent_values=recent[1],
        lengths=after,
    )


@functools.partial(jax.jit, static_argnames=("scale", "block"))
def attend(
    cache: KVCache,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    count: jax.typing.ArrayLike,
    *,
    scale: float,
    block: int,
) -> jax.Array:
    spec, lengths = cache.spec, cache.lengths
    b, t, n, h = q.shape
    m, g, c = cache.recent_keys.shape[1], spec.group, spec.residual
    if spec.rotation is not None:
        q, k = spec.rotation(q), None if k is None else spec.rotation(k)
    rows = q.transpose(0, 2, 1, 3).reshape(b, m, n // m, t, h)
    steps = jnp.arange(t, dtype=jnp.int32)[None]  # [1, t]
    first = lengths if k is not None else lengths - count
    positions = first[:, None] + steps  # [b, t]
    how: Any = {
        "q": rows,
        "positions": positions,
        "scale": scale,
        "window": cache.window,
    }
    state = _attention.start(rows)

    if cache.num_groups:
        per_block = min(cache.num_groups, max(1, block // g))
        filled = num_quantized(lengths, spec)  # [b]
        group_of = _latest(filled - 1, cache.num_groups)  # [b, num_groups]
        used = jnp.max(jnp.minimum(filled, cache.num_groups))

        def quantized(i: jax.Array) -> _attention.Block:
            # The last block may start early so as to end with the last place; what came before is not read again.
            at = jnp.minimum(i * per_block, cache.num_groups - per_block)
            some = jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, at, per_block, 2),
                (cache.keys, cache.values),
            )
            keys, values = (
                dequantize(qt, dtype=cache.dtype).reshape(b, m, per_block * g, h)
                for qt in some
            )
            groups = lax.dynamic_slice_in_dim(group_of, at, per_block, 1)  # [b, groups]
            again = (at + jnp.arange(per_block, dtype=jnp.int32) < i * per_block)[None]
            tokens = (
                groups[:, :, None] * g + jnp.arange(g, dtype=jnp.int32)[None, None]
            )  # [b, groups, g]
            # The newest c tokens are read in full precision, also those whose group is quantized already.
            valid = ((groups >= 0) & ~again)[:, :, None] & (
                tokens < (lengths - c)[:, None, None]
            )
            return _attention.Block(
                keys, values, tokens.reshape(b, -1), valid.reshape(b, -1)
            )

        state = _attention.fold_many(state, -(-used // per_block), quantized, **how)

    held = _latest(lengths - 1, c)
    state = _attention.fold(
        state,
        _attention.Block(cache.recent_keys, cache.recent_values, held, held >= 0),
        **how,
    )

    if k is not None and v is not None:
        size = min(t, max(block, 1))
        keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

        def own(i: jax.Array) -> _attention.Block:
            at = jnp.minimum(i * size, t - size)
            some = at + jnp.arange(size, dtype=jnp.int32)
            valid = jnp.broadcast_to((some >= i * size)[None], (b, size))
            some_keys, some_values = (
                lax.dynamic_slice_in_dim(x, at, size, 2) for x in (keys, values)
            )
            return _attention.Block(
                some_keys, some_values, lengths[:, None] + some[None], valid
            )

        state = _attention.fold_many(state, -(-t // size), own, **how)
    return _attention.finish(state).reshape(b, n, t, h).transpose(0, 2, 1, 3)
