"""The minimum, the maximum and the largest magnitude of every block.

`Extremes` is the input of the scale rules (`_scale_rules.py`). All numbers in it are
float32 for every dtype of the array.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._largest import largest

# Sums and differences of numbers above this constant can overflow float32. Such blocks
# are multiplied by the inverse of this constant before sums are computed.
_HUGE = np.float32(2.0**64)


class Extremes(NamedTuple):
    """The extremes of every block, from which scale rules compute scales.

    Each field is float32 `[..., n, 1, ...]`: the axes of `Geometry.to_blocks`, with
    size 1 inside the block.

    Attributes:
      low: the minimum of the block; 0 for an empty block.
      high: the maximum of the block; 0 for an empty block.
      magnitude: the largest absolute value. It is NaN if the block contains a NaN. It
        is infinite if the block contains an infinity and no NaN.
    """

    low: jax.Array
    high: jax.Array
    magnitude: jax.Array

    @property
    def finite(self) -> jax.Array:
        """True for the blocks that contain only finite numbers."""
        return jnp.isfinite(self.magnitude)

    @property
    def shrink(self) -> jax.Array:
        """The factor that keeps sums over the block inside the range of float32."""
        return jnp.where(self.magnitude > _HUGE, 1 / _HUGE, np.float32(1))

    @property
    def grow(self) -> jax.Array:
        """The inverse of `shrink`."""
        return jnp.where(self.magnitude > _HUGE, _HUGE, np.float32(1))

    def multiplied(self, factor: np.float32) -> Extremes:
        """All extremes times `factor`, at most the largest float32 number."""
        largest = np.finfo(np.float32).max
        return Extremes(*(jnp.clip(x * factor, -largest, largest) for x in self))

    def with_range(self, low: jax.Array, high: jax.Array) -> Extremes:
        """The same extremes with another range.

        A block that is not finite keeps the magnitude NaN or infinity.
        """
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        return Extremes(low, high, jnp.where(self.finite, magnitude, self.magnitude))


def block_extremes(blocks: jax.Array, geometry: Geometry) -> Extremes:
    """The extremes of every block.

    Under jit, XLA removes the computation of extremes that are not used.

    Args:
      blocks: numbers as `Geometry.to_blocks` arranges them.
      geometry: the geometry that arranged them.
    """
    axes = geometry.block_axes
    # XLA's minimum and maximum ignore NaN on CPU, so only `magnitude` reports a NaN.
    low = jnp.min(blocks, axis=axes, keepdims=True, initial=np.inf)
    high = jnp.max(blocks, axis=axes, keepdims=True, initial=-np.inf)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    empty = low > high
    return Extremes(
        jnp.where(empty, 0.0, low),
        jnp.where(empty, 0.0, high),
        _magnitude(blocks, axes),
    )


def _magnitude(blocks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest `|x|` of every block, with kept dimensions; NaN if there is a NaN.

    Bit patterns without the sign bit have the order of the magnitudes. Infinity is
    above all finite numbers and NaN is above infinity. So one integer maximum finds all
    three.
    """
    dtype = blocks.dtype
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    without_sign = np.array(jnp.iinfo(unsigned).max // 2, unsigned)
    pattern = lax.bitcast_convert_type(blocks, unsigned) & without_sign
    maximum = largest(pattern, axes)
    return lax.bitcast_convert_type(maximum, dtype).astype(jnp.float32)
