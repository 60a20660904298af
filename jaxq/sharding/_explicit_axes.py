"""Meshes whose axes have the type `jax.sharding.AxisType.Explicit`.

The sharding of an array over such axes is part of the array's type. Then every
operation must state the sharding of its result. Loops over blocks of rows, Pallas
kernels and the steps of methods cannot. They run with all axes of type Auto instead:
XLA chooses the shardings inside, and only the sharding of the result is stated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_spec(x: Any) -> tuple:
    """The mesh axes of each axis of an array, as its type states them.

    An axis whose mesh axes are not part of the type has None.
    """
    spec = getattr(jax.typeof(x).sharding, "spec", None)
    return tuple(spec or (None,) * jnp.ndim(x))


def call_on_auto_axes(
    fn: Callable[..., jax.Array], spec: Sequence[Any], *args: Any
) -> jax.Array:
    """Calls `fn(*args)` with the explicit mesh axes of the arguments left to XLA.

    If no argument is on a mesh with explicit axes, this is `fn(*args)`.

    Args:
      fn: gives one array.
      spec: the mesh axes of each axis of the result. Two factors of a product can name
        the same mesh axis. The first axis of the result keeps it.
      *args: pytrees of arrays.
    """
    leaves = jax.tree.leaves(args)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
    explicit_meshes = [mesh for mesh in meshes if _explicit_names(mesh)]
    if not explicit_meshes:
        return fn(*args)
    mesh = explicit_meshes[0]
    call: Any = jax.sharding.auto_axes(
        fn,
        axes=tuple(_explicit_names(mesh)),
        out_sharding=NamedSharding(mesh, _without_repeats(spec)),
    )
    return call(*args)


@contextlib.contextmanager
def on_auto_axes(tree: Any) -> Iterator[Any]:
    """Gives a tree of arrays whose explicit mesh axes have become Auto axes.

    Quantization methods run in this context: a weight, its statistics and its key
    enter, and no step of the method has to state a sharding.
    """
    leaves = jax.tree.leaves(tree)
    meshes = [leaf.sharding.mesh for leaf in leaves if _has_explicit_mesh(leaf)]
    if not meshes:
        yield tree
        return
    names = meshes[0].axis_names
    mesh = Mesh(meshes[0].devices, names, axis_types=(AxisType.Auto,) * len(names))

    def put(leaf: Any) -> Any:
        if not _has_explicit_mesh(leaf):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    with jax.set_mesh(mesh):
        yield jax.tree.map(put, tree)


def names_in(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec: None, a name or a tuple."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _without_repeats(spec: Sequence[Any]) -> PartitionSpec:
    """The spec without the entries that name a mesh axis a second time."""
    used: set[str] = set()
    entries = []
    for entry in spec:
        names = set(names_in(entry))
        entries.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*entries)


def _explicit_names(mesh: Any) -> list[str]:
    """The axes of explicit type; none if the mesh is empty."""
    if mesh.empty:
        return []
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in axis_types if kind == AxisType.Explicit]


def _has_explicit_mesh(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    is_named = isinstance(sharding, NamedSharding)
    return is_named and AxisType.Explicit in sharding.mesh.axis_types
