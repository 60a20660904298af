"""Each device computes its part of a primitive in a program that XLA partitions.

With automatic mesh axes, XLA decides where arrays are sharded, after jax has lowered
the program. `jax.experimental.custom_partitioning` lets a primitive take part: it tells
XLA how the axes of operands and result belong together, and XLA calls back with the
sharding that it chose. The callback decides on the parts and binds the same primitive
for them. There it is lowered for one device, which runs its own kernel.

XLA only moves operands of the primitive, that is codes and scales. It never gathers a
decoded weight.

XLA calls back with devices, so they must be known when the program is lowered. jax
keeps them only if the program has a primitive that asks for them. `with_devices` adds
one. It does so in `jax.set_mesh(mesh)` with automatic axes. A mesh of shapes
(`AbstractMesh`) has no devices, an exported program has no callbacks, and the compiler
for TPUs does not call back. Then plain XLA computes the primitive.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.mesh import get_concrete_mesh
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxq.meshes import names_in

# The platforms of devices whose compiler calls back, as jax names their backends.
CALLS_BACK = ("cpu", "gpu", "cuda")

Letters = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a primitive can be cut into parts.

    A letter names an axis of the computation, such as the rows of x. Axes of operands
    with the same letter are cut together.

    Attributes:
      operands: the letter of each axis of each operand. None for an axis that every
        device needs whole.
      result: the letter of each axis of the result.
      units: the number of units along each letter. A part has whole units. The order of
        the letters decides which one gets a mesh axis that several ask for.
      first: the operand that is asked first how a letter is sharded: the weight.
      part: `part(shards)` returns the static parameter `call` of the primitive for
        the parts, for the number of shards of each letter.
      summed: the letter over which results are summed.
    """

    operands: tuple[Letters, ...]
    result: Letters
    units: dict[str, int]
    first: int
    part: Callable[[dict[str, int]], Any]
    summed: str


def with_devices(x: jax.Array) -> jax.Array:
    """Returns `x`. jax then tells lowering rules the devices of the program.

    It does nothing unless `jax.set_mesh` names devices with automatic axes only.
    """
    mesh = get_concrete_mesh()
    abstract = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or abstract != mesh.abstract_mesh:
        return x  # one device, or inside shard_map or another mesh
    if set(mesh.axis_types) != {AxisType.Auto}:
        return x
    if mesh.devices.flat[0].platform not in CALLS_BACK:
        return x
    return devices_p.bind(x)


def can_partition(ctx: Any) -> bool:
    """True if XLA can call back for a primitive in lowering.

    Args:
      ctx: the lowering context of the primitive.
    """
    context = ctx.module_context
    devices = getattr(context.axis_context, "device_assignment", None)
    mesh = getattr(context.axis_context, "abstract_mesh", None)
    if devices is None or mesh is None or len(devices) < 2:
        return False
    return not context.lowering_parameters.for_export and _are_here(devices)


def _are_here(devices: Sequence[Any]) -> bool:
    """True if the compiler for the devices calls back: those of this process, no TPU.

    `jax.experimental.topologies` describes devices for which one can only compile.
    """
    if devices[0].platform not in CALLS_BACK:
        return False
    try:
        return devices[0] in jax.devices(devices[0].platform)
    except RuntimeError:
        return False  # there is no backend for the platform


def partitioned(
    primitive: Primitive, call: Any, parts: Parts
) -> Callable[..., jax.Array]:
    """The primitive as a function, which each device computes for its parts.

    Args:
      primitive: has one static parameter, `call`.
      call: the parameter for whole operands.
      parts: how to cut the primitive into parts.
    """

    def partition(mesh: Any, operands: Sequence[Any], result: Any):
        specs = [_entries(array) for array in operands]
        entries = _assigned(parts, [*specs, _entries(result)], mesh)
        shards = {letter: _num_shards(mesh, entry) for letter, entry in entries.items()}
        names = names_in(entries[parts.summed])
        call_of_part = parts.part(shards)

        def of_part(*arrays: jax.Array) -> jax.Array:
            y = primitive.bind(*arrays, call=call_of_part)
            return lax.psum(y, names).astype(result.dtype) if names else y

        def sharding(letters: Letters) -> NamedSharding:
            spec = [entries.get(letter) if letter else None for letter in letters]
            return NamedSharding(mesh, PartitionSpec(*spec))

        in_shardings = tuple(sharding(letters) for letters in parts.operands)
        return mesh, of_part, sharding(parts.result), in_shardings

    def rule(mesh: Any, operands: Sequence[Any], results: Sequence[Any]):
        shapes = [tuple(array.shape) for array in (*operands, *results)]
        return _sharding_rule(parts, shapes)

    def whole(*operands: jax.Array) -> jax.Array:
        return primitive.bind(*operands, call=call)

    wrapped = custom_partitioning(whole)
    wrapped.def_partition(partition, sharding_rule=rule)
    return wrapped


def _entries(array: Any) -> tuple:
    """The mesh axes of each axis of an array in the callback."""
    spec = tuple(array.sharding.spec)
    return (*spec, *[None] * (len(array.shape) - len(spec)))


def _num_shards(mesh: Any, entry: Any) -> int:
    num_shards = 1
    for name in names_in(entry):
        num_shards *= mesh.shape[name]
    return num_shards


def _assigned(parts: Parts, specs: Sequence[tuple], mesh: Any) -> dict[str, Any]:
    """The mesh axes of each letter.

    Args:
      parts: how to cut the primitive into parts.
      specs: the mesh axes that XLA chose for each operand, and then for the result.
      mesh: the mesh.
    """
    letters = (*parts.operands, parts.result)
    order = sorted(range(len(specs)), key=lambda i: i != parts.first)
    asked: dict[str, list] = {letter: [] for letter in parts.units}
    for i in order:
        for letter, entry in zip(letters[i], specs[i], strict=True):
            if letter is not None and names_in(entry):
                asked[letter].append(entry)
    used: set[str] = set()
    assigned = {}
    for letter, units in parts.units.items():
        assigned[letter] = None
        for entry in asked[letter]:
            names = set(names_in(entry))
            if not names & used and units % _num_shards(mesh, entry) == 0:
                assigned[letter] = entry
                used |= names
                break
    return assigned


def _sharding_rule(parts: Parts, shapes: Sequence[tuple[int, ...]]) -> Any:
    """The rule for XLA's propagation of shardings.

    Args:
      parts: how to cut the primitive into parts.
      shapes: the shapes of the operands, and then of the result.
    """
    fresh = (f"w{i}" for i in itertools.count())
    whole: list[str] = []
    compound_sizes: dict[str, int] = {}
    is_whole_axis: set[str] = set()
    mappings = []
    for letters, shape in zip((*parts.operands, parts.result), shapes, strict=True):
        mapping: list[Any] = []
        for letter, size in zip(letters, shape, strict=True):
            rest = next(fresh)
            if letter is None:
                whole.append(rest)
                mapping.append(rest)
            elif size == parts.units[letter]:
                is_whole_axis.add(letter)
                mapping.append(letter)
            else:
                compound_sizes[rest] = size // parts.units[letter]
                whole.append(rest)
                mapping.append(CompoundFactor(letter, rest))
        mappings.append(tuple(mapping))
    present = {letter for letters in parts.operands for letter in letters if letter}
    for letter in present - is_whole_axis:
        compound_sizes[letter] = parts.units[letter]
    *operands, result = mappings
    return SdyShardingRule(
        tuple(ArrayMapping(*mapping) for mapping in operands),
        (ArrayMapping(*result),),
        reduction_factors=(parts.summed,) if parts.summed in present else (),
        need_replication_factors=tuple(whole),
        **compound_sizes,  # pyright: ignore[reportArgumentType]
    )


# `devices_p(x)` is x.
devices_p = Primitive("with_devices")
devices_p.def_impl(lambda x: x)
devices_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(devices_p, lambda ctx, x: [x])
batching.primitive_batchers[devices_p] = lambda args, dims: (
    devices_p.bind(*args),
    dims[0],
)
ad.deflinear(devices_p, lambda ct: [ct])
prim_requires_devices_during_lowering.add(devices_p)
