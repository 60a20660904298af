"""Rows sorted by expert, quantized before they are multiplied.

Each row is quantized by the activation spec of the weights. If a row has one scale, its
codes are multiplied first, and the result is multiplied by the scale. int8 and float8
codes are multiplied by integer weights without being dequantized, so the kernels round
nothing before the sums. In all other products the codes become floats first.
`ragged_rows_dtype` says which case holds.

The gradient passes straight through the rounding, as in `_activations.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxq.ops._activations import ActivationAxes, quantize_activation, range_ends
from jaxq.qtensor import QTensor, dequantize, with_margin

# `multiply(x, weights, sizes)`: float x `[m, k]` gives float32 `[m, n]`.
Multiply = Callable[[jax.Array, QTensor, jax.Array], jax.Array]


def multiply_quantized_rows(
    x: jax.Array,
    weights: QTensor,
    sizes: jax.Array,
    multiply: Multiply,
    x_dtype: str,
    rows_dtype: str,
) -> jax.Array:
    """The product of quantized rows, sorted by expert, with the experts' weights.

    Args:
      x: float `[m, k]`.
      weights: `[e, k, n]` with an activation spec that `ragged_activation` accepts.
      sizes: int32 `[e]`, at least 0.
      multiply: the product of floats with weights. It must not close over traced
        arrays.
      x_dtype: the dtype in which the derivative multiplies rows, which are not
        quantized there.
      rows_dtype: the dtype in which quantized rows are multiplied, as
        `ragged_rows_dtype` returns it.

    Returns:
      float32 `[m, n]`.
    """

    @jax.custom_jvp
    def product(x: jax.Array, weights: QTensor, sizes: jax.Array) -> jax.Array:
        activation = _quantized_rows(x, weights, sizes)
        without_spec = weights.with_activation(None)
        if not _has_one_scale(activation):
            rows = dequantize(activation, dtype=rows_dtype).reshape(x.shape)
            return multiply(rows, without_spec, sizes)
        rows = _rows_without_scale(activation, rows_dtype).reshape(x.shape)
        assert not isinstance(activation.scale, QTensor)
        row_scale = activation.scale.reshape(-1, 1).astype(jnp.float32)  # [m, 1]
        # The scale of a row without an expert may be NaN, but its result is zero.
        has_expert = jnp.arange(x.shape[0]) < jnp.sum(sizes)
        row_scale = jnp.where(has_expert[:, None], row_scale, 0.0)
        return multiply(rows, without_spec, sizes) * row_scale

    @product.defjvp
    def derivative(primals, tangents):
        x, weights, sizes = primals
        x_dot, *other_tangents = tangents
        x_dot = _without_clipped(x_dot, x, weights, sizes)

        def float_product(x: jax.Array, weights: QTensor, sizes: jax.Array):
            return multiply(x.astype(x_dtype), weights.with_activation(None), sizes)

        _, y_dot = jax.jvp(float_product, primals, (x_dot, *other_tangents))
        return product(*primals), y_dot

    return product(x, weights, sizes)


def _quantized_rows(x: jax.Array, weights: QTensor, sizes: jax.Array) -> QTensor:
    """The rows quantized by the activation spec, `[m, k]` or `[m, 1, k]`."""
    if weights.input_range is None:
        return quantize_activation(x, weights, ActivationAxes((0, 1), (1,)))
    # Each row has the range of its expert, so rows are a batch axis.
    ranges = _ranges_of_rows(weights, sizes, x.shape[0])
    weights = dataclasses.replace(weights, input_range=ranges)
    axes = ActivationAxes((0, 1, 2), (2,), num_batch=1, range_axes=(0,))
    return quantize_activation(x[:, None], weights, axes)


def _ranges_of_rows(weights: QTensor, sizes: jax.Array, num_rows: int) -> jax.Array:
    """The static range of each row, float32 `[m, 2]`."""
    assert weights.input_range is not None
    return jnp.repeat(weights.input_range, sizes, axis=0, total_repeat_length=num_rows)


def _rows_without_scale(activation: QTensor, rows_dtype: str) -> jax.Array:
    """The numbers that are multiplied by the scales of rows, in `rows_dtype`."""
    fmt = activation.spec.fmt
    if rows_dtype == fmt.name == "int8":
        return activation.data
    if rows_dtype == fmt.name:
        return jax.lax.bitcast_convert_type(activation.data, jnp.dtype(fmt.name))
    ones = jnp.ones_like(activation.scale)
    return dequantize(dataclasses.replace(activation, scale=ones), dtype=rows_dtype)


def _has_one_scale(activation: QTensor) -> bool:
    """Whether each row is one scale times numbers that do not depend on the row."""
    scale = activation.scale
    if isinstance(scale, QTensor) or scale.size != activation.shape[0]:
        return False
    return activation.offset is None and activation.codebook is None


def _without_clipped(
    x_dot: jax.Array, x: jax.Array, weights: QTensor, sizes: jax.Array
) -> jax.Array:
    """The tangent of x, zero where a static range clips x."""
    if weights.input_range is None:
        return x_dot
    low, high = range_ends(_ranges_of_rows(weights, sizes, x.shape[0]), (0,))
    low, high = with_margin(low[:, None], high[:, None], weights.meta.activation)
    return jnp.where((low <= x) & (x <= high), x_dot, jnp.zeros((), x_dot.dtype))
