"""A recipe: a list of rules. The first rule that matches a layer decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq.recipes._rule import Rule


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order. The first rule that matches a layer decides what happens to it.

    A layer that no rule matches stays in floats.

    Args:
      rules: `jaxq.Rule` objects.
      rotate: rotate the model before it is quantized, so that no channel is much larger
        than the others. What the model computes stays the same. The model's class says
        how to rotate it: `jaxq.nn.register_rotation`.

    Raises:
      TypeError: `rules` is one Rule, or an element of `rules` is not a Rule; `rotate`
        is not a bool.

    Example:
      >>> import jaxq
      >>> skip_head = jaxq.Rule("lm_head", skip=True)
      >>> recipe = jaxq.Recipe([skip_head, jaxq.Rule("**", weight="nf4")])
      >>> recipe.find("layers/0/mlp/up", "Linear").weight.fmt.name
      'nf4'

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.
    """

    rules: tuple[Rule, ...]
    rotate: bool = False

    def __post_init__(self):
        if isinstance(self.rules, Rule):
            raise TypeError(
                "Recipe: rules must be a list of jaxq.Rule objects, got one Rule. "
                "Write [rule]."
            )
        if not isinstance(self.rotate, bool):
            raise TypeError(
                f"Recipe: rotate must be True or False, got {self.rotate!r}."
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(
                    "Recipe: rules must be jaxq.Rule objects, got "
                    f"{type(rule).__name__}."
                )

    def find(
        self,
        path: str,
        kind: str,
        shape: tuple[int, ...] = (),
        module: type | None = None,
    ) -> Rule | None:
        """The first rule that matches a layer, or None.

        Args:
          path: the layer's path, components joined by "/".
          kind: the layer's kind: "Linear", "Conv", ...
          shape: the shape of its weight.
          module: the layer's class; None for an array of a tree.
        """
        for rule in self.rules:
            if rule.matches(path, kind, shape, module):
                return rule
        return None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dict that JSON can hold. `from_dict` returns an equal one."""
        description: dict[str, Any] = {"rules": [rule.to_dict() for rule in self.rules]}
        if self.rotate:
            description["rotate"] = True
        return description

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Raises:
          ValueError: `data` is not a dict with a list "rules" and at most the other key
            "rotate", or a rule is invalid. The error names the rule and the field.

        Example:
          >>> import json, jaxq
          >>> recipe = jaxq.Recipe([jaxq.Rule(weight="nf4")])
          >>> text = json.dumps(recipe.to_dict())
          >>> jaxq.Recipe.from_dict(json.loads(text)) == recipe
          True
        """
        is_recipe = isinstance(data, Mapping) and (
            {"rules"} <= set(data) <= {"rules", "rotate"}
        )
        if not is_recipe or not isinstance(data["rules"], list | tuple):
            raise ValueError(
                f"Recipe.from_dict: expected {{'rules': [...]}}, got {data!r:.80}."
            )
        rules = []
        for number, rule in enumerate(data["rules"]):
            try:
                rules.append(Rule.from_dict(rule))
            except ValueError as error:
                raise ValueError(
                    f"Recipe.from_dict: rules[{number}]: {error}"
                ) from error
        rotate = data.get("rotate", False)
        if not isinstance(rotate, bool):
            raise ValueError(
                f"Recipe.from_dict: rotate must be True or False, got {rotate!r:.80}."
            )
        return cls(tuple(rules), rotate=rotate)
