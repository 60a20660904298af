"""One product of a parameter with data: which axes it contracts, and its rows."""

from __future__ import annotations

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
    """The statistics of one operand do not describe the other, for a reason."""


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
      NotAProduct: only a part of the parameter's axes is contracted, for example.
    """
    return _PRODUCTS[equation.primitive.name](equation, args, side, view, shape, key)


def _dot(
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
    contracted_parts = [part for dim in x_contracted for part in parts[dim]]
    batch_parts = [
        part for dim in x_batch for part in parts[dim] if part.axis is not None
    ]
    contracting = _contracting(contracted_parts, shape)
    stack = whole_axes(batch_parts, shape)
    if stack is None:
        raise NotAProduct("a product reads only a part of one of its axes")
    index = _index(view, shape)
    batch = _batch((*stack, *index), contracting, shape)
    # Splits the axes of x as the axes of the parameter are split.
    labels: list[Part] = []
    for dim, size in enumerate(x.shape):
        labels += parts.get(dim) or ((Part(None, size),) if size != 1 else ())
    rows = x.reshape([part.size for part in labels])
    is_stacked = [part.axis in batch and part.axis not in index for part in labels]
    is_contracted = [part.axis in contracting for part in labels]
    positions = range(len(labels))
    stacked = [i for i in positions if is_stacked[i]]
    last = [i for i in positions if is_contracted[i]]
    free = [i for i in positions if not is_stacked[i] and not is_contracted[i]]
    stacked.sort(key=lambda i: in_storage_order(labels[i]))
    last.sort(key=lambda i: in_storage_order(labels[i]))
    rows = jnp.transpose(rows, (*stacked, *free, *last))
    sizes = [shape[axis] for axis in batch if axis not in index]
    sizes += [labels[i].size for i in free]
    rows = rows.reshape(*sizes, -1)
    own_free = [
        axis
        for dim, axis in enumerate(view.axes)
        if dim not in own_contracted and dim not in own_batch
    ]
    x_free = [
        (Part(None, size),)
        for dim, size in enumerate(x.shape)
        if dim not in x_contracted and dim not in x_batch
    ]
    free_axes = (own_free, x_free) if side == 0 else (x_free, own_free)
    axes = [view.axes[dim] for dim in own_batch]
    output = View(
        view.leaf, (*axes, *free_axes[0], *free_axes[1]), view.index, product=key
    )
    return Product(key, view.leaf, contracting, batch, index, False, x, rows, output)


def _conv(
    equation: Any, args: Sequence, side: int, view: View, shape: Sequence[int], key: Any
) -> Product:
    if side == 0:
        raise NotAProduct("it is the input of a convolution")
    numbers = equation.params["dimension_numbers"]
    _, *window = numbers.rhs_spec
    parts = [part for dim in window for part in view.axes[dim]]
    contracting = _contracting(parts, shape)
    index = _index(view, shape)
    batch = _batch(tuple(index), contracting, shape)
    x = jnp.asarray(args[0])
    sample, channel, *spatial = numbers.lhs_spec
    rows = jnp.transpose(x, (sample, *spatial, channel))
    return Product(key, view.leaf, contracting, batch, index, True, x, rows, None)


_PRODUCTS = {"conv_general_dilated": _conv, "dot_general": _dot}
PRODUCTS = frozenset(_PRODUCTS)


def _contracting(parts: Sequence[Part], shape: Sequence[int]) -> tuple[int, ...]:
    axes = whole_axes(parts, shape)
    if axes is None:
        raise NotAProduct("a product contracts only a part of one of its axes")
    if not axes:
        raise NotAProduct("a product contracts none of its axes")
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


def _batch(
    axes: Sequence[int], contracting: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...]:
    """The batch axes of a parameter. A later axis of size 1 is a kept axis."""
    return tuple(sorted(a for a in axes if shape[a] > 1 or a < min(contracting)))
