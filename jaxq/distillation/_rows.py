"""Masks: which rows count in the mean of a loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def row_weights(mask: Any, rows: tuple[int, ...], caller: str) -> jax.Array | None:
    """The mask as float32 weights of the rows. None means that all rows count.

    Raises:
      ValueError: the mask has another shape than the rows.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape != rows:
        raise ValueError(
            f"{caller}: mask is {described(mask)}; expected one number for each row, "
            f"{list(rows)}. Cut mask and logits in the same way: logits[:, :-1] of "
            "next tokens go with mask[:, 1:]."
        )
    return mask.astype(jnp.float32)


def clear_rows(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Zeros in place of the rows that do not count.

    A NaN in such a row would reach the gradient, because 0 * NaN is NaN.

    Args:
      x: [*rows, size].
      weights: [*rows] or None.
    """
    if weights is None:
        return x
    return jnp.where(weights[..., None] > 0, x, jnp.zeros((), x.dtype))


def mean_over_rows(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The weighted mean; 0 if no row counts.

    Args:
      values: float32 [*rows].
      weights: float32 [*rows] or None.
    """
    if weights is None:
        return jnp.mean(values)
    total = jnp.sum(weights)
    is_empty = total == 0
    counted = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(counted) / jnp.where(is_empty, 1.0, total)


def described(x: Any) -> str:
    """`float32[2,3]`, for errors."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def is_traced(*values: Any) -> bool:
    """Whether a value is known only when a compiled program runs."""
    return any(isinstance(value, Tracer) for value in values)
