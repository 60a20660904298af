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

Bodies. There are four ways to decode a tile. Which one is fastest depends on the
generation of the TPU:

| body | codes | multiplied with x | scale per group |
|---|---|---|---|
| pre | integers | `scale * (codes - zero_point)`, rounded once | on weights |
| post | integers | codes, exact | on partial sums |
| select | table | entries, looked up as float32 along lanes | see below |
| gather | table | entries, looked up as bfloat16 along sublanes | see below |

- A scale on the weights costs bk * bn multiplications. A scale on the partial sums
  costs bk / group * bm * bn.
- select and gather scale partial sums if 4 * bm <= group, and weights otherwise.
- select runs on every generation. gather runs from v6e on, and only for bfloat16 x.
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
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._problem import Problem

_GROUPS = (32, 64, 128)
_LANES = 128
# A tile needs at least this many scales along k.
_SUBLANES = 8
_X_DTYPES = ("bfloat16", "float16", "float32", "int8")


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can.

    Args:
      problem: the product.
      device_kind: `jax.Device.device_kind`, or None if no device is known yet.
    """
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
    if p.x_dtype not in _X_DTYPES:
        return f"the TPU kernel does not take x in {p.x_dtype}"
    if p.x_dtype == "int8" and p.codebook:
        return "int8 x cannot be multiplied with the float entries of a codebook"
    if device_kind is not None and _generation(device_kind) < 5:
        return f"the TPU kernel is for TPU v5e and later, not for {device_kind}"
    return None


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int | str]:
    """Returns tiles for a problem that the table does not know.

    Args:
      problem: a product that `why_not` accepts.
      device_kind: `jax.Device.device_kind`. None gives tiles that compile for every
        generation.
    """
    p = problem
    is_wide = p.x_dtype in ("float16", "float32")
    # The rows of one register. They depend on the bytes of a number.
    register_rows = {"int8": 32, "bfloat16": 16}.get(p.x_dtype, _SUBLANES)
    m = pl.cdiv(p.m, register_rows) * register_rows
    n = pl.cdiv(p.n, _LANES) * _LANES
    bm, bn = min(m, 256 if is_wide else 512), min(n, 512)
    body = _default_body(p, bm, device_kind)
    return {"bm": bm, "bk": _default_bk(p, bm, body), "bn": bn, "body": body}


def _default_body(p: Problem, bm: int, device_kind: str | None) -> str:
    is_old = _generation(device_kind) < 6
    if p.codebook:
        wide = p.x_dtype in ("float16", "float32")
        return "select" if wide or is_old else "gather"
    if p.x_dtype == "int8":
        return "post"
    if is_old:
        # Before v6e the vector unit has no bfloat16, so a multiplication for every
        # weight is expensive. Partial sums cost nothing extra if a group is as long as
        # the matrix unit.
        return "post" if bm <= p.group or p.group >= 128 else "pre"
    # Beside the transpose of rows, scaled weights take fewer cycles than scaled sums.
    return "post" if 8 * bm <= p.group and p.layout == "columns" else "pre"


def _default_bk(p: Problem, bm: int, body: str) -> int:
    is_wide, select, many_rows = (
        p.x_dtype in ("float16", "float32"),
        body == "select",
        bm > 128,
    )
    # Rows of bytes need room for their transpose.
    transposed_bytes = p.layout == "rows" and p.bits == 8
    if is_wide or ((select or transposed_bytes) and many_rows):
        largest = 1024
    elif select or many_rows:
        largest = 2048
    else:
        largest = 4096
    # A step is assumed to cost about as much as 512 more rows of weights. The last step
    # along k costs as much as the others, so k should be close to a multiple of bk.
    height = _height(p)
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
      x: `[e, m, k]`.
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
    out = jax.ShapeDtypeStruct(
        (p.e, p.m, p.n),
        _native(p.out_dtype),
        manual_axis_type=jax.typeof(x).manual_axis_type,
    )
    num_bytes = sum(a.size * a.dtype.itemsize for a in (*inputs.values(), out))
    # A product reads one matrix of a stack, however long the stack is.
    num_bytes -= (data.shape[0] - p.e) * (data.nbytes // data.shape[0])
    # The index is in scalar memory before the first tile is loaded.
    prefetched = [] if index is None else [index]
    total = pltpu.VMEM((bm, bn), jnp.int32 if is_integer_sum else jnp.float32)
    y = pl.pallas_call(
        functools.partial(_kernel, tuple(inputs), p, body, steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(p.e, pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), steps),
            in_specs=input_specs(inputs, p, bm, bk, bn, _tiles_of_step),
            out_specs=pl.BlockSpec((None, bm, bn), lambda e, m, n, k, *_: (e, m, n)),
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


class InputTiles(NamedTuple):
    """Which tiles a grid step reads.

    Attributes:
      product: first index of x.
      weight: first index of scale, zero_point and codebook.
      matrix: first index of data.
      m: number of the tile along m.
      n: number of the tile along n.
      k: number of the tile along k.
    """

    product: Any
    weight: Any
    matrix: Any
    m: Any
    n: Any
    k: Any


def _tiles_of_step(e, m, n, k, *prefetched) -> InputTiles:
    """The tiles of grid step (e, m, n, k). `prefetched` is empty, or has the index."""
    matrix = prefetched[0][e] if prefetched else e
    return InputTiles(e, e, matrix, m, n, k)


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
    inputs = {"x": jnp.pad(_to_native(x), ((0, 0), (0, 0), (0, padding))), "data": data}
    if scale is not None:
        inputs["scale"] = _to_native(scale)
    if zero_point is not None:
        # bfloat16 holds every zero point exactly. A bfloat16 tile may have 8 rows. A
        # tile of bytes needs 32 rows.
        inputs["zero_point"] = zero_point.astype(jnp.bfloat16)
    if codebook is not None:
        inputs["codebook"] = _lay_out_codebook(codebook, body)
    return inputs


def input_specs(
    inputs: Mapping[str, jax.Array],
    p: Problem,
    bm: int,
    bk: int,
    bn: int,
    tiles_of_step: Callable[..., InputTiles],
) -> list[pl.BlockSpec]:
    """Returns the specification of the tile of each input.

    `tiles_of_step` gets the indices of the grid step and the references to prefetched
    scalars.
    """
    one_scale = p.group == p.k
    height = bk * p.bits // 8

    def spec(shape: tuple, position: Callable[[InputTiles], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *args: position(tiles_of_step(*args)))

    group_rows = 1 if one_scale else bk // p.group
    group_spec = spec(
        (None, group_rows, bn), lambda at: (at.weight, 0 if one_scale else at.k, at.n)
    )
    if p.layout == "rows":
        data_spec = spec((None, bn, height), lambda at: (at.matrix, at.n, at.k))
    else:
        data_spec = spec((None, height, bn), lambda at: (at.matrix, at.k, at.n))
    specs = {
        "x": spec((None, bm, bk), lambda at: (at.product, at.m, at.k)),
        "data": data_spec,
        "scale": group_spec,
        "zero_point": group_spec,
    }
    if "codebook" in inputs:
        tile = (None, *inputs["codebook"].shape[1:])
        specs["codebook"] = spec(tile, lambda at: (at.weight, 0, 0))
    return [specs[name] for name in inputs]


def _kernel(names: tuple[str, ...], p: Problem, body: str, steps: int, *refs) -> None:
    """One grid step (e, m, n, k): adds the product of one tile along k to `total`.

    `refs` are the index if there is one, the inputs `names`, the result `[bm, bn]` and
    total `[bm, bn]`. Only `_tiles_of_step` reads the index.
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
      inputs: references to the tiles that `input_specs` describes, by name.
      total: reference to the sums `[bm, bn]`.
      p: the problem.
      body: how a tile is decoded.
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

    def on_weights(rows: jax.Array, w: jax.Array, op) -> jax.Array:
        """Applies `op` to each row of w `[bk, bn]` and to the row of its group."""
        return op(w.reshape(num_groups, group, -1), rows[:, None, :]).reshape(w.shape)

    if p.codebook:
        w, bias = _table_entries(data, inputs["codebook"][...], body), 0
    else:
        w, bias = _integers(data, p)  # [bk, bn]
    zero = per_group("zero_point") - bias if p.zero_point else None
    if zero is None and bias:
        zero = jnp.full((num_groups, w.shape[1]), -float(bias), jnp.float32)

    # With few rows of x, scaling sums costs less than scaling weights, in every body.
    few_rows = 4 * x.shape[0] <= group
    if one_scale or body == "post" or (p.codebook and few_rows):
        w = w.astype(x.dtype)
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
        if not p.codebook:
            w = w.astype(x.dtype)  # every float dtype of x holds the integers exactly
        if zero is not None:
            w = on_weights(zero.astype(w.dtype), w, jnp.subtract)
        # Weights are rounded to x's dtype once, at the end. If weights and scales have
        # one dtype, they are multiplied in that dtype.
        exact = w.dtype if w.dtype == inputs["scale"].dtype else jnp.float32
        scale = per_group("scale").astype(exact)
        w = on_weights(scale, w.astype(exact), jnp.multiply)
        total[...] += _tile_product(x, w.astype(x.dtype))


def finished_sums(inputs: Mapping[str, Any], total: Any, p: Problem) -> jax.Array:
    """Returns the sums `[bm, bn]` after the last tile along k.

    A scale per column multiplies them here. Other scales are in the sums already.
    """
    sums = total[...]
    if p.group == p.k and "scale" in inputs:
        sums = sums.astype(jnp.float32) * inputs["scale"][...].astype(jnp.float32)
    return sums


def _integers(data: jax.Array, p: Problem) -> tuple[jax.Array, int]:
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


def _lay_out_codebook(codebook: jax.Array, body: str) -> jax.Array:
    """Arranges the codebook as the body reads it from registers.

    For gather it is bfloat16 `[e, 16, 128]`, with the entries along 16 sublanes. For
    select it is float32 `[e, 1, 128]`: the 16 entries, eight times along 128 lanes.
    """
    if body == "gather":
        entries = codebook.astype(jnp.bfloat16)[:, :, None]
        return jnp.broadcast_to(entries, (*codebook.shape, _LANES))
    return jnp.tile(codebook, (1, _LANES // 16))[:, None, :]


def _table_entries(data: jax.Array, table: jax.Array, body: str) -> jax.Array:
    """Looks up the entries `[bk, bn]` of codes: bfloat16 for gather, else float32."""
    codes = pltpu.bitcast(data, jnp.uint4)
    bk, bn = codes.shape
    look_up = functools.partial(jnp.take_along_axis, mode="promise_in_bounds")
    # One gather fills one register. Indices and entries must have the same width: 16
    # bits along sublanes, 32 bits along lanes.
    if body == "gather":
        codes = codes.astype(jnp.int16)
        table = jnp.concatenate([table] * (bn // _LANES), axis=1)  # [16, bn]
        parts = [look_up(table, codes[i : i + 16], axis=0) for i in range(0, bk, 16)]
        return jnp.concatenate(parts, axis=0)
    codes, table = codes.astype(jnp.int32), jnp.broadcast_to(table, (bk, _LANES))
    starts = range(0, bn, _LANES)
    parts = [look_up(table, codes[:, i : i + _LANES], axis=1) for i in starts]
    return jnp.concatenate(parts, axis=1)


def _tile_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` `[bm, bn]`, int32 for int8 x, float32 otherwise."""
    accumulate = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    # Without HIGHEST the matrix unit would round float32 to bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulate,
    )


def _native(dtype: str | jnp.dtype) -> jnp.dtype:
    """The dtype that replaces `dtype` on a TPU: float32 for float16, else `dtype`."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def _to_native(array: jax.Array) -> jax.Array:
    return array.astype(_native(array.dtype))


def _generation(device_kind: str | None) -> int:
    """The generation of a TPU, from its name. It is 5 if the name has no number.

    Tiles for generation 5, the oldest that the kernel supports, compile for all others.
    """
    match = re.search(r"TPU\s?v?(\d)", device_kind or "")
    return int(match[1]) if match else 5


def _height(p: Problem) -> int:
    """bk must be a multiple of this: whole registers of codes, and eight scales."""
    return 256 if p.group == p.k else _SUBLANES * p.group


def _check_tiles(p: Problem, bm: int, bk: int, bn: int, body: str) -> None:
    """Checks that the kernel can run this problem with these tiles."""
    height = _height(p)
    if bm % _SUBLANES or bn % _LANES or bk % height or min(bm, bk, bn) < 1:
        raise ValueError(
            f"quantized_matmul: the TPU kernel cannot run with tiles {bm=}, {bk=}, "
            f"{bn=} for groups of {p.group}. bm, bk and bn must be positive multiples "
            f"of {_SUBLANES}, {height} and {_LANES}."
        )
    bodies = ("gather", "select") if p.codebook else ("pre", "post")
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
    if body == "pre" and p.x_dtype == "int8":
        raise ValueError(
            'quantized_matmul: body "pre" of the TPU kernel rounds scaled weights to '
            'the dtype of x, and int8 cannot hold scaled weights. Use "post".'
        )
