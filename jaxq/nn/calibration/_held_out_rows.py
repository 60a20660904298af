"""Which rows of a layer's input enter the statistics, and which are held out.

A row is a vector `[K]`: a token, or a spatial position of an image. Rows of padding do
not count. One eighth of each sequence is held out of all statistics. Each batch holds
out another eighth. Methods are fitted to the other rows. Their results are
compared on the held-out rows.

A mask may dispatch tokens to experts. Each expert then reads zeros for the tokens of
other experts. Such rows of zeros do not count. In a layer without experts, a row of
zeros is data.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.observers import LayerStats, Observer, update_stats

# `update_stats` of `jaxq.observers` holds out one of this many parts.
_PARTS_PER_SEQUENCE = 8

# Set while a batch is traced: which rows of the batch count. None means all rows.
_COUNTS: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "counts", default=None
)


@contextlib.contextmanager
def only_rows(counts: jax.Array | None) -> Iterator[None]:
    """A context in which `add_rows` uses only the rows where `counts` is True."""
    token = _COUNTS.set(counts)
    try:
        yield
    finally:
        _COUNTS.reset(token)


def add_rows(
    stats: LayerStats,
    x: jax.Array,
    path: str,
    observer: Observer | None,
    input_scale: jax.Array | None = None,
) -> LayerStats:
    """Returns the statistics of a layer after one more call.

    Args:
      stats: the statistics so far.
      x: `[*batch, *free, K]`, with as many batch axes as the statistics have.
      path: of the layer, for errors.
      observer: the observer whose state the statistics hold, or None.
      input_scale: `[*batch, K]`, factors by which the rows are multiplied, or None.

    Raises:
      ValueError: `input_scale` has other batch axes than the statistics; or the mask
        does not fit the rows.
    """
    num_batch = stats.count.ndim
    if input_scale is not None:
        if input_scale.ndim != num_batch + 1:
            raise ValueError(
                f"calibrate: {path or 'the model'} is a stack whose layers read one "
                "input and divide it by different scales, so they have no common "
                "static range. Use dynamic activation quantization (omit observer=)."
            )
        sizes = (*x.shape[:num_batch], *(1 for _ in x.shape[num_batch:-1]), x.shape[-1])
        x = x.astype(jnp.float32) * input_scale.reshape(sizes)
    free = x.shape[num_batch:-1]
    counts, parts = _rows_that_count(free, path), _held_out_parts(free)

    def update(stats: LayerStats, rows: jax.Array, counts: Any, parts: Any) -> Any:
        counts &= _is_data(rows)
        return update_stats(stats, rows, counts, parts, observer)

    for _ in range(num_batch):
        update = jax.vmap(update, in_axes=(0, 0, None, None))
    rows = x.reshape(*x.shape[:num_batch], -1, x.shape[-1])  # [*batch, rows, K]
    return update(stats, rows, counts, parts)


def add_patches(stats: LayerStats, patches: jax.Array, path: str) -> LayerStats:
    """Returns the statistics of a convolution after the patches of one more call.

    Args:
      stats: the statistics so far, with `patches`.
      patches: `[groups, *free, K]`.
      path: of the layer, for errors.
    """
    return stats._replace(patches=add_rows(stats.patches, patches, path, None))


@jax.custom_batching.custom_vmap
def _is_data(rows: jax.Array) -> jax.Array:
    """Which of the rows `[t, K]` of one layer are data, as bool `[t]`.

    Without `jax.vmap`, all rows are data. Under `jax.vmap`, each element of the mapped
    axis is an expert with separate inputs. A row of zeros is then a token of
    another expert, and is not data. Elements that read the same rows (`in_axes=None`)
    are not experts.
    """
    return jnp.ones(rows.shape[:-1], bool)


@_is_data.def_vmap
def _is_data_of_experts(
    axis_size: int, in_batched: list[bool], rows: jax.Array
) -> tuple[jax.Array, bool]:
    """`_is_data` for the rows `[experts, t, K]`."""
    del axis_size, in_batched  # without a mapped argument, this rule is not called
    return jnp.any(rows != 0, axis=-1), True


def _rows_that_count(free: tuple[int, ...], path: str) -> jax.Array:
    """The mask of the batch as bool `[rows]`. All rows count if there is no mask.

    Args:
      free: the shape of the rows, `[b, t]` for example.
      path: of the layer, for errors.

    Raises:
      TypeError: the mask is neither bool nor integer.
      ValueError: the axes of the mask are not the first axes of the rows.
    """
    mask = _COUNTS.get()
    if mask is None:
        return jnp.ones((int(np.prod(free)),), bool)
    if tuple(mask.shape) != tuple(free[: mask.ndim]):
        raise ValueError(
            f"calibrate: the mask has the shape {list(mask.shape)}, but the rows of "
            f"{path or 'the model'} have the shape {list(free)}. The axes of the mask "
            "must be the first axes of the rows. Leave the layer out, or pass batches "
            "without padding."
        )
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            "calibrate: the mask must be bool, or integers 0 and 1, got "
            f"{mask.dtype.name}."
        )
    mask = mask.astype(bool).reshape(*mask.shape, *(1 for _ in free[mask.ndim :]))
    return jnp.broadcast_to(mask, free).reshape(-1)


def _held_out_parts(free: tuple[int, ...]) -> jax.Array:
    """The part of each row, as int32 `[rows]`. Rows of a part are held out together.

    Each eighth of a sequence is a part. A sequence of fewer than eight rows is one
    part.
    """
    num_sequences, length = (free[0], int(np.prod(free[1:]))) if free else (1, 1)
    scale = _PARTS_PER_SEQUENCE if length >= _PARTS_PER_SEQUENCE else 0
    within = jnp.arange(length, dtype=jnp.int32) * scale // max(length, 1)  # [t]
    sequence = jnp.arange(num_sequences, dtype=jnp.int32)[:, None]  # [b, 1]
    return (sequence + within[None]).reshape(-1)
