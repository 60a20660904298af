"""Splitting and merging axes of a QTensor where no block is cut: no code moves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # QTensor.reshape comes here
    from jaxq.qtensor._qtensor import QTensor

# Axes of one shape beside those of another that hold the same numbers.
_Groups = list[tuple[tuple[int, ...], tuple[int, ...]]]


def reshape(qt: QTensor, new: tuple[int, ...]) -> QTensor:
    """`qt.reshape(new)`; a ValueError where a contracted or batch axis or a block would be cut."""
    geometry, batch = qt.meta.geometry, qt.batch_shape
    problem = f"QTensor.reshape: {qt!r} cannot become {list(new)}: "
    if new.count(-1) == 1:
        rest = -math.prod(new)
        new = tuple(qt.size // rest if s == -1 and rest else s for s in new)
    if (
        min(new, default=0) < 0
        or math.prod(new) != qt.size
        or new[: len(batch)] != batch
    ):
        raise ValueError(
            problem + "the number of elements and the batch axes must stay."
        )
    old, inner = geometry.shape, new[len(batch) :]
    if 0 in old and inner != old:
        raise ValueError(problem + "an array without elements keeps its shape.")
    groups = _match_axes(old, inner)
    for group_old, group_new in groups:
        if set(group_old) & set(geometry.contracted) and (
            len(group_old),
            len(group_new),
        ) != (1, 1):
            raise ValueError(
                problem
                + f"contracted axes {list(geometry.contracted)} must keep their sizes."
            )
        position = [geometry.order.index(a) for a in group_old]
        if any(b - a != 1 for a, b in itertools.pairwise(position)):
            raise ValueError(
                problem
                + "the axes to merge are not neighbours in storage. Use jaxq.dequantize(qt)."
            )
    changed = _regroup(qt, groups, inner)
    if changed is None:
        raise ValueError(
            problem
            + "blocks, its own or its scales', run across these axes. Use jaxq.dequantize(qt)."
        )
    return changed


def _match_axes(old: tuple[int, ...], new: tuple[int, ...]) -> _Groups:
    """(old axes, new axes) that hold the same numbers, as negative numbers; axes of size 1 may come and go."""
    groups: _Groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        if i < len(old) and j < len(new) and (old[i] == 1) == (new[j] == 1):
            i, j = i + 1, j + 1
            while (left := math.prod(old[start[0] : i])) != (
                right := math.prod(new[start[1] : j])
            ):
                i, j = (i + 1, j) if left < right else (i, j + 1)
        elif i < len(old) and old[i] == 1:
            i += 1
        else:
            j += 1
        axes = (
            range(start[0] - len(old), i - len(old)),
            range(start[1] - len(new), j - len(new)),
        )
        groups.append((tuple(axes[0]), tuple(axes[1])))
    return groups


def _regroup(qt: QTensor, groups: _Groups, sizes: tuple[int, ...]) -> QTensor | None:
    """`qt` with its kept axes split and merged by `groups`; None where a block would be cut."""
    geometry, batch = qt.meta.geometry, qt.batch_shape
    heirs = {
        min(group_old, key=geometry.order.index): group_new
        for group_old, group_new in groups
        if group_old
    }
    kept = [axis for a in geometry.kept for axis in heirs.get(a, ())]
    for group_old, group_new in groups:
        if not group_old:  # new axes of size 1 may stand anywhere
            for axis in group_new:
                kept.insert(sum(a < axis for a in kept), axis)
    contracted = tuple(axis for a in geometry.contracted for axis in heirs[a])
    changed = dataclasses.replace(geometry, shape=sizes, order=(*kept, *contracted))
    if geometry.flat:  # blocks run along the order of storage, which is what it was
        return qt._with(geometry=changed)

    block_of = dict.fromkeys(kept, 1)
    for group_old, group_new in groups:
        blocks = {
            geometry.block_shape[geometry.order.index(a)]
            for a in group_old
            if geometry.shape[a] != 1
        }
        if (len(group_old), len(group_new)) != (1, 1) and (
            len(blocks) > 1 or not blocks <= {1, None}
        ):
            return None
        block_of |= dict.fromkeys(group_new, blocks.pop() if blocks else 1)
    changed = dataclasses.replace(
        changed, block_shape=(*(block_of[a] for a in kept), geometry.block_shape[-1])
    )

    num_blocks = changed.num_blocks
    if isinstance(qt.scale, type(qt)):  # its axes are the storage axes
        inner: _Groups = [((-1,), (-1,))]
        for group_old, group_new in groups:
            if not set(group_old) & set(geometry.contracted):
                where = (
                    geometry.order.index(a) - len(geometry.num_blocks)
                    for a in group_old
                )
                inner.append(
                    (
                        tuple(where),
                        tuple(kept.index(a) - len(num_blocks) for a in group_new),
                    )
                )
        scale = _regroup(qt.scale, inner, num_blocks)
        if scale is None:
            return None
    else:
        scale = qt.scale.reshape(*batch, *num_blocks)
    zero_point = (
        None if qt.zero_point is None else qt.zero_point.reshape(*batch, *num_blocks)
    )
    offset = qt.offset
    if offset is not None:  # a mean is one number
        offset = offset.reshape(
            *batch, *(num_blocks if qt.spec.offset == "min" else (1,) * len(num_blocks))
        )
    codebook = (
        None
        if qt.codebook is None
        else qt.codebook.reshape(*batch, *num_blocks, qt.codebook.shape[-1])
    )
    meta = dataclasses.replace(qt.meta, geometry=changed)
    data = qt.data.reshape(*batch, *meta.stored_shape)
    leaves = {
        "scale": scale,
        "zero_point": zero_point,
        "offset": offset,
        "codebook": codebook,
    }
    return dataclasses.replace(qt, data=data, meta=meta, **leaves)
