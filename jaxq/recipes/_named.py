"""The recipes that are known by name.

Every preset of `jaxq.presets()` is a weight-only recipe. The tables below add recipes
that quantize activations, use a method, or rotate the model first.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxq import formats
from jaxq.qtensor import QuantSpec, presets
from jaxq.recipes._floats import default_rules
from jaxq.recipes._recipe import Recipe
from jaxq.recipes._rule import Rule


class _Named(NamedTuple):
    """The last rule of a named recipe, and whether the model is rotated first."""

    weight: str | QuantSpec
    activation: str | None = None
    observer: str | None = None
    method: str = "rtn"
    rotate: bool = False

    @property
    def fields(self) -> str:
        """The arguments of a `jaxq.Rule` that differ from the defaults."""
        names = ("weight", "activation", "observer", "method")
        shown = {name: getattr(self, name) for name in names}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in shown.items()
            if value != self._field_defaults.get(name)
        )


_NAMED = {
    # Dynamic activation quantization: one scale per token.
    "fp8_dynamic": _Named("fp8", "fp8"),
    "w4a4": _Named("int4", "int4"),
    "w4a8": _Named("int4", "int8"),
    "w8a8": _Named("int8", "int8"),
    # The same in rotated coordinates.
    "w4a4_rotated": _Named("int4", "int4", rotate=True),
    "w8a8_rotated": _Named("int8", "int8", rotate=True),
    # Static activation quantization: one scale per layer, from calibration.
    "fp8_static": _Named("fp8", "fp8", observer="absmax"),
    # The steps of int8 are all of one size, so a range of least squared error may clip
    # an outlier. The steps of float8 are relative, so clipping gains nothing.
    "w8a8_static": _Named("int8", "int8", observer="mse"),
    # Weights by a method other than rounding to nearest.
    "int3_gptq": _Named("int3", method="gptq"),
    "int4_adaround": _Named("int4", method="adaround"),
    "int4_awq": _Named("int4", method="awq"),
    "int4_gptq": _Named("int4", method="gptq"),
    "int4_hqq": _Named("int4", method="hqq"),
    "llm_int8": _Named("int8", method="llm_int8"),
    "w8a8_smoothquant": _Named("int8", "int8", method="smoothquant"),
}

for _name, _named in _NAMED.items():
    formats.register_recipe_name(
        _name,
        formats.RecipeName(
            str(_named.weight), _named.activation, _named.fields, _named.rotate
        ),
    )


def names() -> list[str]:
    """The names of all named recipes, sorted.

    Every preset is a named recipe. The other recipes quantize activations, use a method
    or rotate the model.

    Example:
      >>> import jaxq
      >>> "w8a8" in jaxq.recipes.names(), "nf4" in jaxq.recipes.names()
      (True, True)
    """
    return sorted([*presets(), *_NAMED])


def get(name: str | QuantSpec) -> Recipe:
    """The recipe of a name, or of a spec for every weight.

    Such a recipe leaves embeddings, norms, biases, routers, output heads and adapters
    in floats.

    Args:
      name: one of `names()`, or a `QuantSpec` for every weight. A hyphen reads as an
        underscore.

    Raises:
      ValueError: no recipe has this name; the error suggests close names.
      TypeError: `name` is neither a string, a `QuantSpec` nor a `Recipe`.

    Example:
      >>> import jaxq
      >>> first = jaxq.Rule("layers/0/**", weight="int8")
      >>> recipe = jaxq.Recipe([first, *jaxq.recipes.get("int4").rules])
    """
    return as_recipe(name, "recipes.get")


def as_recipe(recipe: str | QuantSpec | Recipe, caller: str) -> Recipe:
    """Returns a `Recipe` for a name or for a spec. A `Recipe` is returned unchanged.

    The recipe for a name or a spec begins with `default_rules`. Its last rule quantizes
    all other layers by the name or the spec.

    Raises:
      ValueError: no recipe has this name; the error suggests close names.
      TypeError: `recipe` is neither a string, a `QuantSpec` nor a `Recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        named = _find(recipe, caller)
    elif isinstance(recipe, QuantSpec):
        named = _Named(recipe)
    else:
        raise TypeError(
            f"{caller}: recipe must be a name, a QuantSpec or a jaxq.Recipe, got "
            f"{type(recipe).__name__}."
        )
    last = Rule(
        weight=named.weight,
        activation=named.activation,
        observer=named.observer,
        method=named.method,
        or_nearest=True,
    )
    return Recipe((*default_rules(), last), rotate=named.rotate)


def _find(recipe: str, caller: str) -> _Named:
    name = recipe.strip().lower().replace("-", "_")
    if name in _NAMED:
        return _NAMED[name]
    if name in presets():
        return _Named(name)
    message = formats.unknown_name("recipe", recipe, names(), "jaxq.recipes.names()")
    if name in formats.names():
        message += f" {name!r} is a format: use jaxq.QuantSpec(format={name!r}, ...)."
    raise ValueError(f"{caller}: {message}")
