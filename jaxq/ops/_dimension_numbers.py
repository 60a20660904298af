"""Dimension numbers of products: checks, and the dimension numbers of `a @ b`.

As in `lax.dot_general`, dimension numbers are the tuples
`((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor import QUANTIZED, describe

DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


def as_tuples(dims: DimensionNumbers, caller: str) -> DimensionNumbers:
    """The dimension numbers as tuples.

    Raises:
      TypeError: `dims` is not `((lhs_contracting, rhs_contracting), (lhs_batch,
        rhs_batch))` with sequences of axes.
    """
    try:
        (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dims
        contracting = (tuple(lhs_contracting), tuple(rhs_contracting))
        return contracting, (tuple(lhs_batch), tuple(rhs_batch))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{caller}: dimension_numbers must be ((lhs_contracting, rhs_contracting), "
            f"(lhs_batch, rhs_batch)), got {dims!r}."
        ) from error


def check_sizes(lhs: Any, rhs: Any, dims: DimensionNumbers, caller: str) -> None:
    """Checks the axes in the dimension numbers.

    Raises:
      TypeError: an axis is repeated or does not exist, or a pair of contracting or
        batch axes differs in size.
    """
    shapes = (lhs.shape, rhs.shape)
    for side, shape in enumerate(shapes):
        axes = [*dims[0][side], *dims[1][side]]
        exist = all(-len(shape) <= axis < len(shape) for axis in axes)
        if not exist or len({axis % len(shape) for axis in axes}) != len(axes):
            raise TypeError(
                f"{caller}: contracting and batch axes {axes} must be distinct axes of "
                f"the {('left', 'right')[side]} operand, {list(shape)}."
            )
    for kind, (left, right) in zip(("contracting", "batch"), dims, strict=True):
        if [shapes[0][i] for i in left] != [shapes[1][i] for i in right]:
            raise TypeError(
                f"{caller}: {kind} axes {list(left)} of {list(shapes[0])} and "
                f"{list(right)} of {list(shapes[1])} differ in size."
            )


def batch_first(
    ndim: int, dims: DimensionNumbers, side: int
) -> tuple[list[int], DimensionNumbers]:
    """The order of one operand's axes that puts the product's batch axes first.

    The result of the product does not change: its batch axes come first anyway, and the
    free axes keep their order.

    Args:
      ndim: number of axes of the operand.
      dims: dimension numbers of the product.
      side: 0 for the left operand, 1 for the right one.

    Returns:
      (order, dims): the order of the axes, and the dimension numbers of the product
      after the operand is transposed to this order.
    """
    batch = [axis % ndim for axis in dims[1][side]]
    order = [*batch, *(axis for axis in range(ndim) if axis not in batch)]
    contracting, leading = list(dims[0]), list(dims[1])
    contracting[side] = tuple(order.index(axis % ndim) for axis in contracting[side])
    leading[side] = tuple(range(len(batch)))
    return order, ((contracting[0], contracting[1]), (leading[0], leading[1]))


def mirrored(dims: DimensionNumbers) -> DimensionNumbers:
    """The dimension numbers of the product whose operands have changed sides."""
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dims
    return (rhs_contracting, lhs_contracting), (rhs_batch, lhs_batch)


def broadcastable(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Reshapes `[*axes]` to broadcast against `ndim` axes. A scalar stays a scalar."""
    if not values.ndim:
        return values
    values = jnp.transpose(values, np.argsort(axes).tolist())
    sizes = dict(zip(sorted(axes), values.shape, strict=True))
    return values.reshape([sizes.get(axis, 1) for axis in range(ndim)])


def align_matmul(lhs: Any, rhs: Any) -> tuple[Any, Any, DimensionNumbers]:
    """The operands of `lhs @ rhs` and the dimension numbers of the product.

    Leading axes are matched from the right, as in numpy. If a QTensor has more leading
    axes than the array, the array is broadcast.

    Raises:
      ValueError: an operand has no axes; or a QTensor, or an operand with one axis,
        would have to be broadcast to the leading axes of the other operand.
    """
    for operand in (lhs, rhs):
        if operand.ndim == 0:
            raise ValueError(
                "matmul: both operands must have at least one axis, got "
                f"{describe(jnp.dtype(operand.dtype).name, ())}. Use * for scalars."
            )
    if isinstance(rhs, QUANTIZED) and rhs.ndim > max(lhs.ndim, 2):
        lhs = _broadcast(lhs, rhs.shape[:-2])
    if isinstance(lhs, QUANTIZED) and lhs.ndim > max(rhs.ndim, 2):
        rhs = _broadcast(rhs, lhs.shape[:-2])
    shared = max(0, min(lhs.ndim, rhs.ndim) - 2)

    def leading(ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - 2 - shared, ndim - 2)) if shared else ()

    contracting = ((lhs.ndim - 1,), (max(rhs.ndim - 2, 0),))
    return lhs, rhs, (contracting, (leading(lhs.ndim), leading(rhs.ndim)))


def _broadcast(x: Any, leading: tuple[int, ...]) -> Any:
    """Broadcasts an array or `jax.ShapeDtypeStruct` to leading axes `leading`."""
    if isinstance(x, QUANTIZED):
        raise ValueError(
            f"matmul: {x!r} cannot be broadcast to leading axes {list(leading)}. "
            "Quantize the stacked array with batch=."
        )
    if x.ndim == 1:
        raise ValueError(
            f"matmul: an operand with one axis ({describe(x.dtype.name, x.shape)}) "
            f"cannot be broadcast to leading axes {list(leading)}. Pass x[None]."
        )
    shape = (*leading, *x.shape[-2:])
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return jnp.broadcast_to(x, shape)


def nonnegative(lhs: Any, rhs: Any, dims: DimensionNumbers) -> DimensionNumbers:
    """The same dimension numbers without negative axes."""

    def positive(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
        return tuple(axis % ndim for axis in axes)

    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dims
    return (
        (positive(lhs_contracting, lhs.ndim), positive(rhs_contracting, rhs.ndim)),
        (positive(lhs_batch, lhs.ndim), positive(rhs_batch, rhs.ndim)),
    )
