"""The factors by which a product multiplies its float operand: `QTensor.input_scale`.

A weight with an input scale represents `diag(s) @ W`, so `x @ (diag(s) @ W)` is
`(x * s) @ W`. The float operand is multiplied before it is quantized. All products
multiply by the functions here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.ops._dimension_numbers import DimensionNumbers
from jaxq.qtensor import QTensor

# Dtypes that the multiplied operand keeps. All other dtypes become float32.
_KEPT_DTYPES = ("bfloat16", "float16")


def scale_operand(
    x: jax.Array, weight: QTensor, dims: DimensionNumbers, *, swapped: bool
) -> tuple[jax.Array, QTensor]:
    """Moves the input scale of a weight to the float operand of the product.

    Args:
      x: the float operand.
      weight: a QTensor with an `input_scale`. The product contracts the axes that its
        geometry contracts, and its batch axes are the batch axes of the product.
      dims: dimension numbers of the product.
      swapped: True if the weight is the left operand.

    Returns:
      (`x` multiplied by the factors, the weight without them).
    """
    assert weight.input_scale is not None
    x_side, weight_side = (1, 0) if swapped else (0, 1)
    x_axis_of = {
        axis % weight.ndim: x_axis % x.ndim
        for x_axis, axis in zip(dims[0][x_side], dims[0][weight_side], strict=True)
    }
    along = [axis + weight.ndim for axis in weight.meta.geometry.contracted]
    x_axes = [axis % x.ndim for axis in dims[1][x_side]]
    # [*batch, K] -> [*batch, *contracted], with the batch axes in the product's order
    factors = weight.input_scale.reshape(
        *weight.batch_shape, *(weight.shape[axis] for axis in along)
    )
    order = [*dims[1][weight_side], *range(len(x_axes), factors.ndim)]
    factors = jnp.transpose(factors, order)
    x_axes += [x_axis_of[axis] for axis in along]
    scaled = _multiply(x, _broadcastable(factors, x_axes, x.ndim))
    return scaled, dataclasses.replace(weight, input_scale=None)


def scale_rows_by_group(
    x: jax.Array, weights: QTensor, group_sizes: jax.Array
) -> tuple[jax.Array, QTensor]:
    """Moves the input scales of a stack of weights to rows that are sorted by weight.

    Args:
      x: floats `[m, k]`.
      weights: `[e, k, n]`. If it has no input scale, nothing changes.
      group_sizes: int32 `[e]`, the number of rows of each weight.

    Returns:
      (the rows multiplied by the factors of their weights, the weights without
      factors).
    """
    if weights.input_scale is None:
        return x, weights
    factors = jnp.repeat(
        weights.input_scale, group_sizes, axis=0, total_repeat_length=x.shape[0]
    )  # [m, k]
    return _multiply(x, factors), dataclasses.replace(weights, input_scale=None)


def _multiply(x: jax.Array, factors: jax.Array) -> jax.Array:
    """`x * factors` in float32, rounded to a 16-bit dtype of `x`."""
    scaled = x.astype(jnp.float32) * factors
    return scaled.astype(x.dtype) if x.dtype.name in _KEPT_DTYPES else scaled


def _broadcastable(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Reshapes `[*axes]` to broadcast against `ndim` axes, at the positions `axes`."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    sizes = {axes[i]: values.shape[i] for i in order}
    values = jnp.transpose(values, order)
    return values.reshape([sizes.get(axis, 1) for axis in range(ndim)])
