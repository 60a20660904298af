"""Puts the values of a file on the devices of the arrays whose place they take.

Each value moves as soon as it is read. So the first device never holds more than one
value of a model that is sharded over many devices.
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
    relayout,
    shard_like,
)

Place = Callable[[str, Any], Any]


def placement(into: Any, owner: str) -> Place:
    """A function that puts a value of a file on the devices of its target.

    Args:
      into: the model or the tree that `load` fills.
      owner: the beginning of errors.

    Returns:
      `place(name, value)`. A value that has no target, or does not fit it, stays where
      it is: the comparison of the whole file with `into` names it.

    Raises:
      ValueError: two leaves of `into` have the same path; or `into` has shapes on a
        mesh that is not the current mesh.
    """
    targets = {name: value_in(leaf) for name, leaf in _targets(into, owner).items()}
    for name, target in targets.items():
        for leaf in jax.tree.leaves(target):
            _check_mesh(leaf, name, owner)

    def place(name: str, value: Any) -> Any:
        return _put_like(value, targets.get(name))

    return place


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


def _put_like(value: Any, target: Any) -> Any:
    """The value on the devices of the target, if both have the same shape."""
    if not isinstance(value, QTensor | jax.Array):
        return value
    if getattr(target, "shape", None) != value.shape:
        return value
    if isinstance(target, QTensor):
        is_quantized = isinstance(value, QTensor)
        return _put_qtensor_like(value, target) if is_quantized else value
    sharding = _chosen_sharding(target)
    if sharding is None:
        return value
    if isinstance(value, QTensor) and isinstance(sharding, NamedSharding):
        floats = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return shard_like(value, floats)
    return put(value, sharding)


def _put_qtensor_like(value: QTensor, target: QTensor) -> QTensor:
    """The QTensor with each leaf on the devices of the same leaf of the target.

    The codes get the axis order of the target, which a file does not keep.
    """
    if not value.meta.geometry.flat:
        value = relayout(value, target.meta.layout)
    leaves = [
        _put_leaf_like(getattr(value, name), getattr(target, name)) for name in LEAVES
    ]
    return QTensor.tree_unflatten(value.meta, leaves)


def _put_leaf_like(leaf: Any, target: Any) -> Any:
    if isinstance(leaf, QTensor) and isinstance(target, QTensor):
        return _put_qtensor_like(leaf, target)
    sharding = _chosen_sharding(target)
    if not isinstance(leaf, jax.Array) or sharding is None:
        return leaf
    if isinstance(sharding, NamedSharding):
        # Codes in another packing have another size, which may not divide evenly.
        spec = fitting_spec(sharding.mesh, sharding.spec, leaf.shape)
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return put(leaf, sharding)


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
