"""The mesh axes of a QTensor's codes and scales: those of the float array.

Codes and scales are stored as `[*batch, *kept, k]`, with all contracted axes flattened
into the last one. Each stored axis is sharded over the same mesh axes as the axis of
the float array that it comes from. Leaves that describe the input have no kept axes.

If the size of a leaf's axis is not a multiple of its number of shards, the leaf is not
sharded along that axis. A scale per output channel, for example, has size 1 along the
contracted axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec, is_explicit, names_in
from jaxq.qtensor._inputs import is_traced
from jaxq.qtensor._qtensor import QTensor


def quantized_like(fn: Callable[..., Any], float_array: jax.Array, *args: Any) -> Any:
    """Calls `fn(float_array, *args)`, and shards the QTensor as the float array is.

    Args:
      fn: returns a pytree of arrays with one QTensor. The other arrays are scalars.
      float_array: the array that is quantized. Under jit its sharding is known only on
        a mesh with explicit axes.
      *args: pytrees of arrays.
    """
    if not is_explicit(float_array):
        result = fn(float_array, *args)
        return jax.tree.map(
            lambda part: shard_like(part, float_array), result, is_leaf=_is_qtensor
        )
    mesh = jax.typeof(float_array).sharding.mesh
    shapes = jax.eval_shape(fn, *jax.tree.map(_without_mesh, (float_array, *args)))

    def specs(part: Any) -> Any:
        if not isinstance(part, QTensor):
            return PartitionSpec()
        return _leaf_specs(part, explicit_spec(float_array), mesh)

    spec = jax.tree.map(specs, shapes, is_leaf=_is_qtensor)
    return call_on_auto_axes(fn, spec, float_array, *args)


def shard_like(qt: QTensor, float_array: Any) -> QTensor:
    """Moves codes and scales to the shards of the float array.

    Args:
      qt: the quantized array, in canonical storage `[*batch, *kept, k]`.
      float_array: the array that was quantized.

    Returns:
      The same QTensor with sharded leaves. `qt` itself if the float array is not on a
      mesh of devices, or is traced.
    """
    if not isinstance(qt, QTensor) or is_traced(float_array):
        return qt
    sharding = getattr(float_array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return qt
    mesh = sharding.mesh
    specs = _leaf_specs(qt, tuple(sharding.spec), mesh)
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), qt, specs
    )


def fitting_spec(mesh: Any, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec without the mesh axes whose number does not divide the array's axis.

    Args:
      mesh: the mesh with the sizes of its axes.
      spec: the mesh axes of each axis of an array. It may be shorter than `shape`.
      shape: the shape of the array.
    """
    entries = [
        entry if size % _num_shards(mesh, entry) == 0 else None
        for entry, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*entries)


def mesh_axes(qt: QTensor) -> tuple[Any, ...]:
    """The explicit mesh axes of each axis of the dequantized array.

    Several contracted axes are flattened in storage. Their shards are then along the
    first of them.
    """
    num_batch, geometry = len(qt.batch_shape), qt.meta.geometry
    stored: Any = explicit_spec(qt.data)
    axes: list[Any] = [None] * qt.ndim
    axes[:num_batch] = stored[:num_batch]
    if geometry.flat:
        return tuple(axes)
    by_storage_axis = list(stored[num_batch:])
    if qt.meta.layout == "columns":
        by_storage_axis = [*by_storage_axis[1:], by_storage_axis[0]]
    *kept, contracted = by_storage_axis
    for axis, entry in zip(geometry.kept, kept, strict=True):
        axes[qt.ndim + axis] = entry
    axes[qt.ndim + geometry.contracted[0]] = contracted
    return tuple(axes)


def _leaf_specs(qt: QTensor, spec: tuple[Any, ...], mesh: Any) -> QTensor:
    """The QTensor with the PartitionSpec of each leaf in place of the leaf.

    Args:
      qt: a QTensor of arrays or shapes.
      spec: the mesh axes of each axis of the float array.
      mesh: the mesh with the sizes of these axes.
    """
    stored_spec = _stored_spec(qt, spec)
    batch_spec = stored_spec[: len(qt.batch_shape)]

    def leaf_spec(leaf: Any, entries: tuple[Any, ...]) -> Any:
        if leaf is None:
            return None
        return fitting_spec(mesh, entries, leaf.shape)

    weight = dataclasses.replace(qt, input_range=None, input_scale=None)
    return dataclasses.replace(
        jax.tree.map(lambda leaf: leaf_spec(leaf, stored_spec), weight),
        input_range=leaf_spec(qt.input_range, batch_spec),
        input_scale=leaf_spec(qt.input_scale, (*batch_spec, stored_spec[-1])),
    )


def _stored_spec(qt: QTensor, spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """The mesh axes of each axis of the storage `[*batch, *kept, k]`.

    Args:
      qt: the quantized weight.
      spec: the mesh axes of each axis of the float array.
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


def _is_qtensor(part: Any) -> bool:
    return isinstance(part, QTensor)


def _without_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
