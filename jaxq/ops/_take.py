"""Rows of a quantized table: embedding lookup."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxq import sharding
from jaxq.qtensor import Geometry, QTensor, dequantize, relayout, scale_values


def take(table: QTensor, indices: jax.typing.ArrayLike) -> jax.Array:
    """`dequantize(table)[indices]`, dequantizing only the rows asked for.

    Args:
      table: QTensor `[n, d]` whose scales are shared along -1 (`contracting=(-1,)`), without batch axes.
      indices: integers of any shape; out of range ones give NaN, as `jnp.take` does.

    Returns:
      `table.dtype`, `[*indices.shape, d]`.

    Raises:
      TypeError: `indices` are not integers.
      ValueError: `table` is no such QTensor.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> table = jaxq.quantize(jnp.eye(8), "int8", contracting=(-1,))
      >>> jaxq.ops.take(table, jnp.array([3, 3])).shape
      (2, 8)
    """
    if not isinstance(table, QTensor):
        raise TypeError(
            f"take: table must be a QTensor, got {type(table).__name__}. Index arrays with jnp.take."
        )
    geometry = table.meta.geometry
    if (
        geometry.order != (-2, -1)
        or geometry.num_contracted != 1
        or geometry.flat
        or table.batch_shape
    ):
        raise ValueError(
            f"take: the table must be [n, d] with scales shared along -1, got {table!r}."
        )
    if geometry.block_shape[0] not in (1, None):
        raise ValueError(
            f"take: the blocks of {table!r} run across rows. Use jaxq.dequantize(table)[indices]."
        )
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"take: indices must be integers, got {indices.dtype.name}{list(indices.shape)}."
        )

    return sharding.over_explicit_axes(
        _take, (*sharding.spec_of(indices), None), table, indices
    )


def _take(table: QTensor, indices: jax.Array) -> jax.Array:
    table, geometry = relayout(table, "rows"), table.meta.geometry
    n = geometry.shape[0]
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)  # n may be beyond a narrow type
    row = jnp.where(indices < 0, indices + n, indices)

    def rows(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if leaf.shape[0] == 1:
            return jnp.broadcast_to(leaf[0], (*indices.shape, *leaf.shape[1:]))
        return jnp.take(leaf, row, axis=0, mode="clip")

    # The rows asked for become batch axes of a one-row geometry.
    one_row = Geometry(
        geometry.shape[-1:], (-1,), 1, geometry.block_shape[-1:], geometry.multiple
    )
    spec = table.spec.replace(scale="float32", packing=table.spec.order)
    found = QTensor(
        jnp.take(table.data, row, axis=0, mode="clip"),
        rows(scale_values(table)),  # pyright: ignore[reportArgumentType]
        rows(table.zero_point),
        rows(table.offset),
        rows(table.codebook),
        dataclasses.replace(table.meta, geometry=one_row, spec=spec),
    )
    inside = (row >= 0) & (row < n)
    return jnp.where(inside[..., None], dequantize(found), jnp.nan)
