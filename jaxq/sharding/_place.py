"""place: puts the arrays of a model or tree on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.processes import put
from jaxq.qtensor import QTensor, find_cuts, is_nnx_module
from jaxq.sharding._checks import check_spec
from jaxq.sharding._entries import (
    Entry,
    find_entries,
    present_spec,
    single_entry,
)
from jaxq.sharding._fit_to_shards import fitted
from jaxq.sharding._shardings import check_mesh
from jaxq.sharding._specs import specs_of_entries


def place(
    tree: Any,
    mesh: Mesh,
    rules: PartitionSpec | Mapping[str, PartitionSpec] | None = None,
    *,
    fit_to_shards: bool = False,
) -> Any:
    """Returns the same model or tree with its arrays on the devices of a mesh.

    Codes and scales are sharded as `specs` says. The values do not change.

    Args:
      tree: as in `specs`. It does not change.
      mesh: the mesh of devices.
      rules: as in `specs`.
      fit_to_shards: store the values of a QTensor in smaller groups if a shard would
        cut a group, as `jaxq.sharding.fit_to_shards` does. If it is False, such a
        QTensor raises an error.

    Returns:
      A model of the same class, or a tree of the same structure.

    Raises:
      TypeError: the mesh has no devices, or as in `specs`.
      ValueError: as in `specs`; or `fit_to_shards` is True, and no smaller
        groups fit the shards.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("t",))
      >>> params, _ = jaxq.quantize_params({"up": jnp.ones((64, 8))}, "int8")
      >>> params = jaxq.sharding.place(params, mesh, {"up": P(None, "t")})
      >>> params["up"].data.sharding.spec == P("t", None)
      True
    """
    check_mesh(mesh, "place")
    if is_nnx_module(tree):
        from flax import nnx  # lazy: a user without Flax has no such model

        graph, state = nnx.split(tree)
        placed = place(state, mesh, rules, fit_to_shards=fit_to_shards)
        return nnx.merge(graph, placed)
    if isinstance(rules, PartitionSpec):
        entries, treedef = [single_entry(tree, rules, "place")], None
    else:
        entries, treedef = find_entries(tree, rules, "place")
    if fit_to_shards:
        entries = [_fitted(entry, mesh) for entry in entries]
    specs = specs_of_entries(entries, mesh, "place")
    values = [
        jax.tree.map(lambda leaf, spec: _put(leaf, mesh, spec), entry.value, at)
        for entry, at in zip(entries, specs, strict=True)
    ]
    if treedef is None:
        return values[0]
    leaves = [entry.leaf_with(new) for entry, new in zip(entries, values, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _put(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    return put(leaf, NamedSharding(mesh, spec))


def _fitted(entry: Entry, mesh: Mesh) -> Entry:
    value = entry.value
    if not isinstance(value, QTensor):
        return entry
    spec = present_spec(value) if entry.spec is None else entry.spec
    check_spec(entry, spec, mesh, "place")
    if not find_cuts(value, spec, mesh):
        return entry
    return entry._replace(value=fitted(value, spec, mesh), spec=spec)
