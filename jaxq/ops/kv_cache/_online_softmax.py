"""Online softmax: attention that reads one block of keys and values at a time.

Only the current block is in floats. For one query with scores s_j and values v_j, each
block updates `top`, `total` and `sums` (Milakov and Gimelshein, 2018; Dao et al.,
2022):

    top' = max(top, max_j s_j)
    total' = total exp(top - top') + sum_j exp(s_j - top')
    sums' = sums exp(top - top') + sum_j exp(s_j - top') v_j

The result is sums / total after the last block.

Letters in shapes: b slots, m key heads, n = m r query heads, t queries, s keys, h the
size of a head. The r query heads of one key head become rows of one matrix, so that
keys are never repeated.

References:
  Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
  Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
  IO-Awareness", 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.kernels import varying_alike


class Block(NamedTuple):
    """Some keys and values with their positions.

    Attributes:
      keys: `[b, m, s, h]`.
      values: `[b, m, s, h]`.
      positions: int32 `[b, s]`, positions in the text of each slot.
      valid: bool `[b, s]`. Keys and values that are not valid are not read.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries, their positions and the limits of what they read.

    Attributes:
      rows: `[b, m, r, t, h]`, in the dtype of keys and values.
      positions: int32 `[b, t]`. A query does not read keys of later positions.
      scale: scores are multiplied by this number.
      window: the largest number of keys that a query reads, with its own key. None sets
        no limit.
    """

    rows: jax.Array
    positions: jax.Array
    scale: float
    window: int | None


class Softmax(NamedTuple):
    """The state of the online softmax after the blocks so far; float32.

    Attributes:
      top: the largest score of each query, `[b, m, r, t]`.
      total: the sum of `exp(score - top)`, `[b, m, r, t]`.
      sums: the sum of the values, weighted by `exp(score - top)`, `[b, m, r, t, h]`.
    """

    top: jax.Array
    total: jax.Array
    sums: jax.Array


def start(queries: Queries) -> Softmax:
    """The state before the first block."""
    q = queries.rows
    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    lowest = jnp.full_like(zeros, jnp.finfo(jnp.float32).min)
    return Softmax(lowest, zeros, jnp.zeros(q.shape, jnp.float32))


def fold(state: Softmax, block: Block, queries: Queries) -> Softmax:
    """The state after one more block."""
    q = queries.rows
    b, m, r, t, h = q.shape
    distance = queries.positions[:, :, None] - block.positions[:, None, :]  # [b, t, s]
    visible = block.valid[:, None, :] & (distance >= 0)
    if queries.window is not None:
        visible = visible & (distance < queries.window)
    visible = visible[:, None, None]  # [b, 1, 1, t, s]
    # A place that is not valid may hold a NaN of an earlier text, and 0 * NaN is NaN.
    is_valid = block.valid[:, None, :, None]  # [b, 1, s, 1]
    values = jnp.where(is_valid, block.values, jnp.zeros((), block.values.dtype))
    scores = jnp.einsum(
        "bmqh,bmsh->bmqs",
        q.reshape(b, m, r * t, h),
        block.keys,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(b, m, r, t, -1) * np.float32(queries.scale)
    visible_scores = jnp.where(visible, scores, state.top[..., None])
    top = jnp.maximum(state.top, jnp.max(visible_scores, axis=-1))  # [b, m, r, t]
    exponentials = jnp.exp(scores - top[..., None])
    weights = jnp.where(visible, exponentials, np.float32(0))  # [b, m, r, t, s]
    decay = jnp.exp(state.top - top)  # [b, m, r, t]
    sums = jnp.einsum(
        "bmqs,bmsh->bmqh",
        weights.astype(values.dtype).reshape(b, m, r * t, -1),
        values,
        preferred_element_type=jnp.float32,
    ).reshape(q.shape)
    return Softmax(
        top,
        state.total * decay + weights.sum(axis=-1),
        state.sums * decay[..., None] + sums,
    )


def fold_many(
    state: Softmax,
    num_blocks: int | jax.Array,
    block_at: Callable[[jax.Array], Block],
    queries: Queries,
) -> Softmax:
    """The state after the blocks `block_at(0)` to `block_at(num_blocks - 1)`.

    `num_blocks` may be traced.
    """

    def step(i: jax.Array, state: Softmax) -> Softmax:
        return fold(state, block_at(i), queries)

    if jax.sharding.get_abstract_mesh().manual_axes:
        # In `jax.shard_map` a loop cannot change the mesh axes over which it varies.
        arrays = [*state, queries.rows, queries.positions, *block_at(jnp.int32(0))]
        state = Softmax(*varying_alike(arrays)[: len(state)])
    return lax.fori_loop(0, num_blocks, step, state)


def finish(state: Softmax) -> jax.Array:
    """The result of attention, float32 `[b, m, r, t, h]`.

    It is 0 for a query that read no token.
    """
    total = jnp.where(state.total == 0, np.float32(1), state.total)
    return state.sums / total[..., None]
