"""An array as one row for each device."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def in_pieces(x: Array, count: int, axis: int) -> Array:
    """Splits an axis into `count` equal parts; each part becomes a row.

    Returns:
      `[count, n]`.
    """
    return jnp.moveaxis(x, axis, 0).reshape(count, -1)


def from_piece(
    piece: Array, shape: tuple[int, ...], count: int, axis: int, tiled: bool
) -> Array:
    """One row of `in_pieces` as a part of the array.

    Args:
      piece: `[n]`.
      shape: the shape of the whole array.
      count: the number of rows.
      axis: the axis that was split.
      tiled: whether the part keeps this axis. If it does not, the axis had `count`
        entries.
    """
    others = shape[:axis] + shape[axis + 1 :]
    part = piece.reshape(shape[axis] // count, *others)
    return jnp.moveaxis(part, 0, axis) if tiled else part.reshape(others)


def from_pieces(pieces: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of `in_pieces`."""
    others = shape[:axis] + shape[axis + 1 :]
    return jnp.moveaxis(pieces.reshape(shape[axis], *others), 0, axis)


def in_padded_pieces(x: Array, count: int) -> Array:
    """The flattened array in `count` rows; zeros complete the last one."""
    row = x.reshape(-1)
    length = -(-row.size // count)
    return jnp.pad(row, (0, count * length - row.size)).reshape(count, length)


def from_padded_pieces(pieces: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `in_padded_pieces`."""
    size = 1
    for axis_size in shape:
        size *= axis_size
    return pieces.reshape(-1)[:size].reshape(shape)
