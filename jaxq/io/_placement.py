"""The devices of the arrays of a file, known before any array is read.

`load` reads only the parts of an array that the devices of this process need. So no
device and no process ever holds a whole array that is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
from jax.sharding import AbstractMesh, NamedSharding

from jaxq.io._into_tree import leaves_by_name, value_in
from jaxq.processes import put
from jaxq.qtensor import (
    LEAVES,
    QTensor,
    fitting_spec,
    is_nnx_module,
    leaf_specs,
    relayout,
)
from jaxq.sharding import check_mesh, shardings_of

# `plan(shapes)` gets a tree of `jax.ShapeDtypeStruct`s and QTensors of them. It returns
# the tree with a sharding in place of each shape, or None.
Plan = Callable[[Any], Any]
# `place(name, value)` returns an array or a QTensor after it was read.
Place = Callable[[str, Any], Any]


def plan_like(into: Any, owner: str) -> tuple[Plan, Place, set[Any]]:
    """Functions that put arrays of a file on the devices of their targets.

    Args:
      into: the model or the tree that `load` fills.
      owner: the beginning of errors.

    Returns:
      (plan, place, devices). The plan has None for a value that has no target, or does
      not fit it: the comparison of the whole file with `into` names it. `place` gives
      codes the axis order of their target, which a file does not keep. `devices` are
      those of all targets.

    Raises:
      ValueError: two leaves of `into` have the same path; or `into` has shapes on a
        mesh that is not the current mesh.
    """
    targets = {name: value_in(leaf) for name, leaf in _targets(into, owner).items()}
    for name, target in targets.items():
        for leaf in jax.tree.leaves(target):
            _check_mesh(leaf, name, owner)

    def plan(shapes: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            shapes, is_leaf=lambda node: isinstance(node, QTensor)
        )
        shardings = []
        for path, value in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            shardings.append(_sharding_like(value, targets.get(name)))
        return jax.tree.unflatten(treedef, shardings)

    def place(name: str, value: Any) -> Any:
        target = targets.get(name)
        if not isinstance(value, QTensor) or not isinstance(target, QTensor):
            return value
        return _in_layout_of(value, target)

    devices: set[Any] = set()
    for leaf in jax.tree.leaves(targets):
        sharding = _chosen_sharding(leaf)
        if sharding is not None:
            devices.update(sharding.device_set)
    return plan, place, devices


def plan_on_mesh(into: Any, mesh: Any, rules: Any, owner: str) -> Plan | None:
    """A function that finds the sharding of every array of a file on a mesh.

    Args:
      into: the model or the tree that `load` fills, or None.
      mesh: the mesh of devices. If it is None, there is no plan.
      rules: as in `jaxq.sharding.place`.
      owner: the beginning of errors.

    Raises:
      TypeError: `mesh` is not a mesh of devices; or there are rules and no mesh.
    """
    if mesh is None:
        if rules is not None:
            raise TypeError(f"{owner}: rules= needs mesh=, the mesh of devices.")
        return None
    check_mesh(mesh, owner)

    def plan(shapes: Any) -> Any:
        return shardings_of(shapes, mesh, rules, into=into, caller=owner)

    return plan


def _targets(into: Any, owner: str) -> dict[str, Any]:
    """The arrays and QTensors of `into` by the names that they have in a file."""
    if not is_nnx_module(into):
        return leaves_by_name(into, owner)
    from jaxq.io._model_arrays import array_leaves, path_name, value_of

    targets = {}
    for path, leaf in array_leaves(into):
        # A Variable can hold a tree.
        for inner, value in leaves_by_name(value_of(leaf), owner).items():
            targets[path_name((*path, inner) if inner else path)] = value
    return targets


def _sharding_like(value: Any, target: Any) -> Any:
    """The sharding of an array, or of each leaf of a QTensor, after that of its target.

    None if they do not fit.
    """
    if not hasattr(value, "shape") or getattr(target, "shape", None) != value.shape:
        return None
    if isinstance(target, QTensor):
        return _shardings_of_target(value, target)
    sharding = _chosen_sharding(target)
    if sharding is None or not isinstance(value, QTensor):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, value)
    # Codes and scales are sharded as the float array.
    mesh, specs = sharding.mesh, leaf_specs(value, sharding.spec)
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, fitting_spec(mesh, spec, leaf.shape)),
        value,
        specs,
    )


def _shardings_of_target(value: Any, target: QTensor) -> QTensor | None:
    """The sharding of each leaf of the target. None if its codes have another order."""
    if not isinstance(value, QTensor) or _needs_relayout(value, target):
        return None
    leaves = []
    for name in LEAVES:
        leaf, target_leaf = getattr(value, name), getattr(target, name)
        if isinstance(leaf, QTensor) and isinstance(target_leaf, QTensor):
            leaves.append(_shardings_of_target(leaf, target_leaf))
        else:
            leaves.append(_leaf_sharding(leaf, target_leaf))
    return QTensor.tree_unflatten(value.meta, leaves)


def _leaf_sharding(leaf: Any, target: Any) -> Any:
    if leaf is None or isinstance(leaf, QTensor):
        return None
    sharding = _chosen_sharding(target)
    if not isinstance(sharding, NamedSharding):
        return sharding
    # Codes in another packing have another size, which may not divide evenly.
    spec = fitting_spec(sharding.mesh, sharding.spec, leaf.shape)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _needs_relayout(value: QTensor, target: QTensor) -> bool:
    return not value.meta.geometry.flat and value.meta.layout != target.meta.layout


def _in_layout_of(value: QTensor, target: QTensor) -> QTensor:
    """The QTensor with codes in the order of the target, and on its devices."""
    if value.shape != target.shape or not _needs_relayout(value, target):
        return value
    value = relayout(value, target.meta.layout)
    shardings = _shardings_of_target(value, target)
    assert shardings is not None
    return jax.tree.map(
        lambda leaf, at: leaf if at is None else put(leaf, at, compares=False),
        value,
        shardings,
    )


def _chosen_sharding(target: Any) -> Any:
    """The sharding that the user chose for an array or a shape; None if there is none.

    A shape that was made in `jax.set_mesh` has a mesh without devices. The devices are
    those of the current mesh.
    """
    if isinstance(target, jax.ShapeDtypeStruct):
        sharding = target.sharding
        if _is_abstract(sharding):
            return NamedSharding(jax.sharding.get_mesh(), sharding.spec)
        return sharding
    if isinstance(target, jax.Array) and target.committed:
        return target.sharding
    return None


def _check_mesh(leaf: Any, name: str, owner: str) -> None:
    """Raises ValueError if the mesh of a shape is unknown."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(leaf, jax.ShapeDtypeStruct) or not _is_abstract(sharding):
        return
    current = jax.sharding.get_mesh()
    if current.empty or current.abstract_mesh != sharding.mesh:
        raise ValueError(
            f"{owner}: {name} is a shape on {sharding.mesh}, and the current mesh is "
            f"{current.abstract_mesh}. Call load in `with jax.set_mesh(mesh):`, with "
            "the mesh in which the shapes were made."
        )


def _is_abstract(sharding: Any) -> TypeGuard[NamedSharding]:
    """Whether a sharding names mesh axes, but no devices."""
    is_named = isinstance(sharding, NamedSharding)
    return is_named and isinstance(sharding.mesh, AbstractMesh)
