"""Rotates a model's hidden states and weights at random, for `Recipe(rotate=True)`.

A random rotation spreads outliers over all channels. The model's class knows how to
rotate the model. It has a method `rotated(orthogonal, online)`, or `register_rotation`
adds a function for the class.

References:
  Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
  section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq import methods
from jaxq.recipes import Recipe

_Orthogonal = Callable[[int], jax.Array]
_Online = Callable[[jax.Array], jax.Array]
_Rotate = Callable[[Any, _Orthogonal, _Online], Any]

_ROTATIONS: dict[type, _Rotate] = {}


def register_rotation(cls: type[nnx.Module], rotated: _Rotate) -> None:
    """Tells jaxq how to rotate models of a class that has no method `rotated`.

    Args:
      cls: an nnx module class. Subclasses count too.
      rotated: `(model, orthogonal, online) -> model`. The new model computes the same
        function with rotated weights. `orthogonal(n)` returns a random Hadamard matrix
        `[n, n]`. Multiply it into the weights. `online(x)` rotates the last axis of an
        array. Use it for values that must be rotated when the model runs.

    Example:
      >>> import jaxq
      >>> from jaxq.models import Llama
      >>> def rotated(model, orthogonal, online):
      ...     return jaxq.models.rotate(model, orthogonal(model.config.hidden_size))
      >>> class MyLlama(Llama):
      ...     pass
      >>> jaxq.nn.register_rotation(MyLlama, rotated)

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
      section 4.
    """
    _ROTATIONS[cls] = rotated


def rotate_model(model: nnx.Module, key: jax.Array, caller: str) -> Any:
    """Returns a model with randomly rotated weights that computes the same function.

    Raises:
      ValueError: the model's class has no method `rotated`, and `register_rotation` was
        not called for it.
    """
    rotate = _rotation_of(type(model))
    if rotate is None:
        raise ValueError(
            f"{caller}: the recipe has rotate=True, but jaxq does not know how to "
            f"rotate a {type(model).__name__}. Register the class with "
            "jaxq.nn.register_rotation, or use a recipe without rotate=True."
        )

    def orthogonal(n: int) -> jax.Array:
        signs = methods.random_hadamard(jax.random.fold_in(key, n), n)
        return methods.hadamard(jnp.diag(signs))

    return rotate(model, orthogonal, methods.hadamard)


def rotation_notes(recipe: Recipe, has_batches: bool) -> tuple[str, ...]:
    """The notes for the report on the rotation. Empty without a rotation.

    Args:
      recipe: the recipe.
      has_batches: the rotated model was compared with the float model on a batch.
    """
    if not recipe.rotate:
        return ()
    note = (
        "the model was first rotated by random Hadamard matrices; the errors are those "
        "of the rotated weights; the effect of the rotation was not measured"
    )
    if not has_batches:
        note += (
            "; without a calibration batch, the outputs before and after the rotation "
            "were not compared"
        )
    return (note,)


def refuse_rotation(recipe: Recipe, caller: str) -> None:
    """Raises a ValueError if the recipe has rotate=True.

    Linen modules and trees cannot be rotated.
    """
    if recipe.rotate:
        raise ValueError(
            f"{caller}: rotate=True is for nnx models only, because jaxq finds the "
            "rotation by the class of the model. Use a recipe without rotate=True."
        )


def _rotation_of(cls: type) -> _Rotate | None:
    """The rotation of a class, or of its closest base class that has one."""
    for base in cls.__mro__:
        if base in _ROTATIONS:
            return _ROTATIONS[base]
        if "rotated" in vars(base):
            return cls.rotated  # pyright: ignore[reportAttributeAccessIssue]
    return None
