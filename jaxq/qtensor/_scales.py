"""Scales: from the extremes of a block to the dtype in which the scale is stored.

All arithmetic is float32 for every dtype of the array. Divisions are written as
products with a reciprocal, because XLA rewrites some divisions into such products on
some platforms. So numpy, eager XLA and jitted XLA agree in every bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.qtensor._extremes import Extremes
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._spec import QuantSpec

# The smallest normal float32 number. No scale is smaller, because XLA flushes subnormal
# numbers to zero on CPU.
_SMALLEST_NORMAL = np.float32(2.0**-126)
# The reciprocal of a larger scale is close to the subnormal numbers. `divide` shrinks
# the numbers and the scale by a power of two first.
_LARGE = np.float32(2.0**120)


def ideal_scale(
    blocks: jax.Array, extremes: Extremes, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    """The float32 scale of every block before it is rounded or quantized.

    The scale is 0 for a block of zeros and NaN for a block that is not finite.
    """
    fmt, shrink, grow = spec.fmt, extremes.shrink, extremes.grow
    if not spec.symmetric:
        # The range is extended to contain 0, so that 0 is exact.
        high, low = jnp.maximum(extremes.high, 0.0), jnp.minimum(extremes.low, 0.0)
        width = high * shrink - low * shrink
        scale = width * np.float32(1 / (fmt.max - fmt.min)) * grow
    elif spec.offset == "min":
        width = extremes.high * shrink - extremes.low * shrink
        scale = width * np.float32(1 / fmt.max) * grow
    else:
        scale = spec.rule.scale(blocks, extremes, fmt, geometry)
    return jnp.where(extremes.finite, scale, np.float32(np.nan))


def store_in_dtype(scale: jax.Array, dtype: str, *, signed: bool = False) -> jax.Array:
    """Rounds scales to nearest and clamps them to the range of `dtype`.

    A scale that is not zero does not become zero.

    Args:
      scale: float32, any shape.
      dtype: one of `SCALE_DTYPES`.
      signed: True for offsets: negative numbers stay negative, and a small magnitude
        may round to zero.
    """
    if dtype == "float32":
        if signed:
            return scale
        magnitude = jnp.maximum(jnp.abs(scale), _SMALLEST_NORMAL)
        return jnp.where(scale == 0, 0.0, jnp.sign(scale) * magnitude)
    fmt = formats.get(dtype)
    if not signed:
        smallest = max(fmt.smallest_positive, float(_SMALLEST_NORMAL))
        magnitude = jnp.clip(jnp.abs(scale), smallest, fmt.max)
        # float8_e8m0fnu has no zero.
        has_zero = fmt.min < 0
        zero = 0.0 if has_zero else fmt.smallest_positive
        scale = jnp.where(scale == 0, zero, jnp.sign(scale) * magnitude)
    codes = fmt.encode(scale)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def load_from_dtype(stored: jax.Array) -> jax.Array:
    """The exact float32 values of stored scales."""
    if stored.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return stored.astype(jnp.float32)  # a cast, so that gradients reach the scale
    fmt = formats.get(stored.dtype.name)
    return fmt.decode(lax.bitcast_convert_type(stored, fmt.code_dtype))


def divide(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """`blocks / scale` as a product with the reciprocal of the scale.

    The result is 0 where the scale is 0 or subnormal.
    """
    large = jnp.abs(scale) > _LARGE
    # A NaN scale counts as usable, because NaN must reach the encoder of the format.
    usable = ~(jnp.abs(scale) < _SMALLEST_NORMAL)
    # Both factors end in a division. XLA computes a division once for each block. It
    # repeats cheaper operations, and all operations before them, for each number.
    shrink = 1 / jnp.where(large, np.float32(2.0**8), np.float32(1))
    inverse = 1 / jnp.where(usable, scale * shrink, np.float32(np.inf))
    return (blocks.astype(jnp.float32) * shrink) * inverse
