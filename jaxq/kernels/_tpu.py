"""Block-wise quantized matmul on TPU, as one Pallas (Mosaic) kernel.

Motivation. A decode step reads every weight once and computes little, so it takes as long as reading memory does. Codes
of 4 bits are a quarter of bfloat16, provided that they stay codes until they are in VMEM, and that decoding a tile
takes no longer than fetching the next one. XLA alone writes the decoded weight to memory first.

Layout. Codes lie as "columns": k along sublanes and n along lanes, so that reading a byte as two 4-bit numbers
(`pltpu.bitcast`) is free and yields them in order. Each grid step (e, m, n, k) takes

    x [bm, bk]    data [bk * bits / 8, bn]    scale, zero_point [bk / group, bn]    ->    total += x @ decode(data)

and the last step along k writes total, which is float32, or int32 where the whole sum is integer.

Bodies, the ways to decode a tile; which is fastest depends on the generation:

| body | codes | what meets x on the matrix unit | one scale a group goes |
|---|---|---|---|
| pre | integers | `scale * (codes - zero_point)`, rounded once to x's dtype | onto the weights: bk * bn products |
| post | integers | codes, exact | onto each group's partial sum: bk / group * bm * bn products |
| select | table | entries, taken as float32 along lanes; for any generation | as in post if 4 * bm <= group, or pre |
| gather | table | entries, taken as bfloat16 along sublanes; from v6e on, for bfloat16 x | likewise |

A single scale a column joins the finished sum in every body. In post, `sum(x) * zero_point` is subtracted from the
partial sum instead of `zero_point` from bk * bn codes. float16 is no TPU type: it is computed as float32.

Memory. Of VMEM, a step holds x, data, scale, zero_point and y twice (one is in flight), and total and the decoded tile
once. `default_tiles` stays below 12 MB, which leaves room in the 16 MB that a kernel gets on v5e.

Shapes. Any e, m, k, n. k's tail meets zeros: x is padded to whole tiles, and what lies beyond the last scale counts as
zero. Tails of m and n compute what is never written.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._problem import Problem

_GROUPS = (32, 64, 128)
_LANES = 128
_SUBLANES = 8  # the fewest scales along k that a tile may hold


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """The reason why this kernel does not serve a problem, None where it does.

    Args:
      problem: the problem.
      device_kind: `jax.Device.device_kind`; None where no device is known yet.
    """
    p = problem
    if p.layout != "columns":
        return 'the TPU kernel takes codes as "columns", with n along lanes: relayout the weight'
    if 0 in (p.e, p.m, p.k, p.n):
        return "an empty product needs no kernel"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return f"the TPU kernel has no {p.codes} codes"
    if p.group != p.k and p.group not in _GROUPS:
        return f"the TPU kernel takes groups of {_GROUPS} codes, or one scale a column, not groups of {p.group}"
    if p.x_dtype not in ("bfloat16", "float16", "float32", "int8"):
        return f"the TPU kernel takes no x of {p.x_dtype}"
    if p.x_dtype == "int8" and p.codebook:
        return "entries of a codebook are no integers that int8 x could meet"
    if device_kind is not None and _generation(device_kind) < 5:
        return f"the TPU kernel is made for v5e and later, not for {device_kind}"
    return None


def default_tiles(problem: Problem, device_kind: str | None) -> dict[str, int | str]:
    """Tiles for a problem that no table knows.

    Args:
      problem: what `why_not` has no objection to.
      device_kind: `jax.Device.device_kind`; None gives tiles that compile for every generation.
    """
    p, old = problem, _generation(device_kind) < 6
    wide = p.x_dtype in ("float16", "float32")
    low = {"int8": 32, "bfloat16": 16}.get(p.x_dtype, _SUBLANES)
    bm = min(pl.cdiv(p.m, low) * low, 256 if wide else 512)
    bn = min(pl.cdiv(p.n, _LANES) * _LANES, 512)
    if p.codebook:
        body = "select" if wide or old else "gather"
    elif p.x_dtype == "int8":
        body = "post"
    elif old:  # no bfloat16 vector unit: a product for every weight costs dear, sums as short as a matrix unit nothing
        body = "post" if bm <= p.group or p.group >= 128 else "pre"
    else:
        body = "post" if 8 * bm <= p.group else "pre"
    select, many = body == "select", bm > 128
    most = 1024 if wide or (select and many) else 2048 if select or many else 4096
    # A step costs about as much as 512 rows of weights on top of its own, and the last one is as long as the others.
    height = _height(p)
    bk = min(
        range(most // height * height, 0, -height),
        key=lambda bk: pl.cdiv(p.k, bk) * (bk + 512),
    )
    return {"bm": bm, "bk": bk, "bn": bn, "body": body}


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`x @ decode(data)` as `Problem` states it.

    Args:
      x: `[e, m, k]`.
      data: `[e, k * bits / 8, n]`.
      scale: `[e, k / group, n]`, or None.
      zero_point: like scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: what the arrays are.
      tiles: "bm", "bk", "bn" and "body", as `default_tiles` has them.
      interpret: run on CPU, step by step.

    Returns:
      `[e, m, n]` of `problem.out_dtype`.

    Raises:
      ValueError: tiles that do not fit the hardware or the problem.
    """
    p, body = problem, str(tiles["body"])
    bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
    _check_tiles(p, bm, bk, bn, body)
    steps = pl.cdiv(p.k, bk)
    one_scale = p.group == p.k
    x = jnp.pad(_to_native(x), ((0, 0), (0, 0), (0, steps * bk - p.k)))
    per_group = pl.BlockSpec((None, bk // p.group, bn), lambda e, m, n, k: (e, k, n))
    if one_scale:
        per_group = pl.BlockSpec((None, 1, bn), lambda e, m, n, k: (e, 0, n))
    inputs = {"x": x, "data": data}
    specs = {
        "x": pl.BlockSpec((None, bm, bk), lambda e, m, n, k: (e, m, k)),
        "data": pl.BlockSpec(
            (None, bk * p.bits // 8, bn), lambda e, m, n, k: (e, k, n)
        ),
    }
    if scale is not None:
        inputs["scale"], specs["scale"] = _to_native(scale), per_group
    if zero_point is not None:
        # bfloat16 holds every one of them, and its tiles may be 8 rows high where those of a byte are 32.
        inputs["zero_point"], specs["zero_point"] = (
            zero_point.astype(jnp.bfloat16),
            per_group,
        )
    if codebook is not None:
        inputs["codebook"] = _lay_codebook(codebook, body)
        specs["codebook"] = pl.BlockSpec(
            (None, *inputs["codebook"].shape[1:]), lambda e, m, n, k: (e, 0, 0)
        )
    integer = p.x_dtype == "int8" and one_scale
    out = jax.ShapeDtypeStruct(
        (p.e, p.m, p.n),
        _native(p.out_dtype),
        manual_axis_type=jax.typeof(x).manual_axis_type,
    )
    y = pl.pallas_call(
        functools.partial(_kernel, tuple(inputs), p, body, steps),
        grid=(p.e, pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), steps),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((None, bm, bn), lambda e, m, n, k: (e, m, n)),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.int32 if integer else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * p.e * p.m * p.k * p.n,
            bytes_accessed=sum(
                array.size * array.dtype.itemsize for array in (*inputs.values(), out)
            ),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*inputs.values())
    return y.astype(p.out_dtype)


def _kernel(names: tuple[str, ...], p: Problem, body: str, steps: int, *refs) -> None:
    *ins, y, total = refs
    taken = dict(zip(names, ins, strict=True))
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    x, data = taken["x"][...], taken["data"][...]
    one_scale = p.group == p.k
    group = x.shape[1] if one_scale else p.group
    num_groups = x.shape[1] // group

    def per_group(name: str) -> jax.Array:
        """float32 `[num_groups, bn]`, zero beyond the last group, where memory may hold NaN."""
        rows = taken[name][...].astype(jnp.float32)
        if one_scale or p.num_groups % num_groups == 0:
            return rows
        index = step * num_groups + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(index < p.num_groups, rows, 0.0)

    def onto(rows: jax.Array, w: jax.Array, op) -> jax.Array:
        """`op` of every row of w and the row of its group."""
        return op(w.reshape(num_groups, group, -1), rows[:, None, :]).reshape(w.shape)

    if p.codebook:
        w, bias = _look_up(data, taken["codebook"][...], body), 0
    else:
        w, bias = _integers(data, p)
    zero = per_group("zero_point") - bias if p.zero_point else None
    if zero is None and bias:
        zero = jnp.full((num_groups, w.shape[1]), -float(bias), jnp.float32)

    few_rows = (
        4 * x.shape[0] <= group
    )  # then scaling sums costs less than scaling weights, whoever decodes them
    if one_scale or body == "post" or (p.codebook and few_rows):
        w = w.astype(x.dtype)
        scale = None if one_scale else per_group("scale")
        sums = total[...]
        for g in range(num_groups):
            at = slice(g * group, (g + 1) * group)
            part = _dot(x[:, at], w[at])
            if zero is not None:
                sum_x = jnp.sum(x[:, at].astype(part.dtype), axis=1, keepdims=True)
                part -= sum_x * zero[g : g + 1].astype(part.dtype)
            sums += (
                part if scale is None else part.astype(jnp.float32) * scale[g : g + 1]
            )
        total[...] = sums
    else:
        w = (
            w.astype(x.dtype) if not p.codebook else w
        )  # integers are exact in every dtype of x
        if zero is not None:
            w = onto(zero.astype(w.dtype), w, jnp.subtract)
        exact = w.dtype if w.dtype == taken["scale"].dtype else jnp.float32
        w = onto(per_group("scale").astype(exact), w.astype(exact), jnp.multiply)
        total[...] += _dot(x, w.astype(x.dtype))

    @pl.when(step == steps - 1)
    def _():
        sums = total[...]
        if one_scale and "scale" in taken:
            sums = sums.astype(jnp.float32) * per_group("scale")
        y[...] = sums.astype(y.dtype)


def _integers(data: jax.Array, p: Problem) -> tuple[jax.Array, int]:
    """Codes `[bk, bn]` less a bias, and the bias."""
    if p.bits == 4:
        return pltpu.bitcast(data, jnp.int4 if p.signed else jnp.uint4), 0
    if p.signed or p.x_dtype != "int8":
        return data, 0
    # The matrix unit takes signed bytes only. The top bit is flipped 4 bytes at a time: there are no byte operations.
    words = pltpu.bitcast(data, jnp.int32) ^ jnp.int32(-0x7F7F7F80)
    return pltpu.bitcast(words, jnp.int8), 128


def _lay_codebook(codebook: jax.Array, body: str) -> jax.Array:
    """Tables as registers want them: entries along 16 sublanes, or eight times along 128 lanes."""
    if body == "gather":
        return jnp.broadcast_to(
            codebook.astype(jnp.bfloat16)[:, :, None], (*codebook.shape, _LANES)
        )
    return jnp.tile(codebook, (1, _LANES // 16))[:, None, :]


def _look_up(data: jax.Array, table: jax.Array, body: str) -> jax.Array:
    """Entries `[bk, bn]` of the codes in data: bfloat16 in gather, float32 in select."""
    codes = pltpu.bitcast(data, jnp.uint4)
    bk, bn = codes.shape
    take = functools.partial(jnp.take_along_axis, mode="promise_in_bounds")
    # A gather serves one register at a time, and index and entry have one width: 16 bits, or 32 bits.
    if body == "gather":
        codes, table = (
            codes.astype(jnp.int16),
            jnp.concatenate([table] * (bn // _LANES), axis=1),
        )
        return jnp.concatenate(
            [take(table, codes[i : i + 16], axis=0) for i in range(0, bk, 16)], axis=0
        )
    codes, table = codes.astype(jnp.int32), jnp.broadcast_to(table, (bk, _LANES))
    return jnp.concatenate(
        [take(table, codes[:, i : i + _LANES], axis=1) for i in range(0, bn, _LANES)],
        axis=1,
    )


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=total,
    )


def _native(dtype: str | jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def _to_native(array: jax.Array) -> jax.Array:
    return array.astype(_native(array.dtype))


def _generation(device_kind: str | None) -> int:
    """The digit of its name; 5 where there is none, which can do the least of those served."""
    found = re.search(r"TPU\s?v?(\d)", device_kind or "")
    return int(found[1]) if found else 5


def _height(p: Problem) -> int:
    """What bk must be a multiple of: the rows of whole registers of codes, and of eight scales."""
    return 256 if p.group == p.k else _SUBLANES * p.group


def _check_tiles(p: Problem, bm: int, bk: int, bn: int, body: str) -> None:
    height = _height(p)
    if bm % _SUBLANES or bn % _LANES or bk % height or min(bm, bk, bn) < 1:
        raise ValueError(
            f"tiles {bm=}, {bk=}, {bn=} of groups of {p.group} must be multiples of {_SUBLANES}, {height}, {_LANES}."
        )
    bodies = ("gather", "select") if p.codebook else ("pre", "post")
    if body not in bodies:
        raise ValueError(
            f"body {body!r} does not decode {p.codes}: use one of {bodies}."
        )
    if body == "gather" and p.x_dtype != "bfloat16":
        raise ValueError(
            f'body "gather" has bfloat16 entries, too coarse for x of {p.x_dtype}: use "select".'
        )
    if body == "pre" and p.x_dtype == "int8":
        raise ValueError(
            'body "pre" rounds weights to x\'s dtype, which int8 cannot hold: use "post".'
        )
