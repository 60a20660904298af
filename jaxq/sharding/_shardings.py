"""shardings_of: the NamedSharding of every array of a file, before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.sharding._entries import (
    Entry,
    find_entries,
    present_spec,
    single_entry,
    state_of,
)
from jaxq.sharding._specs import specs_of_entries

Rules = PartitionSpec | Mapping[str, PartitionSpec] | None


def shardings_of(
    shapes: Any, mesh: Mesh, rules: Rules, *, into: Any = None, caller: str
) -> Any:
    """A tree with a NamedSharding in place of each array, and of each leaf of QTensors.

    Args:
      shapes: a tree or a flat dict of `jax.ShapeDtypeStruct`s and QTensors of them.
      mesh: the mesh of devices.
      rules: as in `specs`. If it is None, the PartitionSpec of an array is that of the
        array of `into` with its path and shape: its metadata, or its present sharding.
        All other arrays are replicated.
      into: a model or a tree, or None.
      caller: the public function, for errors.

    Raises:
      TypeError, ValueError: as in `specs`.
    """
    check_mesh(mesh, caller)
    if isinstance(rules, PartitionSpec):
        entries, treedef = [single_entry(shapes, rules, caller)], None
    else:
        entries, treedef = find_entries(shapes, rules, caller)
    if rules is None and into is not None:
        entries = _like(entries, into, caller)
    shardings = [
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        for specs in specs_of_entries(entries, mesh, caller)
    ]
    if treedef is None:
        return shardings[0]
    leaves = [entry.leaf_with(at) for entry, at in zip(entries, shardings, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def check_mesh(mesh: Any, caller: str) -> None:
    """Raises a TypeError unless `mesh` has devices."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{caller}: mesh must be a jax.sharding.Mesh of devices, got "
            f"{type(mesh).__name__}. Make one with jax.make_mesh."
        )


def _like(entries: list[Entry], into: Any, caller: str) -> list[Entry]:
    """The entries with the specs of the arrays of `into` with the same paths."""
    targets, _ = find_entries(state_of(into), None, caller)
    by_path = {target.path: target for target in targets}
    changed = []
    for entry in entries:
        target = by_path.get(entry.path)
        shape = getattr(entry.value, "shape", None)
        if target is not None and getattr(target.value, "shape", None) == shape:
            spec = target.spec
            if spec is None and shape is not None:
                spec = present_spec(target.value)
            entry = entry._replace(spec=spec)
        changed.append(entry)
    return changed
