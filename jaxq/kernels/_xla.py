"""Float activations times a quantized weight in plain XLA, in blocks of rows.

A dequantized weight is 4 to 16 times larger than the quantized one. On a CPU the page
faults of that temporary array cost more than the product. So rows are decoded in blocks
that stay in the cache, and each block is multiplied while it is there:

    for each block of rows:  y[rows] = decode(codes[rows]) @ x.T    # [r, k] @ [k, m]

Three choices are made for XLA:CPU:

- The halves of a byte are never interleaved. Each half is multiplied with its part of
  x.
- The block is the left operand, which the CPU's matrix library prefers.
- y stays [n, m] until the last block is done. XLA would fold a transpose right after a
  product into a form that the library does not support.

With many rows of x, to write y twice takes longer than to join the fields of a block.
Then x is the left operand, and each block gives columns of y (`_many_rows_matmul`).

With few rows of x, on one or two cores, blocks are smaller and one core decodes them
(`_few_rows_matmul`). The time to start work on another core, about 50 microseconds, is
then as long as the work on a block.

The backward pass runs the same loop: dx is a sum over blocks, and scales get exact
gradients.

On an accelerator the blocks are larger (`RowMeta.block_bytes`). Most weights are one
block, and the product is then one dense product with the decoded weight. It computes
the products that have no kernel, and the products with many rows of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.kernels._devices import num_cores
from jaxq.kernels._one_step import as_one_step
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    block_rows,
    columns_of_block,
    decode_field,
    field_length,
    for_blocks,
    join_fields,
    num_fields,
    num_groups,
    split_fields,
    work_bytes,
)

# Up to this number of rows of x and of cores, one core decodes the weight. Products of
# 128 rows are slower that way.
_FEW_ROWS = 16
_FEW_CORES = 2
# From this number of rows of x on, the time to write y twice counts.
_MANY_ROWS = 128
# Bytes of decoded weight in memory at one time with few rows of x. They stay in the
# cache of one core, which has 1 MB or more in a server.
_SMALL_BLOCK_BYTES = 3 * 2**18


def weight_only_matmul(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """Computes `x @ decode(rows).T` and accumulates in float32.

    Args:
      x: `[m, k]` float32, bfloat16 or float16. Weights are rounded to its dtype, as for
        a matrix unit.
      rows: the weight, `[n, k]`.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`.
    """
    m, n = x.shape[0], rows.data.shape[0]
    if 0 in (m, n, meta.k):
        return jnp.zeros((m, n), jnp.float32)
    groups = num_groups(rows)
    # A scale that is constant along k multiplies the result instead of the weights.
    scale_result = groups == 1 and rows.offset is None
    if meta.block_bytes is not None and block_rows(meta, n) == n:
        return _dense_matmul(x, rows, meta, scale_result)
    is_on_cpu = meta.block_bytes is None
    has_many_blocks = block_rows(meta, n) < n
    if is_on_cpu and has_many_blocks and m <= _FEW_ROWS and num_cores() <= _FEW_CORES:
        return _few_rows_matmul(x, rows, meta, scale_result)
    if is_on_cpu and _has_many_rows(m, meta, num_fields(meta, groups)):
        return _many_rows_matmul(x, rows, meta, scale_result)
    wide = _without_single_row(x)
    x_fields = split_fields(wide, meta, groups)  # each [m, field_length]

    def product(block: Rows) -> jax.Array:
        weights = [
            decode_field(block, meta, i, scaled=not scale_result).astype(wide.dtype)
            for i in range(len(x_fields))
        ]
        terms = [
            _dot_float32(weight, field, (1, 1))
            for weight, field in zip(weights, x_fields, strict=True)
        ]
        total = functools.reduce(jnp.add, terms)  # [r, m]
        return total * block.scale.astype(jnp.float32) if scale_result else total

    def write(y: jax.Array, start: jax.Array, block: Rows) -> jax.Array:
        at = (start, jnp.zeros_like(start))
        return lax.dynamic_update_slice(y, product(block), at)

    y = jnp.zeros((n, wide.shape[0]), jnp.float32)
    return for_blocks(rows, meta, write, y).T[:m]


def _has_many_rows(m: int, meta: RowMeta, fields: int) -> bool:
    """True if m rows of x are worth a weight whose fields are joined.

    To join the fields of n rows of the weight takes time for `n * k` numbers. To keep
    them apart takes time for `n * m` sums. The rule assumes that a sum takes as long as
    joining four numbers. This factor has not been measured. There is nothing to join if
    a row is one field.

    A symbolic number of rows, as `jax.export` allows, is not many.
    """
    if not isinstance(m, int) or m < _MANY_ROWS:
        return False
    return fields == 1 or m >= meta.k // 4


def _many_rows_matmul(
    x: jax.Array, rows: Rows, meta: RowMeta, scale_result: bool
) -> jax.Array:
    """`weight_only_matmul` of many rows of x on a CPU.

    One product computes the columns of y that belong to a block. So there are no sums
    over fields, no copy of x and no transpose of y. A small weight is a single block,
    and its product is y itself.
    """

    m, n = x.shape[0], rows.data.shape[0]

    def product(x: jax.Array, block: Rows) -> jax.Array:
        return _dense_matmul(x, block, meta, scale_result)  # [m, r]

    def write(y: jax.Array, start: jax.Array, block: Rows) -> jax.Array:
        at = (jnp.zeros_like(start), start)
        return lax.dynamic_update_slice(y, product(x, block), at)

    def zeros(*operands: Any) -> jax.Array:
        return jnp.zeros((m, n), jnp.float32)

    if block_rows(meta, n) == n:
        return as_one_step(rows.data, product, zeros, x, rows)
    return for_blocks(rows, meta, write, zeros())


def _few_rows_matmul(
    x: jax.Array, rows: Rows, meta: RowMeta, scale_result: bool
) -> jax.Array:
    """`weight_only_matmul` of few rows of x on a CPU with one or two cores.

    XLA:CPU divides a program that decodes a block over all cores, and waits for them.
    It does not divide a program that updates an array in place. So the fields of a
    block are written into one array, which all blocks share. There is then also one
    product instead of one for each field.

    bfloat16 products run in float32, with weights that are rounded to bfloat16. A CPU
    without bfloat16 units would convert both operands anyway.
    """
    m, n, groups = x.shape[0], rows.data.shape[0], num_groups(rows)
    dtype = jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype
    wide = _without_single_row(x.astype(dtype))
    x_fields = split_fields(wide, meta, groups)
    joined_x = jnp.concatenate(x_fields, axis=1)  # [m, fields * field_length]
    length = field_length(meta, groups)
    round_weight = _rounding(x.dtype, rows, meta, scale_result)
    row_factor = None
    if round_weight is _round_exact_product:
        rows, row_factor = _without_huge_scales(rows)

    def write(
        carry: tuple[jax.Array, jax.Array], start: jax.Array, block: Rows
    ) -> tuple[jax.Array, jax.Array]:
        y, weight = carry
        for i in range(len(x_fields)):
            part = decode_field(block, meta, i, scaled=not scale_result)
            at = (0, i * length)
            weight = lax.dynamic_update_slice(weight, round_weight(part), at)
        part_of_y = _dot_float32(weight, joined_x, (1, 1))  # [r, m]
        if scale_result:
            part_of_y = part_of_y * block.scale.astype(jnp.float32)
        at = (start, jnp.zeros_like(start))
        return lax.dynamic_update_slice(y, part_of_y, at), weight

    count = block_rows(meta, n, most_bytes=_SMALL_BLOCK_BYTES)
    y = jnp.zeros((n, wide.shape[0]), jnp.float32)
    weight = jnp.zeros((count, joined_x.shape[1]), dtype)
    y, _ = for_blocks(rows, meta, write, (y, weight), most_bytes=_SMALL_BLOCK_BYTES)
    if row_factor is not None:
        y = y * row_factor
    return y.T[:m]


def _rounding(
    dtype: jnp.dtype, rows: Rows, meta: RowMeta, scale_result: bool
) -> Callable[[jax.Array], jax.Array]:
    """Returns what rounds decoded numbers to `dtype`, the dtype of x."""
    if dtype != jnp.bfloat16:
        return lambda weight: weight.astype(dtype)
    is_integer = meta.fmt.kind == "integer"
    if is_integer and scale_result and rows.zero_point is None:
        return lambda weight: weight  # codes of at most 8 bits
    has_short_scale = rows.scale.dtype == jnp.bfloat16
    # The difference of a code and its zero point has at most 9 bits, and such a scale
    # has 8 bits. float32 holds the product.
    is_exact = is_integer and has_short_scale and rows.offset is None
    return _round_exact_product if is_exact else _round_to_bfloat16


def _without_huge_scales(rows: Rows) -> tuple[Rows, jax.Array]:
    """Divides rows with scales of `2**64` and more by `2**64`.

    Returns:
      The rows, and what multiplies their products: float32 `[n, 1]` or `[1, 1]`.
    """
    largest = jnp.max(jnp.abs(rows.scale), axis=1, keepdims=True)
    is_huge = largest >= 2.0**64
    scale = jnp.where(is_huge, rows.scale * 2.0**-64, rows.scale)
    factor = jnp.where(is_huge, jnp.float32(2.0**64), jnp.float32(1))
    return rows._replace(scale=scale), factor


def _round_to_bfloat16(weight: jax.Array) -> jax.Array:
    """Rounds float32 numbers to bfloat16, and returns float32.

    XLA would leave out a cast to bfloat16 and back.
    """
    return lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)


def _round_exact_product(weight: jax.Array) -> jax.Array:
    """`_round_to_bfloat16` of exact products below `2**111`, in a third of the time.

    The sum has 8 of the 24 bits for the weight. The subtraction is exact. A compiler
    may fuse the product that made the weight into the sum. That changes nothing, if the
    product was exact.

    References: Dekker (1971), "A Floating-Point Technique for Extending the Available
    Precision", section 5.
    """
    shifted = weight * np.float32(2**16)
    return (weight + shifted) - shifted


def whole_numbers_matmul(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """Computes `x @ decode(rows).T` of whole numbers, with an exact sum in each group.

    The scale multiplies the sum of a group instead of the weights. The caller checks
    that float32 holds this sum.

    Args:
      x: float32 `[m, k]`, whole numbers.
      rows: the weight, `[n, k]`, in an integer format.
      meta: static facts of the rows.

    Returns:
      float32 `[m, n]`.
    """
    m, n, groups = x.shape[0], rows.data.shape[0], num_groups(rows)
    if 0 in (m, n, meta.k):
        return jnp.zeros((m, n), jnp.float32)
    size = field_length(meta, groups) // groups
    x_fields = [
        jnp.swapaxes(field.reshape(m, groups, size), 0, 1)  # [groups, m, size]
        for field in split_fields(x, meta, groups)
    ]
    dims = (((2,), (2,)), ((1,), (0,)))

    def product(block: Rows) -> jax.Array:
        """The product with a few rows, `[r, m]`."""
        terms = []
        for i, field in enumerate(x_fields):
            weight = decode_field(block, meta, i, scaled=False)
            weight = weight.reshape(-1, groups, size)
            terms.append(lax.dot_general(weight, field, dims))
        sums = functools.reduce(jnp.add, terms)  # [groups, r, m]
        scale = block.scale.astype(jnp.float32).T[:, :, None]  # [groups, r or 1, 1]
        return jnp.sum(sums * scale, axis=0)

    def write(y: jax.Array, start: jax.Array, block: Rows) -> jax.Array:
        at = (start, jnp.zeros_like(start))
        return lax.dynamic_update_slice(y, product(block), at)

    row_bytes = work_bytes(meta, groups * m)
    y = jnp.zeros((n, m), jnp.float32)
    return for_blocks(rows, meta, write, y, row_bytes=row_bytes).T


def _dense_matmul(
    x: jax.Array, rows: Rows, meta: RowMeta, scale_result: bool
) -> jax.Array:
    """`weight_only_matmul` by one dense product.

    The fields of the decoded weight are joined in the order of x's columns. So there is
    one product instead of one for each field, and x is not cut. XLA joins the fields in
    the program that decodes them.
    """
    weight = _joined_weight(rows, meta, x.dtype, scaled=not scale_result)  # [n, k]
    y = _dot_float32(_without_single_row(x), weight, (1, 1))[: x.shape[0]]  # [m, n]
    return y * rows.scale.astype(jnp.float32).T if scale_result else y


def transposed_matmul(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """Computes `x @ decode(rows)` and accumulates in float32.

    Args:
      x: `[m, n]` float32, bfloat16 or float16. Weights are rounded to its dtype.
      rows: the weight, `[n, k]`.
      meta: static facts of the rows.

    Returns:
      float32 `[m, k]`.
    """
    m, n, groups = x.shape[0], rows.data.shape[0], num_groups(rows)
    fields = num_fields(meta, groups)
    if 0 in (m, n, meta.k):
        return jnp.zeros((m, meta.k), jnp.float32)
    if meta.block_bytes is None and _has_many_rows(m, meta, fields):
        return _many_rows_transposed(x, rows, meta)
    index = jnp.arange(block_rows(meta, n), dtype=jnp.int32)

    def add(
        totals: list[jax.Array], start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> list[jax.Array]:
        part = columns_of_block(x, start, index, num_repeats)  # [m, r]
        part = _without_single_row(part)
        weights = [
            decode_field(block, meta, i).astype(part.dtype) for i in range(fields)
        ]
        return [
            total + _dot_float32(part, weight, (1, 0))[:m]
            for total, weight in zip(totals, weights, strict=True)
        ]

    zeros = [jnp.zeros((m, field_length(meta, groups)), jnp.float32)] * fields
    totals = for_blocks(rows, meta, add, zeros, with_repeats=True)
    return join_fields(totals, meta)


def _many_rows_transposed(x: jax.Array, rows: Rows, meta: RowMeta) -> jax.Array:
    """`transposed_matmul` of many rows of x on a CPU.

    The fields of a block are joined, so that no result is. Each block is added to the
    whole result, so blocks are large: a decoded block may have the size of the result.
    A single block needs no addition.
    """
    (m, n), least_rows = x.shape, x.shape[0] // 16 * 16
    count = block_rows(meta, n, least_rows=least_rows)

    def product(part: jax.Array, block: Rows) -> jax.Array:
        weight = _joined_weight(block, meta, part.dtype, scaled=True)  # [r, k]
        return _dot_float32(part, weight, (1, 0))

    def add(
        total: jax.Array, start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> jax.Array:
        index = jnp.arange(count, dtype=jnp.int32)
        part = columns_of_block(x, start, index, num_repeats)  # [m, r]
        return total + product(part, block)

    def zeros(*operands: Any) -> jax.Array:
        return jnp.zeros((m, meta.k), jnp.float32)

    if count == n:
        return as_one_step(rows.data, product, zeros, x, rows)
    return for_blocks(
        rows, meta, add, zeros(), with_repeats=True, least_rows=least_rows
    )


def _joined_weight(
    rows: Rows, meta: RowMeta, dtype: jnp.dtype, *, scaled: bool
) -> jax.Array:
    """The decoded numbers of all fields in the order of x's columns, `[n, k]`."""
    fields = range(num_fields(meta, num_groups(rows)))
    parts = [decode_field(rows, meta, i, scaled=scaled) for i in fields]
    return join_fields([part.astype(dtype) for part in parts], meta)


def rows_gradient(x: jax.Array, rows: Rows, meta: RowMeta, dy: jax.Array) -> Rows:
    """Returns the gradients of scale, offset and codebook for `y = x @ decode(rows).T`.

    Args:
      x: `[m, k]`.
      rows: the weight, `[n, k]`.
      meta: static facts of the rows.
      dy: cotangent of y, `[m, n]`.

    Returns:
      `Rows` with the gradients. The other fields are None.
    """
    groups, n = num_groups(rows), rows.data.shape[0]
    leaves = {"scale": rows.scale, "offset": rows.offset, "codebook": rows.codebook}
    floats = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    x_fields = split_fields(x.astype(jnp.float32), meta, groups)
    dy = dy.astype(jnp.float32)
    count = block_rows(meta, n)

    def add(
        totals: dict, start: jax.Array, block: Rows, num_repeats: jax.Array
    ) -> dict:
        index = jnp.arange(count, dtype=jnp.int32)
        dy_block = columns_of_block(dy, start, index, num_repeats)  # [m, r]

        def decode(leaves: dict) -> list[jax.Array]:
            weight = block._replace(**leaves)
            return [decode_field(weight, meta, i) for i in range(len(x_fields))]

        wide = {name: getattr(block, name).astype(jnp.float32) for name in floats}
        _, pull = jax.vjp(decode, wide)
        # dW = dy.T @ x, [r, field_length] for each field
        (gradients,) = pull(
            [_dot_float32(dy_block, field, (0, 0)) for field in x_fields]
        )

        def add_block(total: jax.Array, gradient: jax.Array) -> jax.Array:
            if total.shape[0] == 1 and n != 1:  # all rows share the leaf
                return total + gradient
            old = lax.dynamic_slice_in_dim(total, start, count, axis=0)
            new = old + gradient
            return lax.dynamic_update_slice_in_dim(total, new, start, axis=0)

        return jax.tree.map(add_block, totals, gradients)

    totals = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in floats.items()}
    if 0 not in (x.shape[0], n, meta.k):
        totals = for_blocks(rows, meta, add, totals, with_repeats=True)
    gradients = dict.fromkeys(Rows._fields)
    gradients |= {
        name: total.astype(floats[name].dtype) for name, total in totals.items()
    }
    return Rows(**gradients)  # pyright: ignore[reportArgumentType]


def _without_single_row(x: jax.Array) -> jax.Array:
    """Adds a row of zeros to a single row of a 16-bit dtype.

    XLA:CPU does not compute a product with one row as a matrix product. It would widen
    the whole weight to float32.
    """
    if x.shape[0] == 1 and x.dtype != jnp.float32:
        return jnp.pad(x, ((0, 1), (0, 0)))
    return x


def _dot_float32(a: jax.Array, b: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    dims = (((contracting[0],), (contracting[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
