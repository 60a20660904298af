"""Products of codes with scales in groups with Triton, for GPUs.

It serves float8 weights in blocks of 128 x 128 with activations in groups of 128
(DeepSeek-V3, 2024, section 3.3), and int8 codes in groups. Each program keeps the sums
of bm rows of a by bn rows of b. It walks along k in chunks that belong to one group:

    sums[m, n] += (a[m, chunk] @ b[n, chunk].T) * (a_scale[m] * b_scale[n])

If every row of int8 codes has one scale, the scales multiply the int32 sum over all of
k, which is exact.

A chunk has at most 128 codes, so the matrix unit of Hopper, which sums float8 products
in fewer bits than float32 has, never sums more than 128 of them (DeepSeek-V3, section
3.3.2). Edges are masked.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._triton_programs import why_not_offsets

_FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")
# GPUs with float8 units: Ada, Hopper and Blackwell.
_WITH_FLOAT8 = re.compile(
    r"H\d00|GH200|B\d00|\bL4\b|L40|RTX [45]0|RTX PRO|RTX \d000 Ada"
)


def why_not(problem: CodesProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    p = problem
    if p.codes not in _FORMATS:
        return f"the GPU kernel reads {', '.join(_FORMATS)}, not {p.codes}"
    if p.group % 32:
        return f"the GPU kernel needs groups of a multiple of 32 codes, not {p.group}"
    if p.is_packed and p.group % 64:
        return (
            f"the GPU kernel needs groups of a multiple of 64 int4 codes, not {p.group}"
        )
    is_known = device_kind is not None
    if not p.is_integer and is_known and not _WITH_FLOAT8.search(device_kind):
        return f"{device_kind} has no float8 matrix unit"
    b_bytes = p.num_matrices * p.n * p.k // (2 if p.is_packed else 1)
    return why_not_offsets(p.e * p.m * p.k, b_bytes)


def default_tiles(problem: CodesProblem) -> dict[str, int]:
    """Returns "bm", "bn", "warps" and "stages". They are estimated, not measured."""
    p = problem
    bm = next((size for size in (16, 32, 64) if p.m <= size), 128)
    bn = 64 if bm < 64 else 128
    return {"bm": bm, "bn": bn, "warps": 4 if bm < 128 else 8, "stages": 4}


def matmul(
    a: jax.Array,
    a_scale: jax.Array | None,
    b: jax.Array,
    b_scale: jax.Array,
    *,
    problem: CodesProblem,
    tiles: dict[str, int],
    index: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes the product as `CodesProblem` states it.

    Args:
      a: codes `[e, m, k]`, int8 or the bytes of float8.
      a_scale: `[e, m, a_groups]`, or None if a has no scales.
      b: codes `[e, n, k]`, or `[e, n, k / 2]` if two codes share a byte.
      b_scale: `[e, n, b_groups]`.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: the sizes of a program, as `default_tiles` returns them.
      index: int32 `[e]`, the matrix of `b` that each product reads. `b` then has any
        number of matrices. None means that product e reads matrix e.
      interpret: True to run on a CPU.

    Returns:
      float32 `[e, m, n]`.
    """
    p, bm, bn = problem, tiles["bm"], tiles["bn"]
    operands = [x for x in (a, a_scale, b, b_scale, index) if x is not None]
    return pl.pallas_call(
        functools.partial(_program, p, bm, bn, index is not None),
        out_shape=jax.ShapeDtypeStruct(
            (p.e, p.m, p.n),
            jnp.float32,
            manual_axis_type=jax.typeof(a).manual_axis_type,
        ),
        grid=(pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), p.e),
        compiler_params=plt.CompilerParams(
            num_warps=tiles["warps"], num_stages=tiles["stages"]
        ),
        interpret=interpret,
        name="jaxq_codes_matmul",
    )(*operands)


def _program(p: CodesProblem, bm: int, bn: int, has_index: bool, a_ref, *refs) -> None:
    """One program. It computes a tile `[bm, bn]` of the product.

    `refs` are the scales of a if there are any, b, its scales, the index if there is
    one, and the result.
    """
    *refs, y_ref = refs
    index_ref = refs.pop() if has_index else None
    *a_scales, b_ref, b_scale = refs
    chunk = math.gcd(p.group, 128)
    e = pl.program_id(2)
    matrix = e if index_ref is None else index_ref[e]
    m_rows, n_rows = pl.ds(pl.program_id(0) * bm, bm), pl.ds(pl.program_id(1) * bn, bn)
    m_mask = pl.program_id(0) * bm + jnp.arange(bm) < p.m
    n_mask = pl.program_id(1) * bn + jnp.arange(bn) < p.n

    def load_bytes(ref, matrix, rows, mask, start, length):
        tile_mask = lax.broadcast_in_dim(mask, (mask.shape[0], length), (0,))
        columns = pl.ds(start, length)
        return plt.load(ref.at[matrix, rows, columns], mask=tile_mask, other=0)

    def load_a(start, length):
        data = load_bytes(a_ref, e, m_rows, m_mask, start, length)
        return data if p.is_integer else lax.bitcast_convert_type(data, p.codes)

    def products(t):
        """The product of chunk t, `[bm, bn]`."""
        start = t * chunk
        if not p.is_packed:
            b = load_bytes(b_ref, matrix, n_rows, n_mask, start, chunk)
            b = b if p.is_integer else lax.bitcast_convert_type(b, p.codes)
            return multiply(load_a(start, chunk), b)
        # A step reads half as many bytes as a chunk has codes. Their low halves are
        # codes of the first half of a group, and their high halves of the second.
        half = chunk // 2
        group = lax.div(start, np.int32(p.group))
        first = start // 2 + group * (p.group // 2)
        data = load_bytes(b_ref, matrix, n_rows, n_mask, start // 2, half)
        low, high = _nibbles(data.astype(jnp.int32), p.codes)
        y = multiply(load_a(first, half), low)
        return y + multiply(load_a(first + p.group // 2, half), high)

    def multiply(a, b):
        return lax.dot_general(
            a,
            b,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if p.is_integer else jnp.float32,
        )

    def load_scale(ref, rows, mask, groups, t):
        group = lax.div(t * chunk, p.group) if groups > 1 else jnp.int32(0)
        return plt.load(ref.at[e, rows, group], mask=mask, other=0).astype(jnp.float32)

    def scales(t):
        """The scales of chunk t, `[bm, bn]`."""
        b_row = load_scale(b_scale, n_rows, n_mask, p.b_groups, t)
        product = lax.broadcast_in_dim(b_row, (bm, bn), (1,))
        if a_scales:
            a_column = load_scale(a_scales[0], m_rows, m_mask, p.a_groups, t)
            product *= lax.broadcast_in_dim(a_column, (bm, bn), (0,))
        return product

    def add(t, sums):
        return sums + products(t)

    def add_scaled(t, sums):
        return sums + products(t).astype(jnp.float32) * scales(t)

    # float8 products are always scaled one by one. Without a scale between them, Triton
    # would let the matrix unit add the chunks.
    has_one_sum = p.is_integer and max(p.a_groups, p.b_groups) == 1
    zeros = jnp.zeros((bm, bn), jnp.int32 if has_one_sum else jnp.float32)
    step = add if has_one_sum else add_scaled
    sums = lax.fori_loop(0, p.k // chunk, step, zeros)
    if has_one_sum:
        sums = sums.astype(jnp.float32) * scales(jnp.int32(0))
    mask = lax.broadcast_in_dim(m_mask, (bm, bn), (0,))
    mask &= lax.broadcast_in_dim(n_mask, (bm, bn), (1,))
    plt.store(y_ref.at[e, m_rows, n_rows], sums, mask=mask)


def _nibbles(packed: jax.Array, codes: str) -> tuple[jax.Array, jax.Array]:
    """The signed low and high halves of bytes, as int8 or float8. Both are exact."""
    halves = []
    for shift in (0, 4):
        number = (((packed >> np.int32(shift)) & np.int32(15)) ^ np.int32(8)) - 8
        if codes != "int8":
            number = number.astype(jnp.float32)
        halves.append(number.astype(codes))
    return halves[0], halves[1]
