"""A quantized matrix as rows `[n, k]` of raw arrays, and how to decode it in blocks.

A block is a few rows. A field is the part of every row that one shift unpacks, such as
the low halves of the bytes. Codes in HALVES packing are never interleaved. Each field
is multiplied with its own part of x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels._one_step import as_one_step

# The order of codes in memory: along the row, `[n, k]`, or along the column, `[k, n]`.
# All kernels read rows. The TPU kernel also reads columns.
Layout = Literal["rows", "columns"]

# Bytes of decoded weight in memory at one time on a CPU. A product of 128 tokens with a
# weight of 4096 x 4096 then needs about 7 MB, x and y included. Smaller blocks repack x
# more often, and larger ones leave the cache.
_BLOCK_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class RowMeta:
    """Static facts about `Rows`.

    Attributes:
      fmt: format of the codes.
      packing: order of the codes in bytes.
      unit: number of codes in a HALVES unit. None means that a row is one unit. If the
        unit does not divide the row, the codes that are left are a shorter unit.
      k: length of a row in codes, without padding.
      padded_k: stored length of a row in codes: k, padded to whole bytes.
      layout: "rows", or "columns" if `data` is `[padded_k * bits / 8, n]`.
      block_bytes: bytes of decoded rows in memory at one time. None means the size for
        a CPU.
      group: number of codes that share a scale, if a row has several scales. The last
        group of a row may have fewer codes. None means that all groups are equally
        long.
    """

    fmt: formats.Format
    packing: formats.Packing
    unit: int | None
    k: int
    padded_k: int
    layout: Layout = "rows"
    block_bytes: int | None = None
    group: int | None = None


class Rows(NamedTuple):
    """Codes and scales of one matrix.

    Attributes:
      data: stored codes `[n, padded_k * bits / 8]`.
      scale: float `[n, g]`, or `[1, g]` if all rows share it: one number for each of
        the g groups of `group_size` codes. None if the result is the sum of the codes.
      zero_point: integers with the shape of scale, in the format's code dtype, or None.
      offset: float32 with the shape of scale, or None.
      codebook: float32 `[n or 1, g, num_codes]`, or None.
    """

    data: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None


def leaf_names(rows: Rows) -> tuple[str, ...]:
    """Returns the names of the fields that are not None, in order."""
    return tuple(name for name, leaf in rows._asdict().items() if leaf is not None)


def rows_of_leaves(names: Sequence[str], leaves: Sequence[Any]) -> Rows:
    """Returns the `Rows` of these leaves. Fields without a leaf are None."""
    fields: dict[str, Any] = dict.fromkeys(Rows._fields)
    fields |= dict(zip(names, leaves, strict=True))
    return Rows(**fields)


def int8_meta(k: int) -> RowMeta:
    """Returns the static facts of rows of k int8 codes without padding."""
    return codes_meta("int8", k)


def codes_meta(name: str, k: int) -> RowMeta:
    """Returns the static facts of rows of k codes of 8 bits without padding."""
    return RowMeta(formats.get(name), formats.Packing.NONE, None, k, k)


def num_groups(rows: Rows) -> int:
    """Returns the number of scales along k. It is 1 if there are no scales."""
    return 1 if rows.scale is None else rows.scale.shape[-1]


def group_size(meta: RowMeta, groups: int) -> int:
    """Returns the number of codes that share a scale, for rows with `groups` scales.

    The last group may have fewer codes. The size is 0 if there are no scales.
    """
    if groups > 1 and meta.group is not None:
        return meta.group
    return meta.padded_k // groups if groups else 0


def as_rows(rows: Rows, meta: RowMeta) -> tuple[Rows, RowMeta]:
    """Returns the same matrix with its codes along rows."""
    if meta.layout == "rows":
        return rows, meta
    return rows._replace(data=rows.data.T), dataclasses.replace(meta, layout="rows")


def slice_rows(rows: Rows, start: jax.Array, count: int) -> Rows:
    """Returns `count` rows from `start` on. A leaf that all rows share is not cut."""
    n = rows.data.shape[0]

    def cut(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or (leaf.shape[0] == 1 and n != 1):
            return leaf
        return lax.dynamic_slice_in_dim(leaf, start, count, axis=0)

    return Rows(*(cut(leaf) for leaf in rows))  # pyright: ignore[reportArgumentType]


def unpack_codes(rows: Rows, meta: RowMeta) -> jax.Array:
    """Returns all codes of every row, `[n, padded_k]`, in the format's code dtype."""
    patterns = formats.unpack(rows.data, meta.fmt.bits, meta.packing, unit=meta.unit)
    if meta.fmt.code_dtype == np.int8:
        return formats.as_signed(patterns, meta.fmt.bits)
    return patterns


# Fields: parts of a row that need no interleaving.


def num_fields(meta: RowMeta, groups: int) -> int:
    """Returns the number of fields of a row: the halves, quarters or eighths of a unit.

    A row has a single field if its packing is not HALVES. It also has a single field if
    it has several groups and a unit is not exactly one group.
    """
    if meta.packing is not formats.Packing.HALVES:
        return 1
    if groups == 1 or meta.unit == group_size(meta, groups):
        return formats.codes_per_pack(meta.fmt.bits, meta.packing)
    return 1


def field_length(meta: RowMeta, groups: int) -> int:
    """Returns the number of codes in a field of a row.

    Fields have whole groups and whole units. If the last group or unit of a row is not
    full, the end of each field is padding. It is added to a block of rows at a time.
    """
    fields = num_fields(meta, groups)
    if fields == 1:
        return groups * group_size(meta, groups)
    unit = meta.unit or meta.padded_k
    num_units = -(-meta.padded_k // unit) if unit else 0
    return num_units * (unit // fields)


def decode_field(
    rows: Rows, meta: RowMeta, index: int, *, scaled: bool = True
) -> jax.Array:
    """Returns the numbers of field `index` of every row.

    Args:
      rows: codes and scales, `[n, k]`.
      meta: static facts of the rows.
      index: which field. `split_fields` cuts activations in the same way.
      scaled: False leaves out the scale and the offset. Use it if the scale is constant
        along k. The caller then multiplies the result of the product with the scale.

    Returns:
      float32 `[n, field_length]`. Numbers of padding are finite if the scales are. They
      are multiplied with zeros.
    """
    n, groups = rows.data.shape[0], rows.scale.shape[-1]
    codes = _codes_of_field(rows, meta, groups, index)
    codes = _padded(codes, field_length(meta, groups), meta.fmt.zero_code)
    codes = codes.reshape(n, groups, -1)
    if rows.zero_point is not None:
        # int16 holds the difference of any two 8-bit codes.
        codes = codes.astype(jnp.int16)
        zero_point = rows.zero_point[..., None].astype(jnp.int16)
        values = (codes - zero_point).astype(jnp.float32)
    elif rows.codebook is not None:
        values = formats.decode_by_table(meta.fmt, rows.codebook[:, :, None], codes)
    else:
        values = meta.fmt.decode(codes)
    if scaled:
        values = values * rows.scale.astype(jnp.float32)[..., None]
        if rows.offset is not None:
            values = values + rows.offset[..., None]
    return values.reshape(n, -1)


def _codes_of_field(rows: Rows, meta: RowMeta, groups: int, index: int) -> jax.Array:
    """The codes of field `index` of every row, in the format's code dtype.

    The shape is `[n, padded_k / num_fields]`.
    """
    bits = meta.fmt.bits
    if num_fields(meta, groups) == 1:
        return unpack_codes(rows, meta)
    if meta.fmt.code_dtype == np.int8:
        # Shift the field to the top of the byte and back. The second shift copies the
        # sign bit.
        up, down = np.uint8(8 - bits * (index + 1)), np.int8(8 - bits)
        return (rows.data << up).astype(jnp.int8) >> down
    return formats.field(rows.data, index, bits)


def split_fields(x: jax.Array, meta: RowMeta, groups: int) -> list[jax.Array]:
    """Cuts activations `[m, k]` as `decode_field` cuts rows, padded with zeros.

    Returns:
      One array `[m, field_length]` for each field.
    """
    fields, length = num_fields(meta, groups), field_length(meta, groups)
    if fields == 1:
        return [_padded(x, length)]
    x = _padded(x, meta.padded_k)
    m, unit = x.shape[0], meta.unit or meta.padded_k
    whole = meta.padded_k // unit * unit
    last = meta.padded_k - whole
    parts = x[:, :whole].reshape(m, whole // unit, fields, unit // fields)
    if last:
        # The halves of the last unit are shorter.
        shorter = x[:, whole:].reshape(m, 1, fields, last // fields)
        parts = jnp.concatenate([parts, _padded(shorter, unit // fields)], axis=1)
    return [parts[:, :, i].reshape(m, length) for i in range(fields)]


def join_fields(parts: list[jax.Array], meta: RowMeta) -> jax.Array:
    """The inverse of `split_fields`: `[m, k]` without padding."""
    if len(parts) == 1:
        return parts[0][:, : meta.k]
    m, unit = parts[0].shape[0], meta.unit or meta.padded_k
    by_unit = (m, -(-meta.padded_k // unit), unit // len(parts))
    units = jnp.stack([part.reshape(by_unit) for part in parts], axis=2)
    num_whole, last = divmod(meta.padded_k, unit)
    joined = units[:, :num_whole].reshape(m, num_whole * unit)
    if last:
        # The halves of the last unit are shorter.
        shorter = units[:, num_whole, :, : last // len(parts)].reshape(m, last)
        joined = jnp.concatenate([joined, shorter], axis=1)
    return joined[:, : meta.k]


def _padded(a: jax.Array, length: int, value: int = 0) -> jax.Array:
    """Pads the last axis to `length`."""
    missing = length - a.shape[-1]
    if not missing:
        return a
    widths = [(0, 0)] * (a.ndim - 1) + [(0, missing)]
    return jnp.pad(a, widths, constant_values=np.asarray(value, a.dtype))


# Blocks of rows.


def for_blocks(
    rows: Rows,
    meta: RowMeta,
    step,
    carry,
    *,
    with_repeats: bool = False,
    row_bytes: int | None = None,
    most_bytes: int | None = None,
    least_rows: int = 16,
):
    """Folds `step(carry, start, block_rows[, num_repeats])` over blocks of rows.

    All blocks have one size. If that size does not divide n, the last block starts
    early. Its first `num_repeats` rows are then also in the block before.

    Args:
      rows: codes and scales, `[n, k]`.
      meta: static facts of the rows.
      step: returns the next carry. `start` is the index of the block's first row.
      carry: the first carry.
      with_repeats: True passes `num_repeats` to `step`.
      row_bytes: bytes of memory that one row needs while its block is computed. None
        means the bytes of its decoded numbers.
      most_bytes: the largest size of a block in bytes on a CPU. None means the usual
        size.
      least_rows: the smallest number of rows in a block, whatever their size.

    Returns:
      The last carry.
    """
    n = rows.data.shape[0]
    count = block_rows(meta, n, row_bytes, most_bytes, least_rows)
    num_blocks = -(-n // count)
    if num_blocks == 1:
        repeats = (jnp.int32(0),) if with_repeats else ()

        def single(carry, rows: Rows):
            return step(carry, jnp.int32(0), rows, *repeats)

        if meta.block_bytes is not None:
            return single(carry, rows)
        return as_one_step(rows.data, single, lambda carry, rows: carry, carry, rows)

    def body(i: jax.Array, carry):
        i = i.astype(jnp.int32)  # int64 if 64-bit types are enabled
        start = jnp.minimum(i * count, n - count)
        repeats = (i * count - start,) if with_repeats else ()
        return step(carry, start, slice_rows(rows, start, count), *repeats)

    return lax.fori_loop(0, num_blocks, body, carry)


def block_rows(
    meta: RowMeta,
    n: int,
    row_bytes: int | None = None,
    most_bytes: int | None = None,
    least_rows: int = 16,
) -> int:
    """Returns the number of rows in a block of `for_blocks`.

    It is a multiple of 16, `least_rows` or n.
    """
    block_bytes = meta.block_bytes
    if block_bytes is None:
        block_bytes = min(_BLOCK_BYTES, most_bytes or _BLOCK_BYTES)
    row_bytes = row_bytes or 4 * max(meta.padded_k, 1)
    return min(n, max(least_rows, block_bytes // row_bytes // 16 * 16))


def work_bytes(meta: RowMeta, num_sums: Any) -> int:
    """Returns the bytes that a row needs in a product: its codes or its partial sums.

    Args:
      meta: static facts of the rows.
      num_sums: number of partial sums of a row. A symbolic number, as `jax.export`
        allows, is left out.
    """
    sums_bytes = 8 * num_sums if isinstance(num_sums, int) else 0
    return max(4 * meta.padded_k, sums_bytes)


def columns_of_block(
    y: jax.Array, start: jax.Array, index: jax.Array, num_repeats: jax.Array
) -> jax.Array:
    """Returns the columns of `y` that belong to a block of rows.

    Columns of repeated rows are zero, so that a sum over blocks counts each row once.

    Args:
      y: `[m, n]`.
      start: index of the block's first row.
      index: int32 `[r]`, 0, 1, ... for a block of r rows.
      num_repeats: how many rows at the start of the block are repeats.

    Returns:
      `[m, r]`.
    """
    part = lax.dynamic_slice_in_dim(y, start, index.shape[0], axis=1)
    return jnp.where(index[None, :] >= num_repeats, part, jnp.zeros((), y.dtype))
