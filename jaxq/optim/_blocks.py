"""The blocks of an optimizer state: which elements of an array share a scale.

A block is a part of a row, which is the last axis. The elements of a row lie next to
each other in memory. A block never crosses the border of a shard, so a sharded update
needs no communication.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.core import Tracer

from jaxq import formats
from jaxq.qtensor import (
    ErrorContext,
    Geometry,
    PerBlock,
    PerGroup,
    QuantSpec,
    describe,
    resolve,
)


def blocked(
    x: jax.Array, spec: QuantSpec, *, caller: str, name: str
) -> tuple[QuantSpec, Geometry]:
    """The spec and the geometry with which a moment is quantized.

    Args:
      x: the moment, with at least one axis.
      spec: a spec with `PerGroup`.
      caller: the public function, for error messages.
      name: the path of the moment, for error messages.

    Returns:
      The spec, whose granularity is the tile of this array, and the geometry. Codes
      are not packed if the codes of a shard do not fill whole bytes.
    """
    assert isinstance(spec.granularity, PerGroup)
    codes_per_byte = formats.codes_per_pack(spec.fmt.bits, spec.order)
    shape, shard, size = x.shape, shard_shape(x), spec.granularity.size
    is_sharded = shard[-1] != shape[-1]  # otherwise rows are padded
    if is_sharded and shard[-1] % codes_per_byte:
        # A shard with an odd last axis cannot hold 4-bit codes in pairs.
        spec = spec.replace(packing="none")
        codes_per_byte = 1
    tile = tile_of(shape, shard, size, multiple=codes_per_byte)
    spec = spec.replace(granularity=PerBlock(tile, pad=True))
    context = ErrorContext(caller, name, describe(x.dtype.name, shape))
    geometry = resolve(
        shape, spec.granularity, (-1,), (), context=context, multiple=codes_per_byte
    )
    return spec, geometry


def tile_of(
    shape: tuple[int, ...], shard: tuple[int, ...], size: int, *, multiple: int
) -> tuple[int, ...]:
    """The tile of an array: the sizes of a block along its last axes.

    The last axis is split into equal parts of at most `size` elements. If the whole
    axis is shorter, the block has several rows, and then several matrices, until it has
    about `size` elements. With one row in a block, the scales of an array `[768, 10]`
    would take almost as much memory as its codes.

    Args:
      shape: the shape of the array.
      shard: the shape of its shards.
      size: the largest number of elements of a block.
      multiple: the number of codes that fill whole bytes. A part of the last axis is a
        multiple of this number.

    Returns:
      At most as many sizes as the array has axes. Padding completes the last tile of an
      axis that is not sharded.
    """
    tile: list[int] = []
    for axis in reversed(range(len(shape))):
        is_sharded = shard[axis] != shape[axis]
        unit = 1 if tile else multiple  # codes are packed along the last axis
        part = _part(shard[axis], size // math.prod(tile), is_sharded, unit)
        tile.insert(0, part)
        if part != shard[axis] or math.prod(tile) > size // 2:
            break
    return tuple(tile)


def _part(length: int, size: int, is_sharded: bool, unit: int) -> int:
    """The size of equal parts of an axis, at most `size` if possible.

    Args:
      length: the size of the axis, or of its part on one device.
      size: the largest size of a part.
      is_sharded: whether other devices hold other parts of the axis. Then parts must
        divide `length`, because padding would move the borders of shards.
      unit: parts that are not the whole axis are multiples of this number. It divides
        `length` if the axis is sharded.
    """
    if length <= size:
        return max(1, length)  # an axis may be empty
    if not is_sharded:
        num_parts = -(-length // size)
        part = -(-length // num_parts)
        return -(-part // unit) * unit
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    whole = [d for d in divisors if d % unit == 0]
    # A length without good divisors, such as a prime, gets a larger block.
    good = [d for d in whole if size // 4 < d <= size]
    if good:
        return good[-1]
    larger = [d for d in whole if d >= size]
    return min(larger, default=whole[-1])


def shard_shape(x: Any) -> tuple[int, ...]:
    """The shape of the part of an array on one device.

    Under jit, only the sharding of Explicit axes is known. Other axes count as not
    sharded.
    """
    is_traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if is_traced else getattr(x, "sharding", None)
    if sharding is None:
        return x.shape
    return sharding.shard_shape(x.shape)
