"""`jaxq.nn.plan`: the report of a recipe for a model, before anything is quantized."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from jaxq.nn.report import Report
from jaxq.nn.transform._linen import LinenAdapter, check_module
from jaxq.nn.transform._loop import plan_slots
from jaxq.nn.transform._nnx import NnxAdapter
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Adapter
from jaxq.nn.transform._tree import TreeAdapter
from jaxq.qtensor import QuantSpec
from jaxq.recipes import Recipe, as_recipe


def plan(
    model: Any,
    recipe: str | QuantSpec | Recipe,
    variables: Any = None,
    *,
    example: Any = None,
    strict: bool = True,
) -> Report:
    """Returns the report of `quantize_model` without measured errors.

    Nothing is quantized. The report has the bytes that the quantized model will have.

    Args:
      model: a flax nnx module, a flax linen module (with `variables`), or a tree of
        arrays.
      recipe: as in `quantize_model`.
      variables: the variables of a linen module. Not used for other models.
      example: an input of a linen module, as in `jaxq.nn.linen.quantize_model`.
      strict: as in `quantize_model`.

    Returns:
      A `Report`. The row of a layer has the method of its rule. A plan cannot know
      whether this method will fall back to rounding to nearest.

    Raises:
      TypeError: `model` is a linen module, and `variables` has no "params".
      ValueError: a check of `quantize_model` that does not depend on data has failed.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> recipe = jaxq.Recipe([jaxq.Rule(weight="int8")])
      >>> plan = jaxq.nn.plan(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), recipe)
      >>> plan.quantized[0].format, plan.bytes_before, plan.bytes_after
      ('int8', 2080, 576)
    """
    recipe = as_recipe(recipe, "plan")
    # A plan needs no PRNG key, so it does not check that there is one.
    options = Options(caller="plan", strict=strict)
    adapter: Adapter
    if isinstance(model, linen.Module):
        check_module(model, variables, "plan")
        adapter = LinenAdapter(model, variables, recipe, example, options)
    elif isinstance(model, nnx.Module):
        adapter = NnxAdapter(model, recipe, options)
    else:
        adapter = TreeAdapter(model, recipe, options)
    return plan_slots(adapter, recipe, options)
