"""Convolutions by a recipe of low-precision training.

The operands are quantized as matrices `[kept, rest]`. The kept axis is the one whose
scale multiplies the result: examples and features in the forward pass. Numbers are
convolved as float32 arrays. They are integers of 8 bits, float8 numbers or bfloat16
numbers, so the default precision of a matrix unit rounds none of them.

There are no rotations: a window shifts one operand along the other, so a rotation of
both would change the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxq import kernels
from jaxq.meshes import apply_out_sharding, call_on_auto_axes, explicit_spec
from jaxq.qtensor import PerTensor, QuantSpec
from jaxq.training._factors import as_factors
from jaxq.training._low_precision_dot import check_operands
from jaxq.training._low_precision_product import (
    Bounds,
    Draw,
    check_gradient_key,
    draw_key,
)
from jaxq.training._precision_recipe import LowPrecision

CALLER = "training.low_precision"


def convolve_arrays(
    recipe: LowPrecision,
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    """`lax.conv_general_dilated` by a recipe.

    Args:
      recipe: how operands are quantized.
      lhs: the input, float32, bfloat16 or float16.
      rhs: the kernel, likewise.
      window_strides: as in `lax.conv_general_dilated`.
      padding: as in `lax.conv_general_dilated`.
      lhs_dilation: as in `lax.conv_general_dilated`.
      rhs_dilation: as in `lax.conv_general_dilated`.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: as in `lax.conv_general_dilated`.
      batch_group_count: must be 1.
      precision: has no effect.
      preferred_element_type: dtype of the result. None uses the dtype that the operands
        promote to.
      out_sharding: as in `jaxq.dot_general`.
      key: PRNG key, or None.
      bounds: the bounds of delayed scaling, or None.

    Raises:
      TypeError: an operand is not a float array.
      ValueError: `batch_group_count` is not 1.
    """
    if batch_group_count != 1:
        raise ValueError(
            f"{CALLER}: batch_group_count={batch_group_count} adds up examples with "
            "different scales. Name the layer in keep=."
        )
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    check_operands(lhs, rhs, CALLER)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    call = _Convolution(
        recipe,
        tuple(window_strides),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        _as_tuple(lhs_dilation),
        _as_tuple(rhs_dilation),
        numbers,
        feature_group_count,
    )
    dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)

    def product(lhs, rhs, key, bounds):
        y: Any = _convolve(call, lhs, rhs, key, bounds)
        return y.astype(dtype)

    names = [None] * lhs.ndim
    names[numbers.out_spec[0]] = explicit_spec(lhs)[numbers.lhs_spec[0]]
    names[numbers.out_spec[1]] = explicit_spec(rhs)[numbers.rhs_spec[0]]
    y = call_on_auto_axes(product, PartitionSpec(*names), lhs, rhs, key, bounds)
    return apply_out_sharding(y, out_sharding)


def _as_tuple(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The static facts of a convolution. `numbers` has the axes of all arrays."""

    recipe: LowPrecision
    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    numbers: lax.ConvDimensionNumbers
    num_groups: int

    def __call__(self, x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            self.window_strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            self.numbers,
            self.num_groups,
            precision=precision,
        )


class _Operand(NamedTuple):
    """An operand of a convolution, `numbers * scale`.

    Attributes:
      numbers: float32, with the axes of the array.
      scale: float32 `[n or 1]` along one axis of the array; None means 1.
      is_exact: True if bfloat16 holds the numbers.
    """

    numbers: jax.Array
    scale: jax.Array | None
    is_exact: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
    call: _Convolution,
    x: jax.Array,
    w: jax.Array,
    key: jax.Array | None,
    bounds: Bounds | None,
) -> jax.Array:
    """The convolution, float32, with gradients by the recipe."""
    y, _ = _forward(call, x, w, key, bounds)
    return y


def _forward(call, x, w, key, bounds):
    recipe, numbers = call.recipe, call.numbers
    x_bound, w_bound = (None, None) if bounds is None else bounds
    product = recipe.forward
    a = _operand(recipe, x, product.lhs, numbers.lhs_spec[0], key, Draw.X, x_bound)
    b = _operand(recipe, w, product.rhs, numbers.rhs_spec[0], key, Draw.W, w_bound)
    y = call(a.numbers, b.numbers, _precision(a, b))
    y = _scaled(y, a.scale, numbers.out_spec[0])
    y = _scaled(y, b.scale, numbers.out_spec[1])
    num_terms = math.prod(w.shape) // w.shape[numbers.rhs_spec[0]]
    y = kernels.mark_product(y, has_batch=True, num_terms=num_terms)
    return y, (x, w, key, bounds)


def _backward(call, saved, dy):
    x, w, key, bounds = saved
    check_gradient_key(call.recipe, key)
    recipe, numbers = call.recipe, call.numbers
    x_bound, w_bound = (None, None) if bounds is None else bounds
    batch, features = numbers.out_spec[:2]

    product = recipe.input_gradient
    a = _operand(recipe, dy, product.lhs, batch, key, Draw.DY_FOR_X)
    channel = numbers.rhs_spec[1]
    b = _operand(recipe, w, product.rhs, channel, key, Draw.W_FOR_X, w_bound)
    transpose = jax.linear_transpose(
        lambda x: call(x, b.numbers, _precision(a, b)), _float32_like(x)
    )
    (dx,) = transpose(a.numbers)
    dx = _scaled(dx, a.scale, numbers.lhs_spec[0])
    # Each feature group has the same axis of channels in the kernel.
    scale = b.scale
    if scale is not None and scale.size > 1:
        scale = jnp.tile(scale, call.num_groups)
    dx = _scaled(dx, scale, numbers.lhs_spec[1])

    product = recipe.weight_gradient
    channel = numbers.lhs_spec[1]
    a = _operand(recipe, x, product.lhs, channel, key, Draw.X_FOR_W, x_bound)
    if call.num_groups > 1:
        # The scale of a channel does not belong to one index of the kernel.
        scaled = _scaled(a.numbers, a.scale, channel)
        a = _Operand(scaled, None, is_exact=False)
    b = _operand(recipe, dy, product.rhs, features, key, Draw.DY_FOR_W)
    transpose = jax.linear_transpose(
        lambda w: call(a.numbers, w, _precision(a, b)), _float32_like(w)
    )
    (dw,) = transpose(b.numbers)
    dw = _scaled(dw, a.scale, numbers.rhs_spec[1])
    dw = _scaled(dw, b.scale, numbers.rhs_spec[0])
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


_convolve.defvjp(_forward, _backward)


def _operand(
    recipe: LowPrecision,
    x: jax.Array,
    spec: QuantSpec | None,
    kept: int,
    key: jax.Array | None,
    draw: Draw,
    bound: jax.Array | None = None,
) -> _Operand:
    """Quantizes an array whose axis `kept` is not summed over."""
    if spec is None:
        return _Operand(x.astype(jnp.float32), None, is_exact=False)
    if isinstance(spec.granularity, PerTensor):
        kept = 0  # any axis: the gradient then has the same operand as the forward pass
    moved = jnp.moveaxis(x, kept, 0)
    factors = as_factors(
        moved.reshape(moved.shape[0], -1),
        spec,
        axis=-1,
        key=draw_key(key, draw) if spec.needs_key else None,
        bound=bound,
        four_over_six=recipe.four_over_six,
    )
    numbers = factors.numbers.reshape(moved.shape)
    numbers = jnp.moveaxis(numbers.astype(jnp.float32), 0, kept)
    scale = None if factors.scale is None else factors.scale[:, 0]
    return _Operand(numbers, scale, factors.numbers.dtype != jnp.float32)


def _precision(a: _Operand, b: _Operand) -> lax.Precision | None:
    """The precision with which a matrix unit rounds no number."""
    return None if a.is_exact and b.is_exact else lax.Precision.HIGHEST


def _scaled(y: jax.Array, scale: jax.Array | None, axis: int) -> jax.Array:
    """`y` times a scale along an axis."""
    if scale is None:
        return y
    shape = [1] * y.ndim
    shape[axis] = scale.size
    return y * scale.reshape(shape)


def _float32_like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)
