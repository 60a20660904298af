"""Splits a model into a function and its arrays, so that jit compiles it only once.

A model that a user passes is one of three things:

- a flax nnx module, called as `model(inputs)`;
- a pair `(apply, params)`, called as `apply(params, inputs)`. A linen module is the
  pair `(module.apply, variables)`;
- any other function, called as `function(inputs)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen, nnx


class Model(NamedTuple):
    """A model that jit accepts: a static function and traced arrays.

    Attributes:
      function: `function(arrays, inputs)`. It is hashable. Two functions of the same
        model are equal, so they share a compiled program.
      arrays: pytree; empty for a plain function.
    """

    function: Callable[[Any, Any], Any]
    arrays: Any

    def __call__(self, inputs: Any) -> Any:
        return self.function(self.arrays, inputs)


@dataclasses.dataclass(frozen=True)
class NnxFunction:
    """Calls an nnx module in eval mode. The user's module does not change."""

    graphdef: Any

    def module(self, arrays: Any) -> Any:
        """A copy of the module with other arrays, in eval mode."""
        # Variables of an outer trace cannot be changed in a loop. Their copies can.
        module = nnx.merge(self.graphdef, arrays, copy=True)
        module.eval()
        return module

    def __call__(self, arrays: Any, inputs: Any) -> Any:
        return self.module(arrays)(inputs)


@dataclasses.dataclass(frozen=True)
class PlainFunction:
    """Calls a function that has no separate parameters."""

    function: Callable[[Any], Any]

    def __call__(self, arrays: Any, inputs: Any) -> Any:
        return self.function(inputs)


def as_model(model: Any, caller: str, name: str = "model") -> Model:
    """Makes a `Model` from the model that a user passed.

    Args:
      model: what the user passed.
      caller: the public function, for errors.
      name: its argument, for errors.

    Raises:
      TypeError: `model` is none of the three things.
    """
    if isinstance(model, nnx.Module):
        graphdef, arrays = nnx.split(model)
        return Model(NnxFunction(graphdef), arrays)
    if is_pair(model):
        check_apply(model[0], caller, name)
        return Model(*model)
    if isinstance(model, linen.Module):
        raise TypeError(
            f"{caller}: {name} is a linen module without its variables. Pass the pair "
            "(module.apply, variables)."
        )
    if callable(model):
        return Model(PlainFunction(model), ())
    raise TypeError(
        f"{caller}: {name} is a {type(model).__name__}; expected an nnx module, a pair "
        "(apply, params) or a function of the inputs."
    )


def is_pair(model: Any) -> bool:
    """Whether a model is a pair `(apply, params)`."""
    return isinstance(model, tuple) and len(model) == 2 and callable(model[0])


def check_apply(apply: Any, caller: str, name: str) -> None:
    """Raises TypeError if the function of a pair is a module."""
    if isinstance(apply, linen.Module):
        raise TypeError(
            f"{caller}: the first part of the pair {name} is a linen module. Pass its "
            "function: (module.apply, variables)."
        )


def split_batch(batch: Any, caller: str) -> tuple[Any, tuple[Any, ...]]:
    """Splits a batch into the inputs of the models and the other arguments of the loss.

    A tuple or list is `(inputs, *rest)`. Anything else is the inputs.

    Raises:
      ValueError: the batch is an empty tuple or list.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError(
                f"{caller}: a batch is an empty {type(batch).__name__}. Pass the "
                "inputs, or a tuple (inputs, *rest)."
            )
        return batch[0], tuple(batch[1:])
    return batch, ()
