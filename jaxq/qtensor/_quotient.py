"""Numbers divided by their scale: by a reciprocal, or exactly.

XLA rewrites some divisions into products with a reciprocal on some platforms. So
`divide` is written as such a product. `quotient_toward_zero` corrects the product by
its exact remainder.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The smallest normal float32 number. XLA flushes smaller numbers to zero on CPU.
_LEAST_NORMAL = np.float32(2.0**-126)
# The reciprocal of a larger scale is close to the subnormal numbers. `divide` shrinks
# the numbers and the scale by a power of two first.
_LARGE = np.float32(2.0**120)
# The fields of a float32 bit pattern.
_SIGN = np.uint32(0x80000000)
_FRACTION_BITS = 23
_FRACTION = np.uint32(0x7FFFFF)
_LARGEST = np.uint32(0x7F7FFFFF)  # the largest finite number
_UPPER_HALF = np.uint32(0xFFFFF000)  # keeps 12 of the 24 significant bits


def divide_for_rounding(
    blocks: jax.Array, scale: jax.Array, rounding: str
) -> jax.Array:
    """`blocks / scale` for a rounding mode of codes; float32."""
    if rounding == "toward_zero":
        return quotient_toward_zero(blocks, scale)
    return divide(blocks, scale)


def one_over(x: jax.Array) -> jax.Array:
    """`1 / x`, as XLA divides."""
    return 1 / x


def divide(
    blocks: jax.Array,
    scale: jax.Array,
    reciprocal: Callable[[jax.Array], jax.Array] = one_over,
) -> jax.Array:
    """`blocks / scale` as a product with the reciprocal of the scale.

    The result is 0 where the scale is 0 or subnormal.

    Args:
      blocks: numbers of any float dtype.
      scale: float32, broadcastable to `blocks`.
      reciprocal: computes `1 / x`, rounded to nearest, for x that is infinite, NaN, or
        between 2^-126 and 2^120 in magnitude. The division of some kernels is not
        rounded to nearest.
    """
    large = jnp.abs(scale) > _LARGE
    # A NaN scale counts as usable, because NaN must reach the encoder of the format.
    usable = ~(jnp.abs(scale) < _LEAST_NORMAL)
    # Both factors end in a division. XLA computes a division once for each block. It
    # repeats cheaper operations, and all operations before them, for each number.
    shrink = reciprocal(jnp.where(large, np.float32(2.0**8), np.float32(1)))
    inverse = reciprocal(jnp.where(usable, scale * shrink, np.float32(np.inf)))
    return (blocks.astype(jnp.float32) * shrink) * inverse


def quotient_toward_zero(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """The exact quotient `blocks / scale`, rounded toward zero to float32.

    A second rounding toward zero, to the numbers of a format, then gives the exact
    quotient rounded toward zero to the format. The rounded product of `divide` may be
    on the other side of a number of the format.

    If a number or its scale is 0, subnormal or not finite, the result is that of
    `divide`. A result outside the range of float32 becomes the largest number or 0.
    """
    x, s = jnp.broadcast_arrays(blocks.astype(jnp.float32), scale)
    x_bits, s_bits = _bit_pattern(x), _bit_pattern(s)
    x_exponent, s_exponent = _exponent_field(x_bits), _exponent_field(s_bits)
    # Mantissas in [1, 2) are divided, so no product overflows or underflows.
    x_mantissa, s_mantissa = _mantissa(x_bits), _mantissa(s_bits)
    inverse = 1 / _mantissa(_bit_pattern(scale))  # once for each block
    quotient = x_mantissa * inverse  # off by two last places at most
    quotient = quotient + _remainder(x_mantissa, quotient, s_mantissa) * inverse
    # Now it is one of the two floats next to the exact quotient. The lower one is kept.
    too_large = _remainder(x_mantissa, quotient, s_mantissa) < 0
    bits = _bit_pattern(quotient) - too_large.astype(jnp.uint32)
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


def _bit_pattern(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _exponent_field(bits: jax.Array) -> jax.Array:
    """The biased exponent of float32 bit patterns, int32."""
    return ((bits & ~_SIGN) >> _FRACTION_BITS).astype(jnp.int32)


def _mantissa(bits: jax.Array) -> jax.Array:
    """The significand of float32 bit patterns, a number in [1, 2)."""
    one = np.float32(1).view(np.uint32)
    return lax.bitcast_convert_type((bits & _FRACTION) | one, jnp.float32)


def _upper_half(x: jax.Array) -> jax.Array:
    """`x` cut to its upper 12 significant bits."""
    return lax.bitcast_convert_type(_bit_pattern(x) & _UPPER_HALF, jnp.float32)
