"""Meshes whose axes are part of an array's type (`jax.sharding.AxisType.Explicit`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec_of(x: Any) -> tuple:
    """The mesh axes that each axis of an array lies over, where that is part of its type."""
    return tuple(getattr(jax.typeof(x).sharding, "spec", None) or (None,) * jnp.ndim(x))


def over_explicit_axes(
    fn: Callable[..., jax.Array], spec: Sequence[Any], *args: Any
) -> jax.Array:
    """`fn(*args)` where mesh axes of explicit type among the operands' are left to XLA.

    Loops over blocks of rows have no sharding that a type could state. Only the result's is: `spec`, less what names a
    mesh axis twice. Without such axes it is the call.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args)]
    found = {mesh: [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit]
             for mesh in meshes if not mesh.empty}  # fmt: skip
    mesh = next((mesh for mesh, names in found.items() if names), None)
    if mesh is None:
        return fn(*args)
    taken: set[str] = set()
    out = []
    for entry in spec:
        names = set(
            entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        )
        out.append(None if names & taken else entry)
        taken |= names
    sharding = NamedSharding(mesh, PartitionSpec(*out))
    auto: Any = jax.sharding.auto_axes(
        fn, axes=tuple(found[mesh]), out_sharding=sharding
    )
    return auto(*args)


def lay_out(y: jax.Array, sharding: NamedSharding | PartitionSpec | None) -> jax.Array:
    """A result as its caller wants it to lie over a mesh; None leaves it.

    Over explicit axes that is part of its type; over others it is what XLA is told.

    Raises:
      NotImplementedError: axes of both types are named.
    """
    if sharding is None:
        return y
    mesh = (
        sharding.mesh
        if isinstance(sharding, NamedSharding)
        else jax.sharding.get_abstract_mesh()
    )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    named = {
        name
        for entry in spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
        if name is not None
    }
    explicit = {
        n
        for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if t == AxisType.Explicit
    }
    if not explicit:
        return jax.lax.with_sharding_constraint(y, sharding)
    if named - explicit:
        raise NotImplementedError(
            f"out_sharding={spec} names {sorted(named - explicit)}, whose axes are not explicit, in a mesh where "
            f"{sorted(explicit)} are: jax reshards along explicit axes only. Name those alone, and constrain the rest "
            "with jax.lax.with_sharding_constraint."
        )
    return jax.sharding.reshard(y, sharding)
