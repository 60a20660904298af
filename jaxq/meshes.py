"""Meshes whose axes have the type `jax.sharding.AxisType.Explicit`.

The sharding of an array over such axes is part of the array's type. So every operation
must state the sharding of its result. Loops over blocks of rows, Pallas kernels and the
steps of quantization methods cannot state it. The functions here run them with axes of
type Auto: XLA chooses the shardings inside, and only the sharding of the result is
stated.

`apply_out_sharding` shards a result as the caller's argument `out_sharding=` says.
`compile_time_eval` computes small constants while a program on a mesh is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxq.processes import put


def explicit_spec(x: Any) -> tuple:
    """The mesh axes over which each axis of an array is sharded, from its type.

    The entry is None for an axis that the type does not shard.
    """
    spec = getattr(jax.typeof(x).sharding, "spec", None)
    return tuple(spec or (None,) * jnp.ndim(x))


def is_explicit(x: Any) -> bool:
    """True if an array is on a mesh with explicit axes."""
    return bool(_explicit_names(jax.typeof(x).sharding.mesh))


@contextlib.contextmanager
def compile_time_eval() -> Iterator[None]:
    """As `jax.ensure_compile_time_eval`, also in `shard_map` and for a described mesh.

    Arrays that are made in this context are concrete and on one device. jax's own
    context computes on the present mesh. That fails if its axes are Manual, or if it is
    an `AbstractMesh` that only describes devices.
    """
    no_mesh = AbstractMesh((), ())
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(no_mesh):
        yield


def all_explicit_mesh(tree: Any) -> Any:
    """The mesh of the arrays of a tree if all its axes are explicit, else None."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty:
            return mesh if mesh.are_all_axes_explicit else None
    return None


def call_on_auto_axes(fn: Callable[..., Any], spec: Any, *args: Any) -> Any:
    """Calls `fn(*args)` with the explicit mesh axes turned into Auto axes.

    If no argument is on a mesh with explicit axes, it calls `fn(*args)` unchanged.

    Args:
      fn: returns a pytree of arrays.
      spec: the result with a PartitionSpec in place of each array. If two axes of an
        array name the same mesh axis, the first one keeps it. This happens if both
        factors of a product are sharded over it.
      *args: pytrees of arrays.
    """
    explicit_leaves = [leaf for leaf in jax.tree.leaves(args) if is_explicit(leaf)]
    if not explicit_leaves:
        return fn(*args)
    mesh = jax.typeof(explicit_leaves[0]).sharding.mesh
    out_sharding = jax.tree.map(
        lambda entry: NamedSharding(mesh, _without_repeats(entry)),
        spec,
        is_leaf=lambda entry: isinstance(entry, PartitionSpec),
    )
    call: Any = jax.sharding.auto_axes(
        fn, axes=tuple(_explicit_names(mesh)), out_sharding=out_sharding
    )
    if AxisType.Manual in mesh.axis_types:
        # A derivative may keep values of `fn` for its backward pass. Their mesh axes
        # are Auto. `jax.shard_map` gives them back with Explicit axes, and jax raises
        # an error. With `checkpoint`, a derivative keeps the arguments only.
        call = jax.checkpoint(call, prevent_cse=False)
    return call(*args)


@contextlib.contextmanager
def on_auto_axes(tree: Any) -> Iterator[Any]:
    """Yields a tree of arrays with their explicit mesh axes turned into Auto axes.

    Quantization methods run in this context. Their tree has a weight, its statistics
    and its PRNG key. No step of the method has to state a sharding.
    """
    leaves = jax.tree.leaves(tree)
    meshes = [leaf.sharding.mesh for leaf in leaves if _has_explicit_mesh(leaf)]
    if not meshes:
        yield tree
        return
    names = meshes[0].axis_names
    mesh = Mesh(meshes[0].devices, names, axis_types=(AxisType.Auto,) * len(names))

    def turned(leaf: Any) -> Any:
        if not _has_explicit_mesh(leaf):
            return leaf
        return put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    with jax.set_mesh(mesh):
        yield jax.tree.map(turned, tree)


def apply_out_sharding(
    y: jax.Array, out_sharding: NamedSharding | PartitionSpec | None
) -> jax.Array:
    """Shards a result as the caller asked.

    None changes nothing. If the mesh has axes of type Explicit, the sharding becomes
    part of the result's type. Otherwise it is a constraint for XLA.

    Raises:
      NotImplementedError: the mesh has axes of type Explicit, and `out_sharding` names
        an axis of another type.
    """
    if out_sharding is None:
        return y
    if isinstance(out_sharding, NamedSharding):
        mesh, spec = out_sharding.mesh, out_sharding.spec
    else:
        mesh, spec = jax.sharding.get_abstract_mesh(), out_sharding
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in axis_types if kind == AxisType.Explicit}
    if not explicit:
        return jax.lax.with_sharding_constraint(y, out_sharding)
    names: set[str] = set()
    for entry in spec:
        names.update(names_in(entry))
    others = names - explicit
    if others:
        raise NotImplementedError(
            f"out_sharding={spec} names the mesh axes {sorted(others)}, which are not "
            f"Explicit. The Explicit axes of the mesh are {sorted(explicit)}. jax "
            "reshards along Explicit axes only. Name only Explicit axes in "
            "out_sharding. Shard over the other axes with "
            "jax.lax.with_sharding_constraint."
        )
    return jax.sharding.reshard(y, out_sharding)


def names_in(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec: None, a name or a tuple."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _without_repeats(spec: PartitionSpec) -> PartitionSpec:
    """The spec with None for each entry that repeats a mesh axis."""
    used: set[str] = set()
    entries = []
    for entry in spec:
        names = set(names_in(entry))
        entries.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*entries)


def _explicit_names(mesh: Any) -> list[str]:
    """The names of the axes of type Explicit. An empty mesh has none."""
    if mesh.empty:
        return []
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in axis_types if kind == AxisType.Explicit]


def _has_explicit_mesh(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    is_named = isinstance(sharding, NamedSharding)
    return is_named and AxisType.Explicit in sharding.mesh.axis_types
