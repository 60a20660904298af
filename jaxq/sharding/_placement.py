"""Weights over a mesh: quantized with their axes left to XLA, and put where the floats lay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxq.qtensor import QTensor


@contextlib.contextmanager
def on_auto_axes(tree: Any) -> Iterator[Any]:
    """A weight, and what goes with it, with the axes of its mesh left to XLA.

    Over explicit axes every step of a method would have to say how its result lies.
    """
    meshes = [
        leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_explicit(leaf)
    ]
    if not meshes:
        yield tree
        return
    names = meshes[0].axis_names
    mesh = Mesh(meshes[0].devices, names, axis_types=(AxisType.Auto,) * len(names))

    def put(leaf: Any) -> Any:
        return (
            jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
            if _is_explicit(leaf)
            else leaf
        )

    with jax.set_mesh(mesh):
        yield jax.tree.map(put, tree)


def _is_explicit(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return (
        isinstance(sharding, NamedSharding)
        and AxisType.Explicit in sharding.mesh.axis_types
    )


def placed_like(qt: QTensor, floats: Any) -> QTensor:
    """Codes and scales over the mesh axes that the weight lies over; where a leaf cannot be cut evenly, it is whole.

    Args:
      qt: the weight, in canonical storage `[*batch, *kept, k]`.
      floats: the weight as it was, over a mesh or not.
    """
    sharding = getattr(floats, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return qt
    geometry, mesh = qt.meta.geometry, sharding.mesh
    spec = (*sharding.spec, *(None,) * (qt.ndim - len(sharding.spec)))
    first, *others = (spec[a] for a in geometry.contracted)
    along = None if any(others) else first  # k is cut where its first axis is
    wanted = (*spec[: len(qt.batch_shape)], *(spec[a] for a in geometry.kept), along)

    def put(leaf: jax.Array) -> jax.Array:
        def fits(entry: Any, size: int) -> bool:
            names = (
                entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            )
            return size % math.prod(mesh.shape[name] for name in names) == 0

        cut = [
            entry if fits(entry, size) else None
            for entry, size in zip(wanted, leaf.shape, strict=False)
        ]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*cut)))

    return jax.tree.map(put, qt)
