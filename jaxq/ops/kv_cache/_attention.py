"""Softmax attention taken in blocks of keys, so that no block but the present one is ever there in floats.

For one query, scores s_j and values v_j, seen block by block (Milakov and Gimelshein, 2018; Dao et al., 2022):

    top' = max(top, max_j s_j)
    total' = total exp(top - top') + sum_j exp(s_j - top')
    sums' = sums exp(top - top') + sum_j exp(s_j - top') v_j          and in the end sums / total

Axes: b slots, m key heads, n = m r query heads, t queries, s keys, h the size of a head. The query heads of one key
head become rows of one matrix, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Block(NamedTuple):
    """Some keys and values, and where in their texts they stand.

    Attributes:
      keys: `[b, m, s, h]`.
      values: `[b, m, s, h]`.
      positions: int32 `[b, s]`.
      valid: bool `[b, s]`; what is not valid is not read, whatever it holds.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array


class Softmax(NamedTuple):
    """Attention over the blocks seen so far; float32.

    Attributes:
      top: the largest score of each query, `[b, m, r, t]`.
      total: sum of exponentials relative to it, `[b, m, r, t]`.
      sums: values summed with those weights, `[b, m, r, t, h]`.
    """

    top: jax.Array
    total: jax.Array
    sums: jax.Array


def start(q: jax.Array) -> Softmax:
    """Attention of queries `[b, m, r, t, h]` over nothing."""
    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    return Softmax(
        jnp.full_like(zeros, jnp.finfo(jnp.float32).min),
        zeros,
        jnp.zeros(q.shape, jnp.float32),
    )


def fold(
    state: Softmax,
    block: Block,
    q: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None,
) -> Softmax:
    """`state` with one more block.

    Args:
      state: of the blocks before.
      block: the keys and values to add.
      q: `[b, m, r, t, h]`, in the dtype of keys and values.
      positions: of the queries, int32 `[b, t]`; keys behind them are not read.
      scale: what scores are multiplied by.
      window: keys read at most, the query's own position included; None reads all.
    """
    b, m, r, t, h = q.shape
    distance = positions[:, :, None] - block.positions[:, None, :]  # [b, t, s]
    seen = block.valid[:, None, :] & (distance >= 0)
    seen = seen if window is None else seen & (distance < window)
    seen = seen[:, None, None]  # [b, 1, 1, t, s]
    # A place that is not valid may hold a NaN of a text that is gone, and 0 NaN = NaN.
    values = jnp.where(
        block.valid[:, None, :, None], block.values, jnp.zeros((), block.values.dtype)
    )
    rows = q.reshape(b, m, r * t, h)
    scores = jnp.einsum(
        "bmqh,bmsh->bmqs", rows, block.keys, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(b, m, r, t, -1) * np.float32(scale)
    top = jnp.maximum(
        state.top, jnp.max(jnp.where(seen, scores, state.top[..., None]), axis=-1)
    )
    weights = jnp.where(
        seen, jnp.exp(scores - top[..., None]), np.float32(0)
    )  # [b, m, r, t, s]
    fade = jnp.exp(state.top - top)
    rows = weights.astype(values.dtype).reshape(b, m, r * t, -1)
    sums = jnp.einsum(
        "bmqs,bmsh->bmqh", rows, values, preferred_element_type=jnp.float32
    ).reshape(q.shape)
    return Softmax(
        top,
        state.total * fade + weights.sum(axis=-1),
        state.sums * fade[..., None] + sums,
    )


def fold_many(
    state: Softmax, num_blocks: int | jax.Array, block_of: Callable[[jax.Array], Block], q: jax.Array,
    positions: jax.Array, *, scale: float, window: int | None,
) -> Softmax:  # fmt: skip
    """`state` with `block_of(0)`, `block_of(1)`, ...; `num_blocks` may be traced, and the others cost nothing."""

    def step(i, state):
        return fold(state, block_of(i), q, positions, scale=scale, window=window)

    return lax.fori_loop(0, num_blocks, step, state)


def finish(state: Softmax) -> jax.Array:
    """Weighted means, float32 `[b, m, r, t, h]`; 0 for a query that read nothing."""
    return (
        state.sums / jnp.where(state.total == 0, np.float32(1), state.total)[..., None]
    )
