"""One product of a parameter with data: which axes it contracts, and its rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.nn.calibration._origins import Part, View, in_storage_order, whole_axes


class Product(NamedTuple):
    """One product of a parameter with data.

    Attributes:
      key: identifies the product in the function.
      leaf: the position of the parameter among the leaves of the parameters.
      contracting: the axes of the parameter that the product contracts, ascending.
      batch: the axes that stack several matrices, ascending. Each matrix has data of
        its own.
      index: the position that the product reads in an axis of `batch`, by axis. It
        reads all positions of an axis that is not here.
      windowed: the product is a convolution.
      x: the other operand.
      rows: `[*batch, *free, K]`, the rows of `x`, without the axes of `index`. K
        flattens the contracted axes in ascending order.
      output: the origin of the product's output. None for a convolution.
    """

    key: Any
    leaf: int
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    index: dict[int, Any]
    windowed: bool
    x: jax.Array
    rows: jax.Array
    output: View | None


class NotAProduct(Exception):
    """Raised if the rows of the data do not belong to whole axes of the parameter."""


def product_of(
    equation: Any, args: Sequence, side: int, view: View, shape: Sequence[int], key: Any
) -> Product:
    """The product that an equation computes with a parameter.

    Args:
      equation: `dot_general` or `conv_general_dilated`.
      args: its operands.
      side: which operand holds the parameter.
      view: the origin of this operand.
      shape: the shape of the parameter.
      key: identifies the product.

    Raises:
      NotAProduct: the product contracts or reads only a part of one of the parameter's
        axes, or the parameter is the input of a convolution.
    """
    return _PRODUCTS[equation.primitive.name](equation, args, side, view, shape, key)


def contracts(equation: Any) -> bool:
    """True if an equation contracts axes of its operands."""
    if equation.primitive.name != "dot_general":
        return True
    contract_dims, _ = equation.params["dimension_numbers"]
    return bool(contract_dims[0])


def _dot_product(
    equation: Any, args: Sequence, side: int, view: View, shape: Sequence[int], key: Any
) -> Product:
    contract_dims, batch_dims = equation.params["dimension_numbers"]
    x = jnp.asarray(args[1 - side])
    own_contracted, x_contracted = contract_dims[side], contract_dims[1 - side]
    own_batch, x_batch = batch_dims[side], batch_dims[1 - side]
    parts = {
        dim: view.axes[own]
        for own, dim in zip(
            (*own_contracted, *own_batch), (*x_contracted, *x_batch), strict=True
        )
    }
    contracted_parts = _parts_of(x_contracted, parts)
    # A part without an axis is a repetition, so it is no batch axis of the parameter.
    batch_parts = [part for part in _parts_of(x_batch, parts) if part.axis is not None]
    contracting = _whole_contracting(contracted_parts, shape)
    stack = whole_axes(batch_parts, shape)
    if stack is None:
        raise NotAProduct("a product reads only a part of one of its axes")
    index = _index(view, shape)
    batch = _stack_axes((*stack, *index), contracting, shape)
    # The axes of x, split as the axes of the parameter are split.
    labels: list[Part] = []
    for dim, size in enumerate(x.shape):
        labels += parts[dim] if dim in parts else (Part(None, size),)
    stacked_axes = [axis for axis in batch if axis not in index]
    rows = _rows_of(x, labels, stacked_axes, contracting, shape)
    own_free = [
        axis
        for dim, axis in enumerate(view.axes)
        if dim not in own_contracted and dim not in own_batch
    ]
    x_free = [
        (Part(None, size),) for dim, size in enumerate(x.shape) if dim not in parts
    ]
    first, second = (own_free, x_free) if side == 0 else (x_free, own_free)
    axes = [view.axes[dim] for dim in own_batch] + first + second
    output = View(view.leaf, tuple(axes), view.index, product=key)
    operand = args[1 - side]
    return Product(
        key, view.leaf, contracting, batch, index, False, operand, rows, output
    )


def _rows_of(
    x: jax.Array,
    labels: Sequence[Part],
    batch: Sequence[int],
    contracting: Sequence[int],
    shape: Sequence[int],
) -> jax.Array:
    """The rows `[*batch, *free, K]` of an operand.

    Args:
      x: the operand.
      labels: the parts of its axes, in their order. The batch axes and the contracted
        axes of x are parts of the parameter's axes.
      batch: axes of the parameter.
      contracting: axes of the parameter.
      shape: the shape of the parameter.
    """

    def positions(axes: Sequence[int]) -> list[int]:
        own = [i for i, part in enumerate(labels) if part.axis in axes]
        return sorted(own, key=lambda i: in_storage_order(labels[i]))

    first, last = positions(batch), positions(contracting)
    free = [i for i in range(len(labels)) if i not in first and i not in last]
    rows = x.reshape([part.size for part in labels])
    rows = jnp.transpose(rows, (*first, *free, *last))
    sizes = [shape[axis] for axis in batch]
    sizes += [labels[i].size for i in free]
    k = math.prod(shape[axis] for axis in contracting)
    return rows.reshape(*sizes, k)


def _conv_product(
    equation: Any, args: Sequence, side: int, view: View, shape: Sequence[int], key: Any
) -> Product:
    if side == 0:
        raise NotAProduct("it is the input of a convolution")
    numbers = equation.params["dimension_numbers"]
    _, *window = numbers.rhs_spec
    parts = _parts_of(window, view.axes)
    contracting = _whole_contracting(parts, shape)
    index = _index(view, shape)
    batch = _stack_axes(tuple(index), contracting, shape)
    x = jnp.asarray(args[0])
    sample, channel, *spatial = numbers.lhs_spec
    rows = jnp.transpose(x, (sample, *spatial, channel))
    return Product(key, view.leaf, contracting, batch, index, True, args[0], rows, None)


_PRODUCTS = {"conv_general_dilated": _conv_product, "dot_general": _dot_product}
PRODUCTS = frozenset(_PRODUCTS)


def _parts_of(dims: Sequence[int], parts: Any) -> list[Part]:
    """The parts of several axes, in one list. `parts[dim]` are those of one axis."""
    return list(itertools.chain.from_iterable(parts[dim] for dim in dims))


def _whole_contracting(parts: Sequence[Part], shape: Sequence[int]) -> tuple[int, ...]:
    axes = whole_axes(parts, shape)
    if axes is None:
        raise NotAProduct("a product contracts only a part of one of its axes")
    return axes


def _index(view: View, shape: Sequence[int]) -> dict[int, Any]:
    """The position of each axis that a view reads at one position."""
    entries = [entry for entry in view.index if entry[0].axis is not None]
    axes = whole_axes([part for part, _ in entries], shape)
    if axes is None:
        raise NotAProduct("a product reads only a part of one of its axes")
    index = {}
    for axis in axes:
        own = [(part, position) for part, position in entries if part.axis == axis]
        # One position stays the same object, which shows that two products share it.
        index[axis] = own[0][1]
        if len(own) > 1:
            index[axis] = sum(position * part.stride for part, position in own)
    return index


def _stack_axes(
    axes: Sequence[int], contracting: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...]:
    """The batch axes of a parameter.

    An axis of size 1 is a batch axis only before the contracted axes.
    """
    return tuple(sorted(a for a in axes if shape[a] > 1 or a < min(contracting)))
