"""The storage axes of codes, and where shards would cut them.

Where several axes are flattened into one, only the shards of the first axis are
contiguous. So only the first axis can be sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxq import formats
from jaxq.meshes import explicit_spec
from jaxq.qtensor._meta import Meta


class StorageAxis(NamedTuple):
    """A storage axis of codes.

    Attributes:
      axes: the axes of the array that are flattened into it, as negative numbers.
      sizes: their sizes.
      block: the block size. None if one block covers the axis.
      per_pack: the number of codes that fill whole bytes; 1 for kept axes.
      is_one_unit: the codes of a row are arranged together in the packing HALVES.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    block: int | None
    per_pack: int
    is_one_unit: bool

    @property
    def first(self) -> int:
        """The position in `axes` of the first axis, not counting axes of size 1.

        Only the shards of this axis are contiguous in storage.
        """
        larger = [i for i, size in enumerate(self.sizes) if size != 1]
        return larger[0] if larger else 0

    def why_cut(self, shards: int) -> str:
        """Why this number of shards would cut the axis; empty if it does not."""
        size = self.sizes[self.first]
        if size % shards:
            return f"{shards} shards do not divide the {size} entries of the axis"
        part = math.prod(self.sizes) // shards
        if shards == 1:
            return ""
        if self.block is not None and part % self.block:
            fitting = math.gcd(part, self.block)
            return (
                f"{part} codes of a shard are not whole groups of {self.block} codes "
                f"(groups of {fitting} fit)"
            )
        if self.is_one_unit:
            return (
                f"the packing 'halves' puts the {math.prod(self.sizes)} codes of a row "
                "into bytes together"
            )
        if part % self.per_pack:
            return f"{part} codes of a shard are not whole bytes"
        return ""

    def can_fit(self, shards: int) -> bool:
        """Whether this number of shards cuts no axis and no byte, only groups."""
        part, remainder = divmod(math.prod(self.sizes), shards)
        divides = self.sizes[self.first] % shards == 0
        return divides and remainder == 0 and part % self.per_pack == 0

    def working_shards(self) -> tuple[int, ...]:
        """The numbers of shards that cut nothing."""
        size = self.sizes[self.first]
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        return tuple(n for n in divisors if not self.why_cut(n))


def storage_axes(meta: Meta) -> list[StorageAxis]:
    """The storage axes of an array, `[*kept, K]`, or `[F]` for flat blocks."""
    geometry = meta.geometry
    groups = geometry.storage_groups
    is_halves = meta.packing is formats.Packing.HALVES
    per_pack = formats.codes_per_pack(meta.spec.fmt.bits, meta.packing)
    if geometry.block_shape[-1] is not None:
        # Whole blocks are padded to this number of codes.
        per_pack = math.lcm(per_pack, geometry.multiple)
    axes = []
    for i, group in enumerate(groups):
        is_last = i == len(groups) - 1
        axes.append(
            StorageAxis(
                axes=group,
                sizes=tuple(geometry.shape[axis] for axis in group),
                block=geometry.block_shape[i],
                per_pack=per_pack if is_last else 1,
                is_one_unit=is_last and is_halves and meta.pack_unit is None,
            )
        )
    return axes


def axes_of_codes(
    meta: Meta, num_batch: int, data_spec: Iterable[Any]
) -> tuple[Any, ...]:
    """The mesh axes of each axis of an array, from those of its codes.

    Several contracted axes are flattened in storage. Their shards are then along the
    first of them.

    Args:
      meta: the static facts of the QTensor.
      num_batch: the number of its batch axes.
      data_spec: the mesh axes of each axis of its `data`. Missing ones are None.
    """
    entries = tuple(data_spec)
    missing = num_batch + len(meta.stored_shape) - len(entries)
    entries = (*entries, *[None] * missing)
    ndim = num_batch + len(meta.geometry.shape)
    axes: list[Any] = [None] * ndim
    axes[:num_batch] = entries[:num_batch]
    by_storage_axis = list(entries[num_batch:])
    if meta.layout == "columns":
        by_storage_axis = [*by_storage_axis[1:], by_storage_axis[0]]
    for axis, entry in zip(storage_axes(meta), by_storage_axis, strict=True):
        axes[ndim + axis.axes[axis.first]] = entry
    return tuple(axes)


def explicit_axes(meta: Meta, num_batch: int, data: Any) -> tuple[Any, ...]:
    """The explicit mesh axes of each axis of an array, from the type of its codes."""
    data_spec = explicit_spec(data)
    if meta.geometry.flat:
        # Shards of flat blocks may end inside a row.
        data_spec = data_spec[:num_batch]
    return axes_of_codes(meta, num_batch, data_spec)
