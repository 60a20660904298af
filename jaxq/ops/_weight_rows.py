"""A quantized weight as rows `[n, k]`: the input of kernels and of their XLA forms.

The kept axes of the weight are flattened to n, and the contracted axes to k.
`weight_rows` returns the arrays. `row_shapes` returns the shapes of these arrays.
`why_not_rows` gives the reason if a weight cannot be cut into rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxq import formats
from jaxq.kernels import KERNEL_SCALES, Layout, RowMeta, Rows
from jaxq.ops._facts import CodesFacts
from jaxq.qtensor import Geometry, Meta, QTensor, scale_values


def weight_rows(qt: QTensor) -> tuple[Rows, RowMeta]:
    """The rows of a QTensor without batch axes.

    Scales of 16 and 32 bits keep their dtype. All other scales become float32.

    Args:
      qt: a QTensor without batch axes and without an input scale, for which
        `why_not_rows(qt.meta)` is None.

    Returns:
      (rows, meta). The data of the rows are `[n, stored bytes]`, or `[stored bytes, n]`
      in the layout "columns". The scales are `[n or 1, groups]`. `meta` holds the
      static facts of the rows.
    """
    assert qt.input_scale is None, "the input scale must be moved to the input"
    geometry = qt.meta.geometry
    num_rows = _num_rows(geometry)
    if geometry.flat:
        data = qt.data.reshape(num_rows, -1)
    else:
        data = _flatten_kept(qt.data, num_rows, qt.meta.layout)
    scale = qt.scale
    if isinstance(scale, QTensor) or scale.dtype.name not in KERNEL_SCALES:
        scale = scale_values(qt)
    assert not isinstance(scale, QTensor)
    zero_point = offset = codebook = None
    if qt.zero_point is not None:
        zero_point = _per_row(qt.zero_point, geometry)
    if qt.offset is not None:
        offset = _per_row(qt.offset.astype(jnp.float32), geometry)
    if qt.codebook is not None:
        num_codes = qt.codebook.shape[-1]
        entries = [_per_row(qt.codebook[..., i], geometry) for i in range(num_codes)]
        codebook = jnp.stack(entries, axis=-1)  # [n or 1, groups, num_codes]
    rows = Rows(data, _per_row(scale, geometry), zero_point, offset, codebook)
    return rows, row_meta(qt.meta)


def row_meta(meta: Meta) -> RowMeta:
    """The static facts of the rows of a QTensor."""
    geometry = meta.geometry
    k = geometry.contracted_size
    return RowMeta(
        meta.spec.fmt,
        meta.packing,
        meta.pack_unit,
        k,
        k if geometry.flat else meta.stored_sizes[-1],
        meta.layout,
        group=geometry.block_shape[-1],
    )


def row_shapes(weight: CodesFacts) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `weight_rows` for a stack of weights.

    Returns:
      The shape of each leaf of the weight, by the name of the leaf in `Rows`. The first
      axis is the stack, the product of all batch axes.
    """
    meta, geometry = weight.meta, weight.meta.geometry
    stack, num_rows = math.prod(weight.batch_shape), _num_rows(geometry)
    if geometry.flat:
        row_bytes = math.prod(meta.stored_shape) // max(num_rows, 1)
    else:
        row_bytes = meta.stored_shape[0 if meta.layout == "columns" else -1]
    columns = meta.layout == "columns" and not geometry.flat
    data_shape = (row_bytes, num_rows) if columns else (num_rows, row_bytes)
    # uint8 means bytes here. Kernels read the width and sign of codes from the format.
    shapes = {"data": jax.ShapeDtypeStruct((stack, *data_shape), jnp.uint8)}
    num_axes = len(geometry.block_shape)
    for name in ("scale", "zero_point", "offset", "codebook"):
        leaf = getattr(weight, name)
        if leaf is not None:
            rows = _per_row_shape(leaf.shape[:num_axes], geometry)
            shape = (stack, *rows, *leaf.shape[num_axes:])
            shapes[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return shapes


def why_not_rows(meta: Meta) -> str | None:
    """Why a weight cannot be cut into rows; None if it can."""
    geometry, packing = meta.geometry, meta.packing
    if not geometry.flat:
        return None
    k, block = geometry.contracted_size, geometry.block_shape[0]
    if geometry.num_blocks != (1,) and (block is None or k % block):
        return f"blocks of {block} codes cross rows of {k} codes"
    codes_per_pack = formats.codes_per_pack(meta.spec.fmt.bits, packing)
    if geometry.padded_shape != geometry.storage_shape or k % codes_per_pack:
        return f"rows of {k} codes end inside a byte"
    one_unit = packing is formats.Packing.HALVES and meta.pack_unit is None
    if one_unit and k != geometry.storage_shape[0]:
        return "codes of different rows share bytes"
    return None


def _num_rows(geometry: Geometry) -> int:
    return math.prod(geometry.shape[axis] for axis in geometry.kept)


def _flatten_kept(data: jax.Array, num_rows: int, layout: Layout) -> jax.Array:
    """Merges the kept axes into one."""
    if layout == "columns":
        return data.reshape(data.shape[0], num_rows)
    return data.reshape(num_rows, data.shape[-1])


def _per_row(leaf: jax.Array, geometry: Geometry) -> jax.Array:
    """`[*num_blocks] -> [n, groups]`, or `[1, groups]` if all rows share the values."""
    num_rows = _num_rows(geometry)
    if geometry.flat:
        return leaf.reshape(1, 1) if leaf.size == 1 else leaf.reshape(num_rows, -1)
    if all(size == 1 for size in leaf.shape[:-1]):
        return leaf.reshape(1, leaf.shape[-1])
    blocks = zip(geometry.block_shape[:-1], geometry.storage_shape, strict=False)
    for axis, (block, size) in enumerate(blocks):
        if block != 1 and leaf.shape[axis] != size:
            repeated = jnp.repeat(leaf, block or size, axis=axis)
            leaf = repeated[(slice(None),) * axis + (slice(size),)]
    return leaf.reshape(num_rows, leaf.shape[-1])


def _per_row_shape(shape: tuple[int, ...], geometry: Geometry) -> tuple[int, int]:
    """The shape that `_per_row` gives for a leaf of `shape`."""
    num_rows = _num_rows(geometry)
    if geometry.flat:
        size = math.prod(shape)
        return (1, 1) if size == 1 else (num_rows, size // max(num_rows, 1))
    if all(size == 1 for size in shape[:-1]):
        return 1, shape[-1]
    return num_rows, shape[-1]
