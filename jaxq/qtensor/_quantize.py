"""quantize: from floats to a QTensor.

`quantize` checks its arguments. `quantize_array` is the computation, a compiled
function of arrays and static descriptions. `encode` turns numbers that were divided by
their scale into codes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.processes import to_numpy
from jaxq.qtensor import _scales
from jaxq.qtensor._bounds import as_bounds, observed
from jaxq.qtensor._dequantize import stored_values
from jaxq.qtensor._extremes import Extremes, block_extremes
from jaxq.qtensor._geometry import ErrorContext, Geometry, describe, resolve
from jaxq.qtensor._inputs import (
    FLOATS,
    ON_NONFINITE,
    check_input,
    check_key,
    is_traced,
    raise_if_not_finite,
)
from jaxq.qtensor._mesh_axes import quantized_like
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._presets import as_spec
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._quotient import divide, divide_for_rounding
from jaxq.qtensor._spec import QuantSpec

# A scale dtype that reaches this number can store the scales of every float32 array.
_WIDE = 1e30


def quantize(
    w: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    contracting: tuple[int, ...] | int | None = None,
    batch: tuple[int, ...] | int = (),
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    bounds: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    name: str | None = None,
) -> QTensor:
    """Quantizes an array: `codes = round(w / scale) + zero_point`.

    Codes are clipped to the range of the format.

    Stochastic rounding uses `key`. A spec has several levels if its scale is a
    `QuantSpec` too. If one level rounds stochastically, this level uses `key` itself.
    If several levels round stochastically, `jax.random.split(key, num_levels)` gives
    each of these levels a key, the outermost level first. A scale that is rounded
    stochastically is an unbiased estimate of the scale before rounding. The exception
    is a very small scale, because a scale that is not 0 never becomes 0.

    Args:
      w: float32, bfloat16 or float16 array with at least one axis.
      spec: preset name (`jaxq.presets()`) or `QuantSpec`.
      contracting: axes that a matmul with `w` contracts. Groups run along these axes,
        and scales are shared along them. None uses the axis of the granularity. If the
        granularity has no axis, None uses -1 for `PerToken`, -2 for a matrix (Flax
        kernels are `[in, out]`) and the only axis of a 1-D array.
      batch: leading axes that share no scales, for example stacked layers or experts.
      key: PRNG key. Needed if `spec.needs_key`, not allowed otherwise.
      on_nonfinite: what to do with NaN and infinities.
        "raise" raises ValueError with the index of the first one. Under jit no error
        can be raised, so "raise" then means "propagate".
        "propagate" makes the whole block NaN, because its scale becomes NaN. If the
        scale is quantized and its format has no NaN, as in nf4_dq and vsq4, all blocks
        that share the scale of this scale become NaN.
        "zero" replaces NaN and infinities by 0.
        "saturate" replaces NaN by 0. It replaces an infinity by the largest finite
        magnitude of its block, with the sign of the infinity.
      bounds: (low, high), the range to quantize, in place of the extremes of each
        block. `jaxq.observers` compute such ranges. Numbers outside are clipped. Each
        bound is one number, one for each batch element (float `[*batch]`), or one for
        each scale (float `[*batch, *num_blocks]`). A symmetric spec uses the larger
        magnitude of the two bounds, and `scale_rule="signed_extreme"` becomes "absmax".
      name: the name of the array in error messages, for example the path of a
        parameter. None uses "w".

    Returns:
      A QTensor with the shape and dtype of `w`. It is bitwise the same under jit and
      outside jit. If `w` is sharded over a mesh, codes and scales are sharded over the
      same mesh axes wherever these divide their sizes. Under jit this needs mesh axes
      of type Explicit. Over Auto axes XLA then chooses the sharding.

    Warns:
      UserWarning: scales are outside the range of the narrow dtype in which they are
        stored (float16, float8); or scales that are quantized themselves are so small
        beside the largest one that they are stored with an error of 100 % or more. The
        numbers of such blocks are lost. There is no warning under jit.

    Raises:
      TypeError: `w` is not a float32, bfloat16 or float16 array, or the call is under
        `jax.grad`. Rounding has no gradient; use `fake_quant`.
      ValueError: the preset is unknown; `contracting` or `batch` name axes that do not
        exist, repeat, or contradict the granularity; `contracting` is None and has no
        default; a group or tile size does not divide its axis and `pad` is False; the
        format has no negative numbers and the spec is symmetric without an offset;
        `on_nonfinite` is unknown, or is "raise" and a number is not finite; the bounds
        have another shape, are not ordered, or do not apply to the scale rule or the
        offset; the spec needs a key and `key` is None; or the spec needs no key and
        `key` is given.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(4), "int8")
      >>> qt.codes().dtype.name, qt.shape, float(jaxq.dequantize(qt)[0, 0])
      ('int8', (4, 4), 1.0)

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 2.
    """
    spec = as_spec(spec, "quantize")
    if bounds is not None:
        spec = spec.with_absmax()
    label = name or "w"
    x, geometry = check_input(
        w, spec, contracting, batch, caller="quantize", name=label
    )
    formats.check_choice("quantize: on_nonfinite", on_nonfinite, ON_NONFINITE)
    if on_nonfinite == "raise" and not is_traced(x):
        raise_if_not_finite(x, label, "quantize")
    check_key(spec.levels, key, "quantize")
    block_bounds = None if bounds is None else as_bounds(bounds, x, spec, geometry)

    def compute(x: jax.Array, key: jax.Array | None, bounds: Any) -> tuple:
        return _quantize_and_count(x, spec, geometry, key, on_nonfinite, bounds)

    qt, num_too_small = quantized_like(compute, without_gradient(x), key, block_bounds)
    _warn_of_clamped_scales(qt, label)
    _warn_of_small_scales(qt, num_too_small, label)
    if name is None:
        return qt
    return dataclasses.replace(qt, meta=dataclasses.replace(qt.meta, name=name))


def quantize_array(
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    key: jax.Array | None,
    *,
    bounds: tuple[jax.Array, jax.Array] | None = None,
    keep_nonzero: bool = False,
) -> QTensor:
    """The computation of `quantize`, without checks. NaN and infinities propagate.

    Args:
      x: float32, bfloat16 or float16 array.
      spec: how to quantize. Unlike in `quantize`, the format may lack negative numbers.
        Negative numbers are then clipped.
      geometry: the geometry of `x`.
      key: PRNG key if `spec.needs_key`, else None.
      bounds: (low, high), float32 `[*batch, *num_blocks]`, or None.
      keep_nonzero: True if a number that is not 0 must not become 0. It becomes the
        smallest number of its sign instead.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("udynamic8", jaxq.PerTensor())
      >>> x = jnp.array([1.0, 1e-12, 0.0])
      >>> geometry = jaxq.quantize(x, "int8").meta.geometry
      >>> qt = jaxq.qtensor.quantize_array(x, spec, geometry, None, keep_nonzero=True)
      >>> (jaxq.dequantize(qt) > 0).tolist()
      [True, True, False]
    """
    qt, _ = _quantize_and_count(
        x, spec, geometry, key, "propagate", bounds, keep_nonzero=keep_nonzero
    )
    return qt


def store_scale(
    scale: jax.Array, spec: QuantSpec, geometry: Geometry
) -> jax.Array | QTensor:
    """Scales as a spec stores them: in a dtype, or quantized.

    Args:
      scale: float32 `[*batch, *num_blocks]`.
      spec: the spec of the array that has these scales. Its scales are not rounded
        stochastically.
      geometry: the geometry of this array.

    Returns:
      The `scale` of the array's QTensor.
    """
    no_keys = (None,) * len(spec.levels)
    return _store_scale(scale, spec, geometry, no_keys[1:])[0]


@functools.partial(
    jax.jit, static_argnames=("spec", "geometry", "on_nonfinite", "keep_nonzero")
)
def _quantize_and_count(
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    key: jax.Array | None,
    on_nonfinite: str,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    keep_nonzero: bool = False,
) -> tuple[QTensor, jax.Array | None]:
    """The quantized array, and how many of its scales are too small to be quantized.

    Args:
      x: float32, bfloat16 or float16 array.
      spec: how to quantize.
      geometry: the geometry of `x`.
      key: PRNG key if `spec.needs_key`, else None.
      on_nonfinite: as in `quantize`; "raise" acts as "propagate".
      bounds: (low, high), float32 `[*batch, *num_blocks]`, or None.
      keep_nonzero: as in `quantize_array`.

    Returns:
      The QTensor, and an int32 scalar; None if no scale is quantized.
    """
    signs_of_infinities = None
    if on_nonfinite == "saturate":
        signs_of_infinities = jnp.where(jnp.isinf(x), jnp.sign(x), 0)
    if on_nonfinite in ("zero", "saturate"):
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
    return _quantize_level(
        x,
        spec,
        geometry,
        _keys_of_levels(spec, key),
        bounds=bounds,
        signs_of_infinities=signs_of_infinities,
        keep_nonzero=keep_nonzero,
    )


def _keys_of_levels(
    spec: QuantSpec, key: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """The key of each level of the spec, None for levels that do not need one."""
    is_stochastic = [level.rounding == "stochastic" for level in spec.levels]
    num_keys = sum(is_stochastic)
    if num_keys == 0 or key is None:
        return (None,) * len(is_stochastic)
    # A single stochastic level uses the key itself, so its random numbers do not depend
    # on how its scale is stored.
    keys = iter([key] if num_keys == 1 else jax.random.split(key, num_keys))
    return tuple(next(keys) if stochastic else None for stochastic in is_stochastic)


def _quantize_level(
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    keys: tuple[jax.Array | None, ...],
    *,
    bounds: tuple[jax.Array, jax.Array] | None = None,
    signs_of_infinities: jax.Array | None = None,
    keep_nonzero: bool = False,
) -> tuple[QTensor, jax.Array | None]:
    """Quantizes an array by the outermost level of `spec`, and its scale by the next.

    Args:
      x: float array, without infinities if `signs_of_infinities` is given.
      spec: how to quantize.
      geometry: the geometry of `x`.
      keys: one key or None for each level of `spec`.
      bounds: (low, high), float32 `[*batch, *num_blocks]`, or None.
      signs_of_infinities: array like `x` with the sign of each infinity, 0 elsewhere.
      keep_nonzero: True if `x` holds scales or second moments. A number that is not 0
        must not become 0. If the format has a NaN, a NaN in `x` must not change the
        scale of its block.

    Returns:
      As `_quantize_and_count`.
    """
    view = geometry.to_view(x)
    mean = None
    if spec.offset == "mean":
        mean = _batch_mean(view, geometry)
        view = view.astype(jnp.float32) - mean
    if bounds is None and not isinstance(spec.clipping, str):
        bounds = observed(view, spec, geometry)
    blocks = padded_blocks(view, spec, geometry)  # [*batch, n, size, ...]
    if signs_of_infinities is not None:
        blocks = _saturate(blocks, signs_of_infinities, geometry)

    measured = blocks
    if keep_nonzero and _has_nan(spec.fmt):
        measured = jnp.where(jnp.isnan(blocks), np.float32(0), blocks)
    extremes = block_extremes(measured, geometry)
    if bounds is not None:
        low, high = (geometry.scale_to_blocks(bound) for bound in bounds)
        extremes = extremes.with_range(low, high)
    offset = mean
    if spec.offset == "min":
        offset = _store_minimum(extremes, spec, geometry)
        # The steps begin at the stored offset, which may be below the minimum.
        minimum = geometry.scale_to_blocks(_scales.load_from_dtype(offset))
        extremes = extremes.with_range(minimum, extremes.high)
        blocks = blocks.astype(jnp.float32) - minimum
    ideal_scale = _scales.ideal_scale(measured, extremes, spec, geometry)
    scale, num_too_small = _store_scale(
        geometry.scale_from_blocks(ideal_scale), spec, geometry, keys[1:]
    )
    block_scale = ideal_scale
    if spec.codes_from == "stored":
        block_scale = geometry.scale_to_blocks(stored_values(scale))
    y = divide_for_rounding(blocks, block_scale, spec.rounding)
    codebook = None
    if spec.rule.has_threshold:
        signs = spec.rule.signs(blocks, extremes, geometry)
        if spec.rule.codebook is not None:
            codebook = spec.rule.codebook(y, signs, geometry)
        y = jnp.where(jnp.isnan(block_scale), block_scale, signs)
    if keep_nonzero:
        sign = jnp.sign(blocks) * jnp.where(block_scale < 0, -1.0, 1.0)
        magnitude = jnp.maximum(jnp.abs(y), spec.fmt.smallest_positive)
        y = jnp.where(sign != 0, sign * magnitude, y)

    zero = zero_point = None
    if not spec.symmetric:
        zero = _zero_point(extremes, block_scale, spec.fmt)
        zero_point = geometry.scale_from_blocks(zero.astype(spec.fmt.code_dtype))
    codes = geometry.from_blocks(encode(y, zero, spec, keys[0]))
    meta = Meta(spec, geometry, spec.order, x.dtype.name)
    data = _pack(codes, meta)
    return QTensor(data, scale, zero_point, offset, codebook, meta), num_too_small


def _batch_mean(view: jax.Array, geometry: Geometry) -> jax.Array:
    """The mean of each batch element, float32 `[*batch, 1, ..., 1]`.

    A difference of a number from the result never overflows. If a difference from the
    exact mean would overflow, the result is another number: the nearest number to the
    mean for which no difference overflows.
    """
    num_axes = len(geometry.block_shape)
    batch = view.shape[: view.ndim - num_axes]
    size = math.prod(view.shape[view.ndim - num_axes :])
    x = view.astype(jnp.float32).reshape(*batch, size)
    largest = jnp.finfo(jnp.float32).max
    low, high = jnp.min(x, axis=-1, initial=0), jnp.max(x, axis=-1, initial=0)
    mean = _scales.mean(x)
    nearest = jnp.clip(mean, high - largest, low + largest)
    # A mean that is not finite stays as it is, to reach all numbers of its element.
    mean = jnp.where(jnp.isfinite(mean), nearest, mean)
    return mean.reshape(*batch, *(1,) * num_axes)


def padded_blocks(view: jax.Array, spec: QuantSpec, geometry: Geometry) -> jax.Array:
    """A view, padded to whole blocks and cut into them."""
    # Padding zeros do not change the largest magnitude of a block. But they would be
    # the minimum of a block of positive numbers. So offset="min" repeats the edge.
    mode = "edge" if spec.offset == "min" else "constant"
    return geometry.to_blocks(geometry.pad(view, mode=mode))


def _saturate(
    blocks: jax.Array, signs_of_infinities: jax.Array, geometry: Geometry
) -> jax.Array:
    """Replaces infinities by the largest finite magnitude of their block; float32."""
    largest = block_extremes(blocks, geometry).magnitude
    signs = geometry.to_blocks(geometry.pad(geometry.to_view(signs_of_infinities)))
    replacement = signs.astype(jnp.float32) * largest
    return jnp.where(signs != 0, replacement, blocks.astype(jnp.float32))


def _has_nan(fmt: formats.Format) -> bool:
    if not isinstance(fmt, formats.ExponentFormat | formats.FloatFormat):
        return False
    return getattr(fmt, "flavour", "") != "finite"


def _store_scale(
    scale: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    keys: tuple[jax.Array | None, ...],
) -> tuple[jax.Array | QTensor, jax.Array | None]:
    """The scale as it is stored: in a dtype, or quantized by `spec.scale`.

    Args:
      scale: float32 `[*batch, *num_blocks]`.
      spec: the spec of the array that has this scale.
      geometry: the geometry of this array.
      keys: one key or None for each level of `spec` below the first.

    Returns:
      The scale; and how many scales are too small to be quantized, None if the scale is
      stored in a dtype.
    """
    if not isinstance(spec.scale, QuantSpec):
        return _scales.store_in_dtype(scale, spec.scale), None
    array = describe("float32", geometry.num_blocks)
    scale_geometry = resolve(
        geometry.num_blocks,
        spec.scale.granularity,
        (-1,),  # the axis of the blocks along the contraction
        (),
        context=ErrorContext("quantize", "scale", array),
        multiple=formats.codes_per_pack(spec.scale.fmt.bits, spec.scale.order),
    )
    # With a mean as offset, codes are differences from the mean, and 0 is allowed.
    keep_nonzero = spec.scale.offset is None
    qt, num_too_small = _quantize_level(
        scale, spec.scale, scale_geometry, keys, keep_nonzero=keep_nonzero
    )
    # The numbers of a block use less than half of the format if the stored scale is
    # more than twice the ideal one. A scale of the other sign changes their signs.
    magnitude, stored = jnp.abs(scale), jnp.sign(scale) * stored_values(qt)
    too_small = (scale != 0) & ((stored > 2 * magnitude) | (stored <= 0))
    total = jnp.sum(too_small, dtype=jnp.int32)
    return qt, total if num_too_small is None else total + num_too_small


def _store_minimum(
    extremes: Extremes, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    """The minimum of each block as it is stored, rounded down.

    It has the dtype of the scale if that dtype has at least 16 bits, else float32. The
    range of float8 is too small for the minimum.
    """
    dtype = "float32"
    if isinstance(spec.scale, str) and spec.scale in FLOATS:
        dtype = spec.scale
    low = geometry.scale_from_blocks(extremes.low)
    return _scales.store_below(low, dtype)


def _zero_point(
    extremes: Extremes, block_scale: jax.Array, fmt: formats.Format
) -> jax.Array:
    """The code of 0 in every block, as float32."""
    low = jnp.minimum(extremes.low, 0.0)
    zero = np.float32(fmt.min) - jnp.round(divide(low, block_scale))
    zero = jnp.clip(zero, fmt.min, fmt.max)
    return jnp.where(jnp.isnan(zero), 0.0, zero)


def encode(
    y: jax.Array, zero: jax.Array | None, spec: QuantSpec, key: jax.Array | None
) -> jax.Array:
    """The codes of numbers that were divided by their scale.

    Args:
      y: float32 numbers divided by their scale, any shape.
      zero: the zero point, float32, broadcastable to `y`; None for symmetric specs.
      spec: the spec of the codes.
      key: PRNG key for `rounding="stochastic"`, else None.
    """
    fmt = spec.fmt
    if zero is not None:
        codes = formats.round_to_integer(y, spec.rounding, key) + zero
        codes = jnp.clip(codes, fmt.min, fmt.max)
        return jnp.where(jnp.isnan(codes), 0.0, codes).astype(fmt.code_dtype)
    has_extra_negative = fmt.kind == "integer" and fmt.min < -fmt.max
    if has_extra_negative and not spec.rule.signed:
        # A symmetric spec uses the narrow range. A rounded scale may be too small for
        # the block, so this clips to the narrow range.
        y = jnp.maximum(y, -fmt.max)
    return fmt.encode(y, rounding=spec.rounding, key=key)


def _pack(codes: jax.Array, meta: Meta) -> jax.Array:
    """Stored data `[*batch, *kept, K]` of codes in view order, padded to blocks."""
    geometry = meta.geometry
    codes = geometry.unpad(codes, meta.stored_sizes)
    k_axis = geometry.k_position - len(geometry.block_shape)
    # Codes are packed first, so that the transpose moves fewer bytes.
    packed = formats.pack(
        codes, meta.spec.fmt.bits, meta.packing, unit=meta.pack_unit, axis=k_axis
    )
    return geometry.to_storage(packed)


def _warn_of_clamped_scales(qt: QTensor, name: str) -> None:
    """Warns if scales were clamped to the range of the dtype that stores them."""
    scale = qt.scale
    while isinstance(scale, QTensor):
        scale = scale.scale
    fmt = formats.get(scale.dtype.name)
    if is_traced(scale) or fmt.max > _WIDE:
        return
    magnitude = np.abs(to_numpy(scale).astype(np.float32))
    too_large = magnitude >= fmt.max
    too_small = (magnitude > 0) & (magnitude <= fmt.smallest_positive)
    num_clamped = int(np.sum(too_large | too_small))
    if num_clamped:
        warnings.warn(
            f"quantize: {num_clamped} of {magnitude.size} scales of {name} are outside "
            f"the range of {scale.dtype.name}, {fmt.smallest_positive:g} to "
            f"{fmt.max:g}. Numbers of their blocks are clipped or lost. Use "
            "scale='bfloat16' or 'float32', or a scale that is a QuantSpec.",
            stacklevel=3,
        )


def _warn_of_small_scales(qt: QTensor, num: jax.Array | None, name: str) -> None:
    """Warns if scales are too small to be quantized."""
    if num is None or is_traced(num) or not int(num):
        return
    assert isinstance(qt.scale, QTensor)
    scale = qt.spec.scale
    assert isinstance(scale, QuantSpec)
    warnings.warn(
        f"quantize: {int(num)} of {math.prod(qt.scale.shape)} scales of {name} are too "
        f"small beside the largest one: {scale.fmt.name} stores them with an error of "
        "100 % or more. Numbers of their blocks are lost. Use scale='bfloat16' or "
        "'float32', or a finer granularity in scale=.",
        stacklevel=3,
    )


@jax.custom_jvp
def without_gradient(x: jax.Array) -> jax.Array:
    """`x`, with a derivative that raises TypeError."""
    return x


@functools.partial(without_gradient.defjvp, symbolic_zeros=True)
def _refuse_gradient(primals, tangents):
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise TypeError(
            "quantize has no gradient: rounding is flat almost everywhere. For "
            "quantization-aware training use jaxq.fake_quant, whose gradient passes "
            "straight through. To keep w constant use jax.lax.stop_gradient."
        )
    return primals[0], tangents[0]
