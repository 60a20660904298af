"""Inputs of a layer as a matrix of tokens `[tokens, in]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.methods import _matrix


def as_tokens(
    x: Any, w: jax.Array, caller: str, max_tokens: int | None = None
) -> jax.Array:
    """Returns the inputs of a weight as a float32 matrix of tokens.

    Args:
      x: float `[..., in]`. For a stack of weights: `[tokens, in]` for all weights, or
        with the same leading axes as the stack.
      w: the weight `[in, out]`, or a stack of weights.
      caller: the name that error messages begin with.
      max_tokens: if there are more tokens, every n-th token is taken. n is the smallest
        number that gives at most `max_tokens` tokens. None uses all tokens.

    Returns:
      float32 `[tokens, in]`, with the axes of a stack in front if `x` has them.

    Raises:
      TypeError: `x` is not a float array.
      ValueError: `max_tokens` is less than 1, the last axis of `x` is not `in`, there
        are no tokens, or (outside jit) a number is not finite.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"{caller}: max_tokens must be at least 1, got {max_tokens}.")
    num_inputs = w.shape[-2]
    if w.ndim == 2 and np.ndim(x) != 2 and np.shape(x)[-1:] == (num_inputs,):
        x = jnp.asarray(x).reshape(-1, num_inputs)
    x = _matrix.as_statistic(
        x, "x", caller, shape=(None, num_inputs), meaning="inputs [tokens, in]", w=w
    )
    if max_tokens is None:
        return x
    step = -(-x.shape[-2] // max_tokens)
    return x[..., ::step, :]
