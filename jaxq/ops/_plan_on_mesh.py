"""What each device of a mesh does for one product, for `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jaxq.meshes import names_in
from jaxq.ops._dimension_numbers import DimensionNumbers
from jaxq.ops._parts import PartLayout, part_layout
from jaxq.ops._plan import Plan
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


def plan_on_mesh(
    lhs: Any,
    rhs: Any,
    dims: DimensionNumbers,
    mesh: Any,
    plan_parts: Callable[[Any, Any], Plan],
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
      plan_parts: `plan_parts(lhs, rhs)` returns the plan of a product on one device.
      derivative: True if it is the product for the gradient of the activation.
    """
    kinds = set(mesh.axis_types)
    if len(kinds) != 1:
        return "the mesh has axes of several types"
    if kinds == {AxisType.Auto}:
        return (
            "the mesh axes are automatic; with explicit axes each device runs a kernel "
            "on its part"
        )
    names = (_axes_of(lhs), _axes_of(rhs))
    layout = part_layout(lhs, rhs, dims, names, mesh)
    if layout is None:
        return "a shard would cut blocks of the weight"
    plans = []

    def record(lhs: Any, rhs: Any) -> tuple[()]:
        plans.append((plan_parts(lhs, rhs), _text(lhs, rhs)))
        return ()

    in_specs = tuple(
        leaf_specs(operand, spec) if isinstance(operand, QTensor) else spec
        for operand, spec in zip((lhs, rhs), layout[:2], strict=True)
    )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (lhs, rhs)
    )
    # Automatic axes: the shapes of the operands do not say how they are sharded.
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    sizes = AbstractMesh(tuple(mesh.shape.values()), tuple(mesh.axis_names), automatic)
    with jax.sharding.use_abstract_mesh(sizes):
        multiply = jax.shard_map(record, mesh=sizes, in_specs=in_specs, out_specs=())
        jax.eval_shape(multiply, *shapes)
    plan, part = plans[0]
    reason = _why_whole(plan)
    if reason is not None:
        return reason
    if plan.activation_kernel is not None:
        plan = dataclasses.replace(
            plan,
            activation_kernel="xla",
            why_no_activation_kernel="it is quantized before it is cut into parts",
        )
    return dataclasses.replace(
        plan,
        num_devices=mesh.size,
        part=part,
        gathered=_gathered(names, layout),
        summed=_summed_in_gradient(lhs, layout, dims) if derivative else layout.summed,
    )


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


def _why_whole(plan: Plan) -> str | None:
    """Why XLA partitions a product; None if devices multiply parts."""
    if plan.path == "dense":
        return "no operand is quantized"
    if plan.before:
        return "x is quantized or scaled first, which XLA partitions"
    return None


def _text(lhs: Any, rhs: Any) -> str:
    """The shapes of the parts, such as "[4, 64] @ [64, 128]"."""
    return f"{list(lhs.shape)} @ {list(rhs.shape)}"


def _gathered(names: tuple[tuple, tuple], layout: PartLayout) -> tuple[str, ...]:
    """The mesh axes over which a device gets what other devices have."""
    gathered = []
    for before, after in zip(names, layout[:2], strict=True):
        for entry, new in zip(before, after, strict=True):
            missing = set(names_in(entry)) - set(names_in(new))
            gathered += [name for name in names_in(entry) if name in missing]
    return tuple(dict.fromkeys(gathered))


def _axes_of(operand: Any) -> tuple:
    """The mesh axes of each axis of an operand; None where it is not sharded."""
    leaf = operand.data if isinstance(operand, QTensor) else operand
    sharding = getattr(leaf, "sharding", None)
    spec = tuple(getattr(sharding, "spec", None) or ())
    spec = (*spec, *[None] * (leaf.ndim - len(spec)))
    if isinstance(operand, QTensor):
        return tuple(axes_of_array(operand, spec))
    return spec
