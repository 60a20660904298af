"""Ranges of numbers: those given or found for a block, and those in which nothing is clipped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.qtensor import _scales
from jaxq.qtensor._dequantize import scale_values
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._spec import QuantSpec


def as_bounds(
    bounds: Any, x: jax.Array, spec: QuantSpec, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Bounds as float32 `[*batch, *num_blocks]`."""
    if spec.rule.reads_block or spec.offset == "mean":
        raise ValueError(
            f"quantize: bounds= say nothing of what scale_rule={spec.scale_rule!r} and offset={spec.offset!r} need."
        )
    batch = x.shape[: x.ndim - len(geometry.shape)]
    wanted = (*batch, *geometry.num_blocks)
    low, high = (jnp.asarray(end, jnp.float32) for end in bounds)
    for end in (low, high):
        if end.shape not in ((), batch) and end.size != math.prod(wanted):
            raise ValueError(
                f"quantize: bounds are {list(end.shape)}; expected one number, or one for each scale, {list(wanted)}."
            )
    if not isinstance(low, Tracer) and not isinstance(high, Tracer):
        with jax.ensure_compile_time_eval():
            ordered = bool(jnp.all(low <= high))
        if not ordered:
            raise ValueError(
                "quantize: bounds= must be (low, high) with low <= high, and no NaN."
            )
    ones = (1,) * len(geometry.num_blocks)
    ends = [
        end.reshape(wanted)
        if end.size == math.prod(wanted)
        else end.reshape(*end.shape, *ones)
        for end in (low, high)
    ]
    return jnp.broadcast_to(ends[0], wanted), jnp.broadcast_to(ends[1], wanted)


def observed(
    view: jax.Array, spec: QuantSpec, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """The range that `spec.clipping` finds for every block, `[*batch, *num_blocks]`; NaN where nothing is finite."""
    assert not isinstance(spec.clipping, str)
    real = jnp.ones(view.shape[view.ndim - len(geometry.block_shape) :], bool)

    def rows(
        x: jax.Array,
    ) -> jax.Array:  # [*batch, *num_blocks in view order, numbers of a block]
        blocks = geometry.to_blocks(geometry.pad(x))
        inner = len(geometry.block_axes)
        blocks = jnp.moveaxis(blocks, geometry.block_axes, range(-inner, 0))
        return blocks.reshape(*blocks.shape[: blocks.ndim - inner], -1)

    x, where = rows(view.astype(jnp.float32)), rows(real)
    observer = dataclasses.replace(spec.clipping, axis=tuple(range(x.ndim - 1)))
    symmetric = spec.symmetric and spec.offset is None
    mask = jnp.broadcast_to(where, x.shape)
    ends = observer.bounds_of(
        x, spec.fmt, symmetric=symmetric, where=mask, on_nonfinite="ignore"
    )
    k = geometry.k_position - len(geometry.block_shape)
    return jnp.moveaxis(ends[0], k, -1), jnp.moveaxis(ends[1], k, -1)


def inside_range(x: jax.Array, qt: QTensor) -> jax.Array:
    """Where rounding alone moves a number of `x` in `quantize(x)`, and no clipping: bool, of the shape of `x`.

    Args:
      x: floats.
      qt: `x` quantized, by the format's own numbers (no `codebook`).
    """
    geometry = qt.meta.geometry
    y = geometry.to_blocks(geometry.pad(geometry.to_view(x))).astype(jnp.float32)
    if qt.offset is not None:
        y = y - geometry.scale_to_blocks(_scales.load_from_dtype(qt.offset))
    y = _scales.divide(y, geometry.scale_to_blocks(scale_values(qt)))
    if qt.zero_point is not None:
        y = y + geometry.scale_to_blocks(qt.zero_point.astype(jnp.float32))
    low, high = _reach(qt.spec)
    return geometry.from_view(
        geometry.unpad(geometry.from_blocks((low <= y) & (y <= high)))
    )


def with_margin(
    low: jax.Array, high: jax.Array, spec: QuantSpec | None
) -> tuple[jax.Array, jax.Array]:
    """Given bounds, wider by half a step at the edge: within them, rounding is the only error."""
    assert spec is not None
    values = spec.fmt.values()
    share = float((values[-1] - values[-2]) / (values[-1] - values[0])) / 2
    margin = (high - low) * np.float32(share)
    return low - margin, high + margin


def _reach(spec: QuantSpec) -> tuple[float, float]:
    """The range in which rounding is the only error: half a step beyond the outermost numbers."""
    values = spec.fmt.values()
    if (
        spec.symmetric
        and spec.fmt.kind == "integer"
        and not spec.rule.signed
        and spec.offset is None
    ):
        values = values[values >= -spec.fmt.max]
    return float(values[0] - (values[1] - values[0]) / 2), float(
        values[-1] + (values[-1] - values[-2]) / 2
    )
