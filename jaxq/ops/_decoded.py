"""A product with a weight that is dequantized as a whole."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxq import kernels
from jaxq.qtensor import QTensor, dequantize


def multiply_decoded(
    product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, weight: QTensor
) -> jax.Array:
    """`product(x, dequantize(weight, dtype=x.dtype))`.

    The dequantized weight is in memory only during the product. The backward pass
    dequantizes the weight again.
    """

    def multiply(x: jax.Array, weight: QTensor) -> jax.Array:
        return product(x, dequantize(weight, dtype=x.dtype))

    return multiply_in_one_step(jax.checkpoint(multiply), x, weight)


def multiply_in_one_step(
    multiply: Callable[..., jax.Array], x: jax.Array | QTensor, weight: QTensor
) -> jax.Array:
    """`multiply(x, weight)`, as one step of the program (`kernels.as_one_step`)."""

    def skip(x: jax.Array | QTensor, weight: QTensor) -> jax.Array:
        result = jax.eval_shape(multiply, x, weight)
        return jnp.zeros(result.shape, result.dtype)

    return kernels.as_one_step(weight.data, multiply, skip, x, weight)
