"""Moving averages of input ranges: which recipes have them, and where linen keeps them.

An nnx model keeps an average in the `TrainedParam` of its layer. The variables of a
linen module keep it in the collection "quant_stats", because optimizers own "params".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from jaxq import methods
from jaxq.nn.layers import QUANT_STATS, params_of, range_name, with_params
from jaxq.processes import to_numpy
from jaxq.qtensor import QuantSpec, TrainedWeight, as_static
from jaxq.recipes import Recipe
from jaxq.sharding import value_in_box
from jaxq.sharding.boxes import boxed_like

# The names that lead to a parameter.
_Key = tuple[str, ...]


def averaged_recipe(recipe: Recipe, caller: str) -> Recipe:
    """The recipe without observers, because training determines the ranges of inputs.

    Raises:
      ValueError: no rule has an activation; an activation has more than one range; or a
        method quantizes each input by its own range.
    """
    rules = []
    for rule in recipe.rules:
        if isinstance(rule.activation, QuantSpec):
            as_static(rule.activation, f"{caller}: {rule.name}: ranges=ema()")
        if methods.get(rule.method).own_activation:
            raise ValueError(
                f"{caller}: {rule.name}: method {rule.method!r} quantizes each input "
                "by its own range, so the range cannot be a moving average. Use "
                "another method, or ranges='dynamic'."
            )
        rules.append(dataclasses.replace(rule, observer=None))
    if not any(rule.activation is not None for rule in rules):
        raise ValueError(
            f"{caller}: ranges=ema() averages the ranges of inputs, but no rule of the "
            "recipe has activation=. Add it, or use ranges='dynamic' or "
            "ranges=jaxq.training.lsq()."
        )
    return dataclasses.replace(recipe, rules=tuple(rules))


def check_averages(weights: Iterable[tuple[str, TrainedWeight]], caller: str) -> None:
    """Raises a ValueError if a moving average has seen no input.

    Args:
      weights: the path and the value of each trained weight.
      caller: the name of the public function. Errors begin with this name.
    """
    unseen = []
    for path, weight in weights:
        if weight.decay is None:
            continue
        assert weight.input_range is not None
        input_range = to_numpy(weight.input_range)
        is_unseen = input_range[..., 0] >= input_range[..., 1]
        if not is_unseen.any():
            continue
        if is_unseen.ndim > 0:
            path = f"{path} ({is_unseen.sum()} of {is_unseen.size} elements)"
        unseen.append(path)
    if unseen:
        raise ValueError(
            f"{caller}: no batch has set the input range of {', '.join(unseen)}. Run "
            "batches that reach these layers. An nnx model must be in train mode, and "
            "a linen module needs mutable=['quant_stats']. Inputs that are all zeros "
            "or not finite do not count. If no batch reaches a layer, leave "
            "activation= out of its rule."
        )


def split_averages(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Moves the moving averages of linen variables from "params" to "quant_stats".

    Args:
      variables: linen variables. The `TrainedWeight`s in "params" hold the averages.
    """
    params = params_of(variables)
    averages = {}
    for key, weight in _averaged(params).items():
        averages[_place(key)] = weight.input_range
        moved = dataclasses.replace(weight, input_range=None)
        params[key] = boxed_like(moved, params[key])
    if not averages:
        return variables
    stats = flatten_dict(dict(variables.get(QUANT_STATS, {})))
    joined = with_params(variables, params)
    return {**joined, QUANT_STATS: unflatten_dict(stats | averages)}


def join_averages(variables: Mapping[str, Any], caller: str) -> Mapping[str, Any]:
    """Moves the moving averages back from "quant_stats" to "params".

    Args:
      variables: linen variables.
      caller: the name of the public function. Errors begin with this name.

    Raises:
      ValueError: an average is missing.
    """
    params = params_of(variables)
    averaged = _averaged(params)
    if not averaged:
        return variables
    joined = with_params(variables, {})
    stats = flatten_dict(joined.pop(QUANT_STATS, {}))
    for key, weight in averaged.items():
        place = _place(key)
        if place not in stats:
            raise ValueError(
                f"{caller}: the variables have no {QUANT_STATS}/{'/'.join(place)}. "
                "Pass 'params' together with the 'quant_stats' of the last training "
                "step."
            )
        moved = dataclasses.replace(weight, input_range=stats.pop(place))
        params[key] = boxed_like(moved, params[key])
    if stats:
        joined[QUANT_STATS] = unflatten_dict(stats)
    return with_params(joined, params)


def _averaged(params: Mapping[_Key, Any]) -> dict[_Key, TrainedWeight]:
    """The weights with a moving average."""
    values = {key: value_in_box(boxed) for key, boxed in params.items()}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, TrainedWeight) and value.decay is not None
    }


def _place(key: _Key) -> _Key:
    """The names that lead to the average of a parameter."""
    return (*key[:-1], range_name(key[-1]))
