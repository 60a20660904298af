"""Attention over quantized groups of a KV cache on GPU, as one Triton kernel.

Each program keeps the online softmax of `bq` queries of one key head. It walks over the
groups of one split of the cache, one group at a time, and decodes them in registers:

    scores = scale * q @ (key scales * key codes).T        [bq, rows]
    sums = decay * sums + weights @ (value scales * value codes)

With 4-bit codes there are such scores for each of the two tokens of a row.

- Keys and values are rounded to the dtype of the queries after they are scaled, as
  `dequantize` rounds them.
- In a decode step there are few queries, so there would be few programs. Then `splits`
  programs share the groups of a slot. XLA merges their results (flash decoding).
- A program ends after the last group that holds tokens of its slot.

The kernel has run in the interpreter and has been compiled for an H200. It has not been
timed on a device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._tile_product import tile_product
from jaxq.kernels._triton_programs import why_not_offsets

_LOWEST = float(np.finfo(np.float32).min)
# A matrix product of Triton needs at least this many numbers along each axis.
_SMALLEST = 16
_MOST_SPLITS = 32
# About as many programs as run on a large GPU at the same time.
_PROGRAMS = 512


def why_not(problem: AttentionProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    del device_kind
    p = problem
    if p.h & (p.h - 1) or p.h < _SMALLEST * p.parts:
        return (
            "the Triton kernel reads heads whose size is a power of two and at least "
            f"{_SMALLEST * p.parts} for {p.bits} bits, not {p.h}"
        )
    if p.rows & (p.rows - 1) or p.rows < _SMALLEST:
        return (
            "the Triton kernel reads groups whose number of tokens is a power of two "
            f"and at least {_SMALLEST * p.parts} for {p.bits} bits, not {p.group}"
        )
    # Keys and values have the same size.
    return why_not_offsets(p.b * p.m * p.groups * p.rows * p.h)


def default_tiles(problem: AttentionProblem) -> dict[str, int]:
    """Returns the sizes that `read_groups` works with.

    They are estimated from the shapes. They have not been measured.
    """
    p = problem
    bq = next((size for size in (16, 32, 64) if p.n <= size), 64)
    programs = p.b * p.m * pl.cdiv(p.n, bq)
    splits = 1
    # Each split keeps at least 128 tokens.
    while 2 * splits <= _MOST_SPLITS and p.groups * p.group >= 256 * splits:
        if splits * programs >= _PROGRAMS:
            break
        splits *= 2
    return {"bq": bq, "splits": splits, "warps": 4, "stages": 2}


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
    interpret: bool = False,
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
      tiles: "bq", "splits", "warps" and "stages", as `default_tiles` returns them.
      interpret: True to run on a CPU.

    Returns:
      (top, total, sums): float32 `[b, m, splits, n]`, the same, and
      `[b, m, splits, n, h]`.
    """
    p, bq, splits = problem, tiles["bq"], tiles["splits"]
    num_blocks = pl.cdiv(p.n, bq)
    padding = num_blocks * bq - p.n
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    per_query = (p.b, p.m, splits, num_blocks * bq)
    axes = jax.typeof(q).manual_axis_type
    results = pl.pallas_call(
        functools.partial(_program, p, bq, splits),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes)
            for shape in (per_query, per_query, (*per_query, p.h))
        ],
        grid=(p.b * p.m, num_blocks, splits),
        compiler_params=plt.CompilerParams(
            num_warps=tiles["warps"], num_stages=tiles["stages"]
        ),
        interpret=interpret,
        name="jaxq_kv_attention",
    )(q, positions, tokens, num_places, keys, key_scale, values, value_scale)
    top, total, sums = (result[:, :, :, : p.n] for result in results)
    return top, total, sums


def _program(p: AttentionProblem, bq: int, splits: int, *refs) -> None:
    """One program: `bq` queries of one key head, over one split of the groups."""
    q_ref, positions_ref, tokens_ref, places_ref, *refs = refs
    keys_ref, key_scale_ref, values_ref, value_scale_ref, *refs = refs
    top_ref, total_ref, sums_ref = refs
    slot, head = pl.program_id(0) // p.m, pl.program_id(0) % p.m
    split = pl.program_id(2)
    queries = pl.ds(pl.program_id(1) * bq, bq)
    q = plt.load(q_ref.at[slot, head, queries, :])  # [bq, h]
    positions = plt.load(positions_ref.at[slot, queries])
    per_split = pl.cdiv(p.groups, splits)
    first = split * per_split
    last = jnp.minimum(first + per_split, places_ref[slot])
    width = p.h // p.parts

    def fold(j, state):
        top, total, *sums = state
        codes = _fields(plt.load(keys_ref.at[slot, head, j, :, :]), p.bits)
        key_scale = plt.load(key_scale_ref.at[slot, head, j, :]).astype(jnp.float32)
        scores, visible = [], []
        for part in range(p.parts):
            tile = _rounded(codes[part] * _along(key_scale, codes[part], 1), q.dtype)
            product = tile_product(q, tile, 1) * np.float32(p.scale)  # [bq, rows]
            at = plt.load(tokens_ref.at[slot, j, pl.ds(part * p.rows, p.rows)])
            at = _along(at, product, 1)
            distance = _along(positions, product, 0) - at
            is_visible = (at >= 0) & (distance >= 0)
            if p.window is not None:
                is_visible &= distance < p.window
            scores.append(product)
            visible.append(is_visible)
        new_top = top
        for product, is_visible in zip(scores, visible, strict=True):
            seen = jnp.where(is_visible, product, _LOWEST)
            new_top = jnp.maximum(new_top, jnp.max(seen, axis=1))
        decay = jnp.exp(top - new_top)  # [bq]
        total = total * decay
        sums = [part_sum * _along(decay, part_sum, 0) for part_sum in sums]
        for part, (product, is_visible) in enumerate(zip(scores, visible, strict=True)):
            exponentials = jnp.exp(product - _along(new_top, product, 0))
            weights = jnp.where(is_visible, exponentials, 0.0)
            total += jnp.sum(weights, axis=1)
            columns = pl.ds(part * width, width)
            data = plt.load(values_ref.at[slot, head, j, :, columns])  # [rows, width]
            scale = plt.load(value_scale_ref.at[slot, head, j, :, jnp.int32(part)])
            # The scale of a token that is not read may be NaN, and 0 * NaN is NaN.
            is_token = plt.load(tokens_ref.at[slot, j, pl.ds(part * p.rows, p.rows)])
            scale = jnp.where(is_token >= 0, scale.astype(jnp.float32), 0.0)
            for i, value_codes in enumerate(_fields(data, p.bits)):
                tile = _rounded(value_codes * _along(scale, value_codes, 0), q.dtype)
                sums[i] += tile_product(weights.astype(q.dtype), tile, 0)
        return (new_top, total, *sums)

    zeros = jnp.zeros((bq,), jnp.float32)
    sums = [jnp.zeros((bq, width), jnp.float32)] * p.parts
    state = (jnp.full((bq,), _LOWEST, jnp.float32), zeros, *sums)
    top, total, *sums = lax.fori_loop(first, last, fold, state)
    plt.store(top_ref.at[slot, head, split, queries], top)
    plt.store(total_ref.at[slot, head, split, queries], total)
    for i, part_sum in enumerate(sums):
        columns = pl.ds(i * width, width)
        plt.store(sums_ref.at[slot, head, split, queries, columns], part_sum)


def _fields(data: jax.Array, bits: int) -> list[jax.Array]:
    """The codes of each field of the bytes as float32: low halves, high halves.

    Codes of 8 bits have one field.
    """
    words = data.astype(jnp.int32)
    if bits == 8:
        return [words.astype(jnp.float32)]
    codes = [words & np.int32(15), (words >> np.int32(4)) & np.int32(15)]
    # Two's complement: flip the sign bit, then subtract its value.
    return [((c ^ np.int32(8)) - np.int32(8)).astype(jnp.float32) for c in codes]


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """x in `dtype`. float16 would turn numbers beyond its range into infinity."""
    if jnp.dtype(dtype) == jnp.float16:
        limit = float(jnp.finfo(jnp.float16).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def _along(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """A vector along `axis` of a matrix, in the shape of `like`."""
    return lax.broadcast_in_dim(vector, like.shape, (axis,))
