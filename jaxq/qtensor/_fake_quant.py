"""fake_quant: the values of quantized numbers, with a straight-through gradient.

The scales are computed from the numbers, taken from a QTensor, or computed from a
range. The scales of a QTensor and the ends of a range have gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxq.formats import check_choice
from jaxq.meshes import call_on_auto_axes, explicit_spec
from jaxq.qtensor import _scales
from jaxq.qtensor._bounds import (
    as_bounds,
    between_format_ends,
    inside_ends,
    inside_range,
)
from jaxq.qtensor._dequantize import code_values, dequantize, scale_values
from jaxq.qtensor._fake_range import (
    RANGE_GRADIENTS,
    RangeGradient,
    fake_quant_in_range,
)
from jaxq.qtensor._geometry import Geometry, describe
from jaxq.qtensor._inputs import check_floats, check_input, check_key
from jaxq.qtensor._presets import as_spec
from jaxq.qtensor._product_operand import ProductOperand
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._quantize import padded_blocks, quantize_array
from jaxq.qtensor._quotient import divide
from jaxq.qtensor._requantize import requantize
from jaxq.qtensor._spec import QuantSpec


def fake_quant(
    x: jax.typing.ArrayLike,
    spec: str | QuantSpec | QTensor,
    *,
    contracting: tuple[int, ...] | int | None = None,
    batch: tuple[int, ...] | int = (),
    key: jax.Array | None = None,
    bounds: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    range_gradient: RangeGradient = "lsq",
) -> jax.Array:
    """`dequantize(quantize(x))` with a straight-through gradient.

    There are three ways to get the scales:

    1. `spec` is a name or a `QuantSpec`, and there are no `bounds`. The scales are
       computed from `x` and treated as constants. The gradient with respect to `x` is 1
       for numbers that are rounded and 0 for numbers that are clipped. A number is
       rounded up to half a step beyond the smallest and the largest number of the
       format.
    2. `spec` is a QTensor. Its scales are used, and they have gradients. A number `v`
       with the scale `s` becomes `s * q`, where q is `v / s` after rounding and
       clipping. The gradient with respect to `s` is `q - v / s` for a number that is
       rounded and `q` for a number that is clipped (LSQ). The gradient with respect to
       an offset is 1 for a number that is clipped and 0 for others (LSQ+). The gradient
       with respect to an entry of a codebook is the sum over the numbers that have this
       entry, multiplied by their scales. Codes and zero points have no gradients.
    3. `bounds` gives the range. Both ends have gradients. A number that is clipped
       becomes one end, so the gradient with respect to this end is 1. For a number that
       is rounded, `range_gradient` decides. A spec with zero points extends its range
       to contain 0. With such a spec, the gradient is 0 for a low end of 0 or more, and
       for a high end of 0 or less.

    In the cases 2 and 3 a number is clipped if it is at or beyond the smallest or the
    largest number of the format, as in LSQ. With a codebook, a number is clipped if it
    is more than half a step beyond the smallest or the largest entry.

    Args:
      x: float32, bfloat16 or float16 array with at least one axis.
      spec: preset name, `QuantSpec`, or a QTensor of the shape of `x`.
      contracting: as in `quantize`. Not allowed with a QTensor.
      batch: as in `quantize`. Not allowed with a QTensor.
      key: PRNG key, as in `quantize`. Needed if `spec.needs_key`, not allowed
        otherwise.
      bounds: (low, high), as in `quantize`. Not allowed with a QTensor.
      range_gradient: the gradient of `bounds` for numbers that are rounded. "lsq": the
        step follows from the range, and the gradient with respect to the step is
        `q - v / s`. "pact": 0, so only clipped numbers change the range.

    Returns:
      Array of the shape and dtype of `x`, bit for bit `dequantize(quantize(x))`, or
      `dequantize(requantize(x, spec))` with a QTensor. A number that is not finite
      makes its block NaN. With a QTensor, only the number itself becomes NaN.

    Raises:
      TypeError: `x` is not a float32, bfloat16 or float16 array.
      ValueError: the preset is unknown; `contracting` or `batch` name axes that do not
        exist, repeat, or contradict the granularity; `contracting` is None and has no
        default; a group or tile size does not divide its axis and `pad` is False; the
        format has no negative numbers and the spec is symmetric without an offset; the
        spec needs a key and `key` is None; the spec needs no key and `key` is given;
        `spec` is a QTensor of another shape, or is given with `contracting`, `batch` or
        `bounds`; the bounds have another shape, are not ordered, or do not apply to the
        scale rule or the offset; or `range_gradient` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda x: jaxq.fake_quant(x, "int4").sum()
      >>> jax.grad(loss)(jnp.array([0.3, -0.7])).tolist()
      [1.0, 1.0]

      The gradient with respect to a scale:

      >>> x = jnp.array([0.25, -2.0])
      >>> grid = jaxq.quantize(x, jaxq.QuantSpec("int4"), bounds=(-1.0, 1.0))
      >>> loss = lambda grid: jaxq.fake_quant(x, grid).sum()
      >>> slope = jax.grad(loss, allow_int=True)(grid)
      >>> slope.scale.tolist()  # (2 - 0.25 * 7) + (-7)
      [-6.75]

      The gradient with respect to a clipping threshold:

      >>> def loss(threshold):
      ...   return jaxq.fake_quant(
      ...     jnp.array([0.2, 3.0]), "uint4", bounds=(0.0, threshold),
      ...     range_gradient="pact").sum()
      >>> float(jax.grad(loss)(1.5))
      1.0

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
      2013.
      Esser et al., "Learned Step Size Quantization", 2020.
      Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets
      and better initialization", 2020.
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
      Networks", 2018.
      Han et al., "Deep Compression", 2016, for codebooks.
    """
    if isinstance(spec, ProductOperand) and not isinstance(spec, QTensor):
        raise TypeError(
            f"fake_quant: spec must be a QuantSpec or a QTensor, got {spec!r}. Pass "
            "quantize() of a TrainedWeight."
        )
    check_choice("fake_quant: range_gradient", range_gradient, RANGE_GRADIENTS)
    if isinstance(spec, QTensor):
        return _fake_quant_on_grid(x, spec, contracting, batch, key, bounds)
    spec = as_spec(spec, "fake_quant")
    if bounds is not None:
        spec = spec.with_absmax()
    x, geometry = check_input(
        x, spec, contracting, batch, caller="fake_quant", name="x"
    )
    check_key(spec.levels, key, "fake_quant")
    ends = None
    if bounds is not None:
        ends = as_bounds(bounds, x, spec, geometry, caller="fake_quant")

    def compute(x: jax.Array, key: jax.Array | None, ends: Any) -> jax.Array:
        if ends is None:
            return _fake_quant(x, key, spec, geometry, None)
        return fake_quant_in_range(x, ends, key, spec, geometry, range_gradient)

    return call_on_auto_axes(compute, PartitionSpec(*explicit_spec(x)), x, key, ends)


def fake_quant_computed(
    x: jax.Array, spec: QuantSpec, geometry: Geometry, input_scale: jax.Array | None
) -> jax.Array:
    """The values of `quantize_computed`, with a straight-through gradient to `x`."""
    return _fake_quant(x, None, spec, geometry, input_scale)


def quantize_computed(
    x: jax.Array,
    spec: QuantSpec,
    geometry: Geometry,
    input_scale: jax.Array | None,
    key: jax.Array | None = None,
) -> QTensor:
    """`quantize_array` of `x`, divided by an input scale.

    Args:
      x: float array.
      spec: how to quantize.
      geometry: the geometry of `x`.
      input_scale: float32 `[*batch, K]`, the input scale of the QTensor, or None.
      key: PRNG key if `spec.needs_key`, else None.
    """
    if input_scale is None:
        return quantize_array(x, spec, geometry, key)
    view = geometry.to_view(x).astype(jnp.float32)
    view = view / geometry.contracted_to_view(input_scale)
    qt = quantize_array(geometry.from_view(view), spec, geometry, key)
    return dataclasses.replace(qt, input_scale=input_scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fake_quant(
    x: jax.Array,
    key: jax.Array | None,
    spec: QuantSpec,
    geometry: Geometry,
    input_scale: jax.Array | None,
) -> jax.Array:
    return dequantize(quantize_computed(x, spec, geometry, input_scale, key))


@_fake_quant.defjvp
def _fake_quant_jvp(spec: QuantSpec, geometry: Geometry, primals, tangents):
    x, key, input_scale = primals
    # A second derivative must not go through the rounding.
    constant_x, constant_scale = jax.lax.stop_gradient((x, input_scale))
    qt = quantize_computed(constant_x, spec, geometry, constant_scale, key)
    passes = inside_range(constant_x, qt)
    # `_fake_quant` is called again for its value, so that a second derivative finds
    # this rule again.
    value = _fake_quant(x, key, spec, geometry, input_scale)
    return value, jnp.where(passes, tangents[0], jnp.zeros((), x.dtype))


def _fake_quant_on_grid(
    x: jax.typing.ArrayLike,
    grid: QTensor,
    contracting: Any,
    batch: Any,
    key: Any,
    bounds: Any,
) -> jax.Array:
    """`fake_quant` with the scales of a QTensor."""
    if contracting is not None or batch != () or bounds is not None:
        raise ValueError(
            "fake_quant: contracting=, batch= and bounds= are those of the QTensor "
            f"{grid!r}. Leave them out, or pass its spec."
        )
    x = jnp.asarray(x)
    check_floats(x.dtype, x.shape, "x", "fake_quant")
    if x.shape != grid.shape:
        raise ValueError(
            f"fake_quant: x must have the shape {list(grid.shape)} of the QTensor, got "
            f"{describe(x.dtype.name, x.shape)}."
        )
    check_key((grid.spec,), key, "fake_quant")
    leaves, treedef = jax.tree.flatten(grid)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    trained = [leaf for leaf, yes in zip(leaves, is_float, strict=True) if yes]
    constant = [leaf for leaf, yes in zip(leaves, is_float, strict=True) if not yes]
    parts = _Parts(treedef, tuple(is_float))
    compute = functools.partial(_on_grid, parts=parts)
    spec = PartitionSpec(*explicit_spec(x))
    return call_on_auto_axes(compute, spec, x, trained, constant, key)


class _Parts(NamedTuple):
    """How the leaves of a QTensor are split into floats and all others."""

    treedef: Any
    is_float: tuple[bool, ...]

    def whole(self, trained: list[jax.Array], constant: list[jax.Array]) -> QTensor:
        """The QTensor of both parts."""
        floats, others = iter(trained), iter(constant)
        leaves = [next(floats if is_float else others) for is_float in self.is_float]
        return jax.tree.unflatten(self.treedef, leaves)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _on_grid(
    x: jax.Array,
    trained: list[jax.Array],
    constant: list[jax.Array],
    key: jax.Array | None,
    parts: _Parts,
) -> jax.Array:
    grid = parts.whole(trained, constant)
    return dequantize(requantize(x, grid, key=key), dtype=x.dtype)


@_on_grid.defjvp
def _on_grid_jvp(parts: _Parts, primals, tangents):
    x, trained, constant, key = primals
    # A second derivative must not go through the rounding.
    grid = jax.lax.stop_gradient(parts.whole(trained, constant))
    codes = requantize(jax.lax.stop_gradient(x), grid, key=key)
    # `_on_grid` is called again for its value, so that a second derivative finds this
    # rule again.
    value = _on_grid(x, trained, constant, key, parts)
    smooth = functools.partial(_smooth, constant=constant, codes=codes, parts=parts)
    _, tangent = jax.jvp(smooth, (x, trained), (tangents[0], tangents[1]))
    return value, tangent.astype(value.dtype)


def _smooth(
    x: jax.Array,
    trained: list[jax.Array],
    constant: list[jax.Array],
    codes: QTensor,
    parts: _Parts,
) -> jax.Array:
    """A function whose derivatives are those of `_on_grid`.

    Args:
      x: the numbers.
      trained: the float leaves of the grid.
      constant: the other leaves of the grid.
      codes: the quantized numbers.
      parts: how the leaves are split.
    """
    grid = parts.whole(trained, constant)
    spec, geometry = grid.spec, grid.meta.geometry
    view = geometry.to_view(x).astype(jnp.float32)
    if grid.input_scale is not None:
        view = view / geometry.contracted_to_view(grid.input_scale)
    offset = jnp.float32(0)
    if grid.offset is not None:
        offset = geometry.scale_to_blocks(_scales.load_from_dtype(grid.offset))
    blocks = padded_blocks(view, spec, geometry) - offset
    scale = geometry.scale_to_blocks(scale_values(grid))
    quotient = divide(blocks, scale)
    stored = geometry.to_blocks(geometry.to_view_order(codes.stored_codes()))
    passes = geometry.to_blocks(geometry.pad(geometry.to_view(_passes(x, codes))))
    # A rounded number moves with x. Its rounding error is `(code - quotient) * scale`,
    # so it also moves with the scale. A clipped number is the largest or smallest code,
    # multiplied by the scale.
    moving = blocks - zero_with_gradient(scale) * jax.lax.stop_gradient(quotient)
    result = code_values(grid, stored) * scale + offset
    result = result + jnp.where(passes, zero_with_gradient(moving), 0)
    view = geometry.unpad(geometry.from_blocks(result))
    if grid.input_scale is not None:
        view = view * geometry.contracted_to_view(grid.input_scale)
    return geometry.from_view(view)


def zero_with_gradient(x: jax.Array) -> jax.Array:
    """Zeros, with the derivative of `x`."""
    return x - jax.lax.stop_gradient(x)


def _passes(x: jax.Array, codes: QTensor) -> jax.Array:
    """True for numbers that are rounded and not clipped. `codes` is quantized `x`."""
    if codes.codebook is None:
        return between_format_ends(x, codes)
    # Half a step beyond the outer entries, as for a format.
    entries = jnp.sort(codes.codebook, axis=-1)
    first, second = entries[..., 0], entries[..., 1]
    last, before_last = entries[..., -1], entries[..., -2]
    ends = first - (second - first) / 2, last + (last - before_last) / 2
    return inside_ends(x, codes, ends)
