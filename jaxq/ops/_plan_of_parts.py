"""What each device of a mesh does for one product, for `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jaxq.meshes import names_in
from jaxq.ops._activations import (
    activation_axes,
    quantize_activation,
    specs_of_parts,
)
from jaxq.ops._decision import plan_of_term
from jaxq.ops._dimension_numbers import DimensionNumbers, batch_first, mirrored
from jaxq.ops._part_layout import PartLayout, gathered_names, part_layout
from jaxq.ops._plan import Plan
from jaxq.ops._ragged_parts import ragged_layout
from jaxq.qtensor import QTensor, axes_of_array, leaf_specs


def mesh_of(mesh: Any, *operands: Any) -> Any:
    """The mesh on which each device multiplies its parts; None if there is none.

    It is the given mesh, that of operands with explicit axes, or that of
    `jax.set_mesh`. Operands with automatic axes do not tell which mesh is in use when
    the product runs.
    """
    if mesh is not None:
        return mesh
    for leaf in jax.tree.leaves(operands):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and AxisType.Explicit in (
            sharding.mesh.axis_types
        ):
            return sharding.mesh
    current = jax.sharding.get_abstract_mesh()
    return None if current.empty or current.manual_axes else current


# `plan_on_one(lhs, rhs, dims)` is the plan of a product on one device.
PlanOnOne = Callable[[Any, Any, DimensionNumbers], Plan]


def plan_of_parts(
    lhs: Any,
    rhs: Any,
    dims: DimensionNumbers,
    mesh: Any,
    plan_on_one: PlanOnOne,
    *,
    derivative: bool = False,
) -> Plan | str:
    """The plan of each device, or why devices do not multiply parts.

    Args:
      lhs: array, `jax.ShapeDtypeStruct` or QTensor. Its sharding is that of its leaves.
        An operand without a sharding is replicated.
      rhs: likewise.
      dims: dimension numbers without negative axes.
      mesh: the mesh of devices.
      plan_on_one: returns the plan of a product on one device.
      derivative: True if it is the product for the gradient of the activation.
    """
    problem = why_not_parts(mesh)
    if problem is not None:
        return problem
    names = (names_of(lhs), names_of(rhs))
    whole = plan_on_one(_shapes(lhs), _shapes(rhs), dims)
    if whole.path == "dense":
        return "no operand is quantized"
    original = _Operands(lhs, rhs, dims, names)
    operands = _prepared(whole, original)
    plan = _product_of_parts(operands, mesh, plan_on_one, derivative)
    if isinstance(plan, str):
        return plan
    if plan.kernel == "xla" and whole.outlier_product is not None:
        # The product of the outlier columns may still have a kernel.
        floats = _product_of_parts(
            _without_activation(original), mesh, plan_on_one, False
        )
        if isinstance(floats, Plan):
            plan = _with_kernel_of(plan, floats)
    if derivative:
        return plan
    plan = _with_kernel_of(dataclasses.replace(whole, result=plan.result), plan)
    if plan.activation == "dynamic" and _shares_scales(whole, original, mesh):
        plan = dataclasses.replace(
            plan,
            activation_kernel="xla",
            why_no_activation_kernel="numbers on several devices share a scale",
        )
    return plan


def plan_of_ragged_parts(
    x: Any, weights: QTensor, mesh: Any, plan_on_one: Callable[[Any, Any], Plan]
) -> Plan | str:
    """The plan of each device for `ragged_dot`, or why devices do not multiply parts.

    Args:
      x: rows `[m, k]`, or their shape.
      weights: `[e, k, n]`. The leaves may be shapes.
      mesh: the mesh of devices.
      plan_on_one: returns the plan of a product on one device.
    """
    problem = why_not_parts(mesh)
    if problem is not None:
        return problem
    names = (names_of(x), names_of(weights))
    layout = ragged_layout(x, weights, names, mesh)
    in_specs = (layout.x, leaf_specs(weights, layout.weights))
    x_part, weights_part = shapes_of_part((x, weights), in_specs, mesh)
    return dataclasses.replace(
        plan_on_one(x_part, weights_part),
        num_devices=mesh.size,
        part=_text(x_part, weights_part),
        gathered=gathered_names(names, layout[:2]),
        summed=layout.summed,
    )


def why_not_parts(mesh: Any) -> str | None:
    """Why the devices of a mesh do not compute parts; None if they do."""
    kinds = set(mesh.axis_types)
    if len(kinds) != 1:
        return "the mesh has axes of several types"
    if kinds == {AxisType.Auto}:
        return (
            "the mesh axes are automatic; with explicit axes each device runs a kernel "
            "on its part"
        )
    return None


class _Operands(NamedTuple):
    """The operands of a product, and how they lie on a mesh.

    Attributes:
      lhs: array, shape or QTensor.
      rhs: likewise.
      dims: dimension numbers of their product.
      names: the mesh axes of each axis of lhs, and of rhs.
    """

    lhs: Any
    rhs: Any
    dims: DimensionNumbers
    names: tuple[tuple, tuple]


def _prepared(plan: Plan, operands: _Operands) -> _Operands:
    """The shapes of the operands after the preparations `plan.before`."""
    for step in plan.before:
        lhs, rhs, dims, names = operands
        if step == "scale_left":
            operands = _Operands(lhs, _without_input_scale(rhs), dims, names)
        elif step == "scale_right":
            operands = _Operands(_without_input_scale(lhs), rhs, dims, names)
        elif step == "dequantize_left":
            floats = jax.ShapeDtypeStruct(lhs.shape, lhs.dtype)
            operands = _Operands(floats, rhs, dims, names)
        else:
            operands = _quantized(operands, swapped=step == "quantize_right")
    return operands


def _quantized(operands: _Operands, *, swapped: bool) -> _Operands:
    """The operands after the activation is quantized. It is then on the left."""
    lhs, rhs, dims, names = operands
    x, weight = (rhs, lhs) if swapped else (lhs, rhs)
    x_names, weight_names = reversed(names) if swapped else names
    axes = activation_axes(x.ndim, dims, swapped=swapped)
    _, quantized_dims = batch_first(x.ndim, dims, 1 if swapped else 0)
    if swapped:
        quantized_dims = mirrored(quantized_dims)
    activation = jax.eval_shape(
        lambda x, weight: quantize_activation(x, weight, axes),
        _shapes(x),
        _shapes(weight),
    )
    ordered = tuple(x_names[axis] for axis in axes.order)
    sides = (activation, weight.with_activation(None))
    return _Operands(*sides, quantized_dims, (ordered, weight_names))


def _shares_scales(plan: Plan, operands: _Operands, mesh: Any) -> bool:
    """True if numbers on several devices share a scale of the activation."""
    lhs, rhs, dims, names = operands
    swapped = "quantize_right" in plan.before
    x, weight = (rhs, lhs) if swapped else (lhs, rhs)
    axes = activation_axes(x.ndim, dims, swapped=swapped)
    x_names = names[1 if swapped else 0]
    shape = tuple(x.shape[axis] for axis in axes.order)
    ordered = [x_names[axis] for axis in axes.order]
    moved = jax.ShapeDtypeStruct(shape, x.dtype)
    spec = weight.meta.activation
    return specs_of_parts(moved, spec, axes, ordered, mesh) is None


def _product_of_parts(
    operands: _Operands, mesh: Any, plan_on_one: PlanOnOne, derivative: bool
) -> Plan | str:
    """The plan of each device for a product without preparations."""
    lhs, rhs, dims, names = operands
    layout = part_layout(lhs, rhs, dims, names, mesh)
    if layout is None:
        return "a shard would cut blocks of the weight"
    in_specs = layout.in_specs(lhs, rhs)
    lhs_part, rhs_part = shapes_of_part((lhs, rhs), in_specs, mesh)
    plan = plan_on_one(lhs_part, rhs_part, dims)
    summed = layout.summed
    if derivative:
        summed = _summed_in_gradient(lhs, layout, dims)
    elif summed:
        plan = plan_of_term(plan, lhs, rhs)
    return dataclasses.replace(
        plan,
        num_devices=mesh.size,
        part=_text(lhs_part, rhs_part),
        gathered=gathered_names(names, layout[:2]),
        summed=summed,
    )


def shapes_of_part(tree: Any, specs: Any, mesh: Any) -> Any:
    """The shapes of one device's part of a tree.

    Args:
      tree: arrays, shapes and QTensors.
      specs: the PartitionSpec of each leaf.
      mesh: the mesh with the sizes of its axes.
    """
    parts = []

    def record(tree: Any) -> tuple[()]:
        parts.append(_shapes(tree))
        return ()

    # Automatic axes: the shapes do not say how they are sharded.
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    sizes = AbstractMesh(tuple(mesh.shape.values()), tuple(mesh.axis_names), automatic)
    with jax.sharding.use_abstract_mesh(sizes):
        see_part = jax.shard_map(record, mesh=sizes, in_specs=(specs,), out_specs=())
        jax.eval_shape(see_part, _shapes(tree))
    return parts[0]


def _with_kernel_of(plan: Plan, other: Plan) -> Plan:
    """The plan with the kernel, the parts and the collectives of another plan."""
    fields = ("kernel", "why_no_kernel", "passed_over", "num_devices", "part")
    fields = (*fields, "gathered", "summed")
    return dataclasses.replace(plan, **{name: getattr(other, name) for name in fields})


def _without_activation(operands: _Operands) -> _Operands:
    """The operands of a product whose activation stays in floats."""
    lhs, rhs = (
        _without_input_scale(operand.with_activation(None))
        if isinstance(operand, QTensor)
        else operand
        for operand in operands[:2]
    )
    return operands._replace(lhs=lhs, rhs=rhs)


def _without_input_scale(weight: QTensor) -> QTensor:
    return dataclasses.replace(weight, input_scale=None)


def _shapes(tree: Any) -> Any:
    """The shapes of a tree, without shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _summed_in_gradient(
    lhs: Any, layout: PartLayout, dims: DimensionNumbers
) -> tuple[str, ...]:
    """The mesh axes over which the gradient of the activation is summed.

    These are the mesh axes of the weight's free axes: the gradient sums over them.
    """
    weight = 0 if isinstance(lhs, QTensor) else 1
    (contracting, batch), spec = dims, layout[weight]
    bound = (*contracting[weight], *batch[weight])
    free = (names_in(entry) for axis, entry in enumerate(spec) if axis not in bound)
    return tuple(name for names in free for name in names)


def _text(lhs: Any, rhs: Any) -> str:
    """The shapes of the parts, such as "[4, 64] @ [64, 128]"."""
    return f"{list(lhs.shape)} @ {list(rhs.shape)}"


def names_of(operand: Any) -> tuple:
    """The mesh axes of each axis of an operand; None where it is not sharded."""
    leaf = operand.data if isinstance(operand, QTensor) else operand
    sharding = getattr(leaf, "sharding", None)
    spec = tuple(getattr(sharding, "spec", None) or ())
    spec = (*spec, *[None] * (leaf.ndim - len(spec)))
    if isinstance(operand, QTensor):
        return tuple(axes_of_array(operand, spec))
    return spec
