"""The scale of a block: from its extremes, by rule, into the dtype it is kept in.

All arithmetic is float32 whatever the input's dtype, and multiplies by reciprocals computed once, so that numpy, eager
and jitted XLA agree to the bit (XLA rewrites a division by a broadcast array into such a product on some platforms).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._spec import QuantSpec

# XLA flushes subnormals on CPU, so no scale is smaller than float32's smallest normal number, 2^-126.
_SMALLEST_NORMAL = np.float32(2.0**-126)
# Above this a scale's reciprocal nears the subnormals, and numbers are shrunk by a power of two first.
_LARGE = np.float32(2.0**120)
# Above this sums and differences may leave float32's range, and are taken of numbers shrunk by its inverse.
_HUGE = np.float32(2.0**64)
# Axes are halved until this many numbers have met in one: more would make a large program.
_MOST_MET = 64


class Extremes(NamedTuple):
    """What a block's scale depends on, each `[..., n, 1, ...]` as `Geometry.to_blocks` keeps dimensions; float32."""

    low: jax.Array
    high: jax.Array
    magnitude: (
        jax.Array
    )  # NaN where the block holds a NaN, else infinite where it holds an infinity

    @property
    def finite(self) -> jax.Array:
        return jnp.isfinite(self.magnitude)


def extremes(blocks: jax.Array, geometry: Geometry) -> Extremes:
    """Least, greatest and largest number of every block; under jit, what is not used is not computed.

    XLA's minimum and maximum drop NaN on CPU, so only `magnitude` tells of one.
    """
    axes = geometry.block_axes
    low = jnp.min(blocks, axis=axes, keepdims=True, initial=np.inf).astype(jnp.float32)
    high = jnp.max(blocks, axis=axes, keepdims=True, initial=-np.inf).astype(
        jnp.float32
    )
    empty = low > high
    return Extremes(
        jnp.where(empty, 0.0, low),
        jnp.where(empty, 0.0, high),
        _magnitude(blocks, axes),
    )


def within(found: Extremes, low: jax.Array, high: jax.Array) -> Extremes:
    """Given bounds in place of a block's own; a block that is not finite stays marked as such."""
    magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return Extremes(low, high, jnp.where(found.finite, magnitude, found.magnitude))


def _magnitude(blocks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest `|x|` of every block, keeping dimensions; NaN where there is one.

    Without their sign, bit patterns order as the numbers do, with infinity above them and NaN on top: one integer
    maximum sees everything. Halving an axis by pairwise maxima first reads the array once, in long runs, which XLA's
    reduction on CPU does not.
    """
    dtype = blocks.dtype
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    pattern = lax.bitcast_convert_type(blocks, unsigned) & np.array(
        jnp.iinfo(unsigned).max // 2, unsigned
    )
    met = 1
    for axis in axes:
        axis, size = axis % pattern.ndim, pattern.shape[axis]
        while size % 2 == 0 and size > 1 and met < _MOST_MET:
            size, met = size // 2, met * 2
            first = lax.slice_in_dim(pattern, 0, size, axis=axis)
            pattern = jnp.maximum(
                first, lax.slice_in_dim(pattern, size, None, axis=axis)
            )
    largest = jnp.max(pattern, axis=axes, keepdims=True, initial=0)
    return lax.bitcast_convert_type(largest, dtype).astype(jnp.float32)


def scale_of(
    blocks: jax.Array, found: Extremes, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    """The ideal float32 scale of every block by `spec.scale_rule`: 0 for a block of zeros, NaN for a non-finite one."""
    fmt, rule, magnitude = spec.fmt, spec.scale_rule, found.magnitude
    huge = magnitude > _HUGE
    shrink, grow = (
        jnp.where(huge, 1 / _HUGE, np.float32(1)),
        jnp.where(huge, _HUGE, np.float32(1)),
    )
    if not spec.symmetric:
        high, low = jnp.maximum(found.high, 0.0), jnp.minimum(found.low, 0.0)
        scale = (
            (high * shrink - low * shrink) * np.float32(1 / (fmt.max - fmt.min)) * grow
        )
    elif spec.offset == "min":
        scale = (
            (found.high * shrink - found.low * shrink) * np.float32(1 / fmt.max) * grow
        )
    elif rule == "absmax":
        scale = magnitude * np.float32(1 / fmt.max)
    elif rule == "absmean":
        scale = _mean_magnitude(blocks, shrink, geometry) * grow
    elif rule == "ttq":
        scale = magnitude
    elif rule == "twn":
        kept = jnp.abs(terns(blocks, found, rule, geometry))
        sizes = jnp.sum(
            jnp.abs(blocks.astype(jnp.float32)) * kept * shrink,
            axis=geometry.block_axes,
            keepdims=True,
        )
        scale = (
            sizes
            / jnp.maximum(jnp.sum(kept, axis=geometry.block_axes, keepdims=True), 1.0)
            * grow
        )
    elif rule == "signed_extreme":
        extreme = jnp.where(found.high >= -found.low, found.high, found.low)
        scale = extreme * np.float32(1 / fmt.min)
    else:
        scale = _power_of_two(magnitude, fmt, rule)
    return jnp.where(found.finite, scale, np.float32(np.nan))


def terns(
    blocks: jax.Array, found: Extremes, rule: str, geometry: Geometry
) -> jax.Array:
    """The signs of what exceeds its block's threshold, 0 elsewhere; float32.

    "twn": 0.7 of the mean magnitude (Li et al., 2016). "ttq": 0.05 of the largest (Zhu et al., 2017).
    """
    shrink = jnp.where(found.magnitude > _HUGE, 1 / _HUGE, np.float32(1))
    if rule == "twn":
        threshold = np.float32(0.7) * _mean_magnitude(blocks, shrink, geometry)
    else:
        threshold = np.float32(0.05) * (found.magnitude * shrink)
    x = blocks.astype(jnp.float32)
    return jnp.where(jnp.abs(x) * shrink > threshold, jnp.sign(x), 0.0)


def ternary_codebook(y: jax.Array, signs: jax.Array, geometry: Geometry) -> jax.Array:
    """The mean of what stands behind each sign, which is the table of least squared error.

    Args:
      y: numbers in units of their scale, as `Geometry.to_blocks` keeps them.
      signs: their ternary codes.
      geometry: theirs.

    Returns:
      float32 `[*batch, *num_blocks, 3]`: of -1, 0 and 1; 0 where no number has that sign.
    """

    def mean(sign: int) -> jax.Array:
        held = (signs == sign).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(held, axis=geometry.block_axes, keepdims=True), 1.0)
        return geometry.scale_from_blocks(
            jnp.sum(y * held, axis=geometry.block_axes, keepdims=True) / count
        )

    negative, positive = mean(-1), mean(1)
    return jnp.stack([negative, jnp.zeros_like(negative), positive], axis=-1)


def _mean_magnitude(
    blocks: jax.Array, shrink: jax.typing.ArrayLike, geometry: Geometry
) -> jax.Array:
    """The mean of `|x| * shrink` over a block's true numbers."""
    total = jnp.sum(
        jnp.abs(blocks.astype(jnp.float32)) * shrink,
        axis=geometry.block_axes,
        keepdims=True,
    )
    share = (1 / np.maximum(geometry.counts(), 1)).astype(np.float32)
    return total * share.reshape((1,) * (total.ndim - share.ndim) + share.shape)


def _power_of_two(magnitude: jax.Array, fmt: formats.Format, rule: str) -> jax.Array:
    """OCP microscaling scales by the exponent bits of the block's maximum: no logarithm, so never off by one."""
    pattern = lax.bitcast_convert_type(magnitude, jnp.uint32)
    if rule == "mx_even":
        pattern = pattern + np.uint32(
            1 << (22 - fmt.mantissa_bits)
        )  # half a unit in the element's last place
    exponent = (pattern >> 23).astype(jnp.int32) - 127 - fmt.max_exponent
    mantissa = pattern & np.uint32(0x7FFFFF)
    if rule == "mx_ceil":
        exponent = exponent + (mantissa > 0).astype(jnp.int32)
    elif rule == "mx_round_up":
        largest = np.asarray(fmt.max, np.float32).view(np.uint32) & np.uint32(0x7FFFFF)
        exponent = exponent + (mantissa > largest).astype(jnp.int32)
    biased = jnp.clip(exponent + 127, 1, 254).astype(jnp.uint32)
    return jnp.where(
        magnitude > 0, lax.bitcast_convert_type(biased << 23, jnp.float32), 0.0
    )


def store_in_dtype(scale: jax.Array, dtype: str, *, signed: bool = False) -> jax.Array:
    """`scale` rounded to nearest and clamped into `dtype`, so that what is not zero stays not zero.

    Args:
      scale: float32, any shape.
      dtype: one of `SCALE_DTYPES`.
      signed: offsets: negative numbers and any small magnitude are left to rounding.
    """
    if dtype == "float32":
        if signed:
            return scale
        magnitude = jnp.maximum(jnp.abs(scale), _SMALLEST_NORMAL)
        return jnp.where(scale == 0, 0.0, jnp.sign(scale) * magnitude)
    fmt = formats.get(dtype)
    has_zero = fmt.min < 0
    if not signed:
        magnitude = jnp.clip(
            jnp.abs(scale), max(fmt.smallest_positive, float(_SMALLEST_NORMAL)), fmt.max
        )
        zero = 0.0 if has_zero else fmt.smallest_positive
        scale = jnp.where(scale == 0, zero, jnp.sign(scale) * magnitude)
    codes = fmt.encode(scale)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def load_from_dtype(stored: jax.Array) -> jax.Array:
    """The float32 numbers of a stored scale, exactly."""
    if stored.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return stored.astype(jnp.float32)  # a cast, so that gradients reach the scale
    fmt = formats.get(stored.dtype.name)
    return fmt.decode(lax.bitcast_convert_type(stored, fmt.code_dtype))


def divide(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """`blocks / scale` as a product with the reciprocal; 0 where the scale is 0 (or below float32's normal range)."""
    large = jnp.abs(scale) > _LARGE
    usable = ~(
        jnp.abs(scale) < _SMALLEST_NORMAL
    )  # NaN is usable: it must reach the codes' NaN rule
    # Both factors end in a division, which XLA computes once a block; cheaper operations it would repeat for every
    # number of the block, and all that they depend on with them.
    shrink = 1 / jnp.where(large, np.float32(2.0**8), np.float32(1))
    inverse = 1 / jnp.where(usable, scale * shrink, np.float32(np.inf))
    return (blocks.astype(jnp.float32) * shrink) * inverse
