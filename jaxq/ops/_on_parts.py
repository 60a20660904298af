"""A function that each device of a mesh with explicit axes calls on its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxq.meshes import names_in


def call_on_parts(
    fn: Callable[..., Any],
    mesh: Any,
    in_specs: tuple,
    out_specs: Any,
    *args: Any,
    mapped: Sequence[str] | None = None,
) -> Any:
    """`fn` of the parts of each device, in `jax.shard_map`.

    The arguments are resharded first, so this must be traced under `jax.jit`. Codes and
    scales of a QTensor then move between devices, and its floats do not.

    Args:
      fn: function of the parts.
      mesh: a mesh whose axes are all explicit.
      in_specs: for each argument, the PartitionSpec of each leaf.
      out_specs: the PartitionSpecs of the results.
      *args: pytrees of arrays.
      mapped: the mesh axes over which `jax.vmap` maps, from `mapped_axes`. If it is
        None, `jax.shard_map` finds them. A derivative may be traced after `jax.vmap`
        has returned, when nothing can find them. So it passes the axes that were found
        when the function itself was traced.

    Raises:
      ValueError: the parts are shards over a mesh axis over which `jax.vmap` maps.
    """
    axis_names = set() if mapped is None else set(mesh.axis_names) - set(mapped)
    call = jax.shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names
    )
    try:
        args = jax.tree.map(
            lambda leaf, spec: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)),
            args,
            in_specs,
        )
        return call(*args)
    except ValueError as error:
        _check_mapped_axes(mesh, in_specs, error)
        raise


def _check_mapped_axes(mesh: Any, in_specs: tuple, error: ValueError) -> None:
    """Raises an error that names the mesh axes if `jax.vmap` maps over them."""
    entries = [entry for spec in jax.tree.leaves(in_specs) for entry in spec]
    used = {name for entry in entries for name in names_in(entry)}
    mapped = sorted(used & set(mapped_axes(mesh)))
    if mapped:
        raise ValueError(
            f"an operand is sharded over the mesh axes {mapped}, and jax.vmap maps "
            "over an axis that is sharded over them too. Shard the mapped axis over "
            "other mesh axes, or place the operand without these."
        ) from error


def mapped_axes(mesh: Any) -> tuple[str, ...]:
    """The mesh axes over which `jax.vmap` maps. `jax.shard_map` leaves them out."""
    manual: list[str] = []

    def record() -> tuple[()]:
        manual.extend(jax.sharding.get_abstract_mesh().manual_axes)
        return ()

    jax.eval_shape(jax.shard_map(record, mesh=mesh, in_specs=(), out_specs=()))
    return tuple(name for name in mesh.axis_names if name not in manual)
