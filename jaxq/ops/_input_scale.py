"""The factors by which a product multiplies its float operand: `QTensor.input_scale`.

A weight with an input scale represents `diag(s) @ W`, so `x @ (diag(s) @ W)` is
`(x * s) @ W`. The float operand is multiplied before it is quantized. All products use
the functions of this file.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.meshes import all_explicit_mesh, call_on_auto_axes, explicit_spec
from jaxq.ops._dimension_numbers import DimensionNumbers, broadcastable
from jaxq.qtensor import QTensor, TrainedWeight

Weight = TypeVar("Weight", QTensor, TrainedWeight)

# Dtypes that the multiplied operand keeps. All other dtypes become float32.
_KEPT_DTYPES = ("bfloat16", "float16")


def scale_operand(
    x: jax.Array, weight: Weight, dims: DimensionNumbers, *, swapped: bool
) -> tuple[jax.Array, Weight]:
    """Moves the input scale of a weight to the float operand of the product.

    Args:
      x: the float operand.
      weight: a weight with an `input_scale`. The product contracts the axes that its
        geometry contracts. Its batch axes are, in order, those of the product.
      dims: dimension numbers of the product.
      swapped: True if the weight is the left operand.

    Returns:
      (`x` multiplied by the factors, the weight without them).
    """
    assert weight.input_scale is not None
    x_side, weight_side = (1, 0) if swapped else (0, 1)
    x_axis_of = {
        axis % weight.ndim: x_axis % x.ndim
        for x_axis, axis in zip(dims[0][x_side], dims[0][weight_side], strict=True)
    }
    along = [axis + weight.ndim for axis in weight.meta.geometry.contracted]
    x_axes = [axis % x.ndim for axis in dims[1][x_side]]
    x_axes += [x_axis_of[axis] for axis in along]
    # [*batch, K] -> [*batch, *contracted]
    factors = weight.input_scale.reshape(
        *weight.batch_shape, *(weight.shape[axis] for axis in along)
    )
    scaled = _scaled(x, broadcastable(factors, x_axes, x.ndim))
    return scaled, dataclasses.replace(weight, input_scale=None)


def scale_over_mesh(
    x: jax.Array, weight: QTensor, dims: DimensionNumbers, *, swapped: bool
) -> tuple[jax.Array, QTensor]:
    """`scale_operand` on a mesh. The result is sharded as `x`.

    Where a device needs factors of other devices, it gets factors and no activations.
    """
    mesh, x_spec = all_explicit_mesh((x, weight)), explicit_spec(x)
    if mesh is not None:
        x_side = 1 if swapped else 0
        entries = [x_spec[axis] for axis in dims[1][x_side]]
        contracted = dims[0][x_side]
        entries.append(x_spec[contracted[0]] if len(contracted) == 1 else None)
        at = NamedSharding(mesh, PartitionSpec(*entries))
        factors = jax.sharding.reshard(weight.input_scale, at)
        weight = dataclasses.replace(weight, input_scale=factors)

    def scale(x: jax.Array, weight: QTensor) -> jax.Array:
        return scale_operand(x, weight, dims, swapped=swapped)[0]

    scaled = call_on_auto_axes(scale, PartitionSpec(*x_spec), x, weight)
    return scaled, dataclasses.replace(weight, input_scale=None)


def scale_rows_by_group(
    x: jax.Array, weights: QTensor, group_sizes: jax.Array
) -> tuple[jax.Array, QTensor]:
    """Multiplies rows of x, sorted by weight, by the input scales of their weights.

    Args:
      x: floats `[m, k]`.
      weights: `[e, k, n]`. If it has no input scale, nothing changes.
      group_sizes: int32 `[e]`, the number of rows of each weight.

    Returns:
      (the rows multiplied by the input scales of their weights, the weights without
      input scales).
    """
    if weights.input_scale is None:
        return x, weights
    factors = jnp.repeat(
        weights.input_scale, group_sizes, axis=0, total_repeat_length=x.shape[0]
    )  # [m, k]
    return _scaled(x, factors), dataclasses.replace(weights, input_scale=None)


def _scaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    """`x * factors`, computed in float32. 16-bit floats keep their dtype."""
    product = x.astype(jnp.float32) * factors
    return product.astype(x.dtype) if x.dtype.name in _KEPT_DTYPES else product
