"""The product of two tiles inside a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def tile_product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Returns the float32 product over axis 1 of x and `axis` of y, two float tiles."""
    # Without HIGHEST a TPU would round float32 to bfloat16, and a GPU to tf32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
