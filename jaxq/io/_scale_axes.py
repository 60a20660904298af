"""Scales with one axis for each axis of the array, as most other libraries keep them.

A QTensor keeps the scales of a kernel `[in, out]` in groups of g as `[out, in/g]`. Here
they are `[in/g, out]`: axis i has one scale for each tile of axis i of the array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.qtensor import (
    Geometry,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)


def tile_sizes(geometry: Geometry) -> tuple[int, ...]:
    """The size of a tile along each axis of the array, without batch axes.

    Raises:
      ValueError: no tile has these blocks. The error says why, without a full stop.
    """
    if geometry.flat:
        raise ValueError("its blocks cross rows")
    if 0 in geometry.shape:
        raise ValueError("it has no elements")
    tiles = [0] * len(geometry.shape)
    *kept_blocks, group = geometry.block_shape
    for axis, block in zip(geometry.kept, kept_blocks, strict=True):
        size = geometry.shape[axis]
        tiles[axis] = block or size
        _check_divides(tiles[axis], size)
    group = group or geometry.contracted_size
    _check_divides(group, geometry.contracted_size)
    # A group must fill the last contracted axes: of [4, 8], it may have 2, 8 or 16.
    rest = group
    for axis in reversed(geometry.contracted):
        size = geometry.shape[axis]
        tiles[axis] = min(rest, size)
        if rest % tiles[axis] or size % tiles[axis]:
            sizes = [geometry.shape[a] for a in geometry.contracted]
            raise ValueError(f"its groups of {group} are no tiles of the axes {sizes}")
        rest //= tiles[axis]
    return tuple(tiles)


def _check_divides(block: int, size: int) -> None:
    if size % block:
        raise ValueError(f"the last of its blocks of {block} is not full")


def granularity_of(
    tiles: Sequence[int], sizes: Sequence[int], contracted: Sequence[int]
) -> Granularity:
    """The granularity of an array with these tiles.

    Args:
      tiles: the size of a tile along each axis, without batch axes.
      sizes: the sizes of these axes.
      contracted: the contracted axes, as negative numbers in ascending order.

    Raises:
      ValueError: a QTensor has no such blocks. The error says why, without a full stop.
    """
    ndim = len(sizes)
    kept = [axis for axis in range(-ndim, 0) if axis not in contracted]
    if all(tiles[axis] == 1 for axis in kept):
        if all(tiles[axis] == sizes[axis] for axis in contracted):
            return PerChannel()
        return PerGroup(_group_size(tiles, sizes, contracted))
    if tuple(tiles) == tuple(sizes):
        return PerTensor()
    if len(contracted) > 1:
        raise ValueError(
            f"it has tiles of {list(tiles)} and {len(contracted)} contracted axes"
        )
    return PerBlock(tuple(tiles))


def _group_size(
    tiles: Sequence[int], sizes: Sequence[int], contracted: Sequence[int]
) -> int:
    """The group size along the flattened contracted axes."""
    is_whole = True  # of all later axes
    for axis in reversed(contracted):
        if not is_whole and tiles[axis] > 1:
            raise ValueError(
                f"its tiles of {list(tiles)} are not neighbours along the flattened "
                "contracted axes"
            )
        is_whole = is_whole and tiles[axis] == sizes[axis]
    return math.prod(tiles[axis] for axis in contracted)


def from_storage(
    leaf: jax.Array, geometry: Geometry, tiles: Sequence[int]
) -> jax.Array:
    """`[*batch, *num_blocks]` with one axis for each axis of the array.

    Args:
      leaf: scales or zero points of a QTensor.
      geometry: of the QTensor.
      tiles: its `tile_sizes`.
    """
    num_batch = leaf.ndim - len(geometry.block_shape)
    counts = [geometry.shape[axis] // tiles[axis] for axis in geometry.order]
    split = leaf.reshape(*leaf.shape[:num_batch], *counts)
    ndim = len(geometry.shape)
    positions = [geometry.order.index(axis) for axis in range(-ndim, 0)]
    batch = range(num_batch)
    return jnp.transpose(split, (*batch, *(num_batch + p for p in positions)))


def to_storage(leaf: jax.Array, geometry: Geometry) -> jax.Array:
    """The inverse of `from_storage`."""
    num_batch = leaf.ndim - len(geometry.shape)
    order = [leaf.ndim + axis for axis in geometry.order]
    moved = jnp.transpose(leaf, (*range(num_batch), *order))
    return moved.reshape(*leaf.shape[:num_batch], *geometry.num_blocks)
