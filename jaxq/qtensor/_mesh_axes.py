"""The mesh axes of a QTensor's codes and scales: those of the float array.

`jaxq.qtensor._leaf_specs` has the rule for each leaf. If the size of a leaf's axis is
not a multiple of its number of shards, the leaf is not sharded along that axis. A scale
per output channel, for example, has size 1 along the contracted axis. Such leaves are
right under jit. In `jax.shard_map` they are not, and `jaxq.sharding.specs` raises an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec, is_explicit
from jaxq.processes import put
from jaxq.qtensor._inputs import is_traced
from jaxq.qtensor._leaf_specs import divisible, leaf_specs
from jaxq.qtensor._qtensor import QTensor
from jaxq.qtensor._storage_axes import axes_of_codes, explicit_axes


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
        return divisible(part, leaf_specs(part, explicit_spec(float_array)), mesh)

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
    specs = divisible(qt, leaf_specs(qt, sharding.spec), mesh)
    return jax.tree.map(
        lambda leaf, spec: put(leaf, NamedSharding(mesh, spec)), qt, specs
    )


def mesh_axes(qt: QTensor) -> tuple[Any, ...]:
    """The explicit mesh axes of each axis of the dequantized array, from its codes."""
    return explicit_axes(qt.meta, len(qt.batch_shape), qt.data)


def axes_of_array(qt: QTensor, data_spec: Iterable[Any]) -> tuple[Any, ...]:
    """The mesh axes of each axis of the dequantized array.

    Args:
      qt: the quantized array.
      data_spec: the mesh axes of each axis of its codes.
    """
    return axes_of_codes(qt.meta, len(qt.batch_shape), data_spec)


def _is_qtensor(part: Any) -> bool:
    return isinstance(part, QTensor)


def _without_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
