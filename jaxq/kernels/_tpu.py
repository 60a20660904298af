"""Block-wise quantized matmul on TPU, as one Pallas (Mosaic) kernel.

Motivation. A decode step reads every weight once and computes little. So its time is
the time of reading memory. 4-bit codes have a quarter of the bytes of bfloat16. They
save time only if two conditions hold. The codes are decoded after they are in VMEM, and
decoding a tile takes no longer than fetching the next tile. Without a kernel, XLA
writes the decoded weight to memory first. The kernel has run in the interpreter and has
been compiled for TPU v5e, v6e and v7x. It has not been timed on a device.

Layout. A tile is decoded with k along sublanes and n along lanes. Reading a byte as two
4-bit numbers (`pltpu.bitcast`) is then free, and the numbers are in order. Codes in the
layout "columns" already lie like this. Codes in the layout "rows", as `quantize` stores
them, have n along sublanes. The kernel transposes each tile of bytes after it is in
VMEM. The unit that moves lanes does this, and it has little else to do. The matrix unit
could also multiply by a transposed right side. This takes longer: on v6e and v7x it
loads a transposed tile at half the speed, and the tile then holds decoded weights,
which have up to four times the bytes of the codes.

Each grid step (e, m, n, k) computes

    total += x @ decode(data)

    x [bm, bk]    scale, zero_point [bk / group, bn]
    data [bk * bits / 8, bn], or [bn, bk * bits / 8] in the layout "rows"

The last step along k writes `total` to the result. `total` is int32 if x is int8 and
there is one scale per column. Otherwise it is float32.

Bodies. There are five ways to decode a tile. Which one is fastest depends on the
generation of the TPU:

| body | codes | multiplied with x | scale per group |
|---|---|---|---|
| pre | integers | `scale * (codes - zero_point)`, rounded once | on weights |
| post | integers | codes, exact | on partial sums |
| float8 | integers of 4 bits | codes in float8, exact | on partial sums |
| select | table | entries, looked up as float32 along lanes | see below |
| gather | table | entries, looked up as bfloat16 along sublanes | see below |

- A scale on the weights costs bk * bn multiplications. A scale on the partial sums
  costs bk / group * bm * bn.
- select and gather scale partial sums if 4 * bm <= group, and weights otherwise.
- select runs on every generation. gather runs from v6e on, and only for bfloat16 x.
- float8 is for x made of float8 codes, on TPUs with a float8 matrix unit: v7x.
- If there is one scale per column, every body multiplies the finished sum with it.
- With scales on partial sums, `sum(x) * zero_point` is subtracted from the partial sum.
  This replaces a subtraction from bk * bn codes.
- TPUs have no float16. float16 arrays are computed as float32.

Memory. VMEM holds two tiles of each of x, data, scale, zero_point and y, because the
next tiles are fetched during a step. It holds one tile of `total` and one decoded tile,
and in the layout "rows" one transposed tile of data. `default_tiles` needs less than
12 MB. A kernel gets 16 MB on v5e.

Shapes. All e, m, k and n are supported. x is padded with zeros to whole tiles along k,
and scales beyond the last group count as zero. Codes are not padded. The memory beyond
the last code may hold any bytes, and every byte decodes to finite numbers. Numbers
beyond m and n are computed but not written.
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

from jaxq.kernels._problem import Problem
from jaxq.kernels._tile_product import tile_product
from jaxq.kernels._tpu_tiles import (
    LANES,
    SUBLANES,
    WeightTile,
    generation,
    integers,
    is_wide,
    matrix_of,
    native,
    run_grid,
    scaled_weights,
    table_body,
    table_entries,
    tile_height,
    weight_inputs,
    weight_specs,
    whole_registers,
    why_not_tiles,
)

_X_DTYPES = ("bfloat16", "float16", "float32", "int8")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_BYTE_ROWS = 32


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can.

    Args:
      problem: the product.
      device_kind: `jax.Device.device_kind`, or None if no device is known yet.
    """
    p = problem
    if p.x_dtype not in _X_DTYPES:
        return f"the TPU kernel does not take x in {p.x_dtype}"
    if p.x_dtype == "int8" and p.codebook:
        return "int8 x cannot be multiplied with the float entries of a codebook"
    return why_not_tiles(p, device_kind)


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int | str]:
    """Returns tiles for a problem that the table does not know.

    Args:
      problem: a product that `why_not` accepts.
      device_kind: `jax.Device.device_kind`. None gives tiles that compile for every
        generation.
    """
    p = problem
    m, n = whole_registers(p), pl.cdiv(p.n, LANES) * LANES
    bm, bn = min(m, 256 if is_wide(p) else 512), min(n, 512)
    body = _default_body(p, bm, device_kind)
    if body == "float8":
        # A register of bytes has 32 rows.
        bm = pl.cdiv(bm, _BYTE_ROWS) * _BYTE_ROWS
    return {"bm": bm, "bk": _default_bk(p, bm, body), "bn": bn, "body": body}


def _default_body(p: Problem, bm: int, device_kind: str | None) -> str:
    is_old = generation(device_kind) < 6
    if p.codebook:
        return table_body(p, device_kind)
    if p.is_exact and generation(device_kind) >= 7 and _has_float8(p):
        return "float8"
    if p.x_dtype == "int8" or p.is_exact:
        return "post"
    if is_old:
        # Before v6e the vector unit has no bfloat16, so a multiplication for every
        # weight is expensive. Partial sums cost nothing extra if a group is as long as
        # the matrix unit.
        return "post" if bm <= p.group or p.group >= 128 else "pre"
    # Beside the transpose of rows, scaled weights take fewer cycles than scaled sums.
    return "post" if 8 * bm <= p.group and p.layout == "columns" else "pre"


def _has_float8(p: Problem) -> bool:
    """True if the matrix unit of v7x multiplies x and the codes as float8."""
    return p.x_codes in _FLOAT8 and p.bits == 4 and not p.codebook


def _default_bk(p: Problem, bm: int, body: str) -> int:
    select, many_rows = body == "select", bm > 128
    # Rows of bytes need room for their transpose.
    transposed_bytes = p.layout == "rows" and p.bits == 8
    if is_wide(p) or ((select or transposed_bytes) and many_rows):
        largest = 1024
    elif select or many_rows:
        largest = 2048
    else:
        largest = 4096
    # A step is assumed to cost about as much as 512 more rows of weights. The last step
    # along k costs as much as the others, so k should be close to a multiple of bk.
    height = tile_height(p)
    candidates = range(largest // height * height, 0, -height)
    return min(candidates, key=lambda bk: pl.cdiv(p.k, bk) * (bk + 512))


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    index: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes `x @ decode(data)` as `Problem` states it.

    Args:
      x: `[e, m, k]` in `problem.x_dtype` or `problem.x_codes`.
      data: `[e, n, k * bits / 8]` in the layout "rows", `[e, k * bits / 8, n]` in the
        layout "columns".
      scale: `[e, num_groups, n]`, or None.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: "bm", "bk", "bn" and "body", as `default_tiles` returns them.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True, or parameters of the interpreter, to run on a CPU step by step.

    Returns:
      `[e, m, n]` in `problem.out_dtype`.

    Raises:
      ValueError: The tiles do not fit the hardware, or the body cannot compute the
        problem.
    """
    p, body = problem, str(tiles["body"])
    bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
    steps = pl.cdiv(p.k, bk)
    inputs = kernel_inputs(x, data, scale, zero_point, codebook, problem=p, tiles=tiles)
    is_integer_sum = p.x_dtype == "int8" and p.group == p.k
    specs = {
        "x": pl.BlockSpec((None, bm, bk), lambda e, m, n, k, *_: (e, m, k)),
        **weight_specs(inputs, p, bk, bn, _weight_tile),
    }
    return run_grid(
        functools.partial(_kernel, tuple(inputs), p, body, steps),
        inputs,
        index,
        p,
        grid=(p.e, pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), steps),
        in_specs=[specs[name] for name in inputs],
        out_shape=(p.e, p.m, p.n),
        out_spec=pl.BlockSpec((None, bm, bn), lambda e, m, n, k, *_: (e, m, n)),
        total=pltpu.VMEM((bm, bn), jnp.int32 if is_integer_sum else jnp.float32),
        interpret=interpret,
    )


def kernel_inputs(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
) -> dict[str, jax.Array]:
    """Returns the arrays as the kernel reads them, by name. See `matmul`.

    Raises:
      ValueError: The tiles do not fit the hardware, or the body cannot compute the
        problem.
    """
    p, body = problem, str(tiles["body"])
    bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
    _check_tiles(p, bm, bk, bn, body)
    padding = pl.cdiv(p.k, bk) * bk - p.k
    dtype = p.x_codes if body == "float8" else native(p.x_dtype)
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, 0), (0, padding)))
    return {"x": x, **weight_inputs(data, scale, zero_point, codebook, body)}


def _weight_tile(e, m, n, k, *index) -> WeightTile:
    """The tile of grid step (e, m, n, k). `index` has its reference if there is one."""
    del m
    return WeightTile(matrix_of(e, index), e, k, n)


def _kernel(names: tuple[str, ...], p: Problem, body: str, steps: int, *refs) -> None:
    """One grid step (e, m, n, k): adds the product of one tile along k to `total`.

    `refs` are the index if there is one, the inputs `names`, the result `[bm, bn]` and
    total `[bm, bn]`. Only `_weight_tile` reads the index.
    """
    *input_refs, y, total = refs
    inputs = dict(zip(names, input_refs[-len(names) :], strict=True))
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    add_tile_product(inputs, total, p, body, step)

    @pl.when(step == steps - 1)
    def _():
        y[...] = finished_sums(inputs, total, p).astype(y.dtype)


def add_tile_product(
    inputs: Mapping[str, Any], total: Any, p: Problem, body: str, step: Any
) -> None:
    """Adds the product of one tile along k to `total`.

    Args:
      inputs: references to x `[bm, bk]` and to the tile of the weight, by name.
      total: reference to the sums `[bm, bn]`.
      p: the problem.
      body: how the tile is decoded.
      step: number of the tile along k.
    """
    x, data = inputs["x"][...], inputs["data"][...]
    if p.layout == "rows":
        data = data.T
    # x is [bm, bk] and data is [bk * bits / 8, bn].
    one_scale = p.group == p.k
    group = x.shape[1] if one_scale else p.group
    num_groups = x.shape[1] // group

    def per_group(name: str) -> jax.Array:
        """float32 `[num_groups, bn]`, with zeros beyond the last group.

        A tile may reach beyond the last group. The memory there may hold NaN.
        """
        rows = inputs[name][...].astype(jnp.float32)
        if one_scale or p.num_groups % num_groups == 0:
            return rows
        index = step * num_groups + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(index < p.num_groups, rows, 0.0)

    if p.codebook:
        w, bias = table_entries(data, inputs["codebook"][...], body), 0
    else:
        w, bias = integers(data, p)  # [bk, bn]
    zero = per_group("zero_point") - bias if p.zero_point else None
    if zero is None and bias:
        zero = jnp.full((num_groups, w.shape[1]), -float(bias), jnp.float32)

    # With few rows of x, scaling sums costs less than scaling weights, in every body.
    few_rows = 4 * x.shape[0] <= group
    if one_scale or body in ("post", "float8") or (p.codebook and few_rows):
        # float8_e4m3fn holds all integers of 4 bits, and float8_e5m2 does not.
        w = w.astype(jnp.float8_e4m3fn if body == "float8" else x.dtype)
        scale = None if one_scale else per_group("scale")
        sums = total[...]
        for g in range(num_groups):
            at = slice(g * group, (g + 1) * group)
            part = _tile_product(x[:, at], w[at])  # [bm, bn]
            if zero is not None:
                # x @ (w - zero) = x @ w - sum(x) * zero
                sum_x = jnp.sum(x[:, at].astype(part.dtype), axis=1, keepdims=True)
                part -= sum_x * zero[g : g + 1].astype(part.dtype)
            if scale is not None:
                part = part.astype(jnp.float32) * scale[g : g + 1]
            sums += part
        total[...] = sums
    else:
        w = scaled_weights(w, per_group("scale"), zero, p)
        total[...] += _tile_product(x, w)


def finished_sums(inputs: Mapping[str, Any], total: Any, p: Problem) -> jax.Array:
    """Returns the sums `[bm, bn]` after the last tile along k.

    A scale per column multiplies them here. Other scales are in the sums already.
    """
    sums = total[...]
    if p.group == p.k and "scale" in inputs:
        sums = sums.astype(jnp.float32) * inputs["scale"][...].astype(jnp.float32)
    return sums


def _tile_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` `[bm, bn]`, int32 for int8 x, float32 otherwise."""
    if x.dtype == jnp.int8:
        return jnp.dot(x, w, preferred_element_type=jnp.int32)
    return tile_product(x, w, 0)


def _check_tiles(p: Problem, bm: int, bk: int, bn: int, body: str) -> None:
    """Checks that the kernel can run this problem with these tiles."""
    height = tile_height(p)
    if bm % SUBLANES or bn % LANES or bk % height or min(bm, bk, bn) < 1:
        raise ValueError(
            f"quantized_matmul: the TPU kernel cannot run with tiles {bm=}, {bk=}, "
            f"{bn=} for groups of {p.group}. bm, bk and bn must be positive multiples "
            f"of {SUBLANES}, {height} and {LANES}."
        )
    bodies = ("gather", "select") if p.codebook else ("pre", "post")
    bodies += ("float8",) if _has_float8(p) else ()
    if body not in bodies:
        raise ValueError(
            f"quantized_matmul: body {body!r} of the TPU kernel does not decode "
            f"{p.codes}. Use one of {', '.join(bodies)}."
        )
    if body == "gather" and p.x_dtype != "bfloat16":
        raise ValueError(
            'quantized_matmul: body "gather" of the TPU kernel rounds the codebook to '
            f'bfloat16, and this is too coarse for x in {p.x_dtype}. Use "select".'
        )
    if body == "pre" and p.is_exact:
        raise ValueError(
            'quantized_matmul: body "pre" of the TPU kernel rounds scaled weights to '
            'bfloat16, and the product of float8 codes is exact. Use "post".'
        )
    if body == "pre" and p.x_dtype == "int8":
        raise ValueError(
            'quantized_matmul: body "pre" of the TPU kernel rounds scaled weights to '
            'the dtype of x, and int8 cannot hold scaled weights. Use "post".'
        )
