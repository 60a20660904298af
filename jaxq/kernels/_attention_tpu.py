"""Attention over quantized groups of a KV cache on TPU, as one Pallas (Mosaic) kernel.

A decode step reads every code once. The codes of a tile are decoded in VMEM, so memory
is read at the width of the codes. Each grid step (slot, head, block of queries, split,
step) reads a tile of P groups, which has T = P * rows rows, and updates the online
softmax of `bq` queries:

    scores = scale * q @ (key scales * key codes).T      [bq, T] for each token of a row
    sums = decay * sums + (weights * value scales) @ value codes

- Keys are rounded to the dtype of the queries after they are scaled, as `dequantize`
  rounds them. Value codes are multiplied as they are, because every float dtype holds
  them. The weights are multiplied by the value scales instead.
- A row of 4-bit values holds two tokens. The weights of both tokens are multiplied with
  the whole row, and the half that belongs to the other token is dropped at the end.
  The number of queries is small in a decode step, so the matrix unit has room for this.
- TPUs have no float16. float16 queries are computed as float32.
- A slot reads only the tiles that hold its tokens. Tiles beyond them are neither
  fetched nor computed.

The kernel has run in the interpreter and has been compiled for TPU v5e, v6e and v7x. It
has not been timed on a device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._tile_product import tile_product

_LANES = 128
_SUBLANES = 8
# Bytes of a tile of codes of keys. As float32 they need 4 times (int8) or 8 times
# (int4) as many bytes.
_TILE_BYTES = 128 * 1024
_LOWEST = float(np.finfo(np.float32).min)


def why_not(problem: AttentionProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    del device_kind
    p = problem
    if p.h % _LANES:
        return (
            f"the TPU kernel reads heads of a multiple of {_LANES} channels, not of "
            f"{p.h}"
        )
    if p.rows % _SUBLANES:
        return (
            "the TPU kernel reads groups of a multiple of "
            f"{_SUBLANES * p.parts} tokens of {p.bits} bits, not of {p.group}"
        )
    return None


def default_tiles(problem: AttentionProblem) -> dict[str, int]:
    """Returns the sizes that `read_groups` works with.

    A TPU core runs one grid step after the other, so more than one split is useless.
    """
    p = problem
    bq = min(128, pl.cdiv(p.n, 16) * 16)
    # T must be a multiple of the lanes, because scores have the rows along lanes.
    unit = math.lcm(_SUBLANES, _LANES // math.gcd(_LANES, p.rows))
    count = max(1, _TILE_BYTES // (unit * p.rows * p.h))
    return {"bq": bq, "groups": min(unit * count, p.groups), "splits": 1}


def read_groups(
    q: jax.Array,
    positions: jax.Array,
    tokens: jax.Array,
    num_places: jax.Array,
    keys: jax.Array,
    key_scale: jax.Array,
    values: jax.Array,
    value_scale: jax.Array,
    *,
    problem: AttentionProblem,
    tiles: dict[str, int],
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the online softmax over the quantized groups, for each split.

    Args:
      q: `[b, m, n, h]`.
      positions: int32 `[b, n]`, the position of each query.
      tokens: int32 `[b, groups, group]`, the position of each stored token; negative
        for tokens that are not read.
      num_places: int32 `[b]`. Places from this one on have no tokens to read.
      keys: `[b, m, groups, rows, h]`.
      key_scale: `[b, m, groups, h]`.
      values: `[b, m, groups, rows, h]`.
      value_scale: `[b, m, groups, rows, tokens per row]`.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: "bq", "groups" and "splits", as `default_tiles` returns them.
      interpret: True, or parameters of the interpreter, to run on a CPU.

    Returns:
      (top, total, sums): float32 `[b, m, splits, n]`, the same, and
      `[b, m, splits, n, h]`.
    """
    p, bq, splits = problem, tiles["bq"], tiles["splits"]
    num_tiles, num_blocks = pl.cdiv(p.groups, tiles["groups"]), pl.cdiv(p.n, bq)
    steps = pl.cdiv(num_tiles, splits)
    inputs = _inputs(
        (q, positions, tokens, keys, key_scale, values, value_scale),
        p,
        num_blocks * bq,
        num_tiles * tiles["groups"],
    )
    outer = (p.b, p.m, splits, num_blocks)
    shapes = ((bq, _LANES), (bq, _LANES), (p.parts, p.parts * bq, p.h))

    def out_spec(shape):
        zeros = (0,) * len(shape)
        return pl.BlockSpec(
            (None,) * 4 + shape, lambda b, m, x, s, i, used: (b, m, s, x, *zeros)
        )

    axes = jax.typeof(q).manual_axis_type
    top, total, sums = pl.pallas_call(
        functools.partial(_step, p, steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.b, p.m, num_blocks, splits, steps),
            in_specs=_input_specs(p, bq, tiles["groups"], steps),
            out_specs=[out_spec(shape) for shape in shapes],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*outer, *shape), jnp.float32, manual_axis_type=axes)
            for shape in shapes
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",)
        ),
        interpret=interpret,
        name="jaxq_kv_attention",
    )(pl.cdiv(num_places, tiles["groups"]), *inputs)
    flat = (p.b, p.m, splits, num_blocks * bq)
    top, total = (x[..., 0].reshape(flat)[..., : p.n] for x in (top, total))
    sums = _sums_of_tokens(sums, p, bq).reshape(*flat, p.h)[:, :, :, : p.n]
    return top, total, sums


def _inputs(
    arrays: Sequence[jax.Array], p: AttentionProblem, num_queries: int, groups: int
) -> list[jax.Array]:
    """The arrays of `read_groups` in the shapes that the kernel reads.

    Queries are padded to `num_queries`. Arrays with a number for each token are padded
    to `groups` and become `[b, ..., parts, groups * rows]`. Codes are not moved.
    """
    q, positions, tokens, keys, key_scale, values, value_scale = arrays
    padding = num_queries - p.n
    work_dtype = jnp.float32 if p.dtype == "float16" else q.dtype
    q = jnp.pad(q.astype(work_dtype), ((0, 0), (0, 0), (0, padding), (0, 0)))
    # A query at position -1 reads no token.
    positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    tokens = _pad_groups(tokens, 1, groups, -1)
    tokens = tokens.reshape(p.b, groups, p.parts, p.rows)
    tokens = jnp.swapaxes(tokens, 1, 2).reshape(p.b, p.parts, -1)
    value_scale = _pad_groups(value_scale.astype(jnp.float32), 2, groups, 0)
    value_scale = jnp.moveaxis(value_scale, -1, 2).reshape(p.b, p.m, p.parts, -1)
    rows = (p.b, p.m, p.groups * p.rows, p.h)
    return [
        q,
        positions[..., None],
        tokens,
        keys.reshape(rows),
        key_scale.astype(jnp.float32),
        values.reshape(rows),
        value_scale,
    ]


def _input_specs(
    p: AttentionProblem, bq: int, groups: int, steps: int
) -> list[pl.BlockSpec]:
    """The tile of each input in a grid step (slot, head, block, split, step)."""
    t = groups * p.rows

    def at(b, s, i, used):
        """The tile of a step. Steps without tokens repeat the last tile."""
        return jnp.clip(s * steps + i, 0, jnp.maximum(used[b] - 1, 0))

    rows = pl.BlockSpec(
        (None, None, t, p.h), lambda b, m, x, s, i, used: (b, m, at(b, s, i, used), 0)
    )
    return [
        pl.BlockSpec((None, None, bq, p.h), lambda b, m, x, s, i, used: (b, m, x, 0)),
        pl.BlockSpec((None, bq, 1), lambda b, m, x, s, i, used: (b, x, 0)),
        pl.BlockSpec(
            (None, p.parts, t), lambda b, m, x, s, i, used: (b, 0, at(b, s, i, used))
        ),
        rows,
        pl.BlockSpec(
            (None, None, groups, p.h),
            lambda b, m, x, s, i, used: (b, m, at(b, s, i, used), 0),
        ),
        rows,
        pl.BlockSpec(
            (None, None, p.parts, t),
            lambda b, m, x, s, i, used: (b, m, 0, at(b, s, i, used)),
        ),
    ]


def _pad_groups(x: jax.Array, axis: int, size: int, value: int) -> jax.Array:
    """Pads the axis of groups at its end to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _sums_of_tokens(sums: jax.Array, p: AttentionProblem, bq: int) -> jax.Array:
    """`[..., parts, parts * bq, h]` of the kernel as `[..., bq, h]`.

    With 4-bit codes the kernel gives, for the low and the high halves of the bytes, the
    weights of either token times whole rows. The first half of a row belongs to the
    first token.
    """
    if p.parts == 1:
        return sums[..., 0, :, :]
    half = p.h // 2
    first, second = sums[..., :bq, :half], sums[..., bq:, half:]
    both = first + second  # [..., 2, bq, h / 2]
    return jnp.concatenate([both[..., 0, :, :], both[..., 1, :, :]], axis=-1)


def _step(p: AttentionProblem, steps: int, used, *refs) -> None:
    """One grid step. It folds one tile of groups into the softmax of its queries."""
    q, positions, tokens, keys, key_scale, values, value_scale, *state = refs
    top_ref, total_ref, sums_ref = state
    slot, split, step = pl.program_id(0), pl.program_id(3), pl.program_id(4)

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, _LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(split * steps + step < used[slot])
    def _():
        queries = q[...]
        num_groups, h = key_scale.shape
        scales = key_scale[...][:, None, :]  # [P, 1, h]
        scores, visible = [], []
        for part, codes in enumerate(_fields(keys[...], p.bits)):
            scaled = codes.reshape(num_groups, p.rows, h) * scales
            tile = scaled.reshape(codes.shape).astype(queries.dtype)  # [T, h]
            product = tile_product(queries, tile, 1) * np.float32(p.scale)  # [bq, T]
            at = tokens[part : part + 1, :]
            distance = positions[...] - at
            is_visible = (at >= 0) & (distance >= 0)
            if p.window is not None:
                is_visible &= distance < p.window
            scores.append(product)
            visible.append(is_visible)
        old_top = top_ref[:, :1]
        top = old_top
        for product, is_visible in zip(scores, visible, strict=True):
            seen = jnp.where(is_visible, product, old_top)
            top = jnp.maximum(top, jnp.max(seen, axis=1, keepdims=True))
        decay = jnp.exp(old_top - top)  # [bq, 1]
        total = total_ref[:, :1] * decay
        weighted = []
        for part, (product, is_visible) in enumerate(zip(scores, visible, strict=True)):
            weights = jnp.where(is_visible, jnp.exp(product - top), 0.0)
            total += jnp.sum(weights, axis=1, keepdims=True)
            # The scale of a token that is not read may be NaN, and 0 * NaN is NaN.
            scaled = weights * value_scale[part : part + 1, :]
            weighted.append(jnp.where(is_visible, scaled, 0.0).astype(queries.dtype))
        weighted = jnp.concatenate(weighted, axis=0)  # [parts * bq, T]
        decay_rows = jnp.concatenate([decay] * p.parts, axis=0)
        for i, codes in enumerate(_fields(values[...], p.bits)):
            product = tile_product(weighted, codes.astype(queries.dtype), 0)
            sums_ref[i] = sums_ref[i] * decay_rows + product
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def _fields(data: jax.Array, bits: int) -> list[jax.Array]:
    """The codes of each field of the bytes, float32 `[T, h]`: low halves, high halves.

    Codes of 8 bits have one field.
    """
    if bits == 8:
        return [data.astype(jnp.float32)]
    words = data.astype(jnp.int32)
    # The second shift copies the sign bit of the code.
    low, high = (words << 28) >> 28, (words << 24) >> 28
    return [low.astype(jnp.float32), high.astype(jnp.float32)]
