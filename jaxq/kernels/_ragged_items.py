"""The work of a ragged product: which tiles of rows are multiplied by which experts.

The rows of x are sorted by expert and cut into tiles of bm rows. An item is a tile of
rows and an expert that has rows in this tile. A kernel computes one item after the
other, and each item keeps only the rows of its expert. An expert without rows is in no
item, so a kernel never reads its weight.

    rows     0 0 0 1 | 1 1 3 3 | 3 3 . .        bm = 4; expert 2 has no rows
    items    (0, 0) (0, 1) (1, 1) (1, 3) (2, 3)

The number of items depends on the sizes. The arrays have room for the largest number.
The items that are left over are idle: they have no rows, and repeat the tile and the
expert of the item before. A tile without rows has one idle item.

References:
  Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022,
  section 5. The grouped product over tiles of rows on TPU ("megablox") is part of JAX.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Items(NamedTuple):
    """The items in their order, one number each, int32 `[most_items(...)]`.

    Attributes:
      tile: number of the tile of rows. It never decreases.
      expert: number of the weight.
      first_row: the first row of the item, counted from the first row of x.
      last_row: the row after the last row of the item. An idle item has
        `first_row == last_row`.
    """

    tile: jax.Array
    expert: jax.Array
    first_row: jax.Array
    last_row: jax.Array


def most_items(num_rows: int, num_experts: int, bm: int) -> int:
    """Returns the largest number of items.

    Args:
      num_rows: number of rows of x.
      num_experts: number of experts, of all batch elements together.
      bm: number of rows of a tile.
    """
    return -(-num_rows // bm) + min(num_experts, num_rows) - 1


def work_items(
    sizes: jax.Array, num_rows: int, bm: int, *, shared_weights: bool
) -> Items:
    """Returns the items of a product.

    Args:
      sizes: int32 `[b, e]`, the number of rows of each expert. Batch element i has the
        rows from `i * num_rows / b` on. Rows beyond the sum of its sizes belong to no
        expert.
      num_rows: number of rows of x, of all batch elements together. At least 1.
      bm: number of rows of a tile.
      shared_weights: True if all batch elements have the same e weights. Otherwise
        expert j of batch element i has weight `i * e + j`.
    """
    b, e = sizes.shape
    starts, ends = _segments(sizes, num_rows)
    has_rows = starts < ends
    # Experts with rows, in the order of their rows, and then the others.
    order = jnp.argsort(~has_rows, stable=True).astype(jnp.int32)
    # Experts whose rows end before a tile begins, and experts that begin before a tile
    # ends.
    tile_starts = jnp.arange(-(-num_rows // bm), dtype=jnp.int32)[:, None] * bm
    num_before = _count(has_rows[None] & (ends[None] <= tile_starts))  # [num_tiles]
    num_begun = _count(has_rows[None] & (starts[None] < tile_starts + bm))
    # A tile without rows has one idle item.
    items_of_tile = jnp.maximum(num_begun - num_before, 1)
    after = jnp.cumsum(items_of_tile, dtype=jnp.int32)

    item = jnp.arange(most_items(num_rows, b * e, bm), dtype=jnp.int32)
    tile = jnp.minimum(_count(after[None] <= item[:, None]), after.shape[0] - 1)
    # Number of the item within its tile.
    number = item - (after - items_of_tile)[tile]
    rank = num_before[tile] + number
    is_idle = rank >= num_begun[tile]
    segment = order[jnp.clip(rank, 0, jnp.maximum(num_begun[tile] - 1, 0))]
    zero = jnp.int32(0)
    return Items(
        tile=tile,
        expert=segment % e if shared_weights else segment,
        first_row=jnp.where(is_idle, zero, starts[segment]),
        last_row=jnp.where(is_idle, zero, ends[segment]),
    )


def rows_with_experts(sizes: jax.Array, num_rows: int) -> jax.Array:
    """Returns which rows belong to an expert, bool `[num_rows]`. See `work_items`."""
    b = sizes.shape[0]
    totals = jnp.sum(sizes, axis=1, keepdims=True)  # [b, 1]
    number = jnp.arange(num_rows // b, dtype=jnp.int32)
    return (number[None] < totals).reshape(num_rows)


def _segments(sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The first row of each expert and the row after its last row, int32 `[b * e]`."""
    b = sizes.shape[0]
    rows_of_element = num_rows // b
    # Sizes beyond the number of rows would make kernels write beyond the result.
    ends = jnp.minimum(jnp.cumsum(sizes, axis=1, dtype=jnp.int32), rows_of_element)
    starts = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    offset = jnp.arange(b, dtype=jnp.int32)[:, None] * rows_of_element
    return (starts + offset).reshape(-1), (ends + offset).reshape(-1)


def _count(mask: jax.Array) -> jax.Array:
    """The number of True in each row of a mask, int32."""
    return jnp.sum(mask, axis=1, dtype=jnp.int32)
