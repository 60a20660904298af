"""dequantize: from QTensors back to floats."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor import _scales
from jaxq.qtensor._qtensor import QTensor


def dequantize(qt: QTensor, *, dtype: Any = None) -> jax.Array:
    """`scale * (codes - zero_point) + offset`, computed in float32.

    Args:
      qt: a QTensor.
      dtype: of the result; None takes `qt.dtype`. A rounded scale can put a number just beyond the range of float16,
        for example; it becomes the largest number of the dtype.

    Returns:
      Array of `qt.shape`, in logical axis order. Bitwise the same eager and jitted, except that an `offset` may be
      added with one rounding instead of two.

    Raises:
      TypeError: `qt` is not a QTensor, or `dtype` not a float dtype, or float64 without `jax_enable_x64`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.dequantize(jaxq.quantize(jnp.array([0.0, 1.0, -2.0]), "int8")).tolist()
      [0.0, 1.0078740119934082, -2.0]
    """
    if not isinstance(qt, QTensor):
        raise TypeError(f"dequantize: expected a QTensor, got {type(qt).__name__}.")
    dtype = qt.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dequantize: only float dtypes, got dtype={dtype.name}. For the codes use qt.codes()."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"dequantize: jax has no {dtype.name} here. Set jax_enable_x64, or pass dtype=jnp.float32."
        )
    return _dequantize(qt, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(qt: QTensor, dtype: np.dtype) -> jax.Array:
    geometry = qt.meta.geometry
    blocks = geometry.to_blocks(geometry.to_view_order(qt.stored_codes()))
    view = geometry.unpad(geometry.from_blocks(decode_blocks(qt, blocks)))
    # Products of a scale and a code may leave float32's range, and narrow casts wrap, saturate or make NaN by dtype.
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    view = jnp.clip(view, -limit, limit)
    return geometry.from_view(view.astype(dtype))


def decode_blocks(qt: QTensor, blocks: jax.Array) -> jax.Array:
    """The float32 numbers behind codes arranged by `Geometry.to_blocks` (or broadcastable to it)."""
    geometry = qt.meta.geometry
    scale = geometry.scale_to_blocks(scale_values(qt))
    if qt.zero_point is not None:
        zero = geometry.scale_to_blocks(qt.zero_point)
        values = (blocks.astype(jnp.int32) - zero.astype(jnp.int32)).astype(
            jnp.float32
        ) * scale
    elif qt.codebook is not None:
        tables = [
            geometry.scale_to_blocks(qt.codebook[..., i])
            for i in range(qt.codebook.shape[-1])
        ]
        values = (
            formats.decode_by_table(qt.spec.fmt, jnp.stack(tables, axis=-1), blocks)
            * scale
        )
    else:
        values = qt.spec.fmt.decode(blocks) * scale
    if qt.offset is not None:
        values = values + geometry.scale_to_blocks(_scales.load_from_dtype(qt.offset))
    return values


def scale_values(qt: QTensor) -> jax.Array:
    """The scales as float32 `[*batch, *num_blocks]`, dequantized where they are quantized themselves."""
    return stored_values(qt.scale)


def stored_values(scale: jax.Array | QTensor) -> jax.Array:
    """The float32 numbers of a scale as it is stored."""
    if not isinstance(scale, QTensor):
        return _scales.load_from_dtype(scale)
    values = dequantize(scale, dtype=jnp.float32)
    # About a mean a small scale can come out negative, which would turn its block's signs.
    return values if scale.offset is None else jnp.maximum(values, 0.0)
