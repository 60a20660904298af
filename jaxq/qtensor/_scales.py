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
# `mean` shrinks larger numbers before it sums them.
_HUGE = np.float32(2.0**64)


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

    If codes are rounded toward zero, the scale is rounded toward zero too. A larger
    scale would divide the number at the end of the range to less than `length`. The
    code of this number would then lose a step.
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
        return jnp.where(scale == 0, 0.0, _with_sign_of(scale, magnitude))
    fmt = formats.get(dtype)
    if not signed:
        smallest = max(fmt.smallest_positive, float(_SMALLEST_NORMAL))
        magnitude = jnp.clip(jnp.abs(scale), smallest, fmt.max)
        # float8_e8m0fnu has no zero.
        has_zero = fmt.min < 0
        zero = 0.0 if has_zero else fmt.smallest_positive
        scale = jnp.where(scale == 0, zero, _with_sign_of(scale, magnitude))
    codes = fmt.encode(scale)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def _with_sign_of(scale: jax.Array, magnitude: jax.Array) -> jax.Array:
    # `jnp.sign` inside a TPU kernel can only be lowered where a TPU is attached.
    return jnp.where(scale < 0, -magnitude, magnitude)


def store_below(low: jax.Array, dtype: str) -> jax.Array:
    """Rounds numbers down, to the nearest numbers of `dtype` that are not above them.

    A number below the range of `dtype` becomes its most negative number.

    Args:
      low: float32, any shape.
      dtype: "float32", "bfloat16" or "float16".
    """
    nearest = store_in_dtype(low, dtype, signed=True)
    least = jnp.finfo(dtype).min
    is_above = (load_from_dtype(nearest) > low) & (nearest > least)
    minus_infinity = jnp.full_like(nearest, -np.inf)
    return jnp.where(is_above, jnp.nextafter(nearest, minus_infinity), nearest)


def load_from_dtype(stored: jax.Array) -> jax.Array:
    """The exact float32 values of stored scales."""
    if stored.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return stored.astype(jnp.float32)  # a cast, so that gradients reach the scale
    fmt = formats.get(stored.dtype.name)
    return fmt.decode(lax.bitcast_convert_type(stored, fmt.code_dtype))


def mean(x: jax.Array) -> jax.Array:
    """The mean along the last axis; float32.

    The order of the sums depends on the length of the axis only. So each row of a batch
    has the same mean as the row alone. `jnp.mean` does not promise this.

    Args:
      x: float32 `[..., n]`.

    Returns:
      float32 `[...]`; 0 for empty rows.
    """
    n = x.shape[-1]
    if n == 0:
        return jnp.zeros(x.shape[:-1], jnp.float32)
    # A sum of numbers near the largest float32 would overflow.
    is_huge = jnp.max(jnp.abs(x), axis=-1, keepdims=True) > _HUGE
    total = x * jnp.where(is_huge, 1 / _HUGE, np.float32(1))
    while total.shape[-1] > 1:
        half = -(-total.shape[-1] // 2)
        first, second = total[..., :half], total[..., half:]
        missing = [(0, 0)] * (x.ndim - 1) + [(0, half - second.shape[-1])]
        # Without the barrier XLA would write all sums as one large expression.
        total = lax.optimization_barrier(first + jnp.pad(second, missing))
    total = total * np.float32(1 / n)
    return jnp.where(is_huge, total * _HUGE, total)[..., 0]
