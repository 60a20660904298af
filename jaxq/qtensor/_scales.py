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
from jaxq.qtensor._spec import QuantSpec

# The smallest normal float32 number. No scale is smaller, because XLA flushes subnormal
# numbers to zero on CPU.
_SMALLEST_NORMAL = np.float32(2.0**-126)
# The reciprocal of a larger scale is close to the subnormal numbers. `divide` shrinks
# the numbers and the scale by a power of two first.
_LARGE = np.float32(2.0**120)
# The fields of a float32 bit pattern.
_SIGN = np.uint32(0x80000000)
_FRACTION_BITS = 23
_FRACTION = np.uint32(0x7FFFFF)
_LARGEST = np.uint32(0x7F7FFFFF)  # the largest finite number
_UPPER_HALF = np.uint32(0xFFFFF000)  # keeps 12 of the 24 significant bits


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


def divide_for_rounding(
    blocks: jax.Array, scale: jax.Array, rounding: str
) -> jax.Array:
    """`blocks / scale` for a rounding mode of codes; float32."""
    if rounding == "toward_zero":
        return quotient_toward_zero(blocks, scale)
    return divide(blocks, scale)


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


def quotient_toward_zero(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """The exact quotient `blocks / scale`, rounded toward zero to float32.

    A second rounding toward zero, to the numbers of a format, then gives the exact
    quotient rounded toward zero to the format. The rounded product of `divide` may be
    on the other side of a number of the format.

    The result is that of `divide` if a number is 0, subnormal or not finite. A result
    outside the range of float32 becomes the largest number or 0.
    """
    x, s = jnp.broadcast_arrays(blocks.astype(jnp.float32), scale)
    x_bits, s_bits = _bits(x), _bits(s)
    x_exponent, s_exponent = _exponent_field(x_bits), _exponent_field(s_bits)
    # Mantissas in [1, 2) are divided, so no product overflows or underflows.
    x_mantissa, s_mantissa = _mantissa(x_bits), _mantissa(s_bits)
    inverse = 1 / _mantissa(_bits(scale))  # once for each block
    quotient = x_mantissa * inverse  # off by two last places at most
    quotient = quotient + _remainder(x_mantissa, quotient, s_mantissa) * inverse
    # Now it is the nearest float, or so near that only its own last place counts.
    too_large = _remainder(x_mantissa, quotient, s_mantissa) < 0
    bits = _bits(quotient) - too_large.astype(jnp.uint32)
    exponent = _exponent_field(bits) + x_exponent - s_exponent
    pattern = (exponent.astype(jnp.uint32) << _FRACTION_BITS) | (bits & _FRACTION)
    pattern = jnp.where(exponent > 0, pattern, np.uint32(0))
    pattern = jnp.where(exponent < 255, pattern, _LARGEST)
    pattern = pattern | ((x_bits ^ s_bits) & _SIGN)
    is_normal = (x_exponent > 0) & (x_exponent < 255)
    is_normal &= (s_exponent > 0) & (s_exponent < 255)
    exact = lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(is_normal, exact, divide(blocks, scale))


def _remainder(x: jax.Array, quotient: jax.Array, divisor: jax.Array) -> jax.Array:
    """`x - quotient * divisor` without rounding, for a quotient near `x / divisor`.

    Both factors are cut into halves of 12 bits. Products of halves are exact, and so is
    every difference. So it makes no difference if XLA fuses a product and a difference.
    """
    q_high, d_high = _upper_half(quotient), _upper_half(divisor)
    q_low, d_low = quotient - q_high, divisor - d_high
    return ((x - q_high * d_high) - q_high * d_low) - q_low * d_high - q_low * d_low


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _exponent_field(bits: jax.Array) -> jax.Array:
    """The biased exponent of float32 bit patterns, int32."""
    return ((bits & ~_SIGN) >> _FRACTION_BITS).astype(jnp.int32)


def _mantissa(bits: jax.Array) -> jax.Array:
    """The significant digits of float32 bit patterns as a number in [1, 2)."""
    one = np.float32(1).view(np.uint32)
    return lax.bitcast_convert_type((bits & _FRACTION) | one, jnp.float32)


def _upper_half(x: jax.Array) -> jax.Array:
    """`x` cut to its upper 12 significant bits."""
    return lax.bitcast_convert_type(_bits(x) & _UPPER_HALF, jnp.float32)
