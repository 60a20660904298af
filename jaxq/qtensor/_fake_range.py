"""fake_quant with a given range whose two ends have gradients.

LSQ and LSQ+ train the step and the offset of activations. The two ends of a range
determine the step and the offset, so the ends are trained here. PACT trains one end,
the clipping threshold.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxq.qtensor._dequantize import dequantize, scale_values
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._quantize import padded_blocks, quantize_array
from jaxq.qtensor._spec import QuantSpec

RangeGradient = Literal["lsq", "pact"]
RANGE_GRADIENTS = ("lsq", "pact")

# (low, high), float32 `[*batch, *num_blocks]`.
Range = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def fake_quant_in_range(
    x: jax.Array,
    bounds: Range,
    key: jax.Array | None,
    spec: QuantSpec,
    geometry: Geometry,
    range_gradient: RangeGradient,
) -> jax.Array:
    """`dequantize(quantize(x, bounds=bounds))`, with gradients to x and the bounds.

    Args:
      x: float array.
      bounds: (low, high), float32 `[*batch, *num_blocks]`.
      key: PRNG key if `spec.needs_key`, else None.
      spec: a spec whose scales follow from a range.
      geometry: the geometry of `x`.
      range_gradient: as in `fake_quant`.

    Returns:
      Array of the shape and dtype of `x`.
    """
    return dequantize(quantize_array(x, spec, geometry, key, bounds=bounds))


@fake_quant_in_range.defjvp
def _fake_quant_in_range_jvp(spec, geometry, range_gradient, primals, tangents):
    x, bounds, key = primals
    # A second derivative must not go through the rounding.
    constant_x, constant_bounds = jax.lax.stop_gradient((x, bounds))
    quantized = quantize_array(constant_x, spec, geometry, key, bounds=constant_bounds)
    # The function is called again for its value, so that a second derivative finds this
    # rule again.
    value = fake_quant_in_range(x, bounds, key, spec, geometry, range_gradient)
    smooth = functools.partial(
        _smooth, quantized=quantized, range_gradient=range_gradient
    )
    _, tangent = jax.jvp(smooth, (x, bounds), (tangents[0], tangents[1]))
    return value, tangent.astype(value.dtype)


def _smooth(
    x: jax.Array, bounds: Range, quantized: QTensor, range_gradient: RangeGradient
) -> jax.Array:
    """A function whose derivatives are those of `fake_quant_in_range`.

    A number inside the range moves with x. Its rounding error is a fraction of the
    step, so it also moves with the step (LSQ). A number outside the range becomes an
    end of the range, and moves with this end.
    """
    spec, geometry = quantized.spec, quantized.meta.geometry
    low, high = (geometry.scale_to_blocks(end) for end in bounds)
    bottom, top, step = _ends_and_step(low, high, spec)
    blocks = padded_blocks(geometry.to_view(x).astype(jnp.float32), spec, geometry)
    inside = jax.lax.stop_gradient((bottom < blocks) & (blocks < top))
    rounded = blocks
    if range_gradient == "lsq":
        values = dequantize(quantized, dtype=jnp.float32)
        values = geometry.to_blocks(geometry.pad(geometry.to_view(values)))
        scale = geometry.scale_to_blocks(scale_values(quantized))
        error_in_steps = jax.lax.stop_gradient((values - blocks) / scale)
        rounded = blocks + error_in_steps * step
    is_above = jax.lax.stop_gradient(blocks > (bottom + top) / 2)
    result = jnp.where(inside, rounded, jnp.where(is_above, top, bottom))
    return geometry.from_view(geometry.unpad(geometry.from_blocks(result)))


def _ends_and_step(
    low: jax.Array, high: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The smallest and the largest number after quantization, and the scale.

    Only their derivatives matter, so the rounding of scales, zero points and offsets is
    left out.
    """
    fmt = spec.fmt
    if spec.offset == "min":
        return low, high, (high - low) / fmt.max
    if not spec.symmetric:
        # The range is extended to contain 0, so that 0 is exact. An end at 0 has no
        # gradient: the range of numbers after a ReLU keeps its low end (PACT, LSQ).
        bottom, top = jnp.where(low < 0, low, 0.0), jnp.where(high > 0, high, 0.0)
        return bottom, top, (top - bottom) / (fmt.max - fmt.min)
    magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return -magnitude, magnitude, magnitude / fmt.max
