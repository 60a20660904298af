"""Ranges of blocks that the caller passes or an observer computes, and clipping.

A range is a pair (low, high), float32 `[*batch, *num_blocks]`.
"""

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
from jaxq.qtensor._quotient import divide
from jaxq.qtensor._spec import QuantSpec


def as_bounds(
    bounds: Any,
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    *,
    caller: str = "quantize",
) -> tuple[jax.Array, jax.Array]:
    """The `bounds=` of `quantize` as float32 arrays `[*batch, *num_blocks]`.

    Args:
      bounds: (low, high). Each bound is one number, `[*batch]`, or has one number for
        each scale.
      x: the array to quantize.
      spec: how `x` will be quantized.
      geometry: the geometry of `x`.
      caller: the name of the public function, for errors.

    Raises:
      ValueError: the scale rule or the offset of the spec needs more than a range; a
        bound has another shape; or a low bound is NaN or larger than its high bound.
    """
    if spec.rule.reads_block or spec.offset == "mean":
        raise ValueError(
            f"{caller}: bounds= gives a range, but scale_rule={spec.scale_rule!r} and "
            f"offset={spec.offset!r} do not use a range. Leave out bounds=."
        )
    batch = x.shape[: x.ndim - len(geometry.shape)]
    shape = (*batch, *geometry.num_blocks)
    low, high = (jnp.asarray(bound, jnp.float32) for bound in bounds)
    for bound in (low, high):
        if bound.shape not in ((), batch) and bound.size != math.prod(shape):
            raise ValueError(
                f"{caller}: bounds= has shape {list(bound.shape)}; expected one "
                f"number, or one for each scale, {list(shape)}."
            )
    if not isinstance(low, Tracer) and not isinstance(high, Tracer):
        # Both are concrete, but a function around this call may be traced.
        with jax.ensure_compile_time_eval():
            ordered = bool(jnp.all(low <= high))
        if not ordered:
            raise ValueError(
                f"{caller}: bounds= must be (low, high) with low <= high, and no NaN."
            )
    return _bound_per_scale(low, shape), _bound_per_scale(high, shape)


def _bound_per_scale(bound: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A bound of any allowed shape as `[*batch, *num_blocks]`."""
    if bound.size == math.prod(shape):
        return bound.reshape(shape)
    missing = len(shape) - bound.ndim if bound.ndim else 0
    return jnp.broadcast_to(bound.reshape(*bound.shape, *(1,) * missing), shape)


def observed(
    view: jax.Array, spec: QuantSpec, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """The range that the observer `spec.clipping` computes for every block.

    Args:
      view: the array in view order, without padding.
      spec: a spec whose `clipping` is an observer.
      geometry: the geometry of the array.

    Returns:
      (low, high), float32 `[*batch, *num_blocks]`. Both are NaN for a block without
      finite numbers.
    """
    assert not isinstance(spec.clipping, str)
    not_padding = jnp.ones(view.shape[view.ndim - len(geometry.block_shape) :], bool)
    x = _block_rows(view.astype(jnp.float32), geometry)
    mask = jnp.broadcast_to(_block_rows(not_padding, geometry), x.shape)
    observer = dataclasses.replace(spec.clipping, axis=tuple(range(x.ndim - 1)))
    low, high = observer.bounds_of(
        x,
        spec.fmt,
        **range_options(spec),
        where=mask,
        on_nonfinite="ignore",
    )
    # From view order to storage order.
    k_axis = geometry.k_position - len(geometry.block_shape)
    return jnp.moveaxis(low, k_axis, -1), jnp.moveaxis(high, k_axis, -1)


def range_options(spec: QuantSpec) -> dict[str, bool]:
    """The arguments `symmetric` and `include_zero` of `Observer.bounds` for a spec.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.range_options(jaxq.QuantSpec("uint4", offset="min"))
      {'symmetric': False, 'include_zero': False}
    """
    has_offset = spec.offset == "min"
    return {
        "symmetric": spec.symmetric and not has_offset,
        "include_zero": not has_offset,
    }


def _block_rows(view: jax.Array, geometry: Geometry) -> jax.Array:
    """The numbers of each block as one row: `[*batch, *num_blocks, size of a block]`.

    The blocks are in view order.
    """
    blocks = geometry.to_blocks(geometry.pad(view))
    inner = len(geometry.block_axes)
    blocks = jnp.moveaxis(blocks, geometry.block_axes, range(-inner, 0))
    return blocks.reshape(*blocks.shape[: blocks.ndim - inner], -1)


def inside_range(x: jax.Array, qt: QTensor) -> jax.Array:
    """True for the numbers that `quantize(x)` rounds and does not clip.

    Args:
      x: float array.
      qt: `quantize(x)`. `qt.codebook` must be None.

    Returns:
      bool array of the shape of `x`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.array([0.5, 3.0])
      >>> qt = jaxq.quantize(x, "int8", bounds=(-1.0, 1.0))
      >>> jaxq.qtensor.inside_range(x, qt).tolist()
      [True, False]
    """
    low, high = _rounding_range(qt.spec)
    return inside_ends(x, qt, (low, high))


def between_format_ends(x: jax.Array, qt: QTensor) -> jax.Array:
    """True for numbers between the smallest and the largest number of the format.

    The ends are excluded, as in LSQ (Esser et al., 2020, equation 3).

    Args:
      x: float array.
      qt: a QTensor of the shape of `x`, without a codebook.

    Returns:
      bool array of the shape of `x`.
    """
    values = _used_values(qt.spec)
    ends = float(values[0]), float(values[-1])
    return inside_ends(x, qt, ends, with_ends=False)


def inside_ends(
    x: jax.Array, qt: QTensor, ends: tuple[Any, Any], *, with_ends: bool = True
) -> jax.Array:
    """True for the numbers between two ends.

    Args:
      x: float array.
      qt: a QTensor of the shape of `x`. Its scales, zero points and offsets apply.
      ends: (low, high) in units of the scale, with the zero point added. Each is a
        number or `[*batch, *num_blocks]`.
      with_ends: True if the ends themselves are inside.

    Returns:
      bool array of the shape of `x`.
    """
    geometry = qt.meta.geometry
    view = geometry.to_view(x)
    if qt.input_scale is not None:
        scale = geometry.contracted_to_view(qt.input_scale)
        view = view.astype(jnp.float32) / scale
    y = geometry.to_blocks(geometry.pad(view)).astype(jnp.float32)
    if qt.offset is not None:
        y = y - geometry.scale_to_blocks(_scales.load_from_dtype(qt.offset))
    y = divide(y, geometry.scale_to_blocks(scale_values(qt)))
    if qt.zero_point is not None:
        y = y + geometry.scale_to_blocks(qt.zero_point.astype(jnp.float32))
    low, high = (
        geometry.scale_to_blocks(end) if isinstance(end, jax.Array) else end
        for end in ends
    )
    inside = (low <= y) & (y <= high) if with_ends else (low < y) & (y < high)
    return geometry.from_view(geometry.unpad(geometry.from_blocks(inside)))


def with_margin(
    low: jax.Array, high: jax.Array, spec: QuantSpec | None
) -> tuple[jax.Array, jax.Array]:
    """Extends a range on both sides by half a step.

    The step is the distance between the two largest values of the format, multiplied by
    the scale that maps the format to the range.

    Numbers inside the extended range are rounded and not clipped.

    Args:
      low: lower bounds, float32, any shape.
      high: upper bounds, of the same shape.
      spec: the spec that quantizes by this range, not None.

    Returns:
      The extended (low, high).

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> low, high = jnp.float32(0.0), jnp.float32(15.0)
      >>> ends = jaxq.qtensor.with_margin(low, high, jaxq.presets()["uint4"])
      >>> [float(end) for end in ends]
      [-0.5, 15.5]
    """
    assert spec is not None
    values = spec.fmt.values()
    share = float((values[-1] - values[-2]) / (values[-1] - values[0])) / 2
    margin = (high - low) * np.float32(share)
    return low - margin, high + margin


def _rounding_range(spec: QuantSpec) -> tuple[float, float]:
    """The range, in units of the scale, in which rounding is the only error.

    It ends half a step beyond the smallest and the largest number of the format.
    """
    values = _used_values(spec)
    low = values[0] - (values[1] - values[0]) / 2
    high = values[-1] + (values[-1] - values[-2]) / 2
    return float(low), float(high)


def _used_values(spec: QuantSpec) -> np.ndarray:
    """The values of the format that codes of the spec can have, in ascending order."""
    values = spec.fmt.values()
    is_narrow = spec.fmt.kind == "integer" and spec.symmetric and spec.offset is None
    if is_narrow and not spec.rule.signed:
        return values[values >= -spec.fmt.max]
    return values
