"""Rows sorted by expert times a stack of quantized weights, each row with the weight of its expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kernels import RowMeta, Rows, as_rows, ragged_matmul
from jaxq.ops._plan import result_dtype
from jaxq.ops._rows import rows_of, why_not_rows
from jaxq.qtensor import QTensor


def ragged_dot(
    x: jax.Array,
    weights: QTensor,
    group_sizes: jax.Array,
    *,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.ragged_dot` with quantized weights: the first `group_sizes[0]` rows of x meet `weights[0]`, and so on.

    Decoded a few rows of every weight at a time, in plain XLA on every platform. Differentiable in x and scales. A
    dense dispatch (x `[e, m, k]`, one slot of rows an expert) by `jaxq.einsum` runs on the kernels.

    Args:
      x: float `[m, k]`, sorted by expert.
      weights: `[e, k, n]`, quantized with `contracting=-2, batch=0`.
      group_sizes: int32 `[e]`; rows beyond their sum give zeros.
      preferred_element_type: dtype of the result, accumulated in float32; None as for `jaxq.dot_general`.

    Returns:
      `[m, n]`.

    Raises:
      TypeError: x is no float matrix, `group_sizes` are no integers, or `weights` is no QTensor.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> experts = jaxq.quantize(jnp.ones((2, 64, 8)), "int4", contracting=-2, batch=0)
      >>> jaxq.ops.ragged_dot(jnp.ones((5, 64)), experts, jnp.array([2, 3])).shape
      (5, 8)
    """
    if not isinstance(weights, QTensor):
        raise TypeError(
            f"ragged_dot: weights must be a QTensor, got {type(weights).__name__}. Use jax.lax.ragged_dot."
        )
    x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    shown = f"x: {x.dtype.name}{list(x.shape)}, group_sizes: {group_sizes.dtype.name}{list(group_sizes.shape)}"
    if x.ndim != 2 or x.dtype.name not in ("float32", "bfloat16", "float16"):
        raise TypeError(
            f"ragged_dot: x must be a float32, bfloat16 or float16 matrix ({shown})."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"ragged_dot: group_sizes must be integers ({shown}).")
    geometry = weights.meta.geometry
    if (
        len(weights.batch_shape) != 1
        or geometry.contracted != (-2,)
        or geometry.kept != (-1,)
        or why_not_rows(weights)
    ):
        raise ValueError(
            f"ragged_dot: weights must be [e, k, n] with contracting=-2 and batch=0, got {weights!r}."
        )
    e, k, _ = weights.shape
    if x.shape[1] != k or group_sizes.shape != (e,):
        raise ValueError(
            f"ragged_dot: x must be [m, {k}] and group_sizes [{e}] for {weights!r} ({shown})."
        )
    out = jnp.dtype(preferred_element_type or result_dtype(x, weights))
    x = x if x.dtype == weights.dtype else x.astype(jnp.float32)
    found: list[RowMeta] = []

    def rows(qt: QTensor) -> Rows:
        one, meta = as_rows(*rows_of(qt))
        found.append(meta)
        return one

    stacked = jax.vmap(rows)(weights)
    return ragged_matmul(x, stacked, group_sizes.astype(jnp.int32), found[0]).astype(
        out
    )  # pyright: ignore
