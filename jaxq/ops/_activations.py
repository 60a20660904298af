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
from jax.custom_derivatives import SymbolicZero
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
from jaxq.ops._tangents import checkpointed_tangent
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
      mapped: the mesh axes over which `jax.vmap` maps, as in `call_on_parts`.
    """

    order: tuple[int, ...]
    contracting: tuple[int, ...]
    num_batch: int = 0
    range_axes: tuple[int, ...] = ()
    mapped: tuple[str, ...] | None = None


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
      float_product: multiplies `x` itself by the weight. The derivative is that of
        this function, except where a static range clips.
      is_convolution: tells policies of `jax.checkpoint` that this is no dot product.

    Returns:
      The result of `codes_product`.
    """

    @jax.custom_jvp
    def quantized(x: jax.Array, weight: QTensor) -> jax.Array:
        activation = quantize_activation(x, weight, axes)
        return codes_product(activation, weight.with_activation(None))

    def derivative(primals: tuple[jax.Array, QTensor], tangents: tuple):
        x, weight = primals
        x_dot, weight_dot = tangents
        has_batch = is_convolution or axes.num_batch > 0
        num_terms = math.prod(x.shape[axes.order[axis]] for axis in axes.contracting)
        if is_convolution:
            num_terms = weight.meta.geometry.contracted_size
        y = kernels.mark_product(
            quantized(x, weight), has_batch=has_batch, num_terms=num_terms
        )
        terms = []
        if not isinstance(x_dot, SymbolicZero):
            # The product is linear in `x`: the tangent takes the place of `x`.
            x_dot = _without_clipped(x_dot, x, weight, axes)
            terms.append(float_product(x_dot, weight.with_activation(None)))
        of_weight = checkpointed_tangent(
            lambda weight: float_product(x, weight.with_activation(None)),
            (weight,),
            (weight_dot,),
        )
        if of_weight is not None:
            terms.append(of_weight)
        return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)

    quantized.defjvp(derivative, symbolic_zeros=True)
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
    # `jax.vmap` may map over all axes of the mesh. Then there are no parts.
    has_parts = axes.mapped is None or len(axes.mapped) < len(mesh.axis_names)
    specs = specs_of_parts(x, spec, axes, explicit_spec(x), mesh)
    if not has_parts or specs is None:
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

    in_specs = (PartitionSpec(*names),)
    leaves = call_on_parts(
        quantize_part, mesh, in_specs, leaf_list, x, mapped=axes.mapped
    )
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


def _without_clipped(
    x_dot: jax.Array, x: jax.Array, weight: QTensor, axes: ActivationAxes
) -> jax.Array:
    """The tangent of `x`, zero where a static range clips `x`."""
    if weight.input_range is None:
        return x_dot
    batch, spec = axes.order[: axes.num_batch], weight.meta.activation

    def keep_unclipped(
        x_dot: jax.Array, x: jax.Array, input_range: jax.Array
    ) -> jax.Array:
        low, high = (
            broadcastable(end, batch, x.ndim)
            for end in range_ends(input_range, axes.range_axes)
        )
        low, high = with_margin(low, high, spec)
        return jnp.where((low <= x) & (x <= high), x_dot, jnp.zeros((), x_dot.dtype))

    x_spec = PartitionSpec(*explicit_spec(x))
    return call_on_auto_axes(keep_unclipped, x_spec, x_dot, x, weight.input_range)


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
