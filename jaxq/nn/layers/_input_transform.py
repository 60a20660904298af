"""Transforms of a layer's input at run time, which are not parameters of the model.

Rotations that cannot be folded into a weight are an example. A file of parameters does
not hold these transforms. Code that saves or exports a model must therefore check
`input_transforms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class TransformInput:
    """A `promote_dtype` hook of a linear layer that first transforms the input.

    Two of these objects are equal if their attributes are equal.

    Attributes:
      transform: maps the input `[..., in]` to `[..., in]`.
      original: the layer's own `promote_dtype`.
    """

    transform: Callable[[jax.Array], jax.Array]
    original: Callable[..., Any]

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        x, *rest = arrays
        return self.original((self.transform(x), *rest), **kwargs)


def input_transforms(model: nnx.Module) -> dict[str, str]:
    """The names of the transforms of a model's layers, by layer path."""
    transforms = {}
    for path, layer in nnx.iter_modules(model):
        hook = getattr(layer, "promote_dtype", None)
        while hook is not None:  # another hook may wrap the transform
            if isinstance(hook, TransformInput):
                name = getattr(hook.transform, "__qualname__", repr(hook.transform))
                transforms["/".join(map(str, path))] = name
            hook = getattr(hook, "original", None)
    return transforms
