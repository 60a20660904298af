"""Shards a result as the caller's argument `out_sharding=` says."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxq.meshes import names_in


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
