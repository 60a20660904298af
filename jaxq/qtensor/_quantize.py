"""quantize, requantize, fake_quant: from floats to QTensors."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq import formats
from jaxq.qtensor import _scales
from jaxq.qtensor._bounds import as_bounds, inside_range, observed
from jaxq.qtensor._dequantize import dequantize, scale_values, stored_values
from jaxq.qtensor._extremes import Extremes, block_extremes
from jaxq.qtensor._geometry import Geometry, describe, resolve
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._presets import as_spec
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._spec import QuantSpec

ON_NONFINITE = ("raise", "propagate", "zero", "saturate")
_FLOATS = ("float32", "bfloat16", "float16")
# No float32 array has blocks whose scales a dtype that reaches this cannot hold.
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
    """Codes and scales of `w`: `codes = round(w / scale) + zero_point`, clipped to the format's range.

    Args:
      w: float32, bfloat16 or float16 array of at least one axis.
      spec: preset name (`jaxq.presets()`) or `QuantSpec`.
      contracting: axes a matmul with `w` will contract; groups run along them, scales are shared along them.
        Default: -2 of a matrix (Flax kernels are `[in, out]`), the only axis of a row.
      batch: leading axes with statistics of their own: stacked layers, experts.
      key: PRNG key, for `rounding="stochastic"`.
      on_nonfinite: what NaN and infinities do. "raise" names the first one's index; under jit, where no error can be
        raised, it means "propagate": the scale of their block becomes NaN, and so does the block. (A quantized scale
        whose format has no NaN, as in nf4_dq and vsq4, passes it on to its own scale, and so to all blocks under
        that.) "zero" replaces them by 0; "saturate" replaces infinities by the largest finite magnitude of their
        block and NaN by 0.
      bounds: (low, high), the range to quantize instead of each block's extremes, as `jaxq.observers` find it; numbers
        beyond are clipped. Floats, a number each, or one for each scale, `[*batch, *num_blocks]`. A symmetric spec
        takes the larger magnitude.
      name: what errors call the array, a parameter's path for example; None calls it w.

    Returns:
      A QTensor with the shape and dtype of `w`. Bitwise the same eager and jitted.

    Warns:
      UserWarning: scales beyond the range of the narrow dtype they are kept in (float16, float8), not under jit.

    Raises:
      TypeError: `w` is not a float array; the message names the cast.
      ValueError: unknown preset; axes that do not fit; a group size that does not divide; a non-finite number.
      TypeError: under `jax.grad`: rounding has no gradient. Use `fake_quant`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(4), "int8")
      >>> qt.codes().dtype.name, qt.shape, float(jaxq.dequantize(qt)[0, 0])
      ('int8', (4, 4), 1.0)

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
      2018, section 2.
    """
    spec = as_spec(spec, "quantize")
    x, geometry = _prepare(
        w, spec, contracting, batch, on_nonfinite, name or "w", "quantize"
    )
    formats.check_rounding(spec.rounding, key)
    given = None if bounds is None else as_bounds(bounds, x, spec, geometry)
    qt = _quantize(_no_gradient(x), spec, geometry, key, on_nonfinite, bounds=given)
    _warn_of_lost_range(qt, name or "w")
    return (
        qt
        if name is None
        else dataclasses.replace(qt, meta=dataclasses.replace(qt.meta, name=name))
    )


def _warn_of_lost_range(qt: QTensor, name: str) -> None:
    """Warns where scales were clamped into their dtype: numbers of their blocks are clipped, or become 0."""
    scale = qt.scale
    while isinstance(scale, QTensor):
        scale = scale.scale
    fmt = formats.get(scale.dtype.name)
    if isinstance(scale, Tracer) or fmt.max > _WIDE:
        return
    magnitude = np.abs(np.asarray(scale).astype(np.float32))
    lost = int(
        np.sum(
            (magnitude >= fmt.max)
            | ((magnitude > 0) & (magnitude <= fmt.smallest_positive))
        )
    )
    if lost:
        warnings.warn(
            f"quantize: {lost} of {magnitude.size} scales of {name} lie beyond {scale.dtype.name}, which ends at "
            f"{fmt.smallest_positive:g} and {fmt.max:g}: numbers of their blocks are clipped or lost. "
            "Use scale='bfloat16' or 'float32', or a scale that is a QuantSpec.",
            stacklevel=3,
        )


def requantize(
    w: jax.typing.ArrayLike, like: QTensor, *, key: jax.Array | None = None
) -> QTensor:
    """Codes of `w` on the grid of `like`: its scales, zero points, offsets and codebooks stay as they are.

    Args:
      w: float array of the shape of `like`.
      like: the QTensor whose grid is taken.
      key: PRNG key, for a spec of `rounding="stochastic"`.

    Returns:
      A QTensor that differs from `like` in its codes. Of an array, `requantize(w, quantize(w, spec))` is
      `quantize(w, spec)` again, unless the spec has `codes_from="ideal"` or a ternary scale rule.

    Raises:
      TypeError: `like` is not a QTensor.
      ValueError: shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> grid = jaxq.quantize(jnp.array([1.27, 0.5]), "int8")
      >>> [round(v, 2) for v in jaxq.dequantize(jaxq.qtensor.requantize(jnp.array([0.024, 9.0]), grid)).tolist()]
      [0.02, 1.27]
    """
    if not isinstance(like, QTensor):
        raise TypeError(
            f"requantize: like must be a QTensor, got {type(like).__name__}."
        )
    x = jnp.asarray(w)
    if x.shape != like.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"requantize: w must be floats of shape {list(like.shape)}, got {describe(x.dtype.name, x.shape)}."
        )
    formats.check_rounding(like.spec.rounding, key)
    return _requantize(_no_gradient(x), like, key)


@jax.jit
def _requantize(x: jax.Array, like: QTensor, key: jax.Array | None) -> QTensor:
    spec, geometry = like.spec, like.meta.geometry
    view = geometry.to_view(x).astype(jnp.float32)
    if spec.offset == "mean":
        assert like.offset is not None
        view = view - like.offset
    blocks = geometry.to_blocks(
        geometry.pad(view, mode="edge" if spec.offset == "min" else "constant")
    )
    if spec.offset == "min":
        assert like.offset is not None
        blocks = blocks - geometry.scale_to_blocks(_scales.load_from_dtype(like.offset))
    steps = geometry.scale_to_blocks(scale_values(like))
    y = _scales.divide(blocks, steps)
    if like.codebook is not None:
        tables = [
            geometry.scale_to_blocks(like.codebook[..., i])
            for i in range(like.codebook.shape[-1])
        ]
        codes = _nearest(y, tables, spec.fmt)
    else:
        zero = (
            None
            if like.zero_point is None
            else geometry.scale_to_blocks(like.zero_point).astype(jnp.float32)
        )
        codes = _encode(y, zero, spec, key)
    return like.with_stored_codes(geometry.to_storage(geometry.from_blocks(codes)))


def _nearest(y: jax.Array, tables: list[jax.Array], fmt: formats.Format) -> jax.Array:
    """The code of the entry next to each number; of equally near ones the first."""
    best, found = jnp.abs(y - tables[0]), jnp.zeros(y.shape, jnp.int32)
    for i, entry in enumerate(tables[1:], 1):
        distance = jnp.abs(y - entry)
        found, best = jnp.where(distance < best, i, found), jnp.minimum(distance, best)
    return (found + int(fmt.codes().min())).astype(fmt.code_dtype)


def fake_quant(
    x: jax.typing.ArrayLike,
    spec: str | QuantSpec,
    *,
    contracting: tuple[int, ...] | int | None = None,
    batch: tuple[int, ...] | int = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """`dequantize(quantize(x))` with a straight-through gradient: 1 inside the format's range, 0 where it clips.

    A number is inside if rounding alone moves it, by at most half the step at the edge of the range; scales are
    treated as constants.

    Args:
      x: float32, bfloat16 or float16 array.
      spec: preset name or `QuantSpec`.
      contracting: as in `quantize`.
      batch: as in `quantize`.
      key: PRNG key, for `rounding="stochastic"`.

    Returns:
      Array of the shape and dtype of `x`, bit for bit `dequantize(quantize(x))`. Non-finite numbers make their block
      NaN.

    Raises:
      TypeError, ValueError: as `quantize`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> jax.grad(lambda x: jaxq.fake_quant(x, "int4").sum())(jnp.array([0.3, -0.7])).tolist()
      [1.0, 1.0]

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    spec = as_spec(spec, "fake_quant")
    x, geometry = _prepare(x, spec, contracting, batch, "propagate", "x", "fake_quant")
    formats.check_rounding(spec.rounding, key)
    return _fake_quant(x, key, spec, geometry)


def _prepare(
    w, spec: QuantSpec, contracting, batch, on_nonfinite: str, name: str, caller: str
):
    if isinstance(w, QTensor):
        raise TypeError(f"{caller}: {name} is a QTensor already: {w!r}.")
    dtype = np.dtype(getattr(w, "dtype", None) or np.asarray(w).dtype)
    if dtype.kind in "OSU":
        raise TypeError(
            f"{caller}: {name} must be one float array, got {type(w).__name__}."
        )
    if isinstance(w, float | list | tuple):
        dtype = (
            np.dtype(np.float32) if dtype == np.float64 else dtype
        )  # Python numbers have no width of their own
    what = f"{name}: {describe(dtype.name, np.shape(w))}"
    check_floats(dtype, np.shape(w), name, caller, listed=isinstance(w, list | tuple))
    formats.check_choice(f"{caller}: on_nonfinite", on_nonfinite, ON_NONFINITE)
    if spec.symmetric and spec.offset is None and spec.fmt.min >= 0:
        raise ValueError(
            f"{caller}: {spec.fmt.name} has no negative numbers, and a symmetric spec would clip them all. "
            "Use symmetric=False or offset='min'."
        )
    multiple = formats.codes_per_pack(spec.fmt.bits, spec.order)
    geometry = resolve(
        np.shape(w),
        spec.granularity,
        contracting,
        batch,
        caller=caller,
        what=what,
        multiple=multiple,
    )
    x = jnp.asarray(w, dtype)
    if on_nonfinite == "raise" and not isinstance(x, Tracer):
        raise_if_not_finite(x, name, caller)
    return x, geometry


def check_floats(
    dtype: Any, shape: tuple[int, ...], name: str, caller: str, *, listed: bool = False
) -> None:
    """Raises a TypeError with the remedy where an array is none that can be quantized; `listed`: it is a list."""
    dtype = np.dtype(dtype)
    if dtype.name in _FLOATS:
        return
    remedy = (
        f"Pass jnp.asarray({name}, jnp.float32)."
        if listed
        else f"Pass {name}.astype(jnp.float32)."
    )
    remedy = "Pass the real and imaginary parts." if dtype.kind == "c" else remedy
    what = f"{name}: {describe(dtype.name, shape)}"
    raise TypeError(
        f"{caller}: {name} must be float32, bfloat16 or float16, got {what}. {remedy}"
    )


def raise_if_not_finite(
    x: jax.Array,
    name: str,
    caller: str,
    remedy: str = "Clean the array, or pass on_nonfinite='zero', 'saturate' or 'propagate'.",
) -> None:
    """Raises a ValueError that names the first number of `x` that is NaN or infinite, and the remedy."""
    with (
        jax.ensure_compile_time_eval()
    ):  # a concrete array, though a function around it may be traced
        finite = np.asarray(jnp.isfinite(x))
    if finite.all():
        return
    index = tuple(
        int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape)
    )
    raise ValueError(
        f"{caller}: {name}[{', '.join(map(str, index))}] is {np.asarray(x)[index].astype(np.float32)}, one of "
        f"{int((~finite).sum())} non-finite numbers ({name}: {describe(x.dtype.name, x.shape)}). {remedy}"
    )


@functools.partial(
    jax.jit, static_argnames=("spec", "geometry", "on_nonfinite", "positive")
)
def _quantize(
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    key: jax.Array | None,
    on_nonfinite: str = "propagate",
    positive: bool = False,
    bounds: tuple[jax.Array, jax.Array] | None = None,
) -> QTensor:
    """`positive`: x holds scales, of which none that is not zero may become zero, nor a NaN take others along."""
    if on_nonfinite in ("zero", "saturate"):
        infinite, sign = jnp.isinf(x), jnp.sign(x)
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
    view = geometry.to_view(x)
    offset, centre = None, None
    if spec.offset == "mean":  # one number a batch element, [*batch, 1, ..., 1]
        axes = tuple(range(view.ndim - len(geometry.block_shape), view.ndim))
        offset = jnp.mean(view, axis=axes, keepdims=True, dtype=jnp.float32)
        view = view.astype(jnp.float32) - offset
    # Zeros in the padding change no magnitude, but would be the minimum of a block of positive numbers.
    blocks = geometry.to_blocks(
        geometry.pad(view, mode="edge" if spec.offset == "min" else "constant")
    )
    if bounds is None and not isinstance(spec.clipping, str):
        bounds = observed(view, spec, geometry)
    measured = blocks
    if positive and _holds_nan(spec.fmt):
        measured = jnp.where(jnp.isnan(blocks), np.float32(0), blocks)
    found = block_extremes(measured, geometry)
    if on_nonfinite == "saturate":
        marks = geometry.to_blocks(
            geometry.pad(geometry.to_view(jnp.where(infinite, sign, 0)))
        )
        blocks = jnp.where(
            marks != 0,
            marks.astype(jnp.float32) * found.magnitude,
            blocks.astype(jnp.float32),
        )
        measured, found = blocks, block_extremes(blocks, geometry)
    if bounds is not None:
        found = found.with_range(*(geometry.scale_to_blocks(end) for end in bounds))
    ideal_steps = _scales.ideal_scale(measured, found, spec, geometry)
    ideal = geometry.scale_from_blocks(ideal_steps)
    if isinstance(spec.scale, QuantSpec):
        stored: jax.Array | QTensor = _quantize_scale(ideal, spec.scale, geometry)
    else:
        stored = _scales.store_in_dtype(ideal, spec.scale)
    steps = (
        ideal_steps
        if spec.codes_from == "ideal"
        else geometry.scale_to_blocks(stored_values(stored))
    )
    if spec.offset == "min":
        dtype = (
            spec.scale
            if isinstance(spec.scale, str) and spec.scale in _FLOATS
            else "float32"
        )
        offset = _scales.store_in_dtype(
            geometry.scale_from_blocks(found.low), dtype, signed=True
        )
        centre = geometry.scale_to_blocks(_scales.load_from_dtype(offset))
    y = _scales.divide(
        blocks if centre is None else blocks.astype(jnp.float32) - centre, steps
    )
    codebook = None
    if spec.rule.has_threshold:
        signs = spec.rule.signs(blocks, found, geometry)
        if spec.rule.codebook is not None:
            codebook = spec.rule.codebook(y, signs, geometry)
        y = jnp.where(jnp.isnan(steps), steps, signs)
    if positive:
        y = jnp.where(blocks > 0, jnp.maximum(y, spec.fmt.smallest_positive), y)
    zero = None if spec.symmetric else _zero_point(found, steps, spec.fmt)
    codes = _encode(y, zero, spec, key)
    zero_point = (
        None
        if zero is None
        else geometry.scale_from_blocks(zero.astype(spec.fmt.code_dtype))
    )
    codes = geometry.from_blocks(codes)
    meta = Meta(spec, geometry, spec.order, x.dtype.name)
    k_axis = geometry.k_position - len(geometry.block_shape)
    # Packed first and moved into place as bytes: less to transpose.
    data = geometry.to_storage(
        formats.pack(codes, spec.fmt.bits, spec.order, unit=meta.pack_unit, axis=k_axis)
    )
    return QTensor(data, stored, zero_point, offset, codebook, meta)


def _quantize_scale(ideal: jax.Array, spec: QuantSpec, geometry: Geometry) -> QTensor:
    """Scales `[*batch, *num_blocks]`, quantized with K as their contracted axis."""
    inner = resolve(
        geometry.num_blocks,
        spec.granularity,
        (-1,),
        (),
        caller="quantize",
        what=f"scale: {describe('float32', geometry.num_blocks)}",
        multiple=formats.codes_per_pack(spec.fmt.bits, spec.order),
    )
    return _quantize(ideal, spec, inner, None, positive=spec.offset is None)


def _holds_nan(fmt: formats.Format) -> bool:
    return (
        isinstance(fmt, formats.ExponentFormat | formats.FloatFormat)
        and getattr(fmt, "flavour", "") != "finite"
    )


def _zero_point(
    found: Extremes, steps: jax.Array, fmt: formats.Format
) -> jax.Array:
    """The code of 0 in every block, as float32."""
    low = jnp.minimum(found.low, 0.0)
    zero = jnp.clip(
        np.float32(fmt.min) - jnp.round(_scales.divide(low, steps)), fmt.min, fmt.max
    )
    return jnp.where(jnp.isnan(zero), 0.0, zero)


def _encode(
    y: jax.Array, zero: jax.Array | None, spec: QuantSpec, key: jax.Array | None
) -> jax.Array:
    """Codes of numbers in units of their scale."""
    fmt = spec.fmt
    if zero is not None:
        codes = jnp.clip(
            formats.round_to_integer(y, spec.rounding, key) + zero, fmt.min, fmt.max
        )
        return jnp.where(jnp.isnan(codes), 0.0, codes).astype(fmt.code_dtype)
    if (
        fmt.kind == "integer"
        and fmt.min < -fmt.max
        and not spec.rule.signed
    ):
        y = jnp.maximum(
            y, -fmt.max
        )  # a symmetric spec uses the symmetric range, also where a rounded scale clips
    return fmt.encode(y, rounding=spec.rounding, key=key)


@jax.custom_jvp
def _no_gradient(x: jax.Array) -> jax.Array:
    return x


@functools.partial(_no_gradient.defjvp, symbolic_zeros=True)
def _refuse_gradient(primals, tangents):
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise TypeError(
            "quantize has no gradient: rounding is flat almost everywhere. For quantization-aware training use "
            "jaxq.fake_quant, whose gradient passes straight through; to keep w constant use jax.lax.stop_gradient."
        )
    return primals[0], tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fake_quant(
    x: jax.Array, key: jax.Array | None, spec: QuantSpec, geometry: Geometry
) -> jax.Array:
    return dequantize(_quantize(x, spec, geometry, key))


@_fake_quant.defjvp
def _fake_quant_jvp(spec: QuantSpec, geometry: Geometry, primals, tangents):
    x, key = primals
    qt = _quantize(x, spec, geometry, key)
    inside = inside_range(x, qt)
    # The function again, not its value: a derivative may be taken of this one.
    return _fake_quant(x, key, spec, geometry), jnp.where(
        inside, tangents[0], jnp.zeros((), x.dtype)
    )
