"""Scales: from the extremes of a block to the dtype in which the scale is stored.

All arithmetic is float32 for every dtype of the array. Divisions are written as
products with a reciprocal, because XLA rewrites some divisions into such products on
some platforms. So numpy, eager XLA and jitted XLA agree in every bit. Rounding toward
zero needs the exact quotient, see `quotient_toward_zero`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.qtensor._extremes import Extremes
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._quotient import quotient_toward_zero
from jaxq.qtensor._spec import QuantSpec

# The smallest normal float32 number. No scale is smaller, because XLA flushes subnormal
# numbers to zero on CPU.
_SMALLEST_NORMAL = np.float32(2.0**-126)


def ideal_scale(
    blocks: jax.Array, extremes: Extremes, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    """The float32 scale of every block before it is rounded or quantized.

    The scale is 0 for a block of zeros and NaN for a block that is not finite.
    """
    fmt, shrink, grow = spec.fmt, extremes.shrink, extremes.grow
    finite = extremes.finite
    if not spec.symmetric:
        # The range is extended to contain 0, so that 0 is exact.
        high, low = jnp.maximum(extremes.high, 0.0), jnp.minimum(extremes.low, 0.0)
        width = high * shrink - low * shrink
        scale = _divide_range(width, fmt.max - fmt.min, spec) * grow
    elif spec.offset == "min":
        width = extremes.high * shrink - extremes.low * shrink
        scale = _divide_range(width, fmt.max, spec) * grow
    else:
        if spec.headroom_factor != 1.0:
            extremes = extremes.multiplied(_rounded_up(spec.headroom_factor))
        scale = spec.rule.scale(blocks, extremes, fmt, geometry)
        if spec.rounding == "toward_zero" and spec.rule.is_quotient:
            reach = spec.rule.reach_of(fmt)
            magnitude = _divide_range(extremes.magnitude, reach, spec)
            scale = jnp.where(scale < 0, -magnitude, magnitude)
    return jnp.where(finite, scale, np.float32(np.nan))


def _divide_range(width: jax.Array, length: float, spec: QuantSpec) -> jax.Array:
    """The scale that maps `width` to `length`.

    For rounding toward zero it is rounded toward zero. The number at the end of the
    range divided by a larger scale would be less than `length`, and would lose a step.
    """
    if spec.rounding == "toward_zero":
        return quotient_toward_zero(width, jnp.full_like(width, length))
    return width * np.float32(1 / length)


def _rounded_up(factor: float) -> np.float32:
    """The least float32 number that is at least `factor`."""
    nearest = np.float32(factor)
    return nearest if nearest >= factor else np.nextafter(nearest, np.float32(np.inf))


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
