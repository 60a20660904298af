"""What `quantize_checkpoint` does with each parameter, known before any is read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.io.checkpoint._checkpoint import Checkpoint
from jaxq.io.checkpoint._parts import is_table
from jaxq.qtensor import QTensor, QuantSpec, quantize
from jaxq.recipes import Recipe, Rule

_WEIGHT = ".weight"
# The kinds of layers that a checkpoint has, as rules name them.
KINDS = ("Embed", "Linear")
_FLOATS = ("float32", "bfloat16", "float16")


class Step(NamedTuple):
    """What happens to a parameter.

    Attributes:
      name: of the parameter.
      num_bytes: of the source.
      rule: how the weight is quantized; None if it stays as it is.
      reason: why it stays as it is.
    """

    name: str
    num_bytes: int
    rule: Rule | None
    reason: str = ""


def plan_steps(checkpoint: Checkpoint, recipe: Recipe, caller: str) -> list[Step]:
    """One step for each parameter, in the order of the checkpoint.

    Args:
      checkpoint: open, with floats.
      recipe: the rules.
      caller: the name that error messages begin with.

    Raises:
      ValueError: a rule needs data or matches nothing, or the recipe rotates the model.
    """
    if recipe.rotate:
        raise ValueError(
            f"{caller}: the recipe has rotate=True, which needs the whole model. Load "
            "it with jaxq.models.load, and call jaxq.quantize_model."
        )
    for rule in recipe.rules:
        _refuse_data(rule, caller)
    steps, matched = [], set()
    for name in checkpoint:
        shape = checkpoint.eval_shape(name)
        num_bytes = math.prod(shape.shape) * jnp.dtype(shape.dtype).itemsize
        rule, reason = _choose(name, shape, recipe)
        if rule is not None:
            matched.add(id(rule))
        is_quantized = rule is not None and rule.weight is not None
        steps.append(Step(name, num_bytes, rule if is_quantized else None, reason))
    unmatched = [
        rule.pattern
        for rule in recipe.rules
        if id(rule) not in matched and not rule.optional and rule.pattern != "**"
    ]
    if unmatched:
        raise ValueError(
            f"{caller}: rules {unmatched} match no weight of {checkpoint.path}, or "
            "only weights that an earlier rule matches. A path is that of the module: "
            "'model/layers/0/mlp/up_proj' or 'layers/0/mlp/up_proj'."
        )
    if not any(step.rule for step in steps):
        raise ValueError(f"{caller}: no rule quantizes a weight of {checkpoint.path}.")
    return steps


def quantized_weight(weight: jax.Array, step: Step) -> QTensor:
    """The weight `[out, in]`, quantized along its inputs.

    Raises:
      ValueError: the weight cannot be quantized to the spec, or a number is not finite.
        The error names the parameter.
    """
    rule = step.rule
    assert rule is not None
    assert isinstance(rule.weight, QuantSpec)
    method = methods.get(rule.method)
    if method.solve is None:
        qt = quantize(weight, rule.weight, contracting=-1, name=step.name)
    else:
        options = dict(rule.options)
        qt = methods.solve(
            rule.method, weight.T, None, rule.weight, options=options, name=step.name
        ).qt.T
    return qt if rule.activation is None else qt.with_activation(rule.activation)


def _refuse_data(rule: Rule, caller: str) -> None:
    """Raises if a rule needs more than the weight."""
    method, options = methods.get(rule.method), dict(rule.options)
    problem = ""
    if method.needs_data(options) or method.folding is not None:
        problem = f"method={rule.method!r}"
    if rule.observer is not None:
        problem = "observer="
    if rule.correct_bias:
        problem = "correct_bias=True"
    if isinstance(rule.weight, QuantSpec) and rule.weight.needs_key:
        problem = "stochastic rounding"
    if problem:
        raise ValueError(
            f"{caller}: {rule.name} has {problem}. Weights are quantized one at a time "
            "here, without data and without other weights. Use jaxq.quantize_model."
        )


def _choose(name: str, shape: Any, recipe: Recipe) -> tuple[Rule | None, str]:
    """The rule of a parameter, and why it stays as it is (empty if it does not)."""
    if len(shape.shape) != 2 or not name.endswith(_WEIGHT):
        return None, "not a matrix of a layer"
    if jnp.dtype(shape.dtype).name not in _FLOATS:
        return None, f"{shape.dtype}, not one of {', '.join(_FLOATS)}"
    table, linear = KINDS
    kind = table if is_table(name) else linear
    path = name.removesuffix(_WEIGHT).replace(".", "/")
    # Paths of `jaxq.models` do not begin with "model".
    paths = (path, path.removeprefix("model/"))
    kernel = shape.shape[::-1]  # [in, out], as Flax has it
    for rule in recipe.rules:
        if any(rule.matches(own, kind, kernel) for own in paths):
            return rule, "" if rule.weight is not None else rule.reason or "skipped"
    return None, "no rule matches"
