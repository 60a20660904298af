"""Masks: which rows count in the mean of a loss, and how much."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor import describe, is_traced


def row_weights(mask: Any, rows: tuple[int, ...], caller: str) -> jax.Array | None:
    """The mask as float32 weights of the rows. None means that all rows count.

    A traced weight that is negative, infinite or NaN becomes NaN. Then the loss is NaN.

    Raises:
      ValueError: the mask has another shape than the rows, or a weight that is
        negative, infinite or NaN.
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
    weights = mask.astype(jnp.float32)
    is_weight = (weights >= 0) & (weights < jnp.inf)
    if not is_traced(is_weight):
        _check_weights(np.asarray(weights), np.asarray(is_weight), caller)
    return jnp.where(is_weight, weights, jnp.nan)


def _check_weights(weights: np.ndarray, is_weight: np.ndarray, caller: str) -> None:
    if is_weight.all():
        return
    first = tuple(int(index) for index in np.argwhere(~is_weight)[0])
    raise ValueError(
        f"{caller}: mask{list(first)} is {weights[first]}; the weight of a row must be "
        "a finite number from 0 on. 0 leaves the row out."
    )


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
    """The weighted mean; 0 if no row counts, or if there is no row.

    Args:
      values: float32 [*rows].
      weights: float32 [*rows] or None.
    """
    if values.size == 0:
        return jnp.zeros((), values.dtype)
    if weights is None:
        return jnp.mean(values)
    total = jnp.sum(weights)
    is_empty = total == 0
    counted = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(counted) / jnp.where(is_empty, 1.0, total)


def described(x: Any) -> str:
    """`float32[2,3]`, for errors."""
    return describe(np.dtype(x.dtype).name, x.shape)
