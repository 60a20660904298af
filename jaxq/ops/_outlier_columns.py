"""The split of an activation at the LLM.int8() threshold.

A column with a magnitude of at least the threshold is an outlier column. It is
multiplied in floats; all other columns are quantized. Which columns are outliers is
found in every call, so both products have full size: the split is for accuracy, not for
speed.

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
    """The ordinary and the outlier columns of `x`; the sum of the two is `x`.

    Args:
      x: activation, any shape.
      threshold: least magnitude of an outlier, at least 0.
      free_axes: the axes of `x` that the product neither contracts nor shares with the
        weight. The magnitude of a column is the largest one along these axes.

    Returns:
      Two arrays of the shape and dtype of `x`. The first has zeros in the outlier
      columns, the second has zeros in all others.
    """
    magnitude = jnp.max(jnp.abs(x), axis=tuple(free_axes), keepdims=True, initial=0.0)
    ordinary = magnitude < threshold  # False for NaN, which is an outlier
    zero = jnp.zeros((), x.dtype)
    return jnp.where(ordinary, x, zero), jnp.where(ordinary, zero, x)
