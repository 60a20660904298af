"""Block-wise quantized matmul with Triton: for GPUs before Hopper, and for float32 x.

Each program keeps the sums of bm rows of x by bn columns of the result. It walks along
k in chunks. A chunk belongs to one group:

    sums[m, n] += scale[n] * (x[m, chunk] @ (codes[n, chunk] - zero_point[n]).T)

- Codes are multiplied as integers in x's dtype, which holds them exactly. The scale
  multiplies the sum of a chunk in float32.
- The two 4-bit codes of a byte are not interleaved. The low halves of the bytes are
  multiplied with the even columns of x, and the high halves with the odd columns.
- A codebook entry is looked up by a tree of 15 selects on the bits of the code.
- Edges in m, n and k are masked. Nothing is padded.
- With few rows of x there are too few programs to occupy all SMs. Then `splits`
  programs each compute the sums over a part of k, and XLA adds these sums.

Registers of a program, in 32-bit words: bm * bn for the sums, about as many for the
product of a chunk, and bn * chunk for its codes. Shared memory in bytes, without
Triton's own padding: stages * chunk * (bm * bytes per number of x + bn * bits / 8).

Supported: layout "rows"; x in bfloat16, float16 or float32 (in full precision, not as
tf32); codes of 4 bits (signed, unsigned, codebook) or 8 bits; scales in any float
dtype; zero points; groups of a multiple of 32 codes, or one scale per column; any e, m
and n.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels._problem import Problem
from jaxq.kernels._tile_product import tile_product
from jaxq.kernels._triton_programs import (
    both,
    chunk_length,
    decode_bytes,
    load_per_row,
    load_table,
    num_splits,
    rows_of_program,
    run_programs,
    why_not_programs,
)


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can.

    The kind of GPU does not matter: Triton compiles for each of them.
    """
    del device_kind
    return why_not_programs(problem)


def default_tiles(problem: Problem, device_kind: str | None) -> dict:
    """Returns tiles for a problem that the table does not know.

    The tiles are estimated from the shapes. They have not been measured.
    """
    del device_kind
    p, bm, bn = problem, rows_of_program(problem), 64
    programs = p.e * pl.cdiv(p.m, bm) * pl.cdiv(p.n, bn)
    splits = num_splits(programs, p.k)
    return {"bm": bm, "bn": bn, "splits": splits, "warps": 4, "stages": 3}


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    index: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `x @ decode(data)` as `Problem` states it.

    Args:
      x: `[e, m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, num_groups, n]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: five sizes by name. A program computes "bm" rows by "bn" columns of the
        result. Both are powers of two and at least 16. "splits" is the number of
        programs that share the sum over k. "warps" is the number of warps of a program.
        "stages" is the number of stages of Triton's pipeline.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True to run on a CPU.

    Returns:
      `[e, m, n]` in `problem.out_dtype`.
    """
    p = problem
    # [e, codes per byte, m, bytes]. With 4 bits: the columns of x for the first code of
    # each byte, then the columns for the second code.
    per_byte = 8 // p.bits
    x = jnp.moveaxis(x.reshape(p.e, p.m, p.k // per_byte, per_byte), 3, 1)
    arrays = (x, data, scale, zero_point, codebook, index)
    operands = [a for a in arrays if a is not None]
    sizes = program_sizes(p, {name: int(size) for name, size in tiles.items()})
    sums = run_programs(
        functools.partial(_program, p, sizes, index is not None),
        *operands,
        grid=(pl.cdiv(p.m, sizes.bm), pl.cdiv(p.n, sizes.bn), p.e * sizes.splits),
        shape=(sizes.splits, p.e, p.m, p.n),
        warps=int(tiles["warps"]),
        stages=int(tiles["stages"]),
        name="jaxq_triton_matmul",
        interpret=interpret,
    )
    return sums.sum(0).astype(p.out_dtype)


@dataclasses.dataclass(frozen=True)
class ProgramSizes:
    """The sizes that a program works with.

    Attributes:
      bm: rows of x.
      bn: columns of the result.
      splits: number of programs that share the sum over k.
      chunk: codes of a row in one step along k.
      row_bytes: bytes of a row in one step.
      steps: number of steps of a program.
    """

    bm: int
    bn: int
    splits: int
    chunk: int
    row_bytes: int
    steps: int


def program_sizes(p: Problem, tiles: Mapping[str, int]) -> ProgramSizes:
    """Returns the sizes that a program works with."""
    chunk, splits = chunk_length(p), tiles["splits"]
    steps = pl.cdiv(pl.cdiv(p.k, chunk), splits)
    return ProgramSizes(
        tiles["bm"], tiles["bn"], splits, chunk, chunk * p.bits // 8, steps
    )


def _program(
    p: Problem, sizes: ProgramSizes, has_index: bool, x_ref, data_ref, scale_ref, *rest
) -> None:
    """One program. It computes a tile `[bm, bn]`, summed over one part of k.

    `rest` has the zero points if there are any, the codebook if there is one, the index
    if there is one, and the result.
    """
    *extra, out_ref = rest
    index_ref = extra.pop() if has_index else None
    bm, bn, splits = sizes.bm, sizes.bn, sizes.splits
    zero_ref = extra[0] if p.zero_point else None
    e, s = pl.program_id(2) // splits, pl.program_id(2) % splits
    matrix = e if index_ref is None else index_ref[e]
    m_rows = pl.ds(pl.program_id(0) * bm, bm)
    n_rows = pl.ds(pl.program_id(1) * bn, bn)
    m_mask = pl.program_id(0) * bm + jnp.arange(bm) < p.m
    n_mask = pl.program_id(1) * bn + jnp.arange(bn) < p.n
    table = load_table(extra[-1], e) if p.codebook else []

    def load_x(place, columns, k_mask):
        mask = both(m_mask, k_mask)
        return plt.load(x_ref.at[e, place, m_rows, columns], mask=mask, other=0)

    def load_bytes(columns, k_mask):
        mask = both(n_mask, k_mask)
        return plt.load(data_ref.at[matrix, n_rows, columns], mask=mask, other=0)

    def load_scale(ref, group):
        return load_per_row(ref, e, group, n_rows, n_mask)

    loads = Loads(
        load_x,
        load_bytes,
        functools.partial(load_scale, scale_ref),
        None if zero_ref is None else functools.partial(load_scale, zero_ref),
    )
    sums = tile_sums(p, sizes, loads, table, s * sizes.steps, sizes.steps)
    plt.store(out_ref.at[s, e, m_rows, n_rows], sums, mask=both(m_mask, n_mask))


class Loads(NamedTuple):
    """How a program loads its part of each operand.

    Attributes:
      x: `x(place, columns, k_mask)` loads `[bm, row_bytes]`, the columns of x for code
        `place` of each byte.
      packed: `packed(columns, k_mask)` loads the bytes `[bn, row_bytes]`.
      scale: `scale(group)` loads `[bn]`.
      zero_point: `zero_point(group)` loads `[bn]`. None if there are no zero points.
    """

    x: Callable[..., jax.Array]
    packed: Callable[..., jax.Array]
    scale: Callable[..., jax.Array]
    zero_point: Callable[..., jax.Array] | None


def tile_sums(
    p: Problem,
    sizes: ProgramSizes,
    loads: Loads,
    table: list[jax.Array],
    first_step: Any,
    num_steps: Any,
) -> jax.Array:
    """Returns the sums `[bm, bn]` of a program over its steps along k, in float32."""
    bm, bn, row_bytes = sizes.bm, sizes.bn, sizes.row_bytes
    per_byte = 8 // p.bits

    def step(t, sums):
        t = first_step + t
        k_mask = t * row_bytes + jnp.arange(row_bytes) < p.k // per_byte
        columns = pl.ds(t * row_bytes, row_bytes)
        # The last part may reach beyond k, where there is no group.
        group = jnp.minimum(t * sizes.chunk // p.group, p.num_groups - 1)
        packed = loads.packed(columns, k_mask).astype(jnp.int32)  # [bn, row_bytes]
        scale = loads.scale(group).astype(jnp.float32)  # [bn]
        zero = None
        if loads.zero_point is not None:
            zero = loads.zero_point(group).astype(jnp.int32)  # [bn]
        product = jnp.zeros((bm, bn), jnp.float32)
        for place in range(per_byte):
            x = loads.x(jnp.int32(place), columns, k_mask)  # [bm, row_bytes]
            weights = decode_bytes(packed, place, table, zero, p).astype(x.dtype)
            product += tile_product(x, weights, 1)
        return sums + product * lax.broadcast_in_dim(scale, (bm, bn), (1,))

    zeros = jnp.zeros((bm, bn), jnp.float32)
    return lax.fori_loop(np.int32(0), num_steps, step, zeros)
