"""Convolutions with a quantized kernel, as Flax layers call them.

Flax nnx and Flax linen layers share these functions. Inputs are
`[*leading, *spatial, channels]`. Kernels are `[*window, channels, features]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import ops
from jaxq.meshes import apply_out_sharding
from jaxq.qtensor import QUANTIZED, QTensor, TrainedWeight

MASKED = "its kernel is masked; multiply the mask into the kernel first"


def num_channels(layer: Any) -> int:
    """The number of channels of the input of an nnx convolution."""
    return layer.in_features


def features_axis(layer: Any) -> int:
    """The axis of a ConvTranspose's kernel that becomes the features of the result."""
    return -2 if layer.transpose_kernel else -1


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    *,
    out_sharding: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """The `conv_general_dilated` hook of Conv. It takes a float or quantized kernel.

    Products with a float kernel accumulate in float32.

    Args:
      lhs: the input.
      rhs: the kernel, an array or a QTensor.
      window_strides: as in `lax.conv_general_dilated`.
      padding: as in `lax.conv_general_dilated`.
      out_sharding: of the result.
      **kwargs: the other arguments of `lax.conv_general_dilated`.
    """
    if not isinstance(rhs, QUANTIZED):
        dtype = kwargs.pop("preferred_element_type", None) or jnp.result_type(lhs, rhs)
        kwargs |= {"preferred_element_type": jnp.float32, "out_sharding": out_sharding}
        y = lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
        return y.astype(dtype)
    y = ops.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    return apply_out_sharding(y, out_sharding)


def convolved(
    product: Callable[..., jax.Array],
    x: jax.Array,
    kernel: QTensor | TrainedWeight,
    bias: jax.Array | None,
    *,
    channel: int,
    dtype: Any,
) -> jax.Array:
    """Convolves with a quantized kernel through a layer's own product, and adds a bias.

    Args:
      product: as in `ops.convolve`. It takes examples `[n, *spatial, channels]`.
      x: the input, `[*leading, *spatial, channels]`.
      kernel: has one axis for each spatial axis, and axes of channels and features.
      bias: `[features]`, or None.
      channel: the axis of `kernel` that becomes the features of the result.
      dtype: of the result. None uses the dtype of x.
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
