"""Quantized activations times a quantized weight, on the codes themselves.

Integers accumulate in int32, exactly, with the zero points put right afterwards:

    sum (a - z_a)(b - z_b) = sum ab - z_b sum a - z_a sum b + K z_a z_b

(Jacob et al., 2018, equation 7; int32 arithmetic wraps, so only the corrected sum has to fit.) float8 codes multiply
natively into float32. Scales that vary along k meet their group's partial sum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels._rows import RowMeta, Rows, for_blocks

_NATIVE_FLOATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3b11fnuz",
)


def is_native_float(fmt: formats.Format) -> bool:
    """True for float8 formats that XLA multiplies itself."""
    return fmt.name in _NATIVE_FLOATS


def largest_exact_length(
    a: RowMeta, a_symmetric: bool, b: RowMeta, b_symmetric: bool
) -> int:
    """How many products of codes (zero points taken off) surely fit int32."""
    reach = 1
    for meta, symmetric in ((a, a_symmetric), (b, b_symmetric)):
        reach *= int(
            max(meta.fmt.max, -meta.fmt.min)
            if symmetric
            else meta.fmt.max - meta.fmt.min
        )
    return (2**31 - 1) // reach


def codes_matmul(a: Rows, a_meta: RowMeta, b: Rows, b_meta: RowMeta) -> jax.Array:
    """`decode(a) @ decode(b).T` without decoding.

    Args:
      a: `[m, k]` codes with scales, integers or native float8.
      a_meta: static facts of a.
      b: `[n, k]` of the same kind, with as many groups along k as a, or one of the two with a single group. All but
        int8 codes of one group are taken a block of rows at a time.
      b_meta: static facts of b.

    Returns:
      float32 `[m, n]`; where neither has a scale, the sums themselves, int32 for integer codes, if int32 holds k of
      them (`largest_exact_length`).
    """
    m, n = a.data.shape[0], b.data.shape[0]
    raw = (
        jnp.float32 if a.scale is not None or is_native_float(a_meta.fmt) else jnp.int32
    )
    if 0 in (m, n, a_meta.k):
        return jnp.zeros((m, n), raw)
    groups = (
        1
        if a.scale is None or b.scale is None
        else max(a.scale.shape[-1], b.scale.shape[-1])
    )
    # Whole groups, as the operand that has them stores them; the other's padding is cut or filled up to that.
    length = (
        a_meta.k
        if groups == 1
        else (a_meta if a.scale.shape[-1] > 1 else b_meta).padded_k
    )  # pyright: ignore
    left = _grouped(a, a_meta, groups, length)

    def block(taken: Rows) -> jax.Array:
        return _product(left, _grouped(taken, b_meta, groups, length), a_meta, b_meta)

    if (
        b_meta.packing is formats.Packing.NONE
        and groups == 1
        and not is_native_float(b_meta.fmt)
    ):
        return block(b)  # int8 as it lies

    def write(y: jax.Array, start: jax.Array, taken: Rows) -> jax.Array:
        return lax.dynamic_update_slice(y, block(taken), (jnp.zeros_like(start), start))

    # A row of b costs its codes, widened by platforms without float8 units, and a partial sum for every group.
    row_bytes = max(4 * b_meta.padded_k, 8 * groups * m)
    return for_blocks(b, b_meta, write, jnp.zeros((m, n), raw), row_bytes=row_bytes)


class _Groups(NamedTuple):
    """One operand: codes `[n, g, s]`, and its scales and zero points `[n, g]` or with ones (None: there is none)."""

    codes: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None


def _grouped(rows: Rows, meta: RowMeta, groups: int, length: int) -> _Groups:
    """Rows cut into groups of equal length; padding stands for zero."""
    patterns = formats.unpack(rows.data, meta.fmt.bits, meta.packing, unit=meta.unit)
    codes = (
        formats.as_signed(patterns, meta.fmt.bits)
        if meta.fmt.code_dtype == np.int8
        else patterns
    )
    if is_native_float(meta.fmt):
        codes = lax.bitcast_convert_type(codes, jnp.dtype(meta.fmt.name))
    codes = codes[:, :length]
    extra = length - codes.shape[1]
    if extra:
        codes = jnp.pad(codes, ((0, 0), (0, extra)))
        if rows.zero_point is not None:
            codes = jnp.where(
                jnp.arange(length) < length - extra, codes, rows.zero_point[:, -1:]
            )
    zero_point = None if rows.zero_point is None else rows.zero_point.astype(jnp.int32)
    return _Groups(
        codes.reshape(codes.shape[0], groups, length // groups), rows.scale, zero_point
    )


def _product(a: _Groups, b: _Groups, a_meta: RowMeta, b_meta: RowMeta) -> jax.Array:
    groups, size = a.codes.shape[1:]
    chunk = size
    if not is_native_float(a_meta.fmt):
        chunk = largest_exact_length(
            a_meta, a.zero_point is None, b_meta, b.zero_point is None
        )
    if a.scale is None or b.scale is None:
        assert chunk >= size, "callers check what int32 holds"
        return _dot(a.codes, b.codes, a.zero_point, b.zero_point)[0]
    total = jnp.zeros((), jnp.float32)
    for start in range(0, size, chunk):  # one turn, unless k is beyond what int32 holds
        part = slice(start, min(start + chunk, size))
        total = total + _dot(
            a.codes[..., part], b.codes[..., part], a.zero_point, b.zero_point
        ).astype(jnp.float32)
    a_scale, b_scale = (_t(scale.astype(jnp.float32)) for scale in (a.scale, b.scale))
    scales = a_scale[:, :, None] * b_scale[:, None, :]  # [g or 1, m, n]
    return jnp.sum(total * scales, axis=0) if groups > 1 else (total * scales)[0]


def _dot(
    a: jax.Array, b: jax.Array, a_zero: jax.Array | None, b_zero: jax.Array | None
) -> jax.Array:
    """`sum_s (a - a_zero)(b - b_zero)` as `[g, m, n]`, int32 for integer codes, float32 for float8."""
    m, groups, size = a.shape
    whole = jnp.issubdtype(a.dtype, jnp.integer)
    accumulate = jnp.int32 if whole else jnp.float32
    wide = (
        jnp.pad(a, ((0, 1), (0, 0), (0, 0))) if m == 1 else a
    )  # one lone row is slow on XLA:CPU
    if groups == 1:
        dims = (((1,), (1,)), ((), ()))
        out = lax.dot_general(
            wide[:, 0], b[:, 0], dims, preferred_element_type=accumulate
        )[None, :m]
    else:
        dims = (((2,), (2,)), ((1,), (1,)))
        out = lax.dot_general(wide, b, dims, preferred_element_type=accumulate)[:, :m]
    if b_zero is not None:
        out = (
            out
            - _t(jnp.sum(a, axis=2, dtype=jnp.int32))[:, :, None]
            * _t(b_zero)[:, None, :]
        )
    if a_zero is not None:
        out = (
            out
            - _t(a_zero)[:, :, None]
            * _t(jnp.sum(b, axis=2, dtype=jnp.int32))[:, None, :]
        )
        if b_zero is not None:
            out = out + size * _t(a_zero)[:, :, None] * _t(b_zero)[:, None, :]
    return out


def _t(per_row: jax.Array) -> jax.Array:
    return per_row.T  # [n, g] -> [g, n]
