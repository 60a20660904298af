"""Where the numbers of an array in a traced function come from.

`_product_visitor.py` follows each parameter from the arguments of a function to its
products. On the way, the parameter may be transposed, reshaped, broadcast, cast or
indexed. A `View` maps each axis of such an array to axes of the parameter.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A part of an axis of a parameter. A reshape may split an axis into parts.

    Attributes:
      axis: the axis of the parameter. None for positions that belong to no axis:
        repetitions of a broadcast parameter, or the rows of a product's output.
      size: the number of positions.
      stride: the distance between neighbouring positions of the part, in positions of
        the axis.
    """

    axis: int | None
    size: int
    stride: int = 1


# The parts of one axis of an array, outermost first. Empty for a new axis of size 1.
Axis = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """An array that holds the numbers of a parameter in another arrangement.

    A `View` also describes the output of a product with a parameter. The axes of the
    output are batch axes and kept axes of the parameter, and rows.

    Attributes:
      leaf: the position of the parameter among the leaves of the parameters.
      axes: for each axis of the array, the parts of the parameter's axes.
      index: parts of the parameter's axes where the array has only one position, and
        this position, an integer or an integer array `[]`.
      product: the key of the product whose output the array is. None for the parameter
        itself.
    """

    leaf: int
    axes: tuple[Axis, ...]
    index: tuple[tuple[Part, Any], ...] = ()
    product: Any = None

    @classmethod
    def of(cls, leaf: int, shape: Sequence[int]) -> View:
        """The parameter as it is stored."""
        return cls(leaf, tuple((Part(i, size),) for i, size in enumerate(shape)))

    def with_axes(self, axes: Sequence[Axis]) -> View:
        return dataclasses.replace(self, axes=tuple(axes))

    def transposed(self, permutation: Sequence[int]) -> View:
        return self.with_axes([self.axes[axis] for axis in permutation])

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The view after a reshape. None if the reshape cuts a part unevenly."""
        if 0 in shape:
            return None
        parts = list(itertools.chain.from_iterable(self.axes))
        axes = []
        for size in shape:
            axis = _first_parts(parts, size)
            if axis is None:
                return None
            axes.append(axis)
        return self.with_axes(axes)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        """The view after `lax.broadcast_in_dim`."""
        axes = []
        for position, size in enumerate(shape):
            axis: Axis = ()
            if position in dimensions:
                axis = self.axes[dimensions.index(position)]
            if num_positions(axis) != size:
                axis = (Part(None, size),)
            axes.append(axis)
        return self.with_axes(axes)

    def at(self, axis: int, position: Any) -> View:
        """The view of one position of an axis, without this axis."""
        index = list(self.index)
        parts = self.axes[axis]
        for part in reversed(parts):
            # With one part, the position stays the same object: see `is_bias`.
            own_position = position if len(parts) == 1 else position % part.size
            if part.axis is not None:
                index.append((part, own_position))
            if len(parts) > 1:
                position = position // part.size
        axes = (*self.axes[:axis], *self.axes[axis + 1 :])
        return dataclasses.replace(self, axes=axes, index=tuple(index))


class Changed(NamedTuple):
    """An array that was computed from parameters alone.

    Attributes:
      leaves: the positions of these parameters.
      by: the primitive that changed them first.
    """

    leaves: frozenset[int]
    by: str


class Other(enum.Enum):
    """An array that holds no parameter.

    `DATA` depends on the batch, or on the step of a loop. `CONSTANT` does not.
    """

    DATA = enum.auto()
    CONSTANT = enum.auto()


Origin = View | Changed | Other


def is_parameter(origin: Origin) -> bool:
    """True for a view of a parameter. False for the output of a product."""
    return isinstance(origin, View) and origin.product is None


def is_data(origin: Origin) -> bool:
    """True if an array depends on the batch."""
    return origin is Other.DATA or (
        isinstance(origin, View) and origin.product is not None
    )


def combined(origins: Sequence[Origin], by: str) -> Origin:
    """The origin of the result of a primitive, from the origins of its operands."""
    if any(map(is_data, origins)):
        return Other.DATA
    leaves: set[int] = set()
    first = ""
    for origin in origins:
        if isinstance(origin, View):
            leaves.add(origin.leaf)
        elif isinstance(origin, Changed):
            leaves |= origin.leaves
            first = first or origin.by
    return Changed(frozenset(leaves), first or by) if leaves else Other.CONSTANT


def num_positions(axis: Axis) -> int:
    """The size of an axis."""
    return math.prod(part.size for part in axis)


def whole_axes(parts: Sequence[Part], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of a parameter that `parts` cover completely, in ascending order.

    None if a part belongs to no axis, or if `parts` cover an axis incompletely.

    Args:
      parts: different parts.
      shape: the shape of the parameter.
    """
    sizes: dict[int, int] = {}
    for part in parts:
        if part.axis is None:
            return None
        sizes[part.axis] = sizes.get(part.axis, 1) * part.size
    if any(shape[axis] != size for axis, size in sizes.items()):
        return None
    return tuple(sorted(sizes))


def in_storage_order(part: Part) -> tuple[int, int]:
    """A key that sorts parts in the order in which the parameter stores them."""
    return (-1 if part.axis is None else part.axis), -part.stride


def is_bias(output: View, bias: View, shape: Sequence[int]) -> bool:
    """True if a parameter has one number for each output of a weight.

    The axes of the parameter must then be the batch axes and the kept axes of the
    weight, in this order. They may be flattened.

    Args:
      output: the output of a product with the weight.
      bias: the parameter that is added to it.
      shape: the shape of this parameter.
    """
    pairs: list[tuple[Axis, Axis]] = []
    for part, position in bias.index:
        same = [own for own, step in output.index if _is_same(step, position)]
        pairs.append(((part,), tuple(same)))
    for bias_axis, axis in zip(bias.axes, output.axes, strict=True):
        is_row = all(part.axis is None for part in axis)
        is_repeated = all(part.axis is None for part in bias_axis)
        if is_row != is_repeated:
            return False
        if not is_row:
            pairs.append((bias_axis, axis))
    pairs.sort(key=lambda pair: in_storage_order(pair[0][0]))
    bias_parts = list(itertools.chain.from_iterable(pair[0] for pair in pairs))
    parts = list(itertools.chain.from_iterable(pair[1] for pair in pairs))
    sizes_agree = all(num_positions(a) == num_positions(b) for a, b in pairs)
    is_ordered = all(
        group == sorted(group, key=in_storage_order) for group in (bias_parts, parts)
    )
    every_axis = tuple(range(len(shape)))
    return (
        sizes_agree
        and is_ordered
        and whole_axes(bias_parts, shape) == every_axis
        and len(pairs) - len(bias.index) == len(output.axes) - _num_row_axes(output)
        and len(bias.index) == len(output.index)
    )


def _is_same(position: Any, other: Any) -> bool:
    """True if two positions are surely equal. The step of a scan is one object."""
    if isinstance(position, int) and isinstance(other, int):
        return position == other
    return position is other


def _num_row_axes(output: View) -> int:
    return sum(all(part.axis is None for part in axis) for axis in output.axes)


def _first_parts(parts: list[Part], size: int) -> Axis | None:
    """Removes the first parts, with `size` positions together, from a list."""
    axis: list[Part] = []
    if size == 1 and parts and parts[0].size == 1:
        return (parts.pop(0),)
    while size > 1:
        part = parts.pop(0)
        if size % part.size == 0:
            axis.append(part)
            size //= part.size
        elif part.size % size == 0:
            inner = part.size // size
            axis.append(Part(part.axis, size, part.stride * inner))
            parts.insert(0, part._replace(size=inner))
            size = 1
        else:
            return None
    return tuple(axis)
