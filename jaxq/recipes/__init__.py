"""Which layer is quantized how: rules on layer paths, and recipes made of rules.

A recipe knows the path, kind and shape of a layer. It knows nothing of models:
`jaxq.nn` finds the layers of a model and asks the recipe about each.
"""

from jaxq.recipes._floats import default_rules as default_rules
from jaxq.recipes._kinds import kinds, register_kind, unregister_kind
from jaxq.recipes._named import as_recipe, get, names
from jaxq.recipes._patterns import compile_pattern as compile_pattern
from jaxq.recipes._recipe import Recipe
from jaxq.recipes._rule import Layer, Rule

# An import with `as` and the same name is for other rooms of jaxq, not for users.
__all__ = ["Layer", "Recipe", "Rule", "get", "kinds", "names"]
