"""What the inputs of a layer go through at run time: part of a model that is no parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class TransformInput:
    """A linear's `promote_dtype` that transforms its input first; compared by value, as long as its parts are.

    Attributes:
      transform: function of the input `[..., in]` along its last axis.
      original: the layer's own `promote_dtype`.
    """

    transform: Callable[[jax.Array], jax.Array]
    original: Callable[..., Any]

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        x, *rest = arrays
        return self.original((self.transform(x), *rest), **kwargs)


def input_transforms(model: nnx.Module) -> dict[str, str]:
    """By layer path, the name of what its inputs go through at run time: part of a model that is no parameter."""
    found = {}
    for path, layer in nnx.iter_modules(model):
        hook = getattr(layer, "promote_dtype", None)
        while hook is not None:  # hooks of others may lie around it
            if isinstance(hook, TransformInput):
                name = getattr(hook.transform, "__qualname__", repr(hook.transform))
                found["/".join(map(str, path))] = name
            hook = getattr(hook, "original", None)
    return found
