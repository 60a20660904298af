"""Convolutions with a quantized kernel, as Flax layers call them.

Flax nnx and Flax linen share these. Inputs are `[*leading, *places, channels]`, kernels
`[*window, channels, features]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import ops, sharding
from jaxq.qtensor import QTensor

MASKED = "its kernel is masked; multiply the mask into the kernel first"


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    *,
    out_sharding: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """The `conv_general_dilated` hook of Conv: a float kernel accumulates in float32.

    Args:
      lhs: the input.
      rhs: the kernel, an array or a QTensor.
      window_strides: as in `lax.conv_general_dilated`, like `padding` and `kwargs`.
      padding: of the windows.
      out_sharding: of the result.
      **kwargs: what else `lax.conv_general_dilated` takes.
    """
    if not isinstance(rhs, QTensor):
        dtype = kwargs.pop("preferred_element_type", None) or jnp.result_type(lhs, rhs)
        kwargs |= {"preferred_element_type": jnp.float32, "out_sharding": out_sharding}
        y = lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
        return y.astype(dtype)
    y = ops.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    return sharding.apply_out_sharding(y, out_sharding)


def convolved(
    product: Callable[..., jax.Array],
    x: jax.Array,
    kernel: QTensor,
    bias: jax.Array | None,
    *,
    channel: int,
    dtype: Any,
) -> jax.Array:
    """A convolution with a quantized kernel by a layer's own product, with bias.

    Args:
      product: as in `ops.convolve`, of examples `[n, *places, channels]`.
      x: the input, `[*leading, *places, channels]`.
      kernel: has two axes more than there are places.
      bias: `[features]`, or None.
      channel: the axis of `kernel` that becomes the features of the result.
      dtype: of the result. None takes the dtype of x.
    """
    num_leading = x.ndim - (kernel.ndim - 1)
    leading, example = x.shape[:num_leading], x.shape[num_leading:]
    y = ops.convolve(product, x.reshape(-1, *example), kernel, channel=channel)
    y = y.astype(dtype or x.dtype).reshape(*leading, *y.shape[1:])
    return add_bias(y, bias)


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`y` plus `bias` along the last axis, in the dtype of `y`."""
    if bias is None:
        return y
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)
