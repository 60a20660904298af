"""What to do to which parameter: rules on layer paths, and the recipes that are known by name."""

from jaxq.recipes._recipe import KINDS, Layer, Recipe, Rule, as_recipe, get, names

__all__ = ["KINDS", "Layer", "Recipe", "Rule", "as_recipe", "get", "names"]
