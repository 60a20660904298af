"""What the TPU kernels for products share: how a tile of codes is decoded in VMEM.

A tile is decoded with k along sublanes and n along lanes. Reading a byte as two 4-bit
numbers (`pltpu.bitcast`) is then free, and the numbers are in order. Codes in the
layout "columns" already lie like this. Codes in the layout "rows", as `quantize` stores
them, have n along sublanes. Each tile of bytes is transposed after it is in VMEM. The
unit that moves lanes does this, and it has little else to do.

Shapes in this file: data `[bk * bits / 8, bn]`, weights `[bk, bn]`, scales and zero
points `[bk / group, bn]`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._problem import Problem

LANES = 128
# A tile of 32-bit numbers has a multiple of this many rows. So a tile needs at least
# this many scales along k.
SUBLANES = 8
_GROUPS = (32, 64, 128)
_WIDE = ("float16", "float32")


def why_not_tiles(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why codes cannot be decoded in tiles on this TPU, or None if they can."""
    p = problem
    if 0 in (p.e, p.m, p.k, p.n):
        return "the product is empty"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return f"the TPU kernel does not decode {p.codes} codes"
    if p.group != p.k and p.group not in _GROUPS:
        sizes = ", ".join(map(str, _GROUPS))
        return (
            f"the TPU kernel needs groups of {sizes} codes or one scale per column, "
            f"not groups of {p.group}"
        )
    if device_kind is not None and generation(device_kind) < 5:
        return f"the TPU kernel is for TPU v5e and later, not for {device_kind}"
    return None


def generation(device_kind: str | None) -> int:
    """Returns the generation of a TPU, from its name. It is 5 without a number.

    Tiles for generation 5, the oldest that the kernels support, compile for all others.
    """
    match = re.search(r"TPU\s?v?(\d)", device_kind or "")
    return int(match[1]) if match else 5


def native(dtype: str | jnp.dtype) -> jnp.dtype:
    """The dtype that replaces `dtype` on a TPU: float32 for float16, else `dtype`."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def to_native(array: jax.Array) -> jax.Array:
    """Returns the array in its native dtype."""
    return array.astype(native(array.dtype))


def is_wide(problem: Problem) -> bool:
    """True if x has 32 bits on a TPU."""
    return problem.x_dtype in _WIDE


def whole_registers(problem: Problem) -> int:
    """Returns the rows of x, padded to whole registers.

    The rows of a register depend on the bytes of a number.
    """
    rows = {"int8": 32, "bfloat16": 16}.get(problem.x_dtype, SUBLANES)
    return pl.cdiv(problem.m, rows) * rows


def tile_height(problem: Problem) -> int:
    """bk must be a multiple of this: whole registers of codes, and eight scales."""
    return 256 if problem.group == problem.k else SUBLANES * problem.group


# The grid.


def weight_inputs(
    data: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    body: str,
) -> dict[str, jax.Array]:
    """The arrays of a weight as a kernel reads them, by name.

    Args:
      data: codes of one or more matrices.
      scale: `[e, num_groups, n]`, or None.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      body: how entries of the codebook are looked up.
    """
    inputs = {"data": data}
    if scale is not None:
        inputs["scale"] = to_native(scale)
    if zero_point is not None:
        # bfloat16 holds every zero point exactly. A bfloat16 tile may have 8 rows. A
        # tile of bytes needs 32 rows.
        inputs["zero_point"] = zero_point.astype(jnp.bfloat16)
    if codebook is not None:
        inputs["codebook"] = _lay_out_codebook(codebook, body)
    return inputs


class WeightTile(NamedTuple):
    """The tile of a weight that a grid step reads.

    Attributes:
      matrix: first index of data.
      e: first index of scale, zero_point and codebook.
      k: number of the tile along k.
      n: number of the tile along n.
    """

    matrix: Any
    e: Any
    k: Any
    n: Any


def matrix_of(e: Any, prefetched: Sequence[Any]) -> Any:
    """Returns the matrix that product e reads.

    Args:
      e: number of the product.
      prefetched: empty, or a list with the reference to the index.
    """
    return prefetched[0][e] if prefetched else e


def weight_specs(
    inputs: Mapping[str, jax.Array],
    p: Problem,
    bk: int,
    bn: int,
    tile_of_step: Callable[..., WeightTile],
) -> dict[str, pl.BlockSpec]:
    """The tile of each array of a weight in a grid step.

    Args:
      inputs: the arrays by name, as `weight_inputs` returns them.
      p: the problem.
      bk: codes of a tile along k.
      bn: codes of a tile along n.
      tile_of_step: returns the tile of a grid step. It gets the numbers of the step and
        the references to prefetched scalars.
    """
    one_scale = p.group == p.k

    def spec(shape: tuple, place: Callable[[WeightTile], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda *args: place(tile_of_step(*args)))

    height = bk * p.bits // 8
    group_spec = spec(
        (1 if one_scale else bk // p.group, bn),
        lambda tile: (tile.e, 0 if one_scale else tile.k, tile.n),
    )
    if p.layout == "rows":
        data_spec = spec((bn, height), lambda tile: (tile.matrix, tile.n, tile.k))
    else:
        data_spec = spec((height, bn), lambda tile: (tile.matrix, tile.k, tile.n))
    specs = {"data": data_spec, "scale": group_spec, "zero_point": group_spec}
    if "codebook" in inputs:
        shape = inputs["codebook"].shape[1:]
        specs["codebook"] = spec(shape, lambda tile: (tile.e, 0, 0))
    return specs


def run_grid(
    kernel: Callable[..., None],
    inputs: Mapping[str, jax.Array],
    index: jax.Array | None,
    p: Problem,
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_shape: tuple[int, ...],
    out_spec: pl.BlockSpec,
    total: Any,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Runs a kernel over a grid of four axes. It sums along the last axis.

    Args:
      kernel: gets references to the index if there is one, the inputs, the tile of the
        result, and `total`.
      inputs: x and the arrays of the weight, by name.
      index: int32 `[e]`, or None.
      p: the problem.
      grid: the number of steps along each axis.
      in_specs: the tile of each input.
      out_shape: shape of the result.
      out_spec: the tile of the result.
      total: memory for the sums of a tile.
      interpret: True, or parameters of the interpreter.

    Returns:
      The result in `p.out_dtype`.
    """
    if interpret:
        # XLA:CPU reads the 4-bit halves of bytes wrongly if the bytes are constants.
        arrays = jax.lax.optimization_barrier(tuple(inputs.values()))
        inputs = dict(zip(inputs, arrays, strict=True))
    data = inputs["data"]
    out = jax.ShapeDtypeStruct(
        out_shape,
        native(p.out_dtype),
        manual_axis_type=jax.typeof(inputs["x"]).manual_axis_type,
    )
    num_bytes = sum(a.size * a.dtype.itemsize for a in (*inputs.values(), out))
    # A product reads one matrix of a stack, however long the stack is.
    num_bytes -= (data.shape[0] - p.e) * (data.nbytes // data.shape[0])
    # The index is in scalar memory before the first tile is loaded.
    prefetched = [] if index is None else [index]
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[total],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * p.e * p.m * p.k * p.n,
            bytes_accessed=num_bytes,
            transcendentals=0,
        ),
        interpret=interpret,
    )(*prefetched, *inputs.values())
    return y.astype(p.out_dtype)


# Decoding.


def integers(data: jax.Array, p: Problem) -> tuple[jax.Array, int]:
    """Codes `[bk, bn]` minus a bias, and the bias."""
    if p.bits == 4:
        return pltpu.bitcast(data, jnp.int4 if p.signed else jnp.uint4), 0
    if p.signed or p.x_dtype != "int8":
        return data, 0
    # The matrix unit takes only signed bytes. So 128 is subtracted from each code by a
    # flip of its top bit. There are no byte operations, so the bits of 4 bytes are
    # flipped together.
    words = pltpu.bitcast(data, jnp.int32) ^ jnp.int32(-0x7F7F7F80)
    return pltpu.bitcast(words, jnp.int8), 128


def table_body(problem: Problem, device_kind: str | None) -> str:
    """Returns how entries of a table are looked up: "gather" or "select".

    "gather" reads bfloat16 entries along sublanes. It needs TPU v6e, and bfloat16 x.
    "select" reads float32 entries along lanes.
    """
    return "select" if is_wide(problem) or generation(device_kind) < 6 else "gather"


def _lay_out_codebook(codebook: jax.Array, body: str) -> jax.Array:
    """Arranges the codebook as the body reads it from registers.

    For gather it is bfloat16 `[e, 16, 128]`, with the entries along 16 sublanes. For
    select it is float32 `[e, 1, 128]`: the 16 entries, eight times along 128 lanes.
    """
    if body == "gather":
        entries = codebook.astype(jnp.bfloat16)[:, :, None]
        return jnp.broadcast_to(entries, (*codebook.shape, LANES))
    return jnp.tile(codebook, (1, LANES // 16))[:, None, :]


def table_entries(data: jax.Array, table: jax.Array, body: str) -> jax.Array:
    """Looks up the entries `[bk, bn]` of codes: bfloat16 for gather, else float32."""
    codes = pltpu.bitcast(data, jnp.uint4)
    bk, bn = codes.shape
    look_up = functools.partial(jnp.take_along_axis, mode="promise_in_bounds")
    # One gather fills one register. Indices and entries must have the same width: 16
    # bits along sublanes, 32 bits along lanes.
    if body == "gather":
        codes = codes.astype(jnp.int16)
        table = jnp.concatenate([table] * (bn // LANES), axis=1)  # [16, bn]
        parts = [look_up(table, codes[i : i + 16], axis=0) for i in range(0, bk, 16)]
        return jnp.concatenate(parts, axis=0)
    codes, table = codes.astype(jnp.int32), jnp.broadcast_to(table, (bk, LANES))
    starts = range(0, bn, LANES)
    parts = [look_up(table, codes[:, i : i + LANES], axis=1) for i in starts]
    return jnp.concatenate(parts, axis=1)


def scaled_weights(
    w: jax.Array, scale: jax.Array, zero: jax.Array | None, p: Problem
) -> jax.Array:
    """`scale * (w - zero)` `[bk, bn]`, rounded to the dtype of x once, at the end.

    Args:
      w: codes or entries of a table, `[bk, bn]`.
      scale: float32 `[bk / group, bn]`.
      zero: float32 `[bk / group, bn]`, or None.
      p: the problem.
    """
    dtype = native(p.x_dtype)
    if not p.codebook:
        w = w.astype(dtype)  # every float dtype of x holds the integers exactly
    if zero is not None:
        w = _on_groups(zero.astype(w.dtype), w, jnp.subtract)
    # If weights and scales have one dtype, they are multiplied in that dtype.
    exact = w.dtype if w.dtype == native(p.scale_dtype or dtype) else jnp.float32
    w = _on_groups(scale.astype(exact), w.astype(exact), jnp.multiply)
    return w.astype(dtype)


def _on_groups(
    rows: jax.Array, w: jax.Array, op: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Applies `op` to each row of w `[bk, bn]` and to the row of its group."""
    groups = w.reshape(rows.shape[0], -1, w.shape[1])  # [bk / group, group, bn]
    return op(groups, rows[:, None, :]).reshape(w.shape)
