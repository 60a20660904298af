"""Shards the codes and scales of a weight as the float weight was sharded.

Codes and scales are stored as `[*batch, *kept, k]`, with all contracted axes flattened
into the last one. Each stored axis is sharded over the same mesh axes as the axis of
the float weight that it comes from. Leaves that describe the input have no kept axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.qtensor import QTensor
from jaxq.sharding._explicit_axes import names_in


def shard_like(qt: QTensor, float_weight: Any) -> QTensor:
    """Shards codes and scales over the same mesh axes as the float weight.

    If the size of a leaf's axis is not a multiple of its number of shards, the leaf is
    not sharded along that axis. A scale per output channel, for example, has size 1
    along the contracted axis.

    Args:
      qt: the quantized weight, in canonical storage `[*batch, *kept, k]`.
      float_weight: the array that was quantized.

    Returns:
      The same QTensor with sharded leaves. `qt` itself if the float weight is not on a
      mesh.
    """
    sharding = getattr(float_weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return qt
    mesh = sharding.mesh
    stored_spec = _stored_spec(qt, sharding.spec)
    batch_spec = stored_spec[: len(qt.batch_shape)]

    def put(leaf: jax.Array | None, leaf_spec: tuple[Any, ...]) -> Any:
        if leaf is None:
            return None
        spec = [
            mesh_axes if size % _num_shards(mesh, mesh_axes) == 0 else None
            for mesh_axes, size in zip(leaf_spec, leaf.shape, strict=False)
        ]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    weight = dataclasses.replace(qt, input_range=None, input_scale=None)
    return dataclasses.replace(
        jax.tree.map(lambda leaf: put(leaf, stored_spec), weight),
        input_range=put(qt.input_range, batch_spec),
        input_scale=put(qt.input_scale, (*batch_spec, stored_spec[-1])),
    )


def _stored_spec(qt: QTensor, spec: PartitionSpec) -> tuple[Any, ...]:
    """The mesh axes of each axis of the storage `[*batch, *kept, k]`.

    Args:
      qt: the quantized weight.
      spec: the mesh axes of each axis of the float weight.
    """
    geometry = qt.meta.geometry
    spec_by_axis = (*spec, *[None] * (qt.ndim - len(spec)))
    first, *others = [spec_by_axis[axis] for axis in geometry.contracted]
    # The first contracted axis varies slowest in k, so its shards are contiguous in k.
    # The shards of the other contracted axes are not contiguous.
    contracted = None if any(others) else first
    batch = spec_by_axis[: len(qt.batch_shape)]
    kept = [spec_by_axis[axis] for axis in geometry.kept]
    return (*batch, *kept, contracted)


def _num_shards(mesh: Mesh, mesh_axes: Any) -> int:
    """The number of shards along an axis that is sharded over `mesh_axes`."""
    return math.prod(mesh.shape[name] for name in names_in(mesh_axes))
