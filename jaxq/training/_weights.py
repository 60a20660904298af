"""The trained weights of a model, with their paths.

A model is an nnx module, an `nnx.State` of one, the state of a
`jaxq.distillation.make_step`, a linen `TrainState`, or a tree such as linen variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jaxq.nn.layers import TrainedParam
from jaxq.qtensor import TrainedWeight
from jaxq.training._states import map_state, model_of, state_weights, with_model


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


def trained_weights(model: Any, caller: str) -> list[tuple[str, TrainedWeight]]:
    """The path and the value of each trained weight.

    Args:
      model: an nnx module, an nnx State, a `StepState`, a `TrainState`, or a tree.
      caller: the name of the public function. Errors begin with this name.

    Raises:
      ValueError: there is no trained weight.
    """
    model = model_of(model)
    if isinstance(model, nnx.Module):
        params = trained_params(model)
        weights = [(path, param.get_value()) for path, param in params]
    elif isinstance(model, nnx.State):
        weights = [
            ("/".join(map(str, path)), weight)
            for path, weight in state_weights(model).items()
        ]
    else:
        leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_trained)
        weights = [
            (path_of(keys).removesuffix("/box/value"), leaf)
            for keys, leaf in leaves
            if isinstance(leaf, TrainedWeight)
        ]
    if not weights:
        raise no_trained_weight(caller)
    return weights


def no_trained_weight(caller: str) -> ValueError:
    """The error for a model without trained weights."""
    return ValueError(
        f"{caller}: the model has no trained weight. Pass the result of "
        "jaxq.training.prepare. For a float model use jaxq.quantize_model."
    )


def map_weights(function: Callable[[TrainedWeight], TrainedWeight], model: Any) -> Any:
    """Applies a function to each trained weight.

    Args:
      function: from a trained weight to a trained weight.
      model: an nnx module, which is changed in place, an nnx State, a `StepState`, a
        `TrainState`, or a tree.

    Returns:
      The same module, or a new object of the same kind.
    """
    if isinstance(model, nnx.Module):
        for _, param in trained_params(model):
            param.set_value(function(param.get_value()))
        return model
    arrays = model_of(model)
    if isinstance(arrays, nnx.State):
        return with_model(model, map_state(function, arrays))
    mapped = jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, TrainedWeight) else leaf,
        arrays,
        is_leaf=is_trained,
    )
    return with_model(model, mapped)


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf: keys, attribute names and indices, joined by "/"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_trained(x: Any) -> bool:
    """True for a trained weight. This is an `is_leaf=` of functions on trees."""
    return isinstance(x, TrainedWeight)
