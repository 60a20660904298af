"""Eval mode and train mode of a model while calibration batches run through it.

In train mode, dropout removes numbers at random and scales the others up, and batch
normalization uses the statistics of each batch. Ranges and moments of such inputs are
not those of the model in use.

An nnx module keeps its mode in attributes, so calibration runs an eval copy. An
argument of a call (`deterministic=False`) or a flag of the user's module can still set
train mode. A linen module gets its mode as arguments of each call. Calibration cannot
change arguments and such flags. It detects their effects and reports them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from jaxq.jaxprs import inner_jaxprs
from jaxq.nn.calibration._batches import Batch
from jaxq.nn.calibration._programs import cached_program
from jaxq.processes import to_numpy

# The attributes that `nnx.Module.eval` sets to True.
_EVAL_ATTRIBUTES = ("deterministic", "use_running_average")
# The primitives that draw random numbers from a key.
_RANDOM = ("random_bits", "random_gamma", "rng_bit_generator", "rng_uniform")
_DROPS = "drops numbers at random"
_DRAWS = "random numbers are drawn, for example by dropout"


def eval_copy(model: nnx.Module) -> Any:
    """A copy of a model in eval mode. It shares its arrays with the model."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


class ForcedTrainMode:
    """What batches do in train mode, although the model is in eval mode.

    Args:
      model: an nnx module. It does not change.
      run: `run(model, batch, forward)` runs a batch as the user passed it.
      forward: the third argument of `run`.
    """

    def __init__(self, model: nnx.Module, run: Callable[..., Any], forward: Any):
        self._graph, self._state = nnx.split(eval_copy(model))
        self._statistics = _batch_statistics(run, forward)
        self._structures: set[Any] = set()
        self._draws = False
        self._norms: dict[str, None] = {}

    def add(self, batch: Batch) -> None:
        """Looks at a batch, if it has other static values than all earlier batches."""
        try:
            structure = jax.tree.structure(batch)
            if structure in self._structures:
                return
            self._structures.add(structure)
            traced = self._statistics.trace(self._graph, self._state, batch)
            self._draws |= draws_random_numbers(traced.jaxpr.jaxpr)
            before = nnx.filter_state(self._state, nnx.BatchStat)
            if not jax.tree.leaves(before):
                return
            # The compiler removes everything that does not change these statistics.
            after = self._statistics(self._graph, self._state, batch)
        except Exception:  # the calibration itself raises it, with its own message
            return
        values = dict(nnx.to_flat_state(after))
        for path, value in nnx.to_flat_state(before):
            pair = value.get_value(), values[path].get_value()
            if not np.array_equal(*map(to_numpy, pair), equal_nan=True):
                self._norms["/".join(map(str, path[:-1]))] = None

    def note(self) -> str:
        """A note for a report or a warning. Empty if all batches run in eval mode."""
        actions = [_DRAWS] if self._draws else []
        if self._norms:
            norms = _listing(list(self._norms))
            actions.append(f"the running averages of {norms} change")
        if not actions:
            return ""
        return (
            "the calibration batches did not run in eval mode, although model.eval() "
            f"was called: {', and '.join(actions)}. Ranges and statistics include "
            "the effect. An argument of a call (deterministic=False, "
            "use_running_average=False) or a flag of the model sets train mode. Pass "
            "the arguments of eval mode in the batches or in forward=, or change the "
            "flag before calibration"
        )


@cached_program
def _batch_statistics(run: Callable[..., Any], forward: Any) -> Any:
    """Returns the statistics of batch norms after a batch, under jit."""

    @functools.partial(jax.jit, static_argnums=0)
    def statistics(graph: Any, state: Any, batch: Batch) -> Any:
        copy = nnx.merge(graph, state)
        run(copy, batch.whole(), forward)
        return nnx.state(copy, nnx.BatchStat)

    return statistics


def train_mode_note(
    model: nnx.Module, batches: Iterable[Any], run: Callable[..., Any], forward: Any
) -> str:
    """The note of a report on train mode, of a model or of its calibration batches.

    Empty if both are in eval mode.

    Args:
      model: an nnx module. It does not change.
      batches: as the user passed them.
      run: `run(model, batch, forward)` runs a batch.
      forward: the third argument of `run`.
    """
    forced = ForcedTrainMode(model, run, forward)
    for batch in batches:
        forced.add(Batch.of(batch))
    forced_note = forced.note()
    modules = [
        "/".join(map(str, path)) or "the model itself"
        for path, module in nnx.iter_modules(model)
        if any(getattr(module, name, None) is False for name in _EVAL_ATTRIBUTES)
    ]
    if forced_note or not modules:
        return forced_note
    return (
        f"the model is in train mode ({_listing(modules)}). The calibration batches "
        "ran in eval mode. The quantized model is in train mode again"
    )


def draws_random_numbers(jaxpr: Any) -> bool:
    """True if a jaxpr, or a function that it calls, draws random numbers."""
    return any(
        equation.primitive.name in _RANDOM
        or any(map(draws_random_numbers, inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def linen_train_mode(
    module: linen.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Says what one call of a linen module does in train mode. Empty in eval mode.

    Args:
      module: the module that is called.
      args: the arguments of its `__call__`.
      kwargs: the named arguments of its `__call__`.
    """
    path = "/".join(module.path) or type(module).__name__
    if isinstance(module, linen.BatchNorm):
        if _flag(module, "use_running_average", args[1:2], kwargs) is False:
            return f"{path} normalizes by the statistics of each batch"
        return ""
    if isinstance(module, linen.Dropout):
        rate, positional = module.rate, args[1:2]
    elif isinstance(module, linen.MultiHeadDotProductAttention):
        rate, positional = module.dropout_rate, ()
    else:
        return ""
    if rate and _flag(module, "deterministic", positional, kwargs) is False:
        return f"{path} {_DROPS}"
    return ""


def linen_train_mode_note(calls: Mapping[str, None], draws: bool) -> str:
    """A note on what batches do in train mode. Empty in eval mode.

    Args:
      calls: the calls that `linen_train_mode` described.
      draws: the batches draw random numbers.
    """
    actions = list(calls)
    if draws and not any(action.endswith(_DROPS) for action in actions):
        actions.append(_DRAWS)
    if not actions:
        return ""
    return (
        f"the calibration batches ran in train mode: {_listing(actions)}. Ranges "
        "and statistics are not those of eval mode. Pass the arguments of eval mode "
        "(deterministic=True, use_running_average=True, train=False) in the batches "
        "or in forward="
    )


def _flag(
    module: Any, name: str, positional: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The flag of one call: an argument, or the attribute of the module."""
    value = kwargs.get(name, positional[0] if positional else None)
    return getattr(module, name) if value is None else value


def _listing(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
