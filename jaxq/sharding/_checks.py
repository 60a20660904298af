"""Checks of a PartitionSpec against an array and a mesh, and their errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxq.meshes import names_in
from jaxq.qtensor import QTensor, find_cuts, num_shards
from jaxq.sharding._entries import Entry, listed, named_sharding


class Problem(NamedTuple):
    """Why an array cannot be sharded by a PartitionSpec.

    Attributes:
      text: a line of the error.
      can_fit: whether `fit_to_shards` can remove the problem.
    """

    text: str
    can_fit: bool


def mesh_of(entries: list[Entry], mesh: Any) -> Any:
    """The given mesh, that of the arrays, or that of `jax.set_mesh`; else None."""
    if mesh is not None:
        return mesh
    for entry in entries:
        for leaf in jax.tree.leaves(entry.value):
            sharding = named_sharding(leaf)
            if sharding is not None:
                return sharding.mesh
    current = jax.sharding.get_abstract_mesh()
    return None if current.empty else current


def check_spec(entry: Entry, spec: PartitionSpec, mesh: Any, caller: str) -> None:
    """Raises a ValueError unless a spec fits the axes of the array and of the mesh."""
    label = _label(entry)
    if len(spec) > entry.value.ndim:
        raise ValueError(
            f"{caller}: {spec} has {len(spec)} entries, and {label} has "
            f"{entry.value.ndim} axes."
        )
    if PartitionSpec.UNCONSTRAINED in spec:
        raise ValueError(
            f"{caller}: {spec} of {label} has UNCONSTRAINED, but {caller} needs the "
            "mesh axes of each axis. Write None for an axis that is not sharded."
        )
    names = [name for axes in spec for name in names_in(axes)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{caller}: {spec} of {label} names {repeated} more than once. A mesh axis "
            "can shard only one axis of an array."
        )
    if names and mesh is None:
        raise ValueError(
            f"{caller}: {spec} of {label} needs the sizes of the mesh axes. Pass "
            "mesh=, or call jax.set_mesh(mesh) first."
        )
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"{caller}: {spec} of {label} names {unknown}, but the mesh has the axes "
            f"{list(mesh.axis_names)}. If these are logical axes, call it in "
            "flax.linen.logical_axis_rules, with a rule for each."
        )


def problems_of(entry: Entry, spec: PartitionSpec, mesh: Any) -> list[Problem]:
    """What the shards of one array would cut."""
    label, value = _label(entry), entry.value
    if isinstance(value, QTensor):
        return _problems_of_cuts(label, value, spec, mesh)
    problems = []
    for axis, axes in enumerate(spec):
        shards, size = num_shards(mesh, axes), value.shape[axis]
        if size % shards:
            working = [n for n in range(1, size + 1) if size % n == 0]
            text = (
                f"  {label}: axis {axis} in {shards} shards: {shards} shards do not "
                f"divide the {size} entries of the axis. {_possible(working)}"
            )
            problems.append(Problem(text, can_fit=False))
    return problems


def cut_message(problems: list[Problem], caller: str) -> str:
    """The error about shards that would cut something."""
    start = f"{caller}: the shards do not fit the arrays:"
    remedy = "Use a number of shards that works, or shard another axis."
    if any(problem.can_fit for problem in problems):
        remedy += (
            " Where a shard would cut a group, you can also store the same values in "
            "smaller groups: jaxq.sharding.fit_to_shards(qt, spec, mesh=mesh) for one "
            "QTensor, jaxq.sharding.place(..., fit_to_shards=True) for all."
        )
    return "\n".join([start, *(problem.text for problem in problems), remedy])


def _problems_of_cuts(
    label: str, qt: QTensor, spec: PartitionSpec, mesh: Any
) -> list[Problem]:
    problems = []
    for cut in find_cuts(qt, spec, mesh):
        scales = "scales along " if cut.level else ""
        text = (
            f"  {label}: {scales}axis {cut.axis} in {cut.shards} shards: "
            f"{cut.problem}. {_possible(cut.working)}"
        )
        problems.append(Problem(text, cut.can_fit))
    return problems


def _label(entry: Entry) -> str:
    value = entry.value
    if isinstance(value, QTensor):
        sizes = "x".join(map(str, value.shape))
        shown = f"{value.spec.fmt.name}[{sizes}]"
    else:
        shown = f"{value.dtype}{list(value.shape)}"
    return f"{entry.path} ({shown})" if entry.path else shown


def _possible(working: Iterable[int]) -> str:
    counts = list(map(str, working))
    if counts == ["1"]:
        return "This axis cannot be sharded."
    return f"Possible are {listed(counts)} shards."
