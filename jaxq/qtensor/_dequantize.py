"""dequantize: from QTensors back to floats."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxq import formats
from jaxq.meshes import call_on_auto_axes
from jaxq.qtensor import _scales
from jaxq.qtensor._leaf_dtypes import check_leaves
from jaxq.qtensor._mesh_axes import mesh_axes
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._qtensor import QTensor


def dequantize(qt: QTensor, *, dtype: Any = None) -> jax.Array:
    """`scale * (codes - zero_point) + offset`, computed in float32.

    The rows of a QTensor with an `input_scale` are then multiplied by its factors.

    Args:
      qt: a QTensor.
      dtype: float dtype of the result. None uses `qt.dtype`. Numbers beyond the range
        of the dtype are clipped to the range. For example, a rounded scale can put a
        number just beyond the range of float16.

    Returns:
      Array of `qt.shape`, in logical axis order. It is bitwise the same under jit and
      outside jit. The exception is a QTensor with an `offset`: the product and the sum
      may be rounded once (fused) instead of twice.

    Raises:
      TypeError: `qt` is not a QTensor, one of its leaves has another dtype than its
        `meta` says, `dtype` is not a float dtype, or `dtype` is float64 without
        `jax_enable_x64`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.array([0.0, 1.0, -2.0]), "int8")
      >>> jaxq.dequantize(qt).tolist()
      [0.0, 1.0078740119934082, -2.0]
    """
    if isinstance(qt, ProductOperand) and not isinstance(qt, QTensor):
        raise TypeError(
            f"dequantize: expected a QTensor, got {qt!r}. Use {qt.floats_expression}."
        )
    if not isinstance(qt, QTensor):
        raise TypeError(
            f"dequantize: expected a QTensor, got {type(qt).__name__}. Pass the result "
            "of jaxq.quantize."
        )
    check_leaves(qt, "dequantize")
    dtype = qt.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dequantize: dtype must be a float dtype, got dtype={dtype.name}. For the "
            "codes use qt.codes()."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"dequantize: dtype={dtype.name} needs jax_enable_x64=True. Set "
            "jax_enable_x64, or pass dtype=jnp.float32."
        )
    compute = functools.partial(_dequantize, dtype=dtype)
    return call_on_auto_axes(compute, PartitionSpec(*mesh_axes(qt)), qt)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(qt: QTensor, dtype: np.dtype) -> jax.Array:
    geometry = qt.meta.geometry
    blocks = geometry.to_blocks(geometry.to_view_order(qt.stored_codes()))
    view = geometry.unpad(geometry.from_blocks(decode_blocks(qt, blocks)))
    if qt.input_scale is not None:
        view = view * geometry.contracted_to_view(qt.input_scale)
    # The product of a scale and a code may leave the range of float32. A cast to a
    # narrow dtype would then wrap, saturate or give NaN, depending on the dtype.
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    view = jnp.clip(view, -limit, limit)
    return geometry.from_view(view.astype(dtype))


def decode_blocks(qt: QTensor, blocks: jax.Array) -> jax.Array:
    """The float32 values of codes that are arranged as blocks.

    Args:
      qt: the QTensor whose scales, zero points, offsets and codebooks apply.
      blocks: codes as `Geometry.to_blocks` arranges them, or an array that broadcasts
        to that shape.

    Returns:
      float32 values, arranged as blocks.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.array([0.5, -1.0]), "int8")
      >>> ones = jnp.ones((1, 2), jnp.int8)
      >>> bool((jaxq.qtensor.decode_blocks(qt, ones) == qt.scale[0]).all())
      True
    """
    geometry = qt.meta.geometry
    scale = geometry.scale_to_blocks(scale_values(qt))
    values = code_values(qt, blocks) * scale
    if qt.offset is not None:
        values = values + geometry.scale_to_blocks(_scales.load_from_dtype(qt.offset))
    return values


def code_values(qt: QTensor, blocks: jax.Array) -> jax.Array:
    """The values of codes before they are multiplied by their scales, float32.

    Args:
      qt: the QTensor whose zero points and codebooks apply.
      blocks: codes, arranged as in `decode_blocks`.
    """
    geometry = qt.meta.geometry
    if qt.zero_point is not None:
        zero = geometry.scale_to_blocks(qt.zero_point)
        codes = blocks.astype(jnp.int32) - zero.astype(jnp.int32)
        return codes.astype(jnp.float32)
    if qt.codebook is not None:
        entries = geometry.scale_to_blocks(jnp.moveaxis(qt.codebook, -1, 0))
        table = jnp.moveaxis(entries, 0, -1)
        return formats.decode_by_table(qt.spec.fmt, table, blocks)
    return qt.spec.fmt.decode(blocks)


def scale_values(qt: QTensor) -> jax.Array:
    """The scales as float32 `[*batch, *num_blocks]`, dequantized if necessary.

    Args:
      qt: a QTensor.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.full((64, 1), 2.0), "nf4_dq")
      >>> jaxq.qtensor.scale_values(qt).tolist()
      [[2.0]]
    """
    return stored_values(qt.scale)


def stored_values(scale: jax.Array | QTensor) -> jax.Array:
    """The float32 values of a scale as it is stored."""
    if not isinstance(scale, QTensor):
        return _scales.load_from_dtype(scale)
    values = dequantize(scale, dtype=jnp.float32)
    if scale.offset is None:
        return values
    # With an offset (the mean), a small scale can be dequantized to a negative number.
    # A negative scale would change the signs of its block.
    return jnp.maximum(values, 0.0)
