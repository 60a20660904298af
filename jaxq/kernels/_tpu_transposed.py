"""The product of the backward pass on TPU, as one Pallas (Mosaic) kernel.

The gradient of `y = x @ decode(w)` for x is `dy @ decode(w).T`. An adapter on a frozen
weight, as in QLoRA (Dettmers et al., 2023), needs this product in each training step.
The codes are the same as in the forward product. They are summed along n instead of k,
so XLA would write the decoded weight to memory.

Each grid step (e, m, k, n) computes

    total += x @ decode(data).T

    x [bm, bn]    scale, zero_point [bk / group, bn]    total [bm, bk]
    data [bk * bits / 8, bn], or [bn, bk * bits / 8] in the layout "rows"

The last step along n writes `total` (float32) to the result.

- A tile is decoded as in the forward kernel (`_tpu_tiles.py`), with k along sublanes
  and n along lanes. The matrix unit multiplies by the transposed tile.
- A scale varies along n, which is summed. So weights are scaled before the product, and
  rounded to the dtype of x once. Plain XLA does the same.
- TPUs have no float16. float16 arrays are computed as float32.

Memory. VMEM holds two tiles of each of x, data, scale, zero_point and the result, one
tile of `total`, and one decoded tile. In the layout "rows" it also holds one transposed
tile of data. `default_tiles` needs less than 12 MB. A kernel gets 16 MB on v5e.

Shapes. All e, m, k and n are supported. x is padded with zeros to whole tiles along n.
Scales and zero points beyond n count as zero, because the memory there may hold NaN.
Numbers beyond m and k are computed but not written.

The kernel has run in the interpreter and has been compiled for TPU v5e, v6e and v7x. It
has not been timed on a device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._problem import Problem
from jaxq.kernels._tile_product import tile_product
from jaxq.kernels._tpu_tiles import (
    LANES,
    SUBLANES,
    WeightTile,
    integers,
    is_wide,
    matrix_of,
    run_grid,
    scaled_weights,
    table_body,
    table_entries,
    tile_height,
    to_native,
    weight_inputs,
    weight_specs,
    whole_registers,
    why_not_tiles,
)


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can.

    Args:
      problem: the product.
      device_kind: `jax.Device.device_kind`, or None if no device is known yet.
    """
    if problem.x_dtype not in ("bfloat16", "float16", "float32"):
        return f"the transposed TPU kernel does not take x in {problem.x_dtype}"
    return why_not_tiles(problem, device_kind)


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int | str]:
    """Returns tiles for a problem that the table does not know.

    Args:
      problem: a product that `why_not` accepts.
      device_kind: `jax.Device.device_kind`. None gives tiles that compile for every
        generation.
    """
    p = problem
    body = table_body(p, device_kind) if p.codebook else "pre"
    bm = min(whole_registers(p), 256 if is_wide(p) else 512)
    decodes_float32 = body == "select" or is_wide(p)
    # The compiler's static schedule decided these limits. With few rows of x, tall
    # tiles take the fewest cycles. With many rows, wide tiles do, because `total` is
    # then read and written less often.
    if bm <= 64 and p.bits == 4 and not decodes_float32:
        tallest, area = 4096, 2048 * 1024
    elif decodes_float32 and bm > 64:
        tallest, area = 1024, 512 * 1024
    else:
        tallest, area = 1024, 1024 * 1024
    bk = _cheapest(p.k, tile_height(p), tallest, 512)
    bn = _cheapest(p.n, LANES, area // bk, LANES)
    return {"bm": bm, "bk": bk, "bn": bn, "body": body}


def _cheapest(length: int, unit: int, longest: int, step_cost: int) -> int:
    """The tile length, a multiple of `unit`, with which an axis takes the least time.

    The last tile costs as much as the others, so `length` should be close to a multiple
    of a tile. A step is assumed to cost as much as `step_cost` more numbers.
    """
    candidates = range(longest // unit * unit, 0, -unit)
    return min(candidates, key=lambda tile: pl.cdiv(length, tile) * (tile + step_cost))


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
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes `x @ decode(data).T` as `Problem` states it.

    Args:
      x: `[e, m, n]`.
      data: `[e, n, k * bits / 8]` in the layout "rows", `[e, k * bits / 8, n]` in the
        layout "columns".
      scale: `[e, num_groups, n]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: "bm", "bk", "bn" and "body", as `default_tiles` returns them.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True, or parameters of the interpreter, to run on a CPU step by step.

    Returns:
      `[e, m, k]` in `problem.out_dtype`.

    Raises:
      ValueError: The tiles do not fit the hardware, or the body cannot compute the
        problem.
    """
    p, body = problem, str(tiles["body"])
    bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
    _check_tiles(p, bm, bk, bn, body)
    steps = pl.cdiv(p.n, bn)
    x = jnp.pad(to_native(x), ((0, 0), (0, 0), (0, steps * bn - p.n)))
    inputs = {"x": x, **weight_inputs(data, scale, zero_point, codebook, body)}
    specs = {
        "x": pl.BlockSpec((None, bm, bn), lambda e, m, k, n, *_: (e, m, n)),
        **weight_specs(inputs, p, bk, bn, _weight_tile),
    }
    return run_grid(
        functools.partial(_kernel, tuple(inputs), p, body, steps),
        inputs,
        index,
        p,
        grid=(p.e, pl.cdiv(p.m, bm), pl.cdiv(p.k, bk), steps),
        in_specs=[specs[name] for name in inputs],
        out_shape=(p.e, p.m, p.k),
        out_spec=pl.BlockSpec((None, bm, bk), lambda e, m, k, n, *_: (e, m, k)),
        total=pltpu.VMEM((bm, bk), jnp.float32),
        interpret=interpret,
    )


def _weight_tile(e, m, k, n, *index) -> WeightTile:
    """The tile of grid step (e, m, k, n). `index` has its reference if there is one."""
    del m
    return WeightTile(matrix_of(e, index), e, k, n)


def _kernel(names: tuple[str, ...], p: Problem, body: str, steps: int, *refs) -> None:
    """One grid step (e, m, k, n): adds the product of one tile along n to `total`.

    `refs` are the index if there is one, the inputs `names`, the result `[bm, bk]` and
    total `[bm, bk]`. Only `_weight_tile` reads the index.
    """
    *input_refs, y, total = refs
    inputs = dict(zip(names, input_refs[-len(names) :], strict=True))
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    x, data = inputs["x"][...], inputs["data"][...]
    bn = x.shape[1]
    if p.layout == "rows":
        data = data.T
    # x is [bm, bn] and data is [bk * bits / 8, bn].

    def per_group(name: str) -> jax.Array:
        """float32 `[bk / group, bn]`, with zeros beyond n.

        The rows beyond the last group may hold NaN. They belong to columns of the
        result that are not written.
        """
        rows = inputs[name][...].astype(jnp.float32)
        if p.n % bn == 0:
            return rows
        column = step * bn + lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        return jnp.where(column < p.n, rows, 0.0)

    if p.codebook:
        w = table_entries(data, inputs["codebook"][...], body)
    else:
        w = integers(data, p)[0]  # [bk, bn]
    zero = per_group("zero_point") if p.zero_point else None
    w = scaled_weights(w, per_group("scale"), zero, p)
    total[...] += tile_product(x, w, 1)

    @pl.when(step == steps - 1)
    def _():
        y[...] = total[...].astype(y.dtype)


def _check_tiles(p: Problem, bm: int, bk: int, bn: int, body: str) -> None:
    """Checks that the kernel can run this problem with these tiles."""
    height = tile_height(p)
    if bm % SUBLANES or bn % LANES or bk % height or min(bm, bk, bn) < 1:
        raise ValueError(
            "quantized_matmul: the transposed TPU kernel cannot run with tiles "
            f"{bm=}, {bk=}, {bn=} for groups of {p.group}. bm, bk and bn must be "
            f"positive multiples of {SUBLANES}, {height} and {LANES}."
        )
    bodies = ("gather", "select") if p.codebook else ("pre",)
    if body not in bodies or (body == "gather" and is_wide(p)):
        raise ValueError(
            f"quantized_matmul: body {body!r} of the transposed TPU kernel does not "
            f"decode {p.codes} for x in {p.x_dtype}. Use "
            f"{'select' if p.codebook else 'pre'!r}."
        )
