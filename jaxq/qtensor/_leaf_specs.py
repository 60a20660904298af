"""The mesh axes of each leaf of a QTensor, from those of the array it represents.

Codes and scales are stored as `[*batch, *kept, K]`, with all contracted axes flattened
into K. Each stored axis is sharded over the mesh axes of the axis that it comes from:

| leaf | mesh axes |
|---|---|
| `data` | batch, kept axes, K (K before the kept axes for the layout "columns") |
| `scale`, `zero_point`, `offset` | as the codes; none where one block covers an axis |
| `offset` with `offset="mean"` | batch |
| `codebook` | as the scale, then none for the entries |
| `input_range` | batch, then none for the two ends |
| `input_scale` | batch, then K |

A quantized scale is itself a QTensor of shape `[*batch, *num_blocks]`. The same rule
shards its leaves.

Where several axes are flattened into one, only the shards of the first axis are
contiguous. So only the first axis can be sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxq.meshes import names_in
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._storage_axes import storage_axes


def leaf_specs(qt: QTensor, spec: Iterable[Any]) -> QTensor:
    """The QTensor with the PartitionSpec of each leaf in place of the leaf.

    The sizes of the leaves are not compared with the mesh. `find_cuts` does that.

    Args:
      qt: a QTensor of arrays or shapes.
      spec: the mesh axes of each axis of the array, as in a PartitionSpec.
    """
    batch, storage, blocks = _stored_entries(qt, spec)
    *kept, contracted = storage
    is_columns = qt.meta.layout == "columns"
    codes = (contracted, *kept) if is_columns else storage
    scales = PartitionSpec(*batch, *blocks)
    scale: Any = scales
    if isinstance(qt.scale, QTensor):
        scale = leaf_specs(qt.scale, (*batch, *blocks))
    last = storage_axes(qt.meta)[-1]
    # Flat blocks may be sharded along a kept axis, which the input does not have.
    is_contracted = last.axes[last.first] in qt.meta.geometry.contracted
    inputs = contracted if is_contracted else None
    offset = PartitionSpec(*batch) if qt.spec.offset == "mean" else scales
    rule = {
        "data": PartitionSpec(*batch, *codes),
        "scale": scale,
        "zero_point": scales,
        "offset": offset,
        "codebook": PartitionSpec(*scales, None),
        "input_range": PartitionSpec(*batch),
        "input_scale": PartitionSpec(*batch, inputs),
    }
    present = {name: at for name, at in rule.items() if getattr(qt, name) is not None}
    return dataclasses.replace(qt, **present)


def divisible(qt: QTensor, specs: QTensor, mesh: Any) -> QTensor:
    """The specs without mesh axes whose size does not divide the axis of the leaf.

    Args:
      qt: a QTensor of arrays or shapes.
      specs: the result of `leaf_specs`.
      mesh: the mesh with the sizes of the mesh axes.
    """

    def divisible_spec(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        return fitting_spec(mesh, spec, leaf.shape)

    return jax.tree.map(divisible_spec, qt, specs)


def fitting_spec(mesh: Any, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec without mesh axes whose size does not divide the axis of the array.

    Args:
      mesh: the mesh with the sizes of its axes.
      spec: the mesh axes of each axis of an array. It may be shorter than `shape`.
      shape: the shape of the array.
    """
    entries = [
        entry if size % num_shards(mesh, entry) == 0 else None
        for entry, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*entries)


class Cut(NamedTuple):
    """A place where a shard would end inside a group or a byte of codes.

    Attributes:
      axis: the sharded axis of the array, a negative number for axes that are not batch
        axes.
      shards: the number of shards along it.
      problem: what would be cut, as a sentence.
      working: the numbers of shards along the axis that cut nothing.
      level: 0 for the codes of the array, 1 for the codes of its quantized scales, and
        so on.
      can_fit: whether smaller groups, another packing or float scales remove the cut.
    """

    axis: int
    shards: int
    problem: str
    working: tuple[int, ...]
    level: int
    can_fit: bool


def find_cuts(qt: QTensor, spec: Iterable[Any], mesh: Any) -> list[Cut]:
    """The places where the shards of a spec would cut groups, bytes or scales.

    If the list is empty, each shard of the leaves is itself a QTensor: the quantized
    shard of the array.

    Args:
      qt: a QTensor of arrays or shapes.
      spec: the mesh axes of each axis of the array.
      mesh: the mesh with the sizes of the mesh axes.
    """
    return list(_cuts(qt, spec, mesh, 0))


def num_shards(mesh: Any, entry: Any) -> int:
    """The number of shards along an axis that is sharded over the mesh axes `entry`."""
    return math.prod(mesh.shape[name] for name in names_in(entry))


def sharded_storage(qt: QTensor, spec: Iterable[Any]) -> tuple[Any, ...]:
    """The mesh axes of each storage axis of the codes, without batch axes."""
    return _stored_entries(qt, spec)[1]


def _cuts(qt: QTensor, spec: Iterable[Any], mesh: Any, level: int) -> Iterator[Cut]:
    by_axis = _by_axis(qt, spec)
    for axis, size in enumerate(qt.batch_shape):
        shards = num_shards(mesh, by_axis[axis - qt.ndim])
        if size % shards:
            problem = f"{shards} shards do not divide the {size} entries of the axis"
            working = tuple(n for n in range(1, size + 1) if size % n == 0)
            yield Cut(axis, shards, problem, working, level, False)
    for storage_axis in storage_axes(qt.meta):
        first = storage_axis.first
        for position, axis in enumerate(storage_axis.axes):
            shards = num_shards(mesh, by_axis[axis])
            if shards == 1:
                continue
            if position != first:
                names = ", ".join(map(str, storage_axis.axes))
                problem = (
                    f"the axes {names} are stored as one, and only its first axis, "
                    f"{storage_axis.axes[first]}, has shards of neighbouring codes"
                )
                yield Cut(axis, shards, problem, (1,), level, level > 0)
                continue
            problem = storage_axis.why_cut(shards)
            if problem:
                working = storage_axis.working_shards()
                can_fit = level > 0 or storage_axis.can_fit(shards)
                yield Cut(axis, shards, problem, working, level, can_fit)
    if isinstance(qt.scale, QTensor):
        # The axes of the scale are the storage axes of the codes.
        batch, _, blocks = _stored_entries(qt, spec)
        yield from _cuts(qt.scale, (*batch, *blocks), mesh, level + 1)


def _by_axis(qt: QTensor, spec: Iterable[Any]) -> dict[int, Any]:
    """The mesh axes of each axis of the array, by its negative number."""
    entries = tuple(spec)
    entries = (*entries, *[None] * (qt.ndim - len(entries)))
    return {axis - qt.ndim: entry for axis, entry in enumerate(entries)}


def _stored_entries(
    qt: QTensor, spec: Iterable[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The mesh axes of the batch axes, of the storage axes, and of the axes of scales.

    One block that covers an axis has one scale along it, which all shards need.
    """
    by_axis, axes = _by_axis(qt, spec), storage_axes(qt.meta)
    batch = tuple(by_axis[axis - qt.ndim] for axis in range(len(qt.batch_shape)))
    storage = tuple(by_axis[axis.axes[axis.first]] for axis in axes)
    blocks = tuple(
        None if axis.block is None else entry
        for axis, entry in zip(axes, storage, strict=True)
    )
    return batch, storage, blocks
