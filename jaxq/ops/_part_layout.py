"""How the parts of two operands on a mesh give the parts of their product.

Each device multiplies a part of the left operand by a part of the right operand.
`part_layout` decides which parts. It never moves floats of a decoded weight: where a
device needs codes of other devices, it gets codes and scales.

| axis | sharded over |
|---|---|
| batch axes | the mesh axes of either operand |
| free axes | the mesh axes of their operand |
| contracted axes | those of the weight, else of the other operand; sums follow |

A mesh axis serves one axis of the product. It serves the first of: batch axes, free
axes of the left operand, free axes of the right operand, contracted axes. An operand
that was sharded over it elsewhere is gathered. This is what fully sharded training
(FSDP) does: rows of x and weights are sharded over the same mesh axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from jaxq.meshes import names_in
from jaxq.ops._dimension_numbers import DimensionNumbers
from jaxq.qtensor import QTensor, find_cuts, leaf_specs, num_shards


class PartLayout(NamedTuple):
    """The mesh axes of each axis of the operands and of their product.

    Attributes:
      lhs: those of the left operand, in the order of its shape.
      rhs: those of the right operand.
      out: those of the product: batch axes, free axes of lhs, free axes of rhs.
      summed: the mesh axes over which each device has a term of the sum.
    """

    lhs: PartitionSpec
    rhs: PartitionSpec
    out: PartitionSpec
    summed: tuple[str, ...]

    def in_specs(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """The PartitionSpec of each leaf of the operands."""
        return _leaf_specs(lhs, self.lhs), _leaf_specs(rhs, self.rhs)


def part_layout(
    lhs: Any,
    rhs: Any,
    dims: DimensionNumbers,
    names: tuple[tuple, tuple],
    mesh: Any,
) -> PartLayout | None:
    """The layout of a product. None if a shard would cut a block of kept axes.

    Args:
      lhs: array or QTensor. Their leaves may be shapes.
      rhs: likewise.
      dims: dimension numbers without negative axes.
      names: the mesh axes of each axis of lhs, and of rhs.
      mesh: the mesh with the sizes of its axes.
    """
    (contracting, batch), operands = dims, (lhs, rhs)
    used: set[str] = set()
    layout: tuple[list, list] = ([None] * lhs.ndim, [None] * rhs.ndim)
    out: list = []

    def claim(entry: Any) -> Any:
        """The entry, or None if a mesh axis in it serves another axis already."""
        entry_names = set(names_in(entry))
        if not entry_names or entry_names & used:
            return None
        used.update(entry_names)
        return entry

    def fits(axes: tuple[int, int], entry: Any) -> bool:
        return all(
            fits_parts(operand, axis, entry, mesh)
            for operand, axis in zip(operands, axes, strict=True)
        )

    for axes in zip(*batch, strict=True):
        entries = [names[side][axis] for side, axis in enumerate(axes)]
        entry = claim(next((e for e in entries if e is not None), None))
        layout[0][axes[0]] = layout[1][axes[1]] = entry
        out.append(entry)
    for side, operand in enumerate(operands):
        bound = (*contracting[side], *batch[side])
        for axis in range(operand.ndim):
            if axis in bound:
                continue
            entry = claim(names[side][axis])
            if not fits_parts(operand, axis, entry, mesh):
                return None
            layout[side][axis] = entry
            out.append(entry)
    summed: list[str] = []
    weight = 0 if isinstance(lhs, QTensor) else 1
    for axes in zip(*contracting, strict=True):
        for side in (weight, 1 - weight):
            entry = names[side][axes[side]]
            if entry is None or not fits(axes, entry):
                continue
            entry = claim(entry)
            if entry is not None:
                layout[0][axes[0]] = layout[1][axes[1]] = entry
                summed.extend(names_in(entry))
                break
    lhs_spec, rhs_spec, out_spec = (
        PartitionSpec(*entries) for entries in (*layout, out)
    )
    return PartLayout(lhs_spec, rhs_spec, out_spec, tuple(summed))


def gathers_codes(operand: Any, names: tuple, spec: PartitionSpec) -> bool:
    """True if a device needs codes that other devices have."""
    return isinstance(operand, QTensor) and bool(gathered_names((names,), (spec,)))


def gathered_names(names: Sequence[tuple], specs: Sequence[Any]) -> tuple[str, ...]:
    """The mesh axes over which a device gets what other devices have.

    Args:
      names: the mesh axes of each axis of the operands.
      specs: those of the parts that a device multiplies.
    """
    gathered = []
    for before, after in zip(names, specs, strict=True):
        for entry, new in zip(before, after, strict=True):
            missing = set(names_in(entry)) - set(names_in(new))
            gathered += [name for name in names_in(entry) if name in missing]
    return tuple(dict.fromkeys(gathered))


def fits_parts(operand: Any, axis: int, entry: Any, mesh: Any) -> bool:
    """True if shards of an axis are operands themselves: arrays or QTensors."""
    if entry is None:
        return True
    if operand.shape[axis] % num_shards(mesh, entry):
        return False
    if not isinstance(operand, QTensor):
        return True
    spec = [None] * operand.ndim
    spec[axis] = entry
    return not find_cuts(operand, spec, mesh)


def _leaf_specs(operand: Any, spec: PartitionSpec) -> Any:
    return leaf_specs(operand, spec) if isinstance(operand, QTensor) else spec
