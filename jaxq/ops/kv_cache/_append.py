"""Appending tokens to a quantized KV cache.

Letters in shapes: b slots, t new tokens, m key heads, h the size of a head, c =
`residual` places in full precision, g tokens of a group, i new groups or indices.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec
from jaxq.ops.kv_cache._arrays import (
    CacheArrays,
    newest_in_ring,
    num_quantized,
    quantize_groups,
)
from jaxq.qtensor import QTensor, relayout

Cache = TypeVar("Cache", bound=CacheArrays)


@jax.jit
def append(cache: Cache, k: jax.Array, v: jax.Array, count: jax.Array) -> Cache:
    """Appends the first `count` new tokens of each slot and returns the new cache.

    On a mesh with explicit axes the new cache is sharded as the old one. So a cache can
    be the carry of a scan.

    Args:
      cache: the cache without the new tokens.
      k: keys `[b, t, m, h]` of the new tokens.
      v: values `[b, t, m, h]` of the new tokens.
      count: int32 `[b]`, the number of tokens that each slot takes, in `[0, t]`.
    """
    specs = jax.tree.map(lambda leaf: PartitionSpec(*explicit_spec(leaf)), cache)
    return call_on_auto_axes(_append, specs, cache, k, v, count)


def _append(cache: Cache, k: jax.Array, v: jax.Array, count: jax.Array) -> Cache:
    """As `append`, on a mesh without explicit axes."""
    spec, before = cache.spec, cache.lengths
    after = before + count  # [b]
    if spec.rotation is not None:
        k = spec.rotation(k)
    # A line contains the stored tokens in full precision, then the new tokens.
    key_line = _append_tokens(cache.recent_keys, k)  # [b, m, c + t, h]
    value_line = _append_tokens(cache.recent_values, v)

    def place_in_line(position: jax.Array) -> jax.Array:
        """The index in a line of the token at each position of a slot, `[b, i]`."""
        old, new = position % spec.residual, spec.residual + position - before[:, None]
        return jnp.where(position < before[:, None], old, new)

    keys, values = cache.keys, cache.values
    if cache.num_groups:
        num_new = -(-k.shape[1] // spec.group)  # the most that t tokens complete
        first = num_quantized(before, spec)  # [b]
        num_complete = num_quantized(after, spec) - first  # [b]
        positions = jnp.arange(num_new * spec.group, dtype=jnp.int32)[None]
        tokens = place_in_line(first[:, None] * spec.group + positions)
        groups = _quantize_complete(
            cache, (key_line, value_line), tokens, num_complete, num_new
        )
        places = _group_places(first, num_complete, num_new, cache.num_groups)
        keys, values = jax.tree.map(
            lambda leaf, new: _store(leaf, new, places), (keys, values), groups
        )
    # A place that is still empty keeps its old content.
    recent = place_in_line(newest_in_ring(after - 1, spec.residual))  # [b, c]
    return dataclasses.replace(
        cache,
        keys=keys,
        values=values,
        recent_keys=_take_tokens(key_line, recent),
        recent_values=_take_tokens(value_line, recent),
        lengths=after,
    )


def _append_tokens(recent: jax.Array, new: jax.Array) -> jax.Array:
    """`[b, m, c, h]` and `[b, t, m, h]` as `[b, m, c + t, h]`."""
    return jnp.concatenate([recent, new.transpose(0, 2, 1, 3)], axis=2)


def _take_tokens(line: jax.Array, index: jax.Array) -> jax.Array:
    """`[b, m, s, h]` at int32 `[b, i]` -> `[b, m, i, h]`."""

    def take(slot: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.take(slot, i, axis=1, mode="clip")

    return jax.vmap(take)(line, index)


def _quantize_complete(
    cache: CacheArrays,
    lines: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    num_complete: jax.Array,
    num_new: int,
) -> tuple[QTensor, QTensor]:
    """The new groups of keys and values; zeros if no slot completes a group.

    Args:
      cache: the cache without the new tokens.
      lines: (keys, values), each `[b, m, c + t, h]`.
      tokens: int32 `[b, num_new * g]`, indices in the lines of the groups' tokens.
      num_complete: int32 `[b]`, the number of groups that each slot completes.
      num_new: the number of groups to compute for each slot.
    """
    b, m, _, h = lines[0].shape
    shape = (b, m, num_new, cache.spec.group, h)

    def quantized() -> tuple[QTensor, QTensor]:
        k, v = (_take_tokens(line, tokens).reshape(shape) for line in lines)
        keys, values = quantize_groups(k, v, spec=cache.spec)
        # A cache from a file has keys along rows.
        return relayout(keys, cache.keys.meta.layout), values

    def zeros() -> tuple[QTensor, QTensor]:
        shapes = jax.eval_shape(quantized)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # When tokens come one by one, only one of g calls completes a group.
    return lax.cond(jnp.any(num_complete > 0), quantized, zeros)


def _group_places(
    first: jax.Array, num_complete: jax.Array, num_new: int, num_places: int
) -> jax.Array:
    """The place of each new group, int32 `[b, i]`.

    A group that is not stored has the place `num_places`. A group is not stored if it
    is not complete, or if a later new group takes the same place.
    """
    i = jnp.arange(num_new, dtype=jnp.int32)[None]  # [1, i]
    is_stored = (i < num_complete[:, None]) & (i >= num_complete[:, None] - num_places)
    return jnp.where(is_stored, (first[:, None] + i) % num_places, num_places)


def _store(leaf: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
    """Writes `new[:, :, i]` to `places[:, i]` of `leaf`, if that place exists."""

    def store(slot: jax.Array, at: jax.Array, groups: jax.Array) -> jax.Array:
        return slot.at[:, at].set(groups, mode="drop")

    return jax.vmap(store)(leaf, places, new)
