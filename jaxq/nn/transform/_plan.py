"""What a recipe would do to a model, before anything is done."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx

from jaxq.nn.layers._nnx import stack_note, weight_axes
from jaxq.nn.report._report import (
    Report,
    dropped_metadata,
    float_row,
    other_row,
    planned_row,
    skip_reason,
)
from jaxq.nn.transform._folding import (
    foldable,
    planned_outcomes,
    rotated,
    rotation_note,
)
from jaxq.nn.transform._linen import plan_linen
from jaxq.nn.transform._nnx_matching import (
    check_data,
    match,
    raw_arrays,
    unused_notes,
    variables_of,
)
from jaxq.nn.transform._tree import plan_params
from jaxq.nn.transform._weight import dry_run, unscaled_note
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
    """The report that `quantize_model` would give, without errors that must be measured; nothing is quantized.

    Args:
      model: a flax nnx module, a flax linen module (with `variables`), or a tree of arrays.
      recipe: as in `quantize_model`.
      variables: of a linen module.
      example: an input of a linen module, as in `jaxq.nn.linen.quantize_model`.
      strict: as in `quantize_model`.

    Returns:
      A `Report` with the bytes there would be. Layers whose method needs data show it; that it may fall back is not
      known before.

    Raises:
      ValueError: as `quantize_model`, for what can be known without data.

    Example:
      >>> import jaxq
      >>> from flax import linen, nnx
      >>> jaxq.nn.plan(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int4").quantized[0].bytes_after
      272
    """
    recipe = as_recipe(recipe, "plan")
    if isinstance(model, linen.Module):
        return plan_linen(model, variables, recipe, example, strict=strict)
    if not isinstance(model, nnx.Module):
        return plan_params(model, recipe, strict=strict)
    if recipe.rotate:
        model = rotated(model, jax.random.key(0))
    matched = match(model, recipe, "raise", strict=strict)
    check_data(
        [(f.path, f.kind, rule) for f, rule in matched if rule and rule.weight], None
    )
    outcomes = planned_outcomes(
        model, foldable(model, {found.path: rule for found, rule in matched})
    )
    found_of = {
        id(getattr(found.layer, found.kind.weight)): (found, rule)
        for found, rule in reversed(matched)
    }
    layers = {found.path for found, _ in matched}
    rows = []
    for path, variable in variables_of(model):
        if id(variable) not in found_of:
            rows.append(other_row(path, variable, layers))
            continue
        found, rule = found_of[id(variable)]
        value = variable.get_value()
        if rule is None or rule.weight is None:
            rows.append(float_row(path, found.kind.name, value, skip_reason(rule)))
        else:
            qt = dry_run(
                value, rule, *weight_axes(found.layer, found.kind), found.kind.weight
            )
            unscaled, roles = (
                unscaled_note(rule, outcomes.get(found.path)),
                found.kind.roles(found.layer),
            )
            method = "rtn" if unscaled and rule.method != "awq" else rule.method
            notes = (
                unscaled,
                dropped_metadata(variable),
                stack_note(found.layer, found.kind),
            )
            rows.append(
                planned_row(path, found.kind.name, value, qt, method, notes, roles)
            )
    rows += [
        float_row(path, "array", a, "in no variable, left as it is")
        for path, a in raw_arrays(model)
    ]
    notes = (
        *rotation_note(recipe),
        *unused_notes(recipe, [rule for _, rule in matched], strict),
    )
    return Report(tuple(rows), notes)
