"""Rows sorted by expert times quantized weights on TPU, as one Pallas (Mosaic) kernel.

The grid is (n, item, k). Each grid step multiplies the tile of rows of an item by one
tile of the weight of the item's expert, as `_tpu.py` multiplies two tiles:

    total[bm, bn] += x[tile of item] @ decode(data[expert of item])

After the last step along k, the rows of `total` that belong to the expert are written
to the tile of the result. The items of a tile are neighbours, so the tile of the result
stays in VMEM until all of its experts are done. The numbers of the items are in scalar
memory (`_ragged_items.py`). They are there before the first tile is loaded.

An idle item computes nothing. It names the tiles of codes of the step before, so it
loads none. If no expert has rows, the kernel loads one tile of codes and does not use
it.

Supported: the codes, groups, layouts and dtypes of `_tpu.py`, except int8 x.

The kernel has run in the interpreter and has been compiled for TPU v5e, v6e and v7x. It
has not been timed on a device.

References:
  Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022,
  section 5.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels import _tpu
from jaxq.kernels._problem import Problem
from jaxq.kernels._ragged_items import Items
from jaxq.kernels._tpu_tiles import WeightTile, weight_specs


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    if problem.x_dtype == "int8":
        return "the ragged kernel takes floats, not int8 x"
    return _tpu.why_not(problem, device_kind)


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int | str]:
    """Returns tiles for a problem.

    A tile has about as many rows as an expert has on average, but at least 128: fewer
    rows would save no time in the matrix unit, and an expert whose rows are in two
    tiles is read twice. The tiles are estimated. They have not been measured.
    """
    p = problem
    rows_of_expert = pl.cdiv(p.m, p.e)
    rows = next((size for size in (128, 256) if rows_of_expert <= size), 512)
    tile = Problem(**{**vars(p), "e": 1, "m": min(p.m, rows)})
    return _tpu.default_tiles(tile, device_kind)


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    items: Items,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiplies each row of x by the weight of its expert.

    Args:
      x: `[m, k]`.
      data: `[e, n, k * bits / 8]` in the layout "rows", `[e, k * bits / 8, n]` in the
        layout "columns".
      scale: `[e, num_groups, n]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      items: the items for tiles of "bm" rows.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: "bm", "bk", "bn" and "body", as `default_tiles` returns them.
      interpret: True, or parameters of the interpreter, to run on a CPU step by step.

    Returns:
      float32 `[m, n]`. Rows that belong to no expert are zero.

    Raises:
      ValueError: The tiles do not fit the hardware, or the body cannot compute the
        problem.
    """
    p, body = problem, str(tiles["body"])
    bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
    steps = pl.cdiv(p.k, bk)
    inputs = _tpu.kernel_inputs(
        x[None], data, scale, zero_point, codebook, problem=p, tiles=tiles
    )

    def tile_along_k(item, k, numbers: Items):
        # An idle item names the last tile along k, which is in VMEM already.
        is_idle = numbers.first_row[item] == numbers.last_row[item]
        return jnp.where(is_idle, steps - 1, k)

    def x_tile(n, item, k, *refs) -> tuple:
        numbers = Items(*refs)
        return 0, numbers.tile[item], tile_along_k(item, k, numbers)

    def weight_tile(n, item, k, *refs) -> WeightTile:
        numbers = Items(*refs)
        expert = numbers.expert[item]
        return WeightTile(expert, expert, tile_along_k(item, k, numbers), n)

    specs = {
        "x": pl.BlockSpec((None, bm, bk), x_tile),
        **weight_specs(inputs, p, bk, bn, weight_tile),
    }

    out = jax.ShapeDtypeStruct(
        (p.m, p.n), jnp.float32, manual_axis_type=jax.typeof(x).manual_axis_type
    )
    return pl.pallas_call(
        functools.partial(_kernel, tuple(inputs), p, body, steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(p.n, bn), items.tile.shape[0], steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=pl.BlockSpec(
                (bm, bn), lambda n, item, k, *refs: (Items(*refs).tile[item], n)
            ),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=_cost(p, bm, items.tile.shape[0]),
        interpret=interpret,
        name="jaxq_ragged_matmul",
    )(*items, *inputs.values())


def _cost(p: Problem, bm: int, num_items: int) -> pl.CostEstimate:
    """An upper limit, because the number of items that are not idle is not known."""
    weight_bytes = p.n * (p.k * p.bits // 8 + 4 * p.num_groups)
    x_bytes = jnp.dtype(p.x_dtype).itemsize * p.m * p.k
    return pl.CostEstimate(
        flops=2 * num_items * bm * p.k * p.n,
        bytes_accessed=num_items * weight_bytes + x_bytes + 4 * p.m * p.n,
        transcendentals=0,
    )


def _kernel(names: tuple[str, ...], p: Problem, body: str, steps: int, *refs) -> None:
    """One grid step (n, item, k).

    `refs` are the numbers of the items, the inputs `names`, the tile `[bm, bn]` of the
    result, and the sums `[bm, bn]`.
    """
    *input_refs, y, total = refs
    items = Items(*input_refs[: len(Items._fields)])
    inputs: dict[str, Any] = dict(
        zip(names, input_refs[len(Items._fields) :], strict=True)
    )
    item, step = pl.program_id(1), pl.program_id(2)
    tile = items.tile[item]
    first_row, last_row = items.first_row[item], items.last_row[item]
    has_rows = first_row < last_row
    tile_before = items.tile[jnp.maximum(item - 1, 0)]
    is_first_of_tile = (item == 0) | (tile != tile_before)

    @pl.when(is_first_of_tile & (step == 0))
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(has_rows & (step == 0))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(has_rows)
    def _():
        _tpu.add_tile_product(inputs, total, p, body, step)

    @pl.when(has_rows & (step == steps - 1))
    def _():
        sums = _tpu.finished_sums(inputs, total, p)
        row = tile * sums.shape[0] + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        belongs = (row >= first_row) & (row < last_row)
        y[...] = jnp.where(belongs, sums, y[...])
