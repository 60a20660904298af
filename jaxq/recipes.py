"""What to do to which parameter: rules on layer paths, first match wins.

A recipe knows paths and kinds of layers, not models: `jaxq.nn` asks it about each layer it finds. Every preset is a
weight-only recipe by name; `w8a8` and its like also quantize activations on the fly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxq import formats
from jaxq.qtensor import QuantSpec, as_spec, presets

__all__ = ["Recipe", "Rule", "as_recipe", "names"]

# (weight, activation) of the recipes that quantize activations dynamically, one scale a token.
_DYNAMIC = {
    "fp8_dynamic": ("fp8", "fp8"),
    "w4a8": ("int4", "int8"),
    "w8a8": ("int8", "int8"),
}

# (weight, activation, method) of the recipes that quantize by more than rounding to nearest.
_BY_METHOD = {
    "int3_gptq": ("int3", None, "gptq"),
    "int4_adaround": ("int4", None, "adaround"),
    "int4_awq": ("int4", None, "awq"),
    "int4_gptq": ("int4", None, "gptq"),
    "int4_hqq": ("int4", None, "hqq"),
    "llm_int8": ("int8", None, "llm_int8"),
    "w8a8_smoothquant": ("int8", "int8", "smoothquant"),
}

# Last names of layers that make logits or choose experts: small errors there cost most, so they stay in floats.
HEADS = ("head", "lm_head", "logits", "output_head", "router", "unembed")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do to the layers a pattern matches.

    Args:
      pattern: glob on the path, components joined by "/": `*` is within a component, `**` any number of components;
        "re:..." is a regular expression that must match the whole path.
      weight: preset name or `QuantSpec` for the weight.
      activation: preset name or `QuantSpec` for the input, quantized on the fly; None leaves it in floats.
      method: how the weight is quantized, one of `jaxq.methods.names()`; those that need data get it from
        `calibration=`.
      options: keyword arguments of the method, `{"act_order": True}` for example.
      skip: leave the layer as it is.
      kinds: layer kinds the rule is about ("Linear", "Conv", ...); empty means all.
      reason: what a report says of a skipped layer.
      optional: True where matching nothing is no mistake.

    Raises:
      ValueError: neither or both of `weight` and `skip`; an unknown preset or method; a bad regular expression.

    Example:
      >>> import jaxq
      >>> rule = jaxq.Rule("**/attn/*", weight="int8", activation="int8")
      >>> rule.matches("layers/0/attn/query", "Linear"), rule.matches("attn", "Linear")
      (True, False)
    """

    pattern: str = "**"
    weight: str | QuantSpec | None = None
    activation: str | QuantSpec | None = None
    method: str = "rtn"
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    skip: bool = False
    kinds: tuple[str, ...] = ()
    reason: str | None = None
    optional: bool = False

    def __post_init__(self):
        if self.skip == (self.weight is not None):
            raise ValueError(f"Rule({self.pattern!r}): give either weight= or skip=True.")
        if self.skip and self.activation is not None:
            raise ValueError(f"Rule({self.pattern!r}): a skipped layer has no activation=.")
        for field in ("weight", "activation"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, as_spec(getattr(self, field), f"Rule({self.pattern!r}) {field}"))
        if self.method != "rtn":
            from jaxq import methods  # which import optax; most rules name no method

            formats.check_choice(f"Rule({self.pattern!r}): method", self.method, methods.names())
        object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        try:
            _compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Rule({self.pattern!r}): not a regular expression: {error}.") from error

    def matches(self, path: str, kind: str) -> bool:
        """True if the rule is about the layer of this kind at this path."""
        return (not self.kinds or kind in self.kinds) and _compile(self.pattern).fullmatch(path) is not None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches a layer decides. A layer that none matches stays in floats.

    Example:
      >>> import jaxq
      >>> recipe = jaxq.Recipe([jaxq.Rule("lm_head", skip=True), jaxq.Rule("**", weight="nf4")])
      >>> recipe.find("layers/0/mlp/up", "Linear").weight.fmt.name
      'nf4'
    """

    rules: tuple[Rule, ...]

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"Recipe: rules must be jaxq.Rule objects, got {type(rule).__name__}.")

    def find(self, path: str, kind: str) -> Rule | None:
        """The first rule that matches, or None."""
        return next((rule for rule in self.rules if rule.matches(path, kind)), None)


def names() -> list[str]:
    """The recipes known by name: every preset as weight-only, those that quantize activations too, and by method."""
    return sorted([*presets(), *_DYNAMIC, *_BY_METHOD])


def as_recipe(recipe: str | QuantSpec | Recipe, caller: str) -> Recipe:
    """A recipe by name, or a spec for every weight; both leave embeddings, output heads and routers in floats.

    Raises:
      ValueError: no such recipe; close matches are named.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        name = recipe.strip().lower().replace("-", "_")
        if name not in names():
            raise ValueError(f"{caller}: {formats.unknown_name('recipe', recipe, names(), 'jaxq.recipes.names()')}")
        weight, activation, method = _BY_METHOD.get(name, (*_DYNAMIC.get(name, (name, None)), "rtn"))
    elif isinstance(recipe, QuantSpec):
        weight, activation, method = recipe, None, "rtn"
    else:
        raise TypeError(f"{caller}: recipe must be a name, a QuantSpec or a jaxq.Recipe, got {type(recipe).__name__}.")
    defaults: list[Any] = [
        Rule(kinds=("Embed",), skip=True, reason="embedding, left in floats by default", optional=True)
    ]
    for head in HEADS:
        what = "router" if head == "router" else "output head"
        defaults.append(Rule(f"**/{head}", skip=True, reason=f"{what}, left in floats by default", optional=True))
    return Recipe((*defaults, Rule(weight=weight, activation=activation, method=method)))


def _compile(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts += [] if parts[-1:] == ["**"] else ["**"]
        else:
            parts.append("".join("[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c) for c in part))
    text = "/".join(parts)
    # "**/" may stand for nothing, "/**" for nothing, a lone "**" for everything.
    text = text.replace("/**/", "/(?:.*/)?")
    text = re.sub(r"^\*\*/", "(?:.*/)?", text)
    text = re.sub(r"/\*\*$", "(?:/.*)?", text)
    return re.compile(text.replace("**", ".*"))
