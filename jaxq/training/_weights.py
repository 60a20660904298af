"""The trained weights of a model, with their paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jaxq.nn.layers import TrainedParam
from jaxq.qtensor import TrainedWeight


def trained_params(model: nnx.Module) -> Iterator[tuple[str, TrainedParam]]:
    """Yields path and module of each trained weight of an nnx model."""
    # Scales that are quantized themselves are a TrainedParam in a TrainedParam.
    nested: set[int] = set()
    params = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, TrainedParam):
            nested.add(id(module.scale))
            params.append(("/".join(map(str, path)), module))
    yield from (item for item in params if id(item[1]) not in nested)


def trained_weights(model: Any) -> Iterator[tuple[str, TrainedWeight]]:
    """Yields the path and the value of each trained weight.

    Args:
      model: an nnx module or a tree, such as linen variables.
    """
    if isinstance(model, nnx.Module):
        for path, param in trained_params(model):
            yield path, param.get_value()
        return
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_trained)
    for keys, leaf in leaves:
        if isinstance(leaf, TrainedWeight):
            yield path_of(keys), leaf


def map_weights(function: Callable[[TrainedWeight], TrainedWeight], model: Any) -> Any:
    """Applies a function to each trained weight.

    Args:
      function: from a trained weight to a trained weight.
      model: an nnx module, which is changed in place, or a tree.

    Returns:
      The same module, or a new tree.
    """
    if isinstance(model, nnx.Module):
        for _, param in trained_params(model):
            param.set_value(function(param.get_value()))
        return model
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, TrainedWeight) else leaf,
        model,
        is_leaf=is_trained,
    )


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf: keys, attribute names and indices, joined by "/"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_trained(x: Any) -> bool:
    """True for a trained weight. This is an `is_leaf=` of functions on trees."""
    return isinstance(x, TrainedWeight)
