"""The split of an activation at the LLM.int8() threshold.

A column is an outlier column if its largest magnitude is at least the threshold.
Outlier columns are multiplied in floats. All other columns are quantized. The outlier
columns are determined in every call and their number is not static, so both products
have the full size. The split improves accuracy, not speed.

References:
  Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
  2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def split_outlier_columns(
    x: jax.Array, threshold: float, free_axes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Splits `x` into ordinary and outlier columns. The sum of both arrays is `x`.

    Args:
      x: activation, any shape.
      threshold: the smallest magnitude of an outlier, at least 0.
      free_axes: the axes of `x` that are neither contracted nor batch axes of the
        product. The magnitude of a column is the largest magnitude along these axes.

    Returns:
      Two arrays of the shape and dtype of `x`. The first has zeros in the outlier
      columns. The second has zeros in all other columns.
    """
    magnitude = jnp.max(jnp.abs(x), axis=tuple(free_axes), keepdims=True, initial=0.0)
    ordinary = magnitude < threshold  # False for NaN, which is an outlier
    zero = jnp.zeros((), x.dtype)
    return jnp.where(ordinary, x, zero), jnp.where(ordinary, zero, x)
