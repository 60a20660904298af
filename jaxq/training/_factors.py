"""Quantized operands of training products, as numbers that matrix units multiply.

An operand is `numbers * scale`. The scale is constant along the contracted axis, so it
multiplies the result of a product instead of its operands:

| codes | scales | numbers | scale |
|---|---|---|---|
| int8 | one for each row or tensor | int8 | float32 |
| float8 | one for each row or tensor | float8 | float32 |
| float8, float4 | for blocks: powers of two, float8 | bfloat16 | float32 |
| all others | all others | float32 | none |

In the third row the numbers are codes times the scales of their blocks. bfloat16 holds
these products exactly. A matrix unit with block scales multiplies the same numbers. In
the last row the numbers are the dequantized operand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.kernels import is_exact_in_float8, is_native_float
from jaxq.qtensor import (
    ErrorContext,
    Geometry,
    PerBlock,
    PerTensor,
    QTensor,
    QuantSpec,
    dequantize,
    describe,
    quantize_array,
    resolve,
    scale_values,
)

# The bits of a bfloat16 significand, with the implicit bit.
_BFLOAT16_BITS = 8
_INT32_MAX = 2**31 - 1
_LARGEST_CODE = 128
# Four over six: what the largest magnitude of a block becomes, and the largest scale of
# a block with the first target.
_TARGETS = (6.0, 4.0)
_LARGEST_SCALE = 256


class Factors(NamedTuple):
    """An operand of a product, `numbers * scale`.

    Attributes:
      numbers: `[*batch, rows, k]`, the contracted axis last: int8, float8, bfloat16 or
        float32.
      scale: float32 `[*batch, rows or 1, 1]`; None means 1.
    """

    numbers: jax.Array
    scale: jax.Array | None

    @property
    def turned(self) -> Factors:
        """The same operand for a product that contracts the other axis."""
        assert self.scale is None or self.scale.shape[-2] == 1
        return Factors(jnp.swapaxes(self.numbers, -1, -2), self.scale)


def as_factors(
    x: jax.Array,
    spec: QuantSpec | None,
    *,
    axis: int,
    key: jax.Array | None = None,
    bound: jax.Array | None = None,
    four_over_six: bool = False,
) -> Factors:
    """Quantizes an operand of a product.

    Args:
      x: float `[*batch, rows, columns]`.
      spec: how to quantize. None leaves `x` in floats.
      axis: the contracted axis, -1 or -2.
      key: PRNG key if `spec.needs_key`, else None.
      bound: the largest magnitude to represent, float32 scalar. None uses that of each
        block.
      four_over_six: as in `LowPrecision`.
    """
    if spec is None:
        return Factors(x if axis == -1 else jnp.swapaxes(x, -1, -2), None)
    has_choice = four_over_six and has_two_targets(spec)
    return quantize_operand(x, spec, axis, key, bound, has_choice)


def has_two_targets(spec: QuantSpec | None) -> bool:
    """True if the largest magnitude of a block can become 6 or 4 ("four over six").

    The codes are float4_e2m1fn, rounded to nearest, with scales in float8_e4m3fn and a
    scale of the tensor.
    """
    if spec is None or not isinstance(spec.scale, QuantSpec):
        return False
    names = (spec.fmt.name, spec.scale.fmt.name)
    is_nvfp4 = names == ("float4_e2m1fn", "float8_e4m3fn")
    has_tensor_scale = isinstance(spec.scale.granularity, PerTensor)
    return is_nvfp4 and has_tensor_scale and spec.rounding == "nearest_even"


def is_turnable(spec: QuantSpec | None) -> bool:
    """True if the numbers of an operand do not depend on the axis that is contracted.

    One call of `as_factors` then serves two products.
    """
    if spec is None:
        return False  # there is nothing to save
    granularity = spec.granularity
    if isinstance(granularity, PerBlock):
        return len(granularity.shape) == 2 and len(set(granularity.shape)) == 1
    return isinstance(granularity, PerTensor)


@functools.partial(jax.jit, static_argnames=("spec", "axis", "four_over_six"))
def quantize_operand(
    x: jax.Array,
    spec: QuantSpec,
    axis: int,
    key: jax.Array | None,
    bound: jax.Array | None,
    four_over_six: bool,
) -> Factors:
    """Computes `as_factors`. Each quantization of an operand is one call of this."""
    # Unpacked codes: nothing stores them.
    spec = spec.replace(packing=formats.Packing.NONE)
    geometry = _geometry(x, spec, axis)
    bounds = None
    if bound is not None:
        shape = (*x.shape[:-2], *geometry.num_blocks)
        high = jnp.broadcast_to(bound, shape)
        bounds = (-high, high)
    if four_over_six:
        return _four_over_six(x, spec, geometry)
    return _factors_of(quantize_array(x, spec, geometry, key, bounds=bounds))


def _geometry(x: jax.Array, spec: QuantSpec, axis: int) -> Geometry:
    return resolve(
        x.shape,
        spec.granularity,
        (axis,),
        tuple(range(x.ndim - 2)),
        context=ErrorContext("training", "operand", describe(x.dtype.name, x.shape)),
        multiple=1,
    )


def _four_over_six(x: jax.Array, spec: QuantSpec, geometry: Geometry) -> Factors:
    """Maps the largest magnitude of each block to 6 or to 4, by the squared error.

    Near 6, the numbers of E2M1 are 4 and 6. Near 4, they are 3 and 4. So a block whose
    second largest number is about 5/6 of its largest number is better off with 4.

    References:
      Cook et al., "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block
      Scaling", 2025.
    """
    assert isinstance(spec.scale, QuantSpec)
    scale_format = spec.scale.fmt
    x = x.astype(jnp.float32)
    blocks = geometry.to_blocks(geometry.pad(geometry.to_view(x)))
    axes = geometry.block_axes
    largest = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True)
    of_tensor = tuple(range(-2 * len(geometry.block_shape), 0))
    most = jnp.max(largest, axis=of_tensor, keepdims=True)
    # The largest scales of a block are then 256 and 384, which E4M3 holds.
    tensor_scale = most * np.float32(1 / (_TARGETS[0] * _LARGEST_SCALE))

    def candidate(target: float) -> tuple[jax.Array, jax.Array]:
        """The numbers without the scale of the tensor, and their squared errors."""
        ideal = largest * np.float32(1 / target) / jnp.where(most > 0, tensor_scale, 1)
        stored = jnp.maximum(scale_format.round(ideal), scale_format.smallest_positive)
        scale = jnp.where(largest > 0, stored, 0)
        divisor = jnp.where(largest > 0, stored * tensor_scale, 1)
        numbers = spec.fmt.round(blocks * (1 / divisor)) * scale
        error = jnp.sum((numbers * tensor_scale - blocks) ** 2, axes, keepdims=True)
        return numbers, error

    (six, error_of_six), (four, error_of_four) = map(candidate, _TARGETS)
    numbers = jnp.where(error_of_four < error_of_six, four, six)
    # float4 has no NaN.
    numbers = jnp.where(jnp.isnan(most), most, numbers).astype(jnp.bfloat16)
    view = geometry.unpad(geometry.from_blocks(numbers))
    batch = x.shape[:-2]
    return Factors(geometry.to_storage(view), tensor_scale.reshape(*batch, 1, 1))


def _factors_of(qt: QTensor) -> Factors:
    """The factors of an operand that was quantized without packing."""
    spec, geometry = qt.spec, qt.meta.geometry
    is_scaled = spec.symmetric and spec.offset is None and qt.codebook is None
    has_tiles = isinstance(spec.granularity, PerBlock)
    dtype = _dtype_of_codes(spec)
    if is_scaled and not has_tiles and geometry.num_blocks[-1] == 1 and dtype:
        return Factors(_codes_as(dtype, qt), scale_values(qt))
    if is_scaled and _fits_bfloat16(spec):
        return _with_block_scales(qt)
    values = dequantize(qt, dtype=jnp.float32)
    return Factors(geometry.to_storage(geometry.to_view(values)), None)


def _dtype_of_codes(spec: QuantSpec) -> np.dtype | None:
    """The dtype in which matrix units multiply codes of a format, or None."""
    fmt = spec.fmt
    if is_native_float(fmt):
        return jnp.dtype(fmt.name)
    if fmt.kind == "integer":
        return jnp.dtype(jnp.int8) if fmt.min >= -128 and fmt.max <= 127 else None
    return jnp.dtype(jnp.float8_e4m3fn) if is_exact_in_float8(fmt) else None


def _codes_as(dtype: np.dtype, qt: QTensor) -> jax.Array:
    """The numbers of codes, `[*batch, rows, k]`, in a dtype that holds them."""
    if is_native_float(qt.spec.fmt):
        return lax.bitcast_convert_type(qt.data, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return qt.data.astype(dtype)
    return _decode(qt.spec.fmt, qt.data).astype(dtype)


def _fits_bfloat16(spec: QuantSpec) -> bool:
    """True if bfloat16 holds the products of codes and the scales of their blocks."""
    scale = spec.scale
    if isinstance(scale, QuantSpec):
        is_plain = scale.symmetric and scale.offset is None
        if not is_plain or not isinstance(scale.granularity, PerTensor):
            return False
        scale_format = scale.fmt
    else:
        scale_format = formats.get(scale)
    code_bits, scale_bits = _significant_bits(spec.fmt), _significant_bits(scale_format)
    if code_bits is None or scale_bits is None:
        return False
    # A power of two shifts the code, so its one bit adds nothing.
    return code_bits + (scale_bits if scale_bits > 1 else 0) <= _BFLOAT16_BITS


def _significant_bits(fmt: formats.Format) -> int | None:
    """The bits of the significand of a format's numbers, None for a codebook."""
    if fmt.kind == "integer":
        return int(max(fmt.max, -fmt.min)).bit_length()
    if fmt.kind == "float":
        return fmt.mantissa_bits + 1
    return None


def _with_block_scales(qt: QTensor) -> Factors:
    """bfloat16 numbers that contain the scales of blocks, and the scale of the tensor.

    The scale of the tensor is the scale of the scales, if there is one.
    """
    geometry = qt.meta.geometry
    if isinstance(qt.scale, QTensor):
        block_scale = _decode(qt.scale.spec.fmt, qt.scale.codes())
        tensor_scale = scale_values(qt.scale)
    else:
        block_scale, tensor_scale = scale_values(qt), None
    view = geometry.to_view_order(_decode(qt.spec.fmt, qt.stored_codes()))
    blocks = geometry.to_blocks(view) * geometry.scale_to_blocks(block_scale)
    view = geometry.unpad(geometry.from_blocks(blocks.astype(jnp.bfloat16)))
    return Factors(geometry.to_storage(view), tensor_scale)


def _decode(fmt: formats.Format, codes: jax.Array) -> jax.Array:
    """The float32 numbers of codes. XLA casts float8 faster than it moves bits."""
    if is_native_float(fmt):
        numbers = lax.bitcast_convert_type(codes, jnp.dtype(fmt.name))
        return numbers.astype(jnp.float32)
    return fmt.decode(codes)


def multiply(a: Factors, b: Factors) -> jax.Array:
    """The product of two operands, summed in int32 or float32.

    Args:
      a: `[*batch, m, k]`.
      b: `[*batch, n, k]`.

    Returns:
      float32 `[*batch, m, n]`.
    """
    a_numbers, b_numbers = _in_one_dtype(a.numbers, b.numbers)
    batch = tuple(range(a_numbers.ndim - 2))
    last = a_numbers.ndim - 1
    is_integer = jnp.issubdtype(a_numbers.dtype, jnp.integer)
    is_float32 = a_numbers.dtype == jnp.float32
    y = lax.dot_general(
        a_numbers,
        b_numbers,
        (((last,), (last,)), (batch, batch)),
        # Dequantized numbers must not be rounded again.
        precision=lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=jnp.int32 if is_integer else jnp.float32,
    ).astype(jnp.float32)
    if a.scale is not None:
        y = y * a.scale
    return y if b.scale is None else y * jnp.swapaxes(b.scale, -1, -2)


def _in_one_dtype(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both operands in dtypes that multiply each other. No number is rounded."""
    if _are_multiplied(a.dtype, b.dtype, a.shape[-1]):
        return a, b
    is_narrow = all(x.dtype.itemsize == 1 or x.dtype == jnp.bfloat16 for x in (a, b))
    common = jnp.bfloat16 if is_narrow else jnp.float32
    return a.astype(common), b.astype(common)


def _are_multiplied(a: np.dtype, b: np.dtype, k: int) -> bool:
    """True if numbers of two dtypes are multiplied as they are."""
    if a == b == jnp.int8:
        return k * _LARGEST_CODE**2 <= _INT32_MAX
    return a == b or all(dtype.name.startswith("float8") for dtype in (a, b))
