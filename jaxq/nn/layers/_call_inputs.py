"""What calibration reads from one call of a layer's product: the input and its rows.

A row is one vector `[K]` of the input: a token of a linear layer, or a spatial position
of a convolution. A layer kind uses these functions as `read_input` and `read_rows`, or
brings its own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The rows `[*batch, *free, K]` of an input, and its number of batch axes.
InputRows = tuple[jax.Array, int]


def first_argument(x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """The input of `dot_general(x, w, ...)` and `conv_general_dilated(x, w, ...)`."""
    return x


def dot_rows(x: jax.Array, w: Any, dims: Any, *args: Any, **kwargs: Any) -> InputRows:
    """The rows of the input of `dot_general(x, w, dims)`."""
    (contracted, _), (batch, _) = dims
    return contracted_rows(x, tuple(contracted), tuple(batch)), len(batch)


def einsum_input(subscripts: str, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """The input of `einsum(subscripts, x, w)`."""
    return x


def einsum_rows(subscripts: str, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    """The rows of the input of `einsum(subscripts, x, w)`.

    The batch axes are the leading batch axes of the weight, as in `einsum_roles`.
    """
    inputs, out = subscripts.replace(" ", "").split("->")
    left, right = inputs.split(",")
    num_unnamed = x.ndim - len(left.replace("...", ""))
    indices = left.replace("...", "\0" * num_unnamed)
    contracted = [indices.index(c) for c in right if c in indices and c not in out]
    batch = []
    for index in right:
        if index not in indices or index not in out:
            break
        batch.append(indices.index(index))
    return contracted_rows(x, contracted, batch), len(batch)


def conv_rows(x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    """The rows of a convolution's input: the channels of every spatial position."""
    return x, 0


def contracted_rows(
    x: jax.Array, contracted: Sequence[int], batch: Sequence[int]
) -> jax.Array:
    """The rows `[*batch, *free, K]` of an operand. K flattens the contracted axes."""
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    x = jnp.transpose(x, (*batch, *free, *contracted))
    return x.reshape(*x.shape[: x.ndim - len(contracted)], -1)
