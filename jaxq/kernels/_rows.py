"""A quantized matrix as rows `[n, k]` of raw arrays, decoded part by part and block by block."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats

# How codes lie in memory: along the row, `[n, k]`, or along the column, `[k, n]`, as TPU kernels want them.
Layout = Literal["rows", "columns"]

# Bytes of decoded weight alive at once on a CPU: with x and y of 128 tokens at 4096 x 4096 a matmul stays under 8 MB.
_BLOCK_BYTES = 3 * 2**20


@dataclasses.dataclass(frozen=True)
class RowMeta:
    """Static facts about `Rows`.

    Attributes:
      fmt: format of the codes.
      packing: their order in bytes.
      unit: codes in a HALVES unit, None for a whole row.
      k: true length of a row.
      padded_k: its stored length in codes.
      layout: "rows", or "columns" where `data` is `[padded_k * bits / 8, n]`.
      block_bytes: decoded rows alive at once; None for what suits a CPU.
    """

    fmt: formats.Format
    packing: formats.Packing
    unit: int | None
    k: int
    padded_k: int
    layout: Layout = "rows"
    block_bytes: int | None = None


class Rows(NamedTuple):
    """Codes and scales of one matrix.

    Attributes:
      data: stored codes `[n, padded_k * bits / 8]`.
      scale: float `[n, g]`, or `[1, g]` where all rows share it; g groups of `padded_k / g` codes. None where the
        sums of codes themselves are wanted.
      zero_point: like scale in the code dtype, or None.
      offset: float32 like scale, or None.
      codebook: float32 `[n or 1, g, num_codes]`, or None.
    """

    data: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array | None


def as_rows(rows: Rows, meta: RowMeta) -> tuple[Rows, RowMeta]:
    """The same matrix with its codes along rows."""
    if meta.layout == "rows":
        return rows, meta
    return rows._replace(data=rows.data.T), dataclasses.replace(meta, layout="rows")


def slice_rows(rows: Rows, start: jax.Array, count: int) -> Rows:
    """`count` rows from `start` on; a shared scale stays shared."""

    def cut(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or leaf.shape[0] == 1 != rows.data.shape[0]:
            return leaf
        return lax.dynamic_slice_in_dim(leaf, start, count, axis=0)

    return Rows(*(cut(leaf) for leaf in rows))  # pyright: ignore[reportArgumentType]


def num_fields(meta: RowMeta, groups: int) -> int:
    """Into how many parts a row falls that need no interleaving: the halves (quarters, eighths) of each unit."""
    if meta.packing is not formats.Packing.HALVES:
        return 1
    group = meta.padded_k // groups
    return (
        formats.codes_per_pack(meta.fmt.bits, meta.packing)
        if groups == 1 or meta.unit == group
        else 1
    )


def decode_field(
    rows: Rows, meta: RowMeta, index: int, *, scaled: bool = True
) -> jax.Array:
    """Numbers of part `index` of every row, float32 `[n, padded_k / num_fields]`.

    Args:
      rows: codes and scales.
      meta: static facts.
      index: which part; `split_fields` cuts activations the same way.
      scaled: False leaves the scale out (for a scale that is constant along k and joins the result instead).
    """
    n, groups = rows.data.shape[0], rows.scale.shape[-1]
    codes = codes_of_field(rows, meta, groups, index).reshape(n, groups, -1)
    if rows.zero_point is not None:
        values = (
            codes.astype(jnp.int16) - rows.zero_point[..., None].astype(jnp.int16)
        ).astype(jnp.float32)
    elif rows.codebook is not None:
        values = formats.decode_by_table(meta.fmt, rows.codebook[:, :, None], codes)
    else:
        values = meta.fmt.decode(codes)
    if scaled:
        values = values * rows.scale.astype(jnp.float32)[..., None]
        if rows.offset is not None:
            values = values + rows.offset[..., None]
    return values.reshape(n, -1)


def codes_of_field(rows: Rows, meta: RowMeta, groups: int, index: int) -> jax.Array:
    """Codes of part `index` of every row, `[n, padded_k / num_fields]`, in the format's code dtype."""
    bits, fields = meta.fmt.bits, num_fields(meta, groups)
    if fields == 1:
        patterns = formats.unpack(rows.data, bits, meta.packing, unit=meta.unit)
        return (
            formats.as_signed(patterns, bits)
            if meta.fmt.code_dtype == np.int8
            else patterns
        )
    if (
        meta.fmt.code_dtype == np.int8
    ):  # shift the field to the top and back: the sign comes along
        up, down = np.uint8(8 - bits * (index + 1)), np.int8(8 - bits)
        return (rows.data << up).astype(jnp.int8) >> down
    return formats.field(rows.data, index, bits)


def split_fields(x: jax.Array, meta: RowMeta, groups: int) -> list[jax.Array]:
    """Activations `[m, k]` padded with zeros and cut as `decode_field` cuts rows: each `[m, padded_k / fields]`."""
    fields = num_fields(meta, groups)
    x = jnp.pad(x, ((0, 0), (0, meta.padded_k - meta.k)))
    if fields == 1:
        return [x]
    unit = meta.unit or meta.padded_k
    parts = x.reshape(x.shape[0], meta.padded_k // unit, fields, unit // fields)
    return [parts[:, :, i].reshape(x.shape[0], -1) for i in range(fields)]


def join_fields(parts: list[jax.Array], meta: RowMeta) -> jax.Array:
    """The inverse of `split_fields`, padding cut off: `[m, k]`."""
    if len(parts) == 1:
        return parts[0][:, : meta.k]
    m, unit = parts[0].shape[0], meta.unit or meta.padded_k
    units = [
        part.reshape(m, meta.padded_k // unit, unit // len(parts)) for part in parts
    ]
    return jnp.stack(units, axis=2).reshape(m, meta.padded_k)[:, : meta.k]


def for_blocks(
    rows: Rows,
    meta: RowMeta,
    step,
    carry,
    *,
    tell_fresh: bool = False,
    row_bytes: int | None = None,
):
    """Folds `step(carry, start, rows of the block[, fresh])` over blocks of rows.

    The last block starts early where the block size does not divide n; its first `fresh` rows were met before.
    `row_bytes`: what one row costs while its block is alive; None for its decoded numbers.
    """
    n = rows.data.shape[0]
    count = block_rows(meta, n, row_bytes)
    blocks = -(-n // count)
    if blocks == 1:
        extra = (jnp.int32(0),) if tell_fresh else ()
        return step(carry, jnp.int32(0), rows, *extra)

    def body(i: jax.Array, carry):
        i = i.astype(jnp.int32)  # int64 where 64-bit types are on
        start = jnp.minimum(i * count, n - count)
        extra = (i * count - start,) if tell_fresh else ()
        return step(carry, start, slice_rows(rows, start, count), *extra)

    return lax.fori_loop(0, blocks, body, carry)


def block_rows(meta: RowMeta, n: int, row_bytes: int | None = None) -> int:
    """Rows in a block of `for_blocks`."""
    bytes_at_once = _BLOCK_BYTES if meta.block_bytes is None else meta.block_bytes
    return min(
        n, max(16, bytes_at_once // (row_bytes or 4 * max(meta.padded_k, 1)) // 16 * 16)
    )
