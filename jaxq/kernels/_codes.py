"""Quantized activations times a quantized weight, computed without decoding.

Integer codes accumulate exactly in int32. The sums are then corrected for zero points
(Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", equation 7):

    sum (a - z_a)(b - z_b) = sum ab - z_b sum a - z_a sum b + K z_a z_b

int32 arithmetic wraps around, so only the corrected sum has to fit in int32. float8
codes are multiplied natively and accumulate in float32. If scales vary along k, each
group's partial sum is multiplied by the scales of its group.

float8 codes also multiply a weight in a narrower format, such as int4. Its numbers
without scales become float8, or bfloat16 if float8 does not hold them. Both are exact.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels._rows import (
    RowMeta,
    Rows,
    for_blocks,
    group_size,
    unpack_codes,
    work_bytes,
)
from jaxq.meshes import compile_time_eval

_NATIVE_FLOATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3b11fnuz",
)

# float8_e4m3fn holds all whole numbers up to this one.
_LARGEST_WHOLE = 16

# Bytes of a block of b on a CPU. The widened codes of a are in memory as well.
_BLOCK_BYTES = 3 * 2**20


def is_native_float(fmt: formats.Format) -> bool:
    """Returns True for the float8 formats that XLA multiplies without decoding."""
    return fmt.name in _NATIVE_FLOATS


def is_float8(dtype: Any) -> bool:
    """Returns True for the dtypes of these formats."""
    return jnp.dtype(dtype).name in _NATIVE_FLOATS


@functools.cache
def is_exact_in_float8(fmt: formats.Format) -> bool:
    """Returns True if float8_e4m3fn holds every number of a format, such as int4."""
    if fmt.kind == "integer":
        # Codes minus zero points are as large as the range of codes.
        return int(fmt.max - fmt.min) <= _LARGEST_WHOLE
    if fmt.bits >= 8:
        return False
    with compile_time_eval():
        numbers = np.asarray(fmt.decode(jnp.asarray(fmt.codes())), np.float32)
        rounded = numbers.astype(jnp.float8_e4m3fn).astype(np.float32)
    return bool((numbers == rounded).all())


def largest_exact_length(
    a: RowMeta, a_symmetric: bool, b: RowMeta, b_symmetric: bool, most: int = 2**31 - 1
) -> int:
    """Returns how many products of integer codes int32 can sum without overflow.

    Args:
      a: static facts of one operand.
      a_symmetric: True if the operand has no zero point.
      b: static facts of the other operand.
      b_symmetric: True if that operand has no zero point.
      most: the largest sum. float32 holds all whole numbers up to `2**24`.
    """
    largest_product = 1
    for meta, symmetric in ((a, a_symmetric), (b, b_symmetric)):
        low, high = meta.fmt.min, meta.fmt.max
        largest_product *= int(max(high, -low) if symmetric else high - low)
    return most // largest_product


def codes_matmul(a: Rows, a_meta: RowMeta, b: Rows, b_meta: RowMeta) -> jax.Array:
    """Computes `decode(a) @ decode(b).T` without decoding.

    b is multiplied in blocks of rows. Integer codes that are not packed are multiplied
    in a single block if there is one group.

    Args:
      a: `[m, k]` codes, integers or native float8.
      a_meta: static facts of a.
      b: `[n, k]` codes of the same kind. Or a is float8, and b has any format with
        numbers that bfloat16 holds. Both operands have the same number of groups along
        k, or one of them has a single group.
      b_meta: static facts of b.

    Returns:
      float32 `[m, n]` if a has scales. If neither operand has scales, the sums of the
      codes: int32 for integer codes and float32 for float8. The caller checks that sums
      of k products do not overflow int32 (`largest_exact_length`).
    """
    m, n = a.data.shape[0], b.data.shape[0]
    sums_of_codes = a.scale is None and not is_native_float(a_meta.fmt)
    dtype = jnp.int32 if sums_of_codes else jnp.float32
    if 0 in (m, n, a_meta.k):
        return jnp.zeros((m, n), dtype)
    groups, length = 1, a_meta.k
    if a.scale is not None and b.scale is not None:
        groups = max(a.scale.shape[-1], b.scale.shape[-1])
    if groups > 1:
        # The length of all groups. Both operands are cut or padded to this length.
        grouped_meta = a_meta if a.scale.shape[-1] > 1 else b_meta
        length = groups * group_size(grouped_meta, groups)
    a_dtype, b_dtype = _float_dtypes(a_meta, b_meta)
    a_groups = _grouped(a, a_meta, groups, length, a_dtype)

    def product(b_rows: Rows) -> jax.Array:
        b_groups = _grouped(b_rows, b_meta, groups, length, b_dtype)
        return _groups_product(a_groups, b_groups, a_meta, b_meta)

    if b_meta.block_bytes is not None and groups > 1:
        b_groups = _grouped(b, b_meta, groups, length, b_dtype)
        return _sum_over_groups(a_groups, b_groups, a_meta, b_meta)
    packed = b_meta.packing is not formats.Packing.NONE
    if not packed and groups == 1 and b_dtype is None:
        return product(b)

    def write(y: jax.Array, start: jax.Array, b_rows: Rows) -> jax.Array:
        at = (jnp.zeros_like(start), start)
        return lax.dynamic_update_slice(y, product(b_rows), at)

    # A row of b needs memory for its codes and for a partial sum of each group.
    # Platforms without float8 units widen the codes to 4 bytes.
    row_bytes = work_bytes(b_meta, groups * m)
    y = jnp.zeros((m, n), dtype)
    return for_blocks(b, b_meta, write, y, row_bytes=row_bytes, most_bytes=_BLOCK_BYTES)


def _float_dtypes(a_meta: RowMeta, b_meta: RowMeta) -> tuple[Any, Any]:
    """The float dtypes in which codes of a and b are multiplied; None for integers."""
    a, b = a_meta.fmt, b_meta.fmt
    if not is_native_float(a):
        return None, None
    if is_native_float(b):
        return jnp.dtype(a.name), jnp.dtype(b.name)
    # Two float8 formats of one family multiply natively.
    if is_exact_in_float8(b) and a.name in ("float8_e4m3fn", "float8_e5m2"):
        return jnp.dtype(a.name), jnp.dtype(jnp.float8_e4m3fn)
    return jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16)


def _sum_over_groups(
    a: _Groups, b: _Groups, a_meta: RowMeta, b_meta: RowMeta
) -> jax.Array:
    """The product `[m, n]` on an accelerator: a loop over groups, some at a time.

    The float32 partial sums of the groups of a step fit into half of
    `b_meta.block_bytes`. The other half is for the scaled sums. A step has one group at
    least.
    """
    assert b_meta.block_bytes is not None
    (m, groups, _), n = a.codes.shape, b.codes.shape[0]
    # One group at a time if m is symbolic, as `jax.export` allows.
    most = max(1, b_meta.block_bytes // (8 * m * n)) if isinstance(m, int) else 1
    count = max(c for c in range(1, groups + 1) if groups % c == 0 and c <= most)
    if count == groups:
        return _groups_product(a, b, a_meta, b_meta)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        start = i.astype(jnp.int32) * count  # int64 if 64-bit types are enabled
        a_part, b_part = _take_groups(a, start, count), _take_groups(b, start, count)
        return total + _groups_product(a_part, b_part, a_meta, b_meta)

    return lax.fori_loop(0, groups // count, step, jnp.zeros((m, n), jnp.float32))


def _take_groups(operand: _Groups, start: jax.Array, count: int) -> _Groups:
    """`count` groups from `start` on. A scale that all groups share is not cut."""

    def cut(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or leaf.shape[1] == 1:
            return leaf
        return lax.dynamic_slice_in_dim(leaf, start, count, axis=1)

    return _Groups(*(cut(leaf) for leaf in operand))  # pyright: ignore


class _Groups(NamedTuple):
    """One operand of a product of codes, cut into groups.

    Attributes:
      codes: `[n, g, s]`, s codes in each of g groups.
      scale: `[n or 1, g or 1]`, or None.
      zero_point: int32 with the shape of scale, or None.
    """

    codes: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None


def _grouped(
    rows: Rows, meta: RowMeta, groups: int, length: int, dtype: Any
) -> _Groups:
    """Cuts the rows into groups of equal length. Codes of padding decode to zero.

    With a float dtype, codes become numbers without scales in this dtype, and no zero
    points are left.
    """
    codes = unpack_codes(rows, meta)
    if dtype is not None:
        codes = _as_floats(codes, rows, meta, dtype)
        rows = rows._replace(zero_point=None)
    codes = codes[:, :length]
    padding = length - codes.shape[1]
    if padding:
        codes = jnp.pad(codes, ((0, 0), (0, padding)))
        if rows.zero_point is not None:
            # If there is a zero point, the code that decodes to zero is the zero point.
            is_code = jnp.arange(length) < length - padding
            repeats = length // rows.zero_point.shape[1]
            zero_codes = jnp.repeat(rows.zero_point, repeats, axis=1)
            codes = jnp.where(is_code, codes, zero_codes)
    zero_point = None if rows.zero_point is None else rows.zero_point.astype(jnp.int32)
    codes = codes.reshape(codes.shape[0], groups, length // groups)
    return _Groups(codes, rows.scale, zero_point)


def _as_floats(codes: jax.Array, rows: Rows, meta: RowMeta, dtype: Any) -> jax.Array:
    """The numbers of codes `[n, padded_k]` without scales, in a dtype that holds them.

    Zero points are subtracted.
    """
    if is_native_float(meta.fmt):
        numbers = lax.bitcast_convert_type(codes, jnp.dtype(meta.fmt.name))
        return numbers.astype(dtype)
    if rows.zero_point is None:
        return meta.fmt.decode(codes).astype(dtype)
    size = group_size(meta, rows.zero_point.shape[1])
    zero_codes = jnp.repeat(rows.zero_point, size, axis=1)[:, : codes.shape[1]]
    difference = codes.astype(jnp.int16) - zero_codes.astype(jnp.int16)
    return difference.astype(dtype)


def _groups_product(
    a: _Groups, b: _Groups, a_meta: RowMeta, b_meta: RowMeta
) -> jax.Array:
    """The product `[m, n]` of two operands in groups."""
    groups, size = a.codes.shape[1:]
    chunk = size
    if not is_native_float(a_meta.fmt):
        chunk = largest_exact_length(
            a_meta, a.zero_point is None, b_meta, b.zero_point is None
        )
    if a.scale is None or b.scale is None:
        assert chunk >= size, "callers check that int32 does not overflow"
        return _group_sums(a.codes, b.codes, a.zero_point, b.zero_point)[0]
    total = jnp.zeros((), jnp.float32)
    # One pass, unless a group has more products than int32 can sum.
    for start in range(0, size, chunk):
        part = slice(start, min(start + chunk, size))
        sums = _group_sums(
            a.codes[..., part], b.codes[..., part], a.zero_point, b.zero_point
        )
        total = total + sums.astype(jnp.float32)  # [g, m, n]
    a_scale = _groups_first(a.scale.astype(jnp.float32))
    b_scale = _groups_first(b.scale.astype(jnp.float32))
    scales = a_scale[:, :, None] * b_scale[:, None, :]  # [g or 1, m, n]
    return jnp.sum(total * scales, axis=0) if groups > 1 else (total * scales)[0]


def _group_sums(
    a: jax.Array,
    b: jax.Array,
    a_zero: jax.Array | None,
    b_zero: jax.Array | None,
) -> jax.Array:
    """Computes `sum_s (a - a_zero)(b - b_zero)` for each group.

    Args:
      a: codes `[m, g, s]`.
      b: codes `[n, g, s]`.
      a_zero: zero points `[m or 1, g or 1]`, or None.
      b_zero: zero points `[n or 1, g or 1]`, or None.

    Returns:
      `[g, m, n]`, int32 for integer codes, float32 for float8.
    """
    m, groups, size = a.shape
    is_integer = jnp.issubdtype(a.dtype, jnp.integer)
    accumulate = jnp.int32 if is_integer else jnp.float32
    # XLA:CPU is slow with a single row, so a second row is added.
    wide = jnp.pad(a, ((0, 1), (0, 0), (0, 0))) if m == 1 else a
    if groups == 1:
        dims = (((1,), (1,)), ((), ()))
        sums = lax.dot_general(
            wide[:, 0], b[:, 0], dims, preferred_element_type=accumulate
        )
        sums = sums[None, :m]
    else:
        dims = (((2,), (2,)), ((1,), (1,)))
        sums = lax.dot_general(wide, b, dims, preferred_element_type=accumulate)[:, :m]
    if b_zero is not None:
        a_sum = _groups_first(jnp.sum(a, axis=2, dtype=jnp.int32))  # [g, m]
        sums = sums - a_sum[:, :, None] * _groups_first(b_zero)[:, None, :]
    if a_zero is not None:
        zero = _groups_first(a_zero)[:, :, None]  # [g, m, 1]
        b_sum = _groups_first(jnp.sum(b, axis=2, dtype=jnp.int32))  # [g, n]
        sums = sums - zero * b_sum[:, None, :]
        if b_zero is not None:
            sums = sums + size * zero * _groups_first(b_zero)[:, None, :]
    return sums


def _groups_first(per_row: jax.Array) -> jax.Array:
    """`[n, g]` as `[g, n]`."""
    return per_row.T
