"""Convolution with a quantized kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.ops._dot_general import as_operands
from jaxq.ops._straight_through import straight_through
from jaxq.qtensor import QTensor, dequantize, quantize, scale_values


def conv_general_dilated(
    lhs: jax.typing.ArrayLike | QTensor,
    rhs: QTensor,
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

    With integer codes on both sides, symmetric, one scale for each example of `lhs` (or one for all) and one for each
    output channel of `rhs`, the codes are convolved with int32 accumulation. Otherwise, and where batch groups meet
    scales of their own for each example, both are dequantized, the kernel as a whole: kernels are small beside what
    they are applied to.

    Args:
      lhs: array or QTensor; a QTensor keeps the batch dimension and contracts all others.
      rhs: kernel; scales for each output channel, or any other.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
        precision: as in `lax.conv_general_dilated`.
      preferred_element_type: dtype of the result; None takes what the operands' dtypes promote to.

    Returns:
      The convolution, accumulated in int32 or float32 and rounded once.

    Raises:
      TypeError: `rhs` is not a QTensor.
    """
    if not isinstance(rhs, QTensor):
        raise TypeError(
            f"conv_general_dilated: rhs must be a QTensor, got {type(rhs).__name__}. Use lax for arrays."
        )
    x, _ = as_operands(lhs, rhs, caller="conv_general_dilated")
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

    batch, features = (numbers.lhs_spec[0], numbers.out_spec[0]), numbers.out_spec[1]
    y = convolve(
        product,
        x,
        rhs,
        channel=numbers.rhs_spec[0],
        batch=batch,
        features=features,
        mixed=batch_group_count > 1,
    )
    return y.astype(out_dtype)


Product = Callable[[jax.Array, jax.Array, Any], jax.Array]


def convolve(
    product: Product,
    x: jax.Array | QTensor,
    kernel: QTensor,
    *,
    channel: int,
    batch: tuple[int, int] = (0, 0),
    features: int = -1,
    mixed: bool = False,
) -> jax.Array:
    """A convolution of any kind with a quantized kernel: of integer codes where they allow it, else of floats.

    Args:
      product: `product(x, kernel, accumulate)` convolves arrays, summing in the dtype `accumulate`.
      x: what windows are taken of: float array, or QTensor that keeps the batch axis and contracts all others. An
        array is quantized first where the kernel's `with_activation` says so, each example by its own scale or all by
        the kernel's `input_range`. Backward, it passes straight through, where it was not clipped.
      kernel: scales for each output channel, or any other.
      channel: the axis of `kernel` that is the result's features.
      batch: the batch axis of `x` and of the result.
      features: axis of the result.
      mixed: whether an example of the result has terms of several examples of `x` (batch groups).

    Returns:
      The convolution, accumulated in int32 or float32; float32.

    Raises:
      TypeError: `x` is neither float nor a QTensor.
      ValueError: `kernel` has `outliers`.
    """
    if kernel.meta.outliers is not None:
        raise ValueError(
            f"conv_general_dilated: {kernel!r} leaves out columns of a matrix; convolutions have none."
        )
    if kernel.meta.activation is not None and not isinstance(x, QTensor):
        run = functools.partial(
            convolve,
            product,
            channel=channel,
            batch=batch,
            features=features,
            mixed=mixed,
        )
        return _dynamic(run, x, kernel, batch[0])
    kernel = kernel.with_activation(None)
    mixes_scales = (
        mixed and isinstance(x, QTensor) and math.prod(x.meta.geometry.num_blocks) > 1
    )
    codes = (
        isinstance(x, QTensor)
        and why_not_codes(x, kernel, batch[0], channel % kernel.ndim) is None
    )
    if isinstance(x, QTensor) and codes and not mixes_scales:
        y = product(x.codes(), kernel.codes(), jnp.int32).astype(jnp.float32)
        return (
            y
            * _along(scale_values(x), batch[1], y.ndim)
            * _along(scale_values(kernel), features % y.ndim, y.ndim)
        )
    floats = dequantize(x) if isinstance(x, QTensor) else x
    if floats.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"conv_general_dilated: lhs must be float or a QTensor, got {floats.dtype.name}."
        )
    return product(floats, dequantize(kernel, dtype=floats.dtype), jnp.float32)


def _dynamic(
    run: Callable[..., jax.Array], x: jax.Array, kernel: QTensor, batch: int
) -> jax.Array:
    @jax.custom_vjp
    def quantized(x: jax.Array, kernel: QTensor) -> jax.Array:
        assert kernel.meta.activation is not None
        others = tuple(a for a in range(x.ndim) if a != batch)
        bounds = (
            None
            if kernel.input_range is None
            else (kernel.input_range[0], kernel.input_range[1])
        )
        qx = quantize(
            x,
            kernel.meta.activation,
            contracting=others,
            on_nonfinite="propagate",
            bounds=bounds,
            name="activation",
        )
        return run(qx, kernel.with_activation(None))

    def forward(x: jax.Array, kernel: QTensor) -> Any:
        return quantized(x, kernel), (x, kernel)

    def backward(saved: Any, dy: jax.Array) -> Any:
        x, kernel = saved
        _, pull = jax.vjp(run, x, kernel.with_activation(None))
        dx, dkernel = pull(dy)
        ends = (
            None
            if kernel.input_range is None
            else (kernel.input_range[0], kernel.input_range[1])
        )
        return straight_through(dx, dkernel, x, kernel, ends)

    quantized.defvjp(forward, backward)
    return quantized(x, kernel)


def why_not_codes(x: QTensor, kernel: QTensor, batch: int, channel: int) -> str | None:
    """None if the codes of `x` and `kernel` can be convolved as integers, else the reason."""
    for what, qt, kept in (("input", x, batch), ("kernel", kernel, channel)):
        geometry = qt.meta.geometry
        if qt.spec.fmt.kind != "integer" or any(
            v is not None for v in (qt.zero_point, qt.offset, qt.codebook)
        ):
            return f"the {what}, {qt.spec.fmt.name}, is not in symmetric integers"
        if qt.batch_shape or geometry.flat or geometry.num_blocks[-1] != 1:
            return (
                f"the {what} has several scales for one output, {qt.spec.granularity}"
            )
        sizes = {
            a: n
            for a, n in zip(geometry.kept, geometry.num_blocks, strict=False)
            if n > 1
        }
        if set(sizes) - {kept - qt.ndim}:
            return f"the {what} has scales along axes {sorted(sizes)}: {qt!r}"
    terms = kernel.size // kernel.shape[channel]
    reach = np.prod([max(qt.spec.fmt.max, -qt.spec.fmt.min) for qt in (x, kernel)])
    if terms * reach > 2**31 - 1:
        return f"{terms} products may exceed int32"
    return None


def _along(scale: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Scales laid along one axis of the result."""
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])
