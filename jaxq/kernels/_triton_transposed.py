"""The product of the backward pass with Triton, for all GPUs.

The gradient of `y = x @ decode(w)` for x is `dy @ decode(w).T`. An adapter on a frozen
weight, as in QLoRA (Dettmers et al., 2023), needs this product in each training step.
XLA would write the decoded weight to memory.

Each program keeps the sums of bm rows of x by one chunk of the codes of a row. A chunk
belongs to one group. The program walks along n, bn rows of codes at a time:

    sums[m, chunk] += x[m, bn] @ (scale[bn] * (codes[bn, chunk] - zero_point[bn]))

- A scale varies along n, which is summed. So weights are scaled before the product, and
  rounded to the dtype of x once. Plain XLA does the same.
- The two 4-bit codes of a byte are not interleaved. A program keeps one sum for the low
  halves of the bytes and one for the high halves. XLA interleaves them afterwards, in
  the same pass that adds the parts.
- A codebook entry is looked up by a tree of 15 selects on the bits of the code.
- Edges in m, n and k are masked. Nothing is padded.
- With few rows of x there are too few programs to occupy all SMs. Then `splits`
  programs each compute the sums over a part of n, and XLA adds these sums.

Registers of a program, in 32-bit words: bm * chunk for the sums, and bn * chunk for the
codes. Shared memory in bytes, without Triton's own padding:
stages * bn * (bm * bytes per number of x + chunk * bits / 8).

Supported: layout "rows"; x in bfloat16, float16 or float32 (in full precision, not as
tf32); codes of 4 bits (signed, unsigned, codebook) or 8 bits; scales in any float
dtype; zero points; groups of a multiple of 32 codes, or one scale per column; any e, m
and n.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
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
    p, bm = problem, rows_of_program(problem)
    programs = p.e * pl.cdiv(p.m, bm) * pl.cdiv(p.k, chunk_length(p))
    splits = num_splits(programs, p.n)
    return {"bm": bm, "bn": 64, "splits": splits, "warps": 4, "stages": 3}


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
    """Computes `x @ decode(data).T` as `Problem` states it.

    Args:
      x: `[e, m, n]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, num_groups, n]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: five sizes by name. A program multiplies "bm" rows of x, and "bn" rows of
        codes at a time. Both are powers of two and at least 16. "splits" is the number
        of programs that share the sum over n. "warps" is the number of warps of a
        program. "stages" is the number of stages of Triton's pipeline.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True to run on a CPU.

    Returns:
      `[e, m, k]` in `problem.out_dtype`.
    """
    p, per_byte = problem, 8 // problem.bits
    bm, bn, splits = (int(tiles[name]) for name in ("bm", "bn", "splits"))
    arrays = (x, data, scale, zero_point, codebook, index)
    sums = run_programs(
        functools.partial(_program, p, bm, bn, splits, index is not None),
        *(a for a in arrays if a is not None),
        grid=(pl.cdiv(p.m, bm), pl.cdiv(p.k, chunk_length(p)), p.e * splits),
        shape=(splits, p.e, per_byte, p.m, p.k // per_byte),
        warps=int(tiles["warps"]),
        stages=int(tiles["stages"]),
        name="jaxq_triton_transposed_matmul",
        interpret=interpret,
    )
    y = jnp.moveaxis(sums.sum(0), 1, 3)  # [e, m, bytes, codes per byte]
    return y.reshape(p.e, p.m, p.k).astype(p.out_dtype)


def _program(
    p: Problem,
    bm: int,
    bn: int,
    splits: int,
    has_index: bool,
    x_ref,
    data_ref,
    scale_ref,
    *rest,
) -> None:
    """One program. It computes a tile `[bm, chunk]`, summed over one part of n.

    `rest` has the zero points if there are any, the codebook if there is one, the index
    if there is one, and the result.
    """
    *extra, out_ref = rest
    index_ref = extra.pop() if has_index else None
    zero_ref = extra[0] if p.zero_point else None
    chunk, per_byte = chunk_length(p), 8 // p.bits
    row_bytes, steps = chunk // per_byte, pl.cdiv(pl.cdiv(p.n, bn), splits)
    e, s = pl.program_id(2) // splits, pl.program_id(2) % splits
    matrix = e if index_ref is None else index_ref[e]
    m_rows = pl.ds(pl.program_id(0) * bm, bm)
    columns = pl.ds(pl.program_id(1) * row_bytes, row_bytes)
    m_mask = pl.program_id(0) * bm + jnp.arange(bm) < p.m
    k_mask = pl.program_id(1) * row_bytes + jnp.arange(row_bytes) < p.k // per_byte
    group = pl.program_id(1) * chunk // p.group
    table = load_table(extra[-1], e) if p.codebook else []

    def step(t, sums):
        t = s * steps + t
        n_rows = pl.ds(t * bn, bn)
        n_mask = t * bn + jnp.arange(bn) < p.n
        x = plt.load(x_ref.at[e, m_rows, n_rows], mask=both(m_mask, n_mask), other=0)
        packed = plt.load(
            data_ref.at[matrix, n_rows, columns], mask=both(n_mask, k_mask), other=0
        ).astype(jnp.int32)  # [bn, row_bytes]
        scale = load_per_row(scale_ref, e, group, n_rows, n_mask).astype(jnp.float32)
        scale = lax.broadcast_in_dim(scale, packed.shape, (0,))
        zero = None
        if zero_ref is not None:
            zero = load_per_row(zero_ref, e, group, n_rows, n_mask).astype(jnp.int32)
        weights = [
            decode_bytes(packed, place, table, zero, p).astype(jnp.float32) * scale
            for place in range(per_byte)
        ]
        return tuple(
            total + tile_product(x, weight.astype(x.dtype), 0)
            for total, weight in zip(sums, weights, strict=True)
        )

    zeros = (jnp.zeros((bm, row_bytes), jnp.float32),) * per_byte
    sums = lax.fori_loop(0, steps, step, zeros)
    for place, total in enumerate(sums):
        plt.store(
            out_ref.at[s, e, jnp.int32(place), m_rows, columns],
            total,
            mask=both(m_mask, k_mask),
        )
