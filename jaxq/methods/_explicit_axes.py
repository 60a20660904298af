"""Methods of weights on a mesh whose axes have the type Explicit.

The steps of a method do not state shardings. On such a mesh they run with axes of type
Auto, and only the shardings of the results are stated. See `jaxq.meshes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxq.meshes import call_on_auto_axes, explicit_spec, is_explicit, on_auto_axes
from jaxq.qtensor import QTensor, divisible, is_qtensor, is_traced, leaf_specs

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def on_explicit_axes(
    method: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Lets a method take arrays on a mesh with explicit axes.

    A result is sharded as the first such argument with the same shape. Codes and scales
    are sharded as the float array that they represent. All other results are
    replicated.

    Args:
      method: takes arrays, and returns a pytree of arrays and QTensors.
    """

    untyped_method: Any = method

    @functools.wraps(method)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
        arrays = [leaves[i] for i in places]
        explicit = [x for x in arrays if is_explicit(x)]
        if not explicit:
            return method(*args, **kwargs)

        def call(arrays: Sequence[jax.Array]) -> Any:
            replaced = list(leaves)
            for i, array in zip(places, arrays, strict=True):
                replaced[i] = array
            args, kwargs = jax.tree.unflatten(treedef, replaced)
            return untyped_method(*args, **kwargs)

        if any(is_traced(x) for x in explicit):
            mesh: Any = jax.typeof(explicit[0]).sharding.mesh
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                shapes = jax.eval_shape(call, [_without_mesh(x) for x in arrays])
            return call_on_auto_axes(call, _specs(shapes, explicit, mesh), arrays)
        # The method may look at numbers, so its arrays stay concrete.
        mesh = explicit[0].sharding.mesh
        with on_auto_axes(arrays) as arrays_on_auto:
            result = call(arrays_on_auto)
        return jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
            result,
            _specs(result, explicit, mesh),
        )

    return run


def _specs(result: Any, explicit: Sequence[jax.Array], mesh: Any) -> Any:
    """The result with the PartitionSpec of each array in its place."""

    def specs_of(part: Any) -> Any:
        same_shape = [x for x in explicit if x.shape == part.shape]
        spec = PartitionSpec()
        if same_shape:
            spec = PartitionSpec(*explicit_spec(same_shape[0]))
        if isinstance(part, QTensor):
            return divisible(part, leaf_specs(part, spec), mesh)
        return spec

    return jax.tree.map(specs_of, result, is_leaf=is_qtensor)


def _without_mesh(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
