"""Inputs of a layer as a matrix of tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.methods import _matrix


def as_tokens(
    x: Any, w: jax.Array, caller: str, max_tokens: int | None = None
) -> jax.Array:
    """Float32 `[tokens, in]` of the inputs `[..., in]` of a weight `[in, out]`, thinned evenly to `max_tokens`.

    For a stack of weights, x is `[tokens, in]` for all of them or stacked like them.

    Raises:
      TypeError: no floats.
      ValueError: another number of inputs, no tokens, numbers that are not finite.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"{caller}: max_tokens must be at least 1, got {max_tokens}.")
    k = w.shape[-2]
    if w.ndim == 2 and np.ndim(x) != 2 and np.shape(x)[-1:] == (k,):
        x = jnp.asarray(x).reshape(-1, k)
    x = _matrix.as_statistic(
        x, "x", caller, shape=(None, k), said="inputs [tokens, in]", w=w
    )
    return x if max_tokens is None else x[..., :: -(-x.shape[-2] // max_tokens), :]
