"""The operands of a primitive inside `jax.shard_map` and `jax.vmap`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def varying_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Makes all operands vary over the same mesh axes.

    Inside `shard_map`, all operands of a primitive must vary over the same mesh axes.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in operands]
    all_axes = frozenset().union(*varying)
    alike = []
    for array, axes in zip(operands, varying, strict=True):
        missing = tuple(all_axes - axes)
        if missing:
            array = lax.pcast(array, missing, to="varying")
        alike.append(array)
    return alike


def batch_size(operands: Sequence[jax.Array], dims: Sequence[int | None]) -> int:
    """Returns the size of the axis that `vmap` maps over."""
    return next(
        array.shape[dim]
        for array, dim in zip(operands, dims, strict=True)
        if dim is not None
    )


def with_batch_in_front(array: jax.Array, dim: int | None, size: int) -> jax.Array:
    """Joins the axis that `vmap` maps over with the first axis of an operand.

    Args:
      array: `[e, ...]` with the mapped axis at `dim`. If `dim` is None, every batch
        element has the same array.
      dim: the mapped axis, or None.
      size: size of the mapped axis.

    Returns:
      `[size * e, ...]`.
    """
    if dim is None:
        front = jnp.broadcast_to(array[None], (size, *array.shape))
    else:
        front = jnp.moveaxis(array, dim, 0)
    return front.reshape(size * front.shape[1], *front.shape[2:])
