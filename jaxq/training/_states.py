"""Trained weights in states: `nnx.State`, `TrainState`, the state of `make_step`.

A state has the Variables of a model without its modules. The Variable `floats` of a
`TrainedParam` knows the static facts of its trained weight. So the weight can be put
together from the Variables beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxq.distillation import StepState
from jaxq.nn.layers import TrainedFacts, trained_facts
from jaxq.qtensor import TRAINED_LEAVES, TrainedWeight

# The names that lead to a Variable or to a trained weight.
Path = tuple[Any, ...]


def model_of(state: Any) -> Any:
    """The arrays of the model if `state` has those of an optimizer too.

    The moments in the optimizer's state look like trained weights, so they are left
    out. Everything except a `StepState` and a linen `TrainState` is returned as it is.
    """
    if _is_train_state(state):
        return state.params
    if not isinstance(state, StepState):
        return state
    if isinstance(state.params, nnx.State):
        return nnx.merge_state(state.params, state.variables)
    return state.params


def with_model(state: Any, model: Any) -> Any:
    """The inverse of `model_of`: `state` with the arrays of `model`."""
    if _is_train_state(state):
        return state.replace(params=model)
    if not isinstance(state, StepState):
        return model
    if not isinstance(state.params, nnx.State):
        return state._replace(params=model)
    variables = dict(nnx.to_flat_state(model))
    parts = {}
    for name in ("params", "variables"):
        paths = [path for path, _ in nnx.to_flat_state(getattr(state, name))]
        parts[name] = nnx.from_flat_state({path: variables[path] for path in paths})
    return state._replace(**parts)


def _is_train_state(state: Any) -> bool:
    """True for a linen `TrainState`.

    A program that has not imported its module has none. The import is slow, so it is
    not done here.
    """
    module = sys.modules.get("flax.training.train_state")
    return module is not None and isinstance(state, module.TrainState)


def state_weights(state: nnx.State) -> dict[Path, TrainedWeight]:
    """The trained weights of an nnx State. Leaves that it does not have are None.

    Floats that are multiplied by the factors of a batch norm come without the factors.
    """
    variables = dict(nnx.to_flat_state(state))
    return {path: _weight(variables, path) for path in _outer_paths(variables)}


def map_state(
    function: Callable[[TrainedWeight], TrainedWeight], state: nnx.State
) -> nnx.State:
    """A new State with `function` applied to each trained weight."""
    variables = dict(nnx.to_flat_state(state))
    for path in _outer_paths(variables):
        weight = function(_weight(variables, path))
        _put(variables, path, weight)
    return nnx.from_flat_state(variables)


def is_folded(state: nnx.State, path: str) -> bool:
    """Whether the floats of a trained weight are folded with a batch norm."""
    for keys, variable in nnx.to_flat_state(state):
        facts = trained_facts(variable)
        if facts is not None and "/".join(map(str, keys[:-1])) == path:
            return facts.is_folded
    return False


def _outer_paths(variables: Mapping[Path, Any]) -> list[Path]:
    """The paths of trained weights that are not the scales of another one."""
    paths = {
        path[:-1]
        for path, variable in variables.items()
        if path[-1:] == ("floats",) and trained_facts(variable) is not None
    }
    return sorted(
        path for path in paths if path[-1:] != ("scale",) or path[:-1] not in paths
    )


def _weight(variables: Mapping[Path, Any], path: Path) -> TrainedWeight:
    facts = trained_facts(variables[*path, "floats"])
    assert isinstance(facts, TrainedFacts)
    leaves: dict[str, Any] = {}
    for name in TRAINED_LEAVES:
        variable = variables.get((*path, name))
        leaves[name] = None if variable is None else variable.get_value()
    if (*path, "scale", "floats") in variables:
        leaves["scale"] = _weight(variables, (*path, "scale"))
    return TrainedWeight(
        **leaves,
        meta=facts.meta,
        range_gradient=facts.range_gradient,
        gradient_scale=facts.gradient_scale,
        decay=facts.decay,
    )


def _put(variables: dict[Path, Any], path: Path, weight: TrainedWeight) -> None:
    """Puts the leaves of a weight in the place of its Variables."""
    for name in TRAINED_LEAVES:
        leaf, place = getattr(weight, name), (*path, name)
        if isinstance(leaf, TrainedWeight):
            _put(variables, place, leaf)
        elif leaf is not None:
            variables[place] = variables[place].copy(leaf)
