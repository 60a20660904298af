"""Products with dynamic or static activation quantization.

The gradient passes straight through the rounding. Numbers that a static range clips get
no gradient. A number up to half a step beyond the range is rounded, not clipped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxq import kernels
from jaxq.meshes import (
    all_explicit_mesh,
    call_on_auto_axes,
    explicit_spec,
    names_in,
)
from jaxq.ops._dimension_numbers import DimensionNumbers, batch_first, broadcastable
from jaxq.ops._facts import ArrayFacts, activation_facts, activation_problem
from jaxq.ops._on_parts import call_on_parts
from jaxq.qtensor import (
    QTensor,
    QuantSpec,
    find_cuts,
    leaf_specs,
    quantize,
    with_margin,
)


@dataclasses.dataclass(frozen=True)
class ActivationAxes:
    """The roles of an activation's axes.

    Attributes:
      order: the permutation of the activation's axes before quantization. It puts the
        product's batch axes first.
      contracting: the contracted axes after this permutation.
      num_batch: the number of leading batch axes after this permutation.
      range_axes: the axes of the weight's `input_range` in the order of the product's
        batch axes.
    """

    order: tuple[int, ...]
    contracting: tuple[int, ...]
    num_batch: int = 0
    range_axes: tuple[int, ...] = ()


def activation_axes(
    ndim: int, dims: DimensionNumbers, *, swapped: bool
) -> ActivationAxes:
    """The roles of the axes of the float operand of a product.

    Args:
      ndim: the number of axes of this operand.
      dims: dimension numbers of the product.
      swapped: True if this operand is on the right.
    """
    x_side, weight_side = (1, 0) if swapped else (0, 1)
    order, quantized_dims = batch_first(ndim, dims, x_side)
    return ActivationAxes(
        order=tuple(order),
        contracting=tuple(quantized_dims[0][x_side]),
        num_batch=len(dims[1][x_side]),
        range_axes=tuple(dims[1][weight_side]),
    )


def multiply_quantized(
    x: jax.Array,
    weight: QTensor,
    axes: ActivationAxes,
    codes_product: Callable[[QTensor, QTensor], jax.Array],
    float_product: Callable[[jax.Array, QTensor], jax.Array],
    *,
    is_convolution: bool = False,
) -> jax.Array:
    """The product with `x` quantized by `weight.meta.activation`.

    Args:
      x: float activation.
      weight: QTensor with an activation spec.
      axes: roles of the axes of `x`.
      codes_product: multiplies the quantized activation (axes in `axes.order`) by the
        weight.
      float_product: multiplies `x` itself by the weight. The gradient is the gradient
        of this function, except where a static range clips.
      is_convolution: tells policies of `jax.checkpoint` that this is no dot product.

    Returns:
      The result of `codes_product`.
    """

    @jax.custom_vjp
    def quantized(x: jax.Array, weight: QTensor) -> jax.Array:
        activation = quantize_activation(x, weight, axes)
        return codes_product(activation, weight.with_activation(None))

    def forward(x: jax.Array, weight: QTensor):
        has_batch = is_convolution or axes.num_batch > 0
        num_terms = math.prod(x.shape[axes.order[axis]] for axis in axes.contracting)
        if is_convolution:
            num_terms = weight.meta.geometry.contracted_size
        y = kernels.mark_product(
            quantized(x, weight), has_batch=has_batch, num_terms=num_terms
        )
        return y, (x, weight)

    def backward(saved: tuple[jax.Array, QTensor], dy: jax.Array):
        x, weight = saved
        _, pull_back = jax.vjp(float_product, x, weight.with_activation(None))
        dx, dweight = pull_back(dy)
        return _pass_through(dx, dweight, x, weight, axes)

    quantized.defvjp(forward, backward)
    return quantized(x, weight)


def quantize_activation(x: jax.Array, weight: QTensor, axes: ActivationAxes) -> QTensor:
    """`x` quantized by `weight.meta.activation`, with its axes in `axes.order`.

    On a mesh with explicit axes each device quantizes its part, if it has all numbers
    that share a scale. Otherwise XLA partitions the quantization.
    """
    spec, input_range = weight.meta.activation, weight.input_range
    assert spec is not None
    x = jnp.transpose(x, axes.order)
    mesh = all_explicit_mesh(x)
    if mesh is None or input_range is not None:
        return _quantize(x, spec, input_range, axes)
    if specs_of_parts(x, spec, axes, explicit_spec(x), mesh) is None:
        return _quantize_in_xla(x, spec, axes)
    return _quantize_parts(x, spec, axes, mesh)


def specs_of_parts(
    x: Any, spec: QuantSpec, axes: ActivationAxes, names: Sequence[Any], mesh: Any
) -> QTensor | None:
    """The PartitionSpecs of the quantized parts of an activation.

    Args:
      x: the activation or its shape, with its axes in `axes.order`.
      spec: its quantization, without a static range.
      axes: the roles of its axes.
      names: the mesh axes of each axis of `x`.
      mesh: the mesh with the sizes of its axes.

    Returns:
      A QTensor with the PartitionSpec of each leaf. None if numbers of several devices
      share a scale.
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    whole = jax.eval_shape(lambda x: _quantize(x, spec, None, axes), shape)
    if find_cuts(whole, names, mesh):
        return None
    specs = leaf_specs(whole, names)
    sharded = {name for entry in names for name in names_in(entry)}
    for leaf in jax.tree.leaves(specs):
        if sharded - {name for entry in leaf for name in names_in(entry)}:
            return None
    return specs


@functools.partial(jax.jit, static_argnames=("spec", "axes", "mesh"))
def _quantize_parts(
    x: jax.Array, spec: QuantSpec, axes: ActivationAxes, mesh: Any
) -> QTensor:
    """`x` quantized by the devices of a mesh, each of which has a part."""
    names = explicit_spec(x)
    specs = specs_of_parts(x, spec, axes, names, mesh)
    leaf_list, structure = jax.tree.flatten(specs)

    def quantize_part(x: jax.Array) -> list[jax.Array]:
        # A QTensor would have the geometry of the part.
        return jax.tree.leaves(_quantize(x, spec, None, axes))

    leaves = call_on_parts(quantize_part, mesh, (PartitionSpec(*names),), leaf_list, x)
    return jax.tree.unflatten(structure, leaves)


def _quantize(
    x: jax.Array, spec: QuantSpec, input_range: jax.Array | None, axes: ActivationAxes
) -> QTensor:
    """`x` quantized, with its axes in `axes.order` already.

    `kernels.quantize_activation` has the bits of `quantize`. It takes dynamic ranges
    only. With a static range there are no extremes to find, and XLA needs one launch.
    """
    if input_range is not None:
        bounds = range_ends(input_range, axes.range_axes)
        return _quantize_in_xla(x, spec, axes, bounds)
    array, batch = ArrayFacts(tuple(x.shape), x.dtype.name), range(axes.num_batch)
    facts = activation_facts(array, spec, axes.contracting, tuple(batch))
    if not isinstance(activation_problem(facts), kernels.ActivationProblem):
        return _quantize_in_xla(x, spec, axes)
    activation = kernels.quantize_activation(x, spec, facts.meta.geometry)
    meta = dataclasses.replace(activation.meta, name="activation")
    return dataclasses.replace(activation, meta=meta)


def _quantize_in_xla(
    x: jax.Array,
    spec: QuantSpec,
    axes: ActivationAxes,
    bounds: tuple[jax.Array, jax.Array] | None = None,
) -> QTensor:
    """`x` quantized by its own extremes or by bounds, in plain XLA."""
    return quantize(
        x,
        spec,
        contracting=axes.contracting,
        batch=tuple(range(axes.num_batch)),
        on_nonfinite="propagate",
        bounds=bounds,
        name="activation",
    )


def _pass_through(
    dx: jax.Array,
    dweight: QTensor,
    x: jax.Array,
    weight: QTensor,
    axes: ActivationAxes,
) -> tuple[jax.Array, QTensor]:
    """Turns the gradients of the float product into those of the quantized product.

    Args:
      dx: gradient of the float product with respect to `x`.
      dweight: gradient of the float product with respect to the weight without its
        activation spec.
      x: the activation before it is quantized.
      weight: the weight with its activation spec.
      axes: roles of the axes of `x`.

    Returns:
      Gradients of `x` and of `weight`. The gradient of the static range is zero.
    """
    if weight.input_range is None:
        return dx, dataclasses.replace(dweight, meta=weight.meta)
    batch, spec = axes.order[: axes.num_batch], weight.meta.activation

    def without_clipped(
        dx: jax.Array, x: jax.Array, input_range: jax.Array
    ) -> jax.Array:
        low, high = (
            broadcastable(end, batch, x.ndim)
            for end in range_ends(input_range, axes.range_axes)
        )
        low, high = with_margin(low, high, spec)
        return jnp.where((low <= x) & (x <= high), dx, jnp.zeros((), dx.dtype))

    x_spec = PartitionSpec(*explicit_spec(x))
    dx = call_on_auto_axes(without_clipped, x_spec, dx, x, weight.input_range)
    no_gradient = jnp.zeros_like(weight.input_range)
    return dx, dataclasses.replace(dweight, meta=weight.meta, input_range=no_gradient)


def range_ends(
    input_range: jax.Array, range_axes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """(low, high) of a static range, `[*batch]` in the product's order of batch axes.

    Both are `[]` if the whole activation shares one range. Only a weight with leading
    batch axes has one range for each batch element.
    """
    if input_range.ndim == 1:
        return input_range[0], input_range[1]
    ordered = jnp.transpose(input_range, (*range_axes, len(range_axes)))
    return ordered[..., 0], ordered[..., 1]
