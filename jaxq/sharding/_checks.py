"""Checks of a PartitionSpec against an array and a mesh, and their errors."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxq.meshes import names_in
from jaxq.qtensor import QTensor, find_cuts, num_shards
from jaxq.sharding._entries import Entry, named_sharding


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
    """Raises a ValueError if the mesh lacks an axis, or the array has too few axes."""
    label = _label(entry)
    if len(spec) > entry.value.ndim:
        raise ValueError(
            f"{caller}: {spec} has {len(spec)} entries, and {label} has "
            f"{entry.value.ndim} axes."
        )
    names = [name for axes in spec for name in names_in(axes)]
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


def problems_of(entry: Entry, spec: PartitionSpec, mesh: Any) -> list[str]:
    """What the shards of one array would cut: one sentence for each cut."""
    label, value = _label(entry), entry.value
    if isinstance(value, QTensor):
        return [
            f"  {label}: {'scales along ' if cut.level else ''}axis {cut.axis} in "
            f"{cut.shards} shards: {cut.problem}. {_possible(cut.working)}"
            for cut in find_cuts(value, spec, mesh)
        ]
    problems = []
    for axis, axes in enumerate(spec):
        shards, size = num_shards(mesh, axes), value.shape[axis]
        if size % shards:
            problem = f"{shards} shards do not divide the {size} entries of the axis"
            problems.append(f"  {label}: axis {axis} in {shards} shards: {problem}.")
    return problems


def cut_message(problems: list[str], caller: str) -> str:
    """The error about shards that would cut something."""
    start = f"{caller}: the shards would cut groups, bytes or axes:"
    remedy = (
        "Use a number of shards that works, shard another axis, or store the same "
        "values in smaller groups: jaxq.sharding.fit_to_shards(qt, spec, mesh=mesh) "
        "for one QTensor, jaxq.sharding.place(..., fit_to_shards=True) for all."
    )
    return "\n".join([start, *problems, remedy])


def _label(entry: Entry) -> str:
    value = entry.value
    if isinstance(value, QTensor):
        sizes = "x".join(map(str, value.shape))
        shown = f"{value.spec.fmt.name}[{sizes}]"
    else:
        shown = f"{value.dtype}{list(value.shape)}"
    return f"{entry.path} ({shown})" if entry.path else shown


def _possible(working: tuple[int, ...]) -> str:
    if working == (1,):
        return "This axis cannot be sharded."
    return f"Possible are {', '.join(map(str, working))} shards."
