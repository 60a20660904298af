"""`take`: embedding lookup in a quantized table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec
from jaxq.ops._decision import check_table
from jaxq.ops._operands import check_one_mesh
from jaxq.ops._trained import multiply_trained
from jaxq.qtensor import (
    Geometry,
    QTensor,
    TrainedWeight,
    check_leaves,
    dequantize,
    describe,
    relayout,
    scale_values,
)


def take(table: QTensor | TrainedWeight, indices: jax.typing.ArrayLike) -> jax.Array:
    """`dequantize(table)[indices]`; only the rows at the indices are dequantized.

    Args:
      table: QTensor `[n, d]` whose scales are shared along axis -1
        (`contracting=(-1,)`), without batch axes.
      indices: integers of any shape. An index out of range gives NaN, as in `jnp.take`.

    Returns:
      `table.dtype`, `[*indices.shape, d]`.

    Raises:
      TypeError: `table` is not a QTensor, a leaf of it has another dtype than its
        `meta` says, or `indices` are not integers.
      ValueError: `table` is not `[n, d]` with scales shared along axis -1, or it has
        tiles (`PerBlock`) of several rows.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> table = jaxq.quantize(jnp.eye(8), "int8", contracting=(-1,))
      >>> jaxq.ops.take(table, jnp.array([3, 3])).shape
      (2, 8)
    """
    if isinstance(table, TrainedWeight):
        return multiply_trained(jnp.asarray(indices), table, _take_rows, has_batch=None)
    if not isinstance(table, QTensor):
        raise TypeError(
            f"take: table must be a QTensor, got {type(table).__name__}. "
            "Index arrays with jnp.take."
        )
    check_leaves(table, "take")
    check_table(table)
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            "take: indices must be integers, got "
            f"{describe(indices.dtype.name, indices.shape)}. "
            "Pass indices.astype(jnp.int32)."
        )
    check_one_mesh((table, indices), "take")
    spec = PartitionSpec(*explicit_spec(indices), None)
    return call_on_auto_axes(_take, spec, table, indices)


def _take_rows(indices: jax.Array, table: QTensor | jax.Array) -> jax.Array:
    """Reads rows of a QTensor or of an array."""
    if isinstance(table, QTensor):
        return take(table, indices)
    return jnp.take(table, indices, axis=0)


def _take(table: QTensor, indices: jax.Array) -> jax.Array:
    """Dequantizes the rows as a QTensor. Its batch axes are the axes of `indices`."""
    table, geometry = relayout(table, "rows"), table.meta.geometry
    num_rows = geometry.shape[0]
    if indices.dtype.itemsize < 4:
        # A narrow dtype may be unable to hold num_rows.
        indices = indices.astype(jnp.int32)
    row_index = jnp.where(indices < 0, indices + num_rows, indices)

    def take_rows(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if leaf.shape[0] == 1:  # one entry for all rows
            return jnp.broadcast_to(leaf[0], (*indices.shape, *leaf.shape[1:]))
        return jnp.take(leaf, row_index, axis=0, mode="clip")

    row_geometry = Geometry(
        geometry.shape[-1:], (-1,), 1, geometry.block_shape[-1:], geometry.multiple
    )
    spec = table.spec.replace(scale="float32", packing=table.spec.order)
    offset = table.offset
    if offset is not None:  # a spec with float32 scales has float32 offsets
        offset = offset.astype(jnp.float32)
    input_scale = table.input_scale
    if input_scale is not None:
        sizes = (*indices.shape, *input_scale.shape)
        input_scale = jnp.broadcast_to(input_scale, sizes)
    rows = QTensor(
        jnp.take(table.data, row_index, axis=0, mode="clip"),
        take_rows(scale_values(table)),  # pyright: ignore[reportArgumentType]
        take_rows(table.zero_point),
        take_rows(offset),
        take_rows(table.codebook),
        dataclasses.replace(table.meta.with_geometry(row_geometry), spec=spec),
        input_scale=input_scale,
    )
    in_range = (row_index >= 0) & (row_index < num_rows)
    return jnp.where(in_range[..., None], dequantize(rows), jnp.nan)
