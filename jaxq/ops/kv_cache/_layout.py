"""How a quantized KV cache and its queries lie on the devices of a mesh.

Each device reads its own slots and its own heads. So attention has no collective, and
codes of the cache never move. Queries move if they lie elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxq.meshes import names_in
from jaxq.ops.kv_cache._arrays import CacheArrays
from jaxq.qtensor import num_shards


class CacheLayout(NamedTuple):
    """The mesh axes of the arrays of `KVCache.attend`.

    Attributes:
      cache: the cache with a PartitionSpec in place of each leaf.
      tokens: those of queries, keys and values `[b, t, heads, h]`.
      slots: those of numbers `[b]`.
    """

    cache: CacheArrays
    tokens: PartitionSpec
    slots: PartitionSpec


def cache_layout(
    cache: CacheArrays, q: Any, spec_of: Callable[[Any], tuple], mesh: Any
) -> CacheLayout | None:
    """The layout of attention, or None if devices do not have whole slots and heads.

    Args:
      cache: the cache. The leaves may be shapes.
      q: queries `[b, t, n, h]` or their shape.
      spec_of: returns the mesh axes of each axis of an array.
      mesh: the mesh with the sizes of its axes.
    """
    slots, heads, *rest = spec_of(cache.recent_keys)
    q_slots, _, q_heads, _ = spec_of(q)
    slots = q_slots if slots is None else slots
    heads = q_heads if heads is None else heads
    b, m = cache.recent_keys.shape[:2]
    if b % num_shards(mesh, slots) or m % num_shards(mesh, heads):
        return None
    if set(names_in(slots)) & set(names_in(heads)) or any(rest):
        return None

    def spec(leaf: Any) -> PartitionSpec:
        return PartitionSpec(slots, heads, *[None] * (leaf.ndim - 2))

    for leaf in jax.tree.leaves((cache.keys, cache.values)):
        if any(spec_of(leaf)[2:]):
            return None  # groups or channels are sharded
    specs = jax.tree.map(spec, dataclasses.replace(cache, lengths=cache.recent_keys))
    cache_specs = dataclasses.replace(specs, lengths=PartitionSpec(slots))
    tokens = PartitionSpec(slots, None, heads, None)
    return CacheLayout(cache_specs, tokens, PartitionSpec(slots))
