"""Rows sorted by expert times quantized weights on GPU, as one Triton kernel.

The grid is (item, block of n, split of k). Each program multiplies the rows of one item
by bn columns of the weight of the item's expert (`_ragged_items.py`), as `_triton.py`
multiplies a tile. It loads and writes only the rows of its expert. So the rows of one
tile are written by several programs if they belong to several experts. The program of
an idle item ends at once. It reads no codes and writes nothing.

Scales are read as they are stored, `[e, n, num_groups]`. So nothing is computed for the
scales of experts without rows.

Supported: the codes, groups, layout and dtypes of `_triton.py`.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.

References:
  Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022,
  section 5.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels import _triton
from jaxq.kernels._problem import Problem
from jaxq.kernels._ragged_items import Items, most_items
from jaxq.kernels._triton_programs import both, load_table, num_splits, run_programs


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    return _triton.why_not(problem, device_kind)


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int]:
    """Returns tiles for a problem.

    A tile has about as many rows as an expert has on average. The tiles are estimated
    from the shapes. They have not been measured.
    """
    del device_kind
    p = problem
    rows_of_expert = pl.cdiv(p.m, p.e)
    bm = next((size for size in (16, 32, 64) if rows_of_expert <= size), 64)
    bn = 64
    programs = most_items(p.m, p.e, bm) * pl.cdiv(p.n, bn)
    splits = num_splits(programs, p.k)
    return {"bm": bm, "bn": bn, "splits": splits, "warps": 4, "stages": 3}


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    items: Items,
    *,
    problem: Problem,
    tiles: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each row of x by the weight of its expert.

    Args:
      x: `[m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, n, num_groups]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      items: the items for tiles of "bm" rows.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: sizes by name, as `default_tiles` returns them. See `_triton.matmul`.
      interpret: True to run on a CPU.

    Returns:
      float32 `[m, n]`. Rows that belong to no expert are not written: they may hold any
      numbers.
    """
    p, sizes = problem, _triton.program_sizes(problem, tiles)
    # [codes per byte, m, bytes], see `_triton.matmul`.
    per_byte = 8 // p.bits
    x = jnp.moveaxis(x.reshape(p.m, p.k // per_byte, per_byte), 2, 0)
    arrays = (x, data, scale, zero_point, codebook)
    operands = [array for array in arrays if array is not None]
    sums = run_programs(
        functools.partial(_program, p, sizes),
        *items,
        *operands,
        grid=(items.tile.shape[0], pl.cdiv(p.n, sizes.bn), sizes.splits),
        shape=(sizes.splits, p.m, p.n),
        warps=tiles["warps"],
        stages=tiles["stages"],
        name="jaxq_ragged_matmul",
        interpret=interpret,
    )
    return sums[0] if sizes.splits == 1 else sums.sum(0)


def _program(p: Problem, sizes: _triton.ProgramSizes, *refs) -> None:
    """One program: the rows of an item, bn columns, and one part of k.

    `refs` are the numbers of the items, x, the codes, the scales, the zero points if
    there are any, the codebook if there is one, and the result.
    """
    *refs, out_ref = refs
    items = Items(*refs[: len(Items._fields)])
    x_ref, data_ref, scale_ref, *extra = refs[len(Items._fields) :]
    zero_ref = extra[0] if p.zero_point else None
    item, split = pl.program_id(0), pl.program_id(2)
    tile, expert = items.tile[item], items.expert[item]
    first_row, last_row = items.first_row[item], items.last_row[item]
    m_rows = pl.ds(tile * sizes.bm, sizes.bm)
    row = tile * sizes.bm + jnp.arange(sizes.bm)
    m_mask = (row >= first_row) & (row < last_row)
    n_rows = pl.ds(pl.program_id(1) * sizes.bn, sizes.bn)
    n_mask = pl.program_id(1) * sizes.bn + jnp.arange(sizes.bn) < p.n
    has_rows = first_row < last_row
    table = load_table(extra[-1], expert) if p.codebook else []

    def load_x(place, columns, k_mask):
        mask = both(m_mask, k_mask)
        return plt.load(x_ref.at[place, m_rows, columns], mask=mask, other=0)

    def load_bytes(columns, k_mask):
        mask = both(n_mask, k_mask)
        return plt.load(data_ref.at[expert, n_rows, columns], mask=mask, other=0)

    def load_scale(ref, group):
        return plt.load(ref.at[expert, n_rows, group], mask=n_mask, other=0)

    loads = _triton.Loads(
        load_x,
        load_bytes,
        functools.partial(load_scale, scale_ref),
        None if zero_ref is None else functools.partial(load_scale, zero_ref),
    )
    # Triton needs bounds of one integer type.
    num_steps = jnp.where(has_rows, jnp.int32(sizes.steps), jnp.int32(0))
    first_step = split * sizes.steps
    sums = _triton.tile_sums(p, sizes, loads, table, first_step, num_steps)
    mask = both(m_mask, n_mask)
    plt.store(out_ref.at[split, m_rows, n_rows], sums, mask=mask)
