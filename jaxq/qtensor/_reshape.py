"""Splitting and merging axes of a geometry so that no block is cut.

Storage order does not change, so no code moves. `QTensor.reshape` applies the result to
the arrays of a QTensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from jaxq.qtensor._geometry import Geometry


class AxisGroup(NamedTuple):
    """Neighbouring axes before and after a reshape that hold the same numbers.

    Axes are negative numbers. If an axis of size 1 is added, `old` is empty. If an axis
    of size 1 is removed, `new` is empty.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def is_single(self) -> bool:
        """True for one axis that stays one axis."""
        return len(self.old) == len(self.new) == 1


def match_axes(old: tuple[int, ...], new: tuple[int, ...]) -> list[AxisGroup]:
    """The smallest groups of axes that hold the same numbers.

    Args:
      old: sizes before the reshape.
      new: sizes after it, with the same product.
    """
    groups: list[AxisGroup] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        both_left = i < len(old) and j < len(new)
        if both_left and (old[i] == 1) == (new[j] == 1):
            # The group grows on the side of the smaller product.
            i, j = i + 1, j + 1
            left, right = old[first_old], new[first_new]
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
        elif i < len(old) and old[i] == 1:
            i += 1  # an axis of size 1 is removed
        else:
            j += 1  # an axis of size 1 is added
        old_axes = range(first_old - len(old), i - len(old))
        new_axes = range(first_new - len(new), j - len(new))
        groups.append(AxisGroup(tuple(old_axes), tuple(new_axes)))
    return groups


def why_not_regroup(geometry: Geometry, groups: list[AxisGroup]) -> str | None:
    """The reason why axes cannot be split and merged like this; None if they can.

    `regroup` checks the blocks, not this function.
    """
    for group in groups:
        if set(group.old) & set(geometry.contracted) and not group.is_single:
            return f"contracted axes {list(geometry.contracted)} must keep their sizes."
        positions = [geometry.order.index(axis) for axis in group.old]
        if any(b - a != 1 for a, b in itertools.pairwise(positions)):
            return (
                "the axes to merge are not neighbours in storage. Reshape "
                "jaxq.dequantize(qt)."
            )
    return None


def regroup(
    geometry: Geometry, groups: list[AxisGroup], sizes: tuple[int, ...]
) -> Geometry | None:
    """The geometry after its kept axes are split and merged.

    Args:
      geometry: the geometry before.
      groups: the axes before and after the reshape, as `match_axes` returns them.
      sizes: logical sizes after the reshape.

    Returns:
      The new geometry, or None if a block would be cut.
    """
    # The new axes take the place of the group's first old axis in storage order.
    new_axes = {}
    for group in groups:
        if group.old:
            new_axes[min(group.old, key=geometry.order.index)] = group.new
    kept: list[int] = []
    for old in geometry.kept:
        kept.extend(new_axes.get(old, ()))
    for group in groups:
        if not group.old:
            # New axes of size 1 can be anywhere: they go before the next larger axis.
            for axis in group.new:
                kept.insert(sum(a < axis for a in kept), axis)
    contracted: list[int] = []
    for old in geometry.contracted:
        contracted.extend(new_axes[old])
    changed = dataclasses.replace(geometry, shape=sizes, order=(*kept, *contracted))
    if geometry.flat:
        return changed  # blocks follow storage order, which is the same as before

    block_sizes = _kept_blocks(geometry, groups)
    if block_sizes is None:
        return None
    block_shape = [block_sizes[axis] for axis in kept]
    return dataclasses.replace(
        changed, block_shape=(*block_shape, geometry.block_shape[-1])
    )


def _kept_blocks(
    geometry: Geometry, groups: list[AxisGroup]
) -> dict[int, int | None] | None:
    """The block size of each new kept axis; None if a block would be cut."""
    block_sizes: dict[int, int | None] = {}
    for group in groups:
        if set(group.old) & set(geometry.contracted):
            continue
        blocks = {
            geometry.block_shape[geometry.order.index(axis)]
            for axis in group.old
            if geometry.shape[axis] != 1
        }
        # Axes with one scale for each index, or one scale for all, can be split and
        # merged. Larger blocks, and both kinds together, cannot.
        is_uniform = len(blocks) <= 1 and blocks <= {1, None}
        if not group.is_single and not is_uniform:
            return None
        block = blocks.pop() if blocks else 1
        block_sizes |= dict.fromkeys(group.new, block)
    return block_sizes


def groups_of_scale(
    old: Geometry, new: Geometry, groups: list[AxisGroup]
) -> list[AxisGroup]:
    """The groups of the axes of the scale.

    The axes of the scale are the storage axes `[*kept, K]` of the codes.
    """
    scale_groups = [AxisGroup((-1,), (-1,))]
    for group in groups:
        if not set(group.old) & set(old.contracted):
            before = [old.order.index(a) - len(old.num_blocks) for a in group.old]
            after = [new.order.index(a) - len(new.num_blocks) for a in group.new]
            scale_groups.append(AxisGroup(tuple(before), tuple(after)))
    return scale_groups
