"""Error messages for unknown names, with the closest known names as suggestions.

The names of presets and recipes are those of rooms above this one. These rooms register
them here, so that an error can say what such a name means.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class RecipeName(NamedTuple):
    """What the name of a recipe for whole models stands for.

    Attributes:
      weight: the preset of the weights.
      activation: the preset of the inputs. None leaves them in floats.
      fields: the arguments of a `jaxq.Rule` that does the same.
      rotate: the recipe also rotates the model.
    """

    weight: str
    activation: str | None
    fields: str
    rotate: bool


_PRESET_FORMATS: dict[str, str] = {}
_RECIPES: dict[str, RecipeName] = {}


def register_preset_name(name: str, fmt: str) -> None:
    """Registers the name of a preset and the name of its format, for errors."""
    _PRESET_FORMATS[name] = fmt


def register_recipe_name(name: str, meaning: RecipeName) -> None:
    """Registers the name of a recipe that is not a preset, for errors."""
    _RECIPES[name] = meaning


def recipe_name(name: Any) -> RecipeName | None:
    """What the name of a recipe stands for; None if no recipe has this name."""
    return _RECIPES.get(normalize(name)) if isinstance(name, str) else None


def meaning_of_no_format(name: str) -> str:
    """Says which formats a preset or a recipe has; empty for any other name."""
    key = normalize(name)
    if key in _PRESET_FORMATS:
        return (
            f"{name!r} is a preset, which also has a granularity and scales: "
            f"jaxq.presets()[{key!r}]. Its format is {_PRESET_FORMATS[key]!r}."
        )
    recipe = _RECIPES.get(key)
    if recipe is None:
        return ""
    fmt = _PRESET_FORMATS[recipe.weight]
    meaning = f"{name!r} is a recipe for models. The format of its weights is {fmt!r}"
    if recipe.activation is not None:
        meaning += f", that of its inputs {_PRESET_FORMATS[recipe.activation]!r}"
    return f"{meaning}."


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str) -> str:
    """Returns the error message for a name that is not in `known`.

    Args:
      kind: the kind of object that has such a name, for example "format".
      name: the unknown name.
      known: all known names. The message suggests up to three similar ones.
      listing: the call that lists all known names, such as "jaxq.formats.names()".
    """
    hint = _suggestion(name, known, most=3)
    hint = f"{hint} " if hint else ""
    return f"unknown {kind} {name!r}. {hint}{listing} lists them all."


def check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    """Checks that `value` is one of `allowed`.

    Args:
      what: the caller and the argument, such as "QuantSpec: rounding".
      value: the argument's value.
      allowed: the values that the argument may have.

    Raises:
      ValueError: `value` is not in `allowed`. The message suggests similar values.
    """
    if value in allowed:
        return
    hint = _suggestion(value, allowed, most=2)
    hint = f" {hint}" if hint else ""
    raise ValueError(
        f"{what} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
    )


def normalize(name: str) -> str:
    """Returns the spelling under which a name is stored: lower case, underscores."""
    return name.strip().lower().replace("-", "_")


def _suggestion(name: Any, known: Iterable[str], most: int) -> str:
    """The question "Did you mean ...?", or an empty text if no name is similar."""
    close = difflib.get_close_matches(
        normalize(str(name)), list(known), n=most, cutoff=0.5
    )
    if not close:
        return ""
    return f"Did you mean {' or '.join(repr(c) for c in close)}?"
