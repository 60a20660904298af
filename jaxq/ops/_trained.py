"""Products with a `TrainedWeight`.

The forward pass computes the product with the quantized weight. The input is quantized
too if the weight has an activation spec. So the product equals that of the converted
model, bit for bit. The derivative is that of the float product of the same quantized
values, and passes straight through the rounding. Forward mode and second derivatives
work too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import kernels
from jaxq.ops._activations import ActivationAxes, range_ends
from jaxq.ops._outlier_columns import split_outlier_columns
from jaxq.ops._tangents import checkpointed_tangent
from jaxq.qtensor import QUANTIZED, TrainedWeight, fake_quant, range_options

# `multiply(x, weight)` multiplies by a QTensor, or by an array of the same values.
Multiply = Callable[[Any, Any], jax.Array]
# `fake_input(x, weight)` returns the quantized values of the input.
FakeInput = Callable[[Any, TrainedWeight], Any]


def keep_input(x: Any, weight: TrainedWeight) -> Any:
    """The input as it is, for products that never quantize it."""
    return x


def multiply_trained(
    x: Any,
    weight: TrainedWeight,
    multiply: Multiply,
    fake_input: FakeInput = keep_input,
    *,
    has_batch: bool | None,
) -> jax.Array:
    """A product with a trained weight.

    Args:
      x: the other operands: a float array, integers, or a tuple of arrays.
      weight: the trained weight.
      multiply: the product. It must not close over traced arrays.
      fake_input: returns the quantized values of the input.
      has_batch: the product has batch axes, or is a convolution. None for a lookup in
        a table, which policies of `jax.checkpoint` do not save.

    Returns:
      `multiply(x, weight.quantize())`, or `multiply(x, weight.floats)` if the weight is
      switched off.
    """

    def quantized_product(x: Any, weight: TrainedWeight) -> jax.Array:
        return multiply(x, weight.quantize())

    def float_product(x: Any, weight: TrainedWeight) -> jax.Array:
        return multiply(x, weight.floats.astype(weight.dtype))

    @jax.custom_jvp
    def product(x: Any, weight: TrainedWeight) -> jax.Array:
        if weight.switch is None:
            return quantized_product(x, weight)
        is_on = _is_on(weight)
        return jax.lax.cond(is_on, quantized_product, float_product, x, weight)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]):
        # The backward pass computes the quantized values again. So the forward pass
        # keeps only `x` and `weight`.
        tangent = checkpointed_tangent(smooth_product, primals, tangents)
        y, weight = product(*primals), primals[1]
        if has_batch is not None:
            num_terms = weight.meta.geometry.contracted_size
            y = kernels.mark_product(y, has_batch=has_batch, num_terms=num_terms)
        return y, jnp.zeros_like(y) if tangent is None else tangent

    product.defjvp(derivative, symbolic_zeros=True)

    def smooth_product(x: Any, weight: TrainedWeight) -> jax.Array:
        input_scale = jax.lax.stop_gradient(weight.input_scale)  # is not trained
        weight = dataclasses.replace(weight, input_scale=input_scale)
        values, fake_x = weight.fake_quant(), fake_input(x, weight)
        if weight.switch is not None:
            is_on = _is_on(weight)
            values = jnp.where(is_on, values, weight.floats.astype(weight.dtype))
            fake_x = jax.tree.map(lambda a, b: jnp.where(is_on, a, b), fake_x, x)
        return multiply(fake_x, values)

    return product(x, weight)


def _is_on(weight: TrainedWeight) -> jax.Array:
    """Whether products quantize. All weights of a stack have the same switch."""
    assert weight.switch is not None
    return jnp.all(weight.switch > 0.5)


def with_average(
    x: jax.Array, weight: TrainedWeight, axes: ActivationAxes
) -> TrainedWeight:
    """The weight with the input range of a product, if the range is a moving average.

    The first input sets the range. Each later input sets it to
    `decay * range + (1 - decay) * range of the input`. An input that is all zeros, or
    has a number that is not finite, does not count. Until the first input that counts,
    each product uses the range of its own input.

    Args:
      x: the input, multiplied by the weight's input scale if it has one.
      weight: the trained weight. `weight.record` stores the new average.
      axes: the roles of the axes of `x`.
    """
    if weight.decay is None:
        return weight
    current_range = _range_of(jax.lax.stop_gradient(x), weight, axes)
    average = weight.input_range
    if average is None:
        average = jnp.zeros_like(current_range)
    if weight.record is not None:
        average = _next_average(average, current_range, weight)
        weight.record(average)
    input_range = jnp.where(_is_range(average), average, current_range)
    return dataclasses.replace(weight, input_range=input_range, record=None)


def _next_average(
    average: jax.Array, current_range: jax.Array, weight: TrainedWeight
) -> jax.Array:
    """The moving average after an input with the range `current_range`.

    Both are `[*batch, 2]`.
    """
    assert weight.decay is not None
    decay = np.float32(weight.decay)
    mixed = decay * average + (1 - decay) * current_range
    updated = jnp.where(_is_range(average), mixed, current_range)
    is_finite = jnp.isfinite(current_range).all(-1, keepdims=True)
    counts = _is_range(current_range) & is_finite
    if weight.averaging is not None:
        counts &= (weight.averaging > 0.5)[..., None]
    return jnp.where(counts, updated, average)


def _is_range(input_range: jax.Array) -> jax.Array:
    """Whether low is below high, bool `[*batch, 1]`."""
    return input_range[..., :1] < input_range[..., 1:]


def _range_of(x: jax.Array, weight: TrainedWeight, axes: ActivationAxes) -> jax.Array:
    """(low, high) of the input, float32 `[*batch, 2]` in the weight's batch axes."""
    assert weight.meta.activation is not None
    num_batch = len(weight.batch_shape)
    moved = jnp.transpose(x, axes.order).astype(jnp.float32)
    rest = tuple(range(num_batch, x.ndim))
    # The initial values are for an input without elements.
    low = jnp.min(moved, rest, initial=jnp.inf)
    high = jnp.max(moved, rest, initial=-jnp.inf)
    if range_options(weight.meta.activation)["include_zero"]:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    # A NaN is no end of a range. With an infinite range, the product is NaN, as it must
    # be for an input with NaN.
    low = jnp.where(jnp.isnan(low), -jnp.inf, low)
    high = jnp.where(jnp.isnan(high), jnp.inf, high)
    ends = jnp.stack([low, high], axis=-1)
    if num_batch == 0:
        return ends
    return jnp.transpose(ends, (*np.argsort(axes.range_axes).tolist(), num_batch))


def fake_quant_activation(
    x: jax.Array, weight: TrainedWeight, axes: ActivationAxes
) -> jax.Array:
    """The values of the quantized input of a product, with straight-through gradients.

    Args:
      x: the input, multiplied by the weight's input scale if it has one.
      weight: the trained weight. Without an activation spec, nothing changes.
      axes: the roles of the axes of `x`.

    Returns:
      Array like `x`, with gradients to `x` and to the weight's `input_range`.
    """
    spec = weight.meta.activation
    if spec is None:
        return x
    outliers = jnp.zeros((), x.dtype)
    if weight.meta.outliers is not None:
        batch = axes.order[: axes.num_batch]
        contracted = [axes.order[axis] for axis in axes.contracting]
        bound = (*batch, *contracted)
        free = [axis for axis in range(x.ndim) if axis not in bound]
        x, outliers = split_outlier_columns(x, weight.meta.outliers, free)
    bounds = None
    if weight.input_range is not None:
        input_range = weight.input_range
        if weight.gradient_scale:
            num_features = math.prod(x.shape[axes.order[a]] for a in axes.contracting)
            factor = 1 / math.sqrt(max(num_features, 1) * spec.fmt.max)
            input_range = _with_scaled_gradient(input_range, factor)
        if weight.range_gradient is None:
            input_range = jax.lax.stop_gradient(input_range)
        bounds = range_ends(input_range, axes.range_axes)
    values = fake_quant(
        jnp.transpose(x, axes.order),
        spec,
        contracting=axes.contracting,
        batch=tuple(range(axes.num_batch)),
        bounds=bounds,
        range_gradient=weight.range_gradient or "lsq",
    )
    return jnp.transpose(values, np.argsort(axes.order).tolist()) + outliers


def _with_scaled_gradient(x: jax.Array, factor: float) -> jax.Array:
    """`x`, whose gradient is multiplied by a factor."""
    constant = jax.lax.stop_gradient(x)
    return constant + (x - constant) * factor


def reciprocal_input_scale(weight: TrainedWeight) -> TrainedWeight:
    """The weight with the reciprocal of its input scale.

    A float input that was multiplied by the input scale is divided by it again.
    """
    assert weight.input_scale is not None
    return dataclasses.replace(weight, input_scale=1 / weight.input_scale)


def trained_operand(operands: Sequence[Any], caller: str) -> int | None:
    """The position of the only trained weight of a product, or None.

    Raises:
      TypeError: another operand is a QTensor or a trained weight too.
    """
    trained = [i for i, x in enumerate(operands) if isinstance(x, TrainedWeight)]
    if not trained:
        return None
    others = [x for i, x in enumerate(operands) if i != trained[0]]
    if any(isinstance(x, QUANTIZED) for x in others):
        raise TypeError(
            f"{caller}: {operands[trained[0]]!r} can only be multiplied by a float "
            f"array, got {others[0]!r}. Pass floats as the other operand."
        )
    return trained[0]
