"""What the Triton kernels for products share: sizes, decoding, masks, split sums.

A program works with a chunk of codes of a row at a time. All codes of a chunk belong to
one group. The two 4-bit codes of a byte are not interleaved: `place` 0 is the low half
of each byte, and 1 is the high half.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels._problem import Problem


def why_not_programs(problem: Problem) -> str | None:
    """Returns why Triton programs cannot decode the codes, or None if they can."""
    p = problem
    if p.layout != "rows":
        return (
            'it reads codes in layout "rows", not "columns"; use '
            'jaxq.relayout(weight, "rows")'
        )
    if p.x_dtype == "int8" or p.scale_dtype is None:
        return "it takes no int8 x"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return (
            "it decodes codes of 4 or 8 bits and codebooks of 16 numbers, not "
            f"{p.codes}"
        )
    if p.is_empty:
        return "the product is empty"
    if p.num_groups > 1 and p.group % 32:
        return f"the group size must be a multiple of 32 codes, not {p.group}"
    if p.k * p.bits % 8:
        return f"rows of {p.k} codes do not fill whole bytes"
    row_bytes = p.k * p.bits // 8
    num_zero_points = p.e * p.n * p.num_groups if p.zero_point else 0
    return why_not_offsets(p.num_matrices * p.n * row_bytes, num_zero_points)


def why_not_offsets(*num_bytes: int) -> str | None:
    """Returns why Triton programs cannot address arrays, or None if they can.

    Pallas computes offsets in 64 bits only for arrays of more than 2^32 bytes. Other
    offsets are signed numbers of 32 bits, and count elements. So the elements of an
    array with one byte each cannot be addressed if they lie beyond 2^31. Arrays with
    wider elements have more than 2^32 bytes before they have 2^31 elements.

    Args:
      *num_bytes: sizes of the arrays whose elements have one byte.
    """
    for size in num_bytes:
        if 2**31 < size <= 2**32:
            return (
                f"an array has {size / 2**30:.2f} GiB, and the offsets of Triton "
                "programs are too narrow for arrays of bytes of 2 to 4 GiB"
            )
    return None


# Sizes. Triton needs sizes that are powers of two, and at least 16 for a product.


def rows_of_program(problem: Problem) -> int:
    """Returns the rows of x that a program multiplies."""
    return next((size for size in (16, 32, 64) if problem.m <= size), 64)


def chunk_length(problem: Problem) -> int:
    """Returns the codes of a chunk."""
    return 128 if problem.num_groups == 1 else math.gcd(problem.group, 128)


def num_splits(programs: int, length: int) -> int:
    """Returns the number of programs that share a sum over `length` products.

    Sums are split while programs are few and each part has at least 512 products.
    """
    splits = 1
    while splits < 16 and 2 * splits * programs <= 512 and length >= 1024 * splits:
        splits *= 2
    return splits


# Parts of a program.


def load_per_row(ref, e, group, rows, mask):
    """Scales or zero points of one group, `[bn]`. They are 0 where mask is False."""
    return plt.load(ref.at[e, group, rows], mask=mask, other=0)


def load_table(ref, e) -> list:
    """The 16 entries of a codebook as scalars."""
    return [ref[e, i] for i in range(16)]


def decode_bytes(packed, place: int, table: list, zero, p: Problem):
    """Weights without their scales, `[bn, row_bytes]`.

    Args:
      packed: the bytes as int32 `[bn, row_bytes]`.
      place: which code of each byte, 0 for the low bits.
      table: 16 scalars for a codebook, else empty.
      zero: zero points int32 `[bn]`, or None.
      p: the problem.
    """
    codes = packed
    if p.bits == 4:
        codes = (packed >> np.int32(4 * place)) & np.int32(15)
        if p.signed and not p.codebook:
            # Two's complement: flip the sign bit, then subtract its value.
            codes = (codes ^ np.int32(8)) - np.int32(8)
    if not p.codebook:
        if zero is None:
            return codes
        return codes - lax.broadcast_in_dim(zero, codes.shape, (0,))
    # A tree of selects. Each round uses one bit of the code, the lowest first, and
    # halves the number of entries that are left: 16, 8, 4, 2, 1.
    values = [jnp.full(codes.shape, number) for number in table]
    for bit in range(4):
        is_set = (codes & np.int32(1 << bit)) != 0
        values = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def both(rows, columns):
    """Combines a mask of rows `[r]` and a mask of columns `[c]` to a mask `[r, c]`."""
    shape = (rows.shape[0], columns.shape[0])
    row_mask = lax.broadcast_in_dim(rows, shape, (0,))
    return row_mask & lax.broadcast_in_dim(columns, shape, (1,))


# Running programs.


def run_programs(
    program: Callable[..., None],
    *operands: jax.Array,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    warps: int,
    stages: int,
    name: str,
    interpret: bool,
) -> jax.Array:
    """Runs the programs of a kernel.

    Args:
      program: gets references to the operands and to the result.
      *operands: arrays.
      grid: the number of programs along each axis.
      shape: shape of the result.
      warps: warps of a program.
      stages: stages of Triton's pipeline.
      name: name of the kernel in profiles.
      interpret: True to run on a CPU.

    Returns:
      float32, of the given shape.
    """
    out = jax.ShapeDtypeStruct(
        shape,
        jnp.float32,
        manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
    )
    return pl.pallas_call(
        program,
        out_shape=out,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*operands)
