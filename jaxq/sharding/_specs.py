"""specs: the PartitionSpecs of codes and scales, from those of the float weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxq.qtensor import QTensor, is_nnx_variable, leaf_specs
from jaxq.sharding._checks import (
    Problem,
    check_spec,
    cut_message,
    mesh_of,
    problems_of,
)
from jaxq.sharding._entries import (
    Entry,
    find_entries,
    is_box,
    present_spec,
    single_entry,
    state_of,
)


def specs(
    tree: Any,
    rules: PartitionSpec | Mapping[str, PartitionSpec] | None = None,
    *,
    mesh: Any = None,
) -> Any:
    """Returns a PartitionSpec for every array, and for every leaf of every QTensor.

    A PartitionSpec in `rules` names the mesh axes of each axis of the float weight, in
    the order of its shape. The result names those of codes and scales in the order in
    which they are stored. Use it for `in_specs` and `out_specs` of `jax.shard_map`, and
    with `NamedSharding` for `jax.device_put` and `in_shardings` of `jax.jit`.

    Args:
      tree: a QTensor, an array, an nnx model, or any tree of these, such as the
        variables of a linen module.
      rules: a PartitionSpec if `tree` is one QTensor or one array. Otherwise a dict of
        patterns with PartitionSpecs, `{"**/up/kernel": PartitionSpec(None, "t")}`. The
        patterns are those of `jaxq.Rule`, for paths such as "layers/0/up/kernel". The
        first rule that matches counts. Every array with more than one axis needs a
        rule; an array with one axis or none is replicated without one. None reads the
        metadata of Flax (`nnx.with_partitioning`, `nn.with_partitioning`, logical axis
        rules), or else how the arrays are sharded now.
      mesh: the mesh that has the sizes of the mesh axes. None uses that of the arrays,
        or else that of `jax.set_mesh`.

    Returns:
      The tree with a PartitionSpec in place of each array. A QTensor becomes a QTensor
      of PartitionSpecs, an nnx model an `nnx.State`, and a linen box of an array a
      PartitionSpec. The box of a QTensor stays, so that the specs fit the tree.

    Raises:
      TypeError: a rule is not a pattern with a PartitionSpec; or the tree has a weight
        in quantization-aware training.
      ValueError: a shard would cut a group of codes, a byte, or a group of scales, or
        the number of shards does not divide an axis (the error names all such arrays);
        a rule matches no array; an array with several axes has no rule; a PartitionSpec
        has more entries than the array has axes, names a mesh axis twice or one that
        the mesh does not have, or has UNCONSTRAINED; or there is no mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.AbstractMesh((2,), ("t",))
      >>> qt = jaxq.quantize(jnp.ones((256, 64)), "int4")
      >>> at = jaxq.sharding.specs(qt, P("t", None), mesh=mesh)
      >>> at.data == P(None, "t"), at.scale == P(None, "t")
      (True, True)
    """
    if isinstance(rules, PartitionSpec):
        entries = [single_entry(tree, rules, "specs")]
        return specs_of_entries(entries, mesh, "specs")[0]
    entries, treedef = find_entries(state_of(tree), rules, "specs")
    all_specs = specs_of_entries(entries, mesh, "specs")
    leaves = [_in_leaf(entry, at) for entry, at in zip(entries, all_specs, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def specs_of_entries(entries: list[Entry], mesh: Any, caller: str) -> list[Any]:
    """The specs of each entry: a PartitionSpec, or a QTensor of them.

    Raises:
      ValueError: a shard would cut something. The error names all such arrays.
    """
    mesh = mesh_of(entries, mesh)
    problems: list[Problem] = []
    all_specs = []
    for entry in entries:
        value, spec = entry.value, entry.spec
        if not hasattr(value, "shape"):
            all_specs.append(jax.tree.map(lambda _: PartitionSpec(), value))
            continue
        spec = present_spec(value) if spec is None else spec
        check_spec(entry, spec, mesh, caller)
        problems += problems_of(entry, spec, mesh)
        all_specs.append(
            leaf_specs(value, spec) if isinstance(value, QTensor) else spec
        )
    if problems:
        raise ValueError(cut_message(problems, caller))
    return all_specs


def _in_leaf(entry: Entry, at: Any) -> Any:
    """The specs in the kind of leaf that the tree has."""
    if is_nnx_variable(entry.leaf):
        return entry.leaf.replace(at)
    # A spec is for a box and for its value. Specs of a QTensor need the same structure.
    is_boxed_qtensor = is_box(entry.leaf) and isinstance(at, QTensor)
    return entry.leaf.replace_boxed(at) if is_boxed_qtensor else at
