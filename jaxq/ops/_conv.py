"""Convolution with a quantized kernel.

`_decision.py` decides whether codes or dequantized operands are convolved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec
from jaxq.ops._activations import ActivationAxes, multiply_quantized
from jaxq.ops._decision import plan_conv
from jaxq.ops._decoded import multiply_decoded, multiply_in_one_step
from jaxq.ops._operands import as_operands, check_one_mesh
from jaxq.ops._plan import Plan
from jaxq.ops._trained import (
    fake_quant_activation,
    multiply_trained,
    trained_operand,
    with_average,
)
from jaxq.qtensor import (
    FLOATS,
    QUANTIZED,
    QTensor,
    TrainedWeight,
    dequantize,
    scale_values,
)

# `product(x, kernel, accumulate)` convolves arrays and sums in the dtype `accumulate`.
Product = Callable[[jax.Array, jax.Array, Any], jax.Array]


def conv_general_dilated(
    lhs: jax.typing.ArrayLike | QTensor,
    rhs: QTensor | TrainedWeight,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated` with a quantized kernel.

    The codes are convolved with int32 accumulation if all of these conditions hold:

    - Both operands have symmetric integer codes.
    - `lhs` has one scale for each example, or one for all.
    - `rhs` has one scale for each output channel, or one for all.
    - If `batch_group_count` is above 1, `lhs` has one scale for all examples.
    - int32 holds the sum of all products of one output.

    Otherwise both operands are dequantized. The kernel is dequantized as a whole,
    because a kernel is small compared with its input.

    Args:
      lhs: float array, or a QTensor that keeps the batch axis and contracts all others.
      rhs: QTensor or `TrainedWeight`, the kernel, with any scales.
      window_strides: as in `lax.conv_general_dilated`.
      padding: as in `lax.conv_general_dilated`.
      lhs_dilation: as in `lax.conv_general_dilated`.
      rhs_dilation: as in `lax.conv_general_dilated`.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: as in `lax.conv_general_dilated`.
      batch_group_count: as in `lax.conv_general_dilated`.
      precision: as in `lax.conv_general_dilated`.
      preferred_element_type: dtype of the result; None uses the dtype that the
        operands promote to.

    Returns:
      The convolution, accumulated in int32 or float32 and rounded once.

    Raises:
      TypeError: `rhs` is not a QTensor, or `lhs` is an array whose dtype is not
        float32, bfloat16 or float16.
      ValueError: `rhs` has an outlier threshold (`with_activation(outliers=)`), or both
        an input scale and an activation spec.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> kernel = jaxq.quantize(jnp.ones((3, 4, 8)), "int8", contracting=(0, 1))
      >>> numbers = ("NWC", "WIO", "NWC")
      >>> x = jnp.ones((1, 5, 4))
      >>> jaxq.ops.conv_general_dilated(
      ...     x, kernel, (1,), "SAME", dimension_numbers=numbers
      ... ).shape
      (1, 5, 8)
    """
    caller = "conv_general_dilated"
    if not isinstance(rhs, QUANTIZED):
        raise TypeError(
            f"{caller}: rhs must be a QTensor, got {type(rhs).__name__}. "
            "Use jax.lax.conv_general_dilated for two arrays."
        )
    x, _ = as_operands(lhs, rhs, caller=caller)
    check_one_mesh((x, rhs), caller)
    out_dtype = jnp.dtype(
        preferred_element_type or jnp.promote_types(x.dtype, rhs.dtype)
    )
    numbers = lax.conv_dimension_numbers(x.shape, rhs.shape, dimension_numbers)

    def product(x: jax.Array, kernel: jax.Array, accumulate: Any) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type=accumulate,
        )

    y = convolve(
        product,
        x,
        rhs,
        channel=numbers.rhs_spec[0],
        batch=(numbers.lhs_spec[0], numbers.out_spec[0]),
        features=numbers.out_spec[1],
        mixed=batch_group_count > 1,
    )
    return y.astype(out_dtype)


def convolve(
    product: Product,
    x: jax.Array | QTensor,
    kernel: QTensor | TrainedWeight,
    *,
    channel: int,
    batch: tuple[int, int] = (0, 0),
    features: int = -1,
    mixed: bool = False,
) -> jax.Array:
    """A convolution of any kind with a quantized kernel.

    Args:
      product: `product(x, kernel, accumulate)` convolves arrays and sums in the dtype
        `accumulate`.
      x: the input: a float array, or a QTensor that keeps the batch axis and contracts
        all others. If the kernel has an activation spec (`QTensor.with_activation`), an
        array is quantized first: each example by its own extremes, or all examples by
        the kernel's `input_range`. The gradient passes straight through this rounding.
      kernel: QTensor or `TrainedWeight` with any scales.
      channel: the axis of `kernel` that becomes the features of the result.
      batch: the batch axis of `x` and the batch axis of the result.
      features: the feature axis of the result.
      mixed: True if one example of the result is a sum over several examples of `x`
        (`batch_group_count` above 1).

    Returns:
      The convolution as float32, accumulated in int32 or float32.

    Raises:
      TypeError: `x` is an array whose dtype is not float32, bfloat16 or float16.
      ValueError: `kernel` has an outlier threshold (`with_activation(outliers=)`), or
        both an input scale and an activation spec.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq.ops import convolve
      >>> def product(x, kernel, accumulate):  # a kernel of width 1
      ...     return jnp.einsum(
      ...         "nwi,io->nwo", x, kernel, preferred_element_type=accumulate
      ...     )
      >>> kernel = jaxq.quantize(jnp.ones((4, 8)), "int8")
      >>> convolve(product, jnp.ones((1, 5, 4)), kernel, channel=1).shape
      (1, 5, 8)
    """
    if isinstance(kernel, TrainedWeight):
        convolution = functools.partial(
            convolve,
            product,
            channel=channel,
            batch=batch,
            features=features,
            mixed=mixed,
        )
        product = _over_mesh(product, channel, batch, features, mixed=mixed)
        return _convolve_trained(convolution, product, x, kernel, batch[0])
    product = _over_mesh(product, channel, batch, features, mixed=mixed)
    plan = plan_conv(x, kernel, channel=channel, batch=batch[0], mixed=mixed)
    carry_out = functools.partial(_convolve, product, batch=batch[1], features=features)
    if not plan.before:
        return carry_out(plan, x, kernel.with_activation(None))
    assert not isinstance(x, QTensor)
    axes = _activation_axes(x, batch[0])

    def float_product(x: jax.Array, kernel: QTensor) -> jax.Array:
        plan = plan_conv(x, kernel, channel=channel, batch=batch[0], mixed=mixed)
        return carry_out(plan, x, kernel)

    codes_product = functools.partial(carry_out, plan)
    return multiply_quantized(
        x, kernel, axes, codes_product, float_product, is_convolution=True
    )


def _over_mesh(
    product: Product,
    channel: int,
    batch: tuple[int, int],
    features: int,
    *,
    mixed: bool,
) -> Product:
    """The product, with the sharding of its result stated on explicit mesh axes.

    The examples of the result are sharded as those of `x`, and its features as the
    channels of the kernel. The arguments are those of `convolve`.
    """

    def multiply(x: jax.Array, kernel: jax.Array, accumulate: Any) -> jax.Array:
        axis_names: list[Any] = [None] * x.ndim
        if not mixed:
            axis_names[batch[1]] = explicit_spec(x)[batch[0]]
        axis_names[features] = explicit_spec(kernel)[channel]

        def convolve_arrays(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return product(x, kernel, accumulate)

        spec = PartitionSpec(*axis_names)
        return call_on_auto_axes(convolve_arrays, spec, x, kernel)

    return multiply


def _activation_axes(x: jax.Array, batch: int) -> ActivationAxes:
    """The roles of the axes of the input. All axes but the batch axis are contracted.

    Args:
      x: the input.
      batch: the batch axis of `x`.
    """
    contracting = [axis for axis in range(x.ndim) if axis != batch % x.ndim]
    return ActivationAxes(tuple(range(x.ndim)), tuple(contracting))


def _convolve_trained(
    convolution: Callable[..., jax.Array],
    product: Product,
    x: jax.Array | QTensor,
    kernel: TrainedWeight,
    batch: int,
) -> jax.Array:
    """A convolution with a trained kernel.

    Args:
      convolution: `convolution(x, kernel)` convolves with a QTensor.
      product: as in `convolve`.
      x: the input.
      kernel: the trained kernel.
      batch: the batch axis of `x`.
    """
    trained_operand((x, kernel), "conv_general_dilated")  # x must be an array
    assert not isinstance(x, QTensor)
    axes = _activation_axes(x, batch)

    def multiply(x: jax.Array, kernel: QTensor | jax.Array) -> jax.Array:
        if isinstance(kernel, QTensor):
            return convolution(x, kernel)
        return product(x, kernel.astype(x.dtype), jnp.float32)

    def fake_input(x: jax.Array, kernel: TrainedWeight) -> jax.Array:
        return fake_quant_activation(x, kernel, axes)

    kernel = with_average(x, kernel, axes)
    return multiply_trained(x, kernel, multiply, fake_input, has_batch=True)


def _convolve(
    product: Product,
    plan: Plan,
    x: jax.Array | QTensor,
    kernel: QTensor,
    *,
    batch: int,
    features: int,
) -> jax.Array:
    """Carries out a plan: convolves codes, or the floats of both operands."""
    if plan.path == "codes":
        assert isinstance(x, QTensor)

        def multiply_codes(x: QTensor, kernel: QTensor) -> jax.Array:
            return product(x.codes(), kernel.codes(), jnp.int32)

        y = multiply_in_one_step(multiply_codes, x, kernel).astype(jnp.float32)
        x_scale = _along(scale_values(x), batch, y.ndim)
        return y * x_scale * _along(scale_values(kernel), features % y.ndim, y.ndim)
    floats = dequantize(x) if isinstance(x, QTensor) else x
    if floats.dtype.name not in FLOATS:
        raise TypeError(
            "conv_general_dilated: lhs must be a float32, bfloat16 or float16 array "
            f"or a QTensor, got {floats.dtype.name}{list(floats.shape)}. "
            "Pass lhs.astype(jnp.float32)."
        )

    def float_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x, kernel, jnp.float32)

    return multiply_decoded(float_product, floats, kernel)


def _along(scale: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Scales reshaped to broadcast along one axis of the result."""
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])
