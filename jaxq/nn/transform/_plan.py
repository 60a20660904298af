"""What a recipe would do to a model, before anything is done."""

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

    Nothing is quantized. The bytes are those that the quantized model will have.

    Args:
      model: a flax nnx module, a flax linen module (with `variables`), or a tree of
        arrays.
      recipe: as in `quantize_model`.
      variables: of a linen module.
      example: an input of a linen module, as in `jaxq.nn.linen.quantize_model`.
      strict: as in `quantize_model`.

    Returns:
      A `Report`. A layer whose method needs data shows that method. Whether the method
      will fall back to rounding is not known yet.

    Raises:
      TypeError: `variables` are missing for a linen module.
      ValueError: the errors of `quantize_model` that do not depend on data.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> recipe = jaxq.Recipe([jaxq.Rule(weight="int8")])
      >>> plan = jaxq.nn.plan(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), recipe)
      >>> plan.quantized[0].format, plan.bytes_before, plan.bytes_after
      ('int8', 2080, 576)
    """
    recipe = as_recipe(recipe, "plan")
    # No key is needed yet, so a plan does not check that there is one.
    options = Options(strict=strict)
    adapter: Adapter
    if isinstance(model, linen.Module):
        check_module(model, variables, "plan")
        adapter = LinenAdapter(model, variables, recipe, example, options)
    elif isinstance(model, nnx.Module):
        adapter = NnxAdapter(model, recipe, options)
    else:
        adapter = TreeAdapter(model, recipe)
    return plan_slots(adapter, recipe, options)
