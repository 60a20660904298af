"""Convolution with a quantized kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
    output channel of `rhs`, the codes are convolved with int32 accumulation. Otherwise both are dequantized, the kernel
    as a whole: kernels are small beside what they are applied to.

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
        raise TypeError(f"conv_general_dilated: rhs must be a QTensor, got {type(rhs).__name__}. Use lax for arrays.")
    options = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
    }
    x = lhs if isinstance(lhs, QTensor) else jnp.asarray(lhs)
    if rhs.meta.activation is not None and not isinstance(x, QTensor):
        return _dynamic(x, rhs, _freeze(options), preferred_element_type)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, rhs.dtype))
    numbers = lax.conv_dimension_numbers(x.shape, rhs.shape, dimension_numbers)
    channel, batch, feature = numbers.rhs_spec[0], numbers.lhs_spec[0], numbers.out_spec[1]
    if isinstance(x, QTensor) and why_not_codes(x, rhs, batch, channel) is None:
        y = lax.conv_general_dilated(x.codes(), rhs.codes(), **options, preferred_element_type=jnp.int32)
        out_batch = numbers.out_spec[0]
        y = (
            y.astype(jnp.float32)
            * _along(scale_values(x), out_batch, y.ndim)
            * _along(scale_values(rhs), feature, y.ndim)
        )
        return y.astype(out_dtype)
    floats = dequantize(x) if isinstance(x, QTensor) else x
    if floats.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"conv_general_dilated: lhs must be float or a QTensor, got {floats.dtype.name}.")
    kernel = dequantize(rhs, dtype=floats.dtype)
    return lax.conv_general_dilated(floats, kernel, **options, preferred_element_type=jnp.float32).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dynamic(x: jax.Array, kernel: QTensor, options: tuple, dtype: Any) -> jax.Array:
    """The convolution with each example of x quantized by its own scale. Backward, x passes straight through."""
    assert kernel.meta.activation is not None
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dict(options)["dimension_numbers"])
    others = tuple(a for a in range(x.ndim) if a != numbers.lhs_spec[0])
    qx = quantize(x, kernel.meta.activation, contracting=others, on_nonfinite="propagate", name="activation")
    return conv_general_dilated(qx, kernel.with_activation(None), **dict(options), preferred_element_type=dtype)


def _dynamic_forward(x, kernel, options, dtype):
    return _dynamic(x, kernel, options, dtype), (x, kernel)


def _dynamic_backward(options, dtype, saved, dy):
    def floats(x: jax.Array, kernel: QTensor) -> jax.Array:
        return conv_general_dilated(x, kernel, **dict(options), preferred_element_type=dtype)

    x, kernel = saved
    _, pull = jax.vjp(floats, x, kernel.with_activation(None))
    dx, dkernel = pull(dy)
    return dx, dataclasses.replace(dkernel, meta=kernel.meta)


_dynamic.defvjp(_dynamic_forward, _dynamic_backward)


def _freeze(options: dict[str, Any]) -> tuple:
    """Options as a hashable tuple of pairs."""

    def freeze(value: Any) -> Any:
        return (
            tuple(freeze(v) for v in value)
            if isinstance(value, list | tuple) and type(value) in (list, tuple)
            else value
        )

    return tuple((name, freeze(value)) for name, value in options.items())


def why_not_codes(x: QTensor, kernel: QTensor, batch: int, channel: int) -> str | None:
    """None if the codes of `x` and `kernel` can be convolved as integers, else the reason."""
    for what, qt, kept in (("input", x, batch), ("kernel", kernel, channel)):
        geometry = qt.meta.geometry
        if qt.spec.fmt.kind != "integer" or any(v is not None for v in (qt.zero_point, qt.offset, qt.codebook)):
            return f"the {what} is not in symmetric integers: {qt!r}"
        if qt.batch_shape or geometry.flat or geometry.num_blocks[-1] != 1:
            return f"the {what} has several scales for one output: {qt!r}"
        sizes = {a: n for a, n in zip(geometry.kept, geometry.num_blocks, strict=False) if n > 1}
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
