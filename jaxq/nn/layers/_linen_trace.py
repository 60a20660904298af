"""Calls a linen module with abstract values, so that an interceptor sees its layers.

Nothing is computed. The key of a parameter is the tuple of names that lead to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

# The parameters, by the tuple of names that lead to each of them.
FlatParams = dict[tuple[str, ...], Any]
# `forward(module, variables, example)` calls the module.
Forward = Callable[[linen.Module, Any, Any], Any]


def params_of(variables: Mapping[str, Any]) -> FlatParams:
    """The parameters as a flat dict. A value that is not a mapping is a leaf."""
    return flatten_dict(_as_dicts(variables.get("params", {})))


def with_params(variables: Mapping[str, Any], params: FlatParams) -> dict[str, Any]:
    """The variables with other parameters. The keys are those of `params_of`."""
    return {**_as_dicts(variables), "params": unflatten_dict(params)}


def _as_dicts(tree: Any) -> Any:
    """Converts nested mappings, such as a FrozenDict, to dicts with string keys."""
    if not isinstance(tree, Mapping):
        return tree
    return {str(name): _as_dicts(value) for name, value in tree.items()}


class Trace(NamedTuple):
    """A traced call of a module.

    Attributes:
      jaxpr: of the call, a `jax.extend.core.ClosedJaxpr`.
      sources: the name of each input of the jaxpr, see `leaf_name`. Empty for inputs
        that are not parameters.
    """

    jaxpr: Any
    sources: list[str]


def leaf_name(key: tuple[str, ...], position: int) -> str:
    """The name of a leaf of a parameter. An array has one leaf, at position 0."""
    return f"{'/'.join(key)} leaf {position}"


def trace(
    module: linen.Module,
    variables: Any,
    example: Any,
    forward: Forward | None,
    interceptor: Callable[..., Any],
) -> Trace:
    """Calls a module with abstract values.

    Args:
      module: a linen module.
      variables: for `module.apply`.
      example: an array or its `jax.ShapeDtypeStruct`, a tuple of arguments, or a dict
        of named arguments. The dict may have arguments of `apply` too.
      forward: `forward(module, variables, example)` calls the module. None uses
        `module.apply`.
      interceptor: sees the calls of all modules.
    """
    tagged = {**_as_dicts(variables), "jaxq_trace": _tags(variables)}
    leaves, treedef = jax.tree.flatten((tagged, example))
    shapes = {
        position: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for position, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    # Created before the trace, so that the random keys are not tracers.
    settings = {
        "mutable": linen.DenyList("params"),
        "rngs": {"params": jax.random.key(0), "dropout": jax.random.key(0)},
    }

    def run(arrays: dict[int, Any]) -> None:
        filled = [arrays.get(position, leaf) for position, leaf in enumerate(leaves)]
        traced_variables, batch = jax.tree.unflatten(treedef, filled)
        with linen.intercept_methods(interceptor):
            if forward is not None:
                forward(module, traced_variables, batch)
            elif isinstance(batch, dict):
                module.apply(traced_variables, **{**settings, **batch})
            else:
                arguments = batch if isinstance(batch, tuple) else (batch,)
                module.apply(traced_variables, *arguments, **settings)

    with warnings.catch_warnings():
        # `nnx.bridge.ToLinen` reads the tags as states of its nnx module, and warns.
        warnings.filterwarnings("ignore", "Found unknown module paths")
        jaxpr = jax.make_jaxpr(run)(shapes)
    names = _leaf_names((tagged, example), params_of(variables))
    return Trace(jaxpr, [names[position] for position in shapes])


def _leaf_names(arguments: Any, params: FlatParams) -> list[str]:
    """The name of each leaf of the arguments of a trace, in the order of the leaves."""
    names, counts = [], dict.fromkeys(params, 0)
    for path, _ in jax.tree_util.tree_leaves_with_path(arguments):
        # The path begins with the position of the variables, and their collection.
        keys: list[Any] = [getattr(entry, "key", None) for entry in path]
        prefixes = (tuple(keys[2:end]) for end in range(3, len(keys) + 1))
        key = next((prefix for prefix in prefixes if prefix in params), None)
        if path[0].idx != 0 or keys[1] != "params" or key is None:
            names.append("")
            continue
        names.append(leaf_name(key, counts[key]))
        counts[key] += 1
    return names


@jax.tree_util.register_static
class _Tag:
    """A static variable, different in every module.

    `nn.jit` traces two equal modules with equal variables only once. Without the tags,
    an interceptor would not see the layers of the second module.
    """


def _tags(variables: Mapping[str, Any]) -> dict[str, Any]:
    scopes: set[tuple[str, ...]] = set()
    for path in params_of(variables):
        scopes.update(path[:length] for length in range(len(path)))
    return unflatten_dict({(*scope, "tag"): _Tag() for scope in scopes})
