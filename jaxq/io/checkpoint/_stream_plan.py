"""What `quantize_checkpoint` does with each parameter, before any is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.files import listed
from jaxq.io.checkpoint._checkpoint import Checkpoint
from jaxq.io.checkpoint._parts import is_table
from jaxq.io.checkpoint._stream_statistics import Place, Statistics
from jaxq.io.checkpoint._targets import Target
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, quantize
from jaxq.recipes import Recipe, Rule

_WEIGHT = ".weight"
# The kinds of layers that a checkpoint has, as rules name them.
KINDS = ("Embed", "Linear")
_EXPERTS = ".experts."
# Names of Mixtral, and those of the same modules in `jaxq.models`.
_MIXTRAL_PARENT = "block_sparse_moe"
_MIXTRAL = {
    _MIXTRAL_PARENT: "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
_NUMBER_OF_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FLOATS = ("float32", "bfloat16", "float16")


class Step(NamedTuple):
    """What happens to a parameter.

    Attributes:
      name: of the parameter.
      num_bytes: of the source.
      rule: how the weight is quantized; None if it stays as it is.
      reason: why it stays as it is; empty if it is quantized.
      num_slices: the number of matrices in a stack, which are read and written one by
        one; 0 if the parameter is no stack.
      place: where the statistics for its method are; None if the method uses none.
    """

    name: str
    num_bytes: int
    rule: Rule | None
    reason: str = ""
    num_slices: int = 0
    place: Place | None = None


def plan_steps(
    checkpoint: Checkpoint,
    recipe: Recipe,
    kind: Target,
    statistics: Statistics | None,
    caller: str,
) -> list[Step]:
    """One step for each parameter, in the order of the checkpoint.

    Args:
      checkpoint: open, with floats.
      recipe: the rules.
      kind: the format of the result.
      statistics: for methods that need data; or None.
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
        _refuse_data(rule, statistics is not None, caller)
    steps, matched, missing = [], set(), []
    parents = _parents_of_experts(checkpoint)
    for name in checkpoint:
        shape = checkpoint.eval_shape(name)
        num_bytes = math.prod(shape.shape) * jnp.dtype(shape.dtype).itemsize
        rule, reason = _choose(name, shape, recipe, kind, parents)
        if rule is not None:
            matched.add(id(rule))
        num_slices = shape.shape[0] if len(shape.shape) == 3 else 0
        rule = None if reason else rule
        place = None
        if rule is not None and statistics is not None and _uses_data(rule):
            place = _place(name, parents, statistics)
            if place is None:
                missing.append(name)
        steps.append(Step(name, num_bytes, rule, reason, num_slices, place))
    if missing:
        raise ValueError(
            f"{caller}: statistics= has no layer for {listed(missing)}. Its paths must "
            "be those of the model that jaxq.models.load gives: "
            "'layers/0/mlp/up_proj'. Collect them with `jaxq statistics collect` or "
            "jaxq.nn.calibrate."
        )
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


def quantized_weight(
    weight: jax.Array, step: Step, stats: LayerStats | None = None
) -> QTensor:
    """The weight `[out, in]`, or a matrix `[in, out]` of a stack, quantized.

    If a method needs statistics and `stats` is None, weights are rounded to nearest.
    `_try_each_shape` uses this, because codes and scales have the same shapes then.

    Raises:
      ValueError: the weight cannot be quantized to the spec, or a number is not finite.
        The error names the parameter.
    """
    rule = step.rule
    assert rule is not None
    assert isinstance(rule.weight, QuantSpec)
    method, options = methods.get(rule.method), dict(rule.options)
    is_in_out = step.num_slices > 0
    if method.solve is None or (stats is None and method.needs_data(options)):
        axis = -2 if is_in_out else -1
        spec = method.nearest_spec(rule.weight, options)
        qt = quantize(weight, spec, contracting=axis, name=step.name)
    else:
        matrix = weight if is_in_out else weight.T  # [in, out]
        solved = methods.solve(
            rule.method, matrix, stats, rule.weight, options=options, name=step.name
        )
        qt = solved.qt if is_in_out else solved.qt.T
    return qt if rule.activation is None else qt.with_activation(rule.activation)


def _uses_data(rule: Rule) -> bool:
    """Whether the method of a rule uses statistics, for its result or to judge it."""
    method = methods.get(rule.method)
    return method.solve is not None and (
        method.judged or method.needs_data(dict(rule.options))
    )


def _place(name: str, parents: set[str], statistics: Statistics) -> Place | None:
    """Where the statistics of a parameter are; None if they are missing."""
    for path in _paths(name, parents):
        if path in statistics:
            number = _NUMBER_OF_EXPERT.search(name)
            if number is None or f"/experts/{number[1]}/" in path:
                return Place(path)
            return Place(path, int(number[1]))
    return None


def _refuse_data(rule: Rule, has_statistics: bool, caller: str) -> None:
    """Raises a ValueError if a rule needs more than a weight and its statistics."""
    method, options = methods.get(rule.method), dict(rule.options)
    problem = remedy = ""
    if method.needs_data(options) and not has_statistics:
        problem = f"method={rule.method!r}, which needs data"
        remedy = "Pass statistics=, or use"
    if method.folding is not None:
        problem = f"method={rule.method!r}, which moves scales between layers"
    if rule.observer is not None:
        problem = "observer=, and the formats have no static ranges of inputs"
    if rule.correct_bias:
        problem = "correct_bias=True, which changes another parameter"
    if isinstance(rule.weight, QuantSpec) and rule.weight.needs_key:
        problem = "stochastic rounding"
    if problem:
        raise ValueError(
            f"{caller}: {rule.name} has {problem}. Weights are quantized one at a time "
            f"here. {remedy or 'Use'} jaxq.quantize_model."
        )


def _choose(
    name: str, shape: Any, recipe: Recipe, kind: Target, parents: set[str]
) -> tuple[Rule | None, str]:
    """The rule that matches a parameter, and the reason why it stays as it is.

    The rule is None if none matches. The reason is empty if the rule quantizes.
    """
    is_matrix = len(shape.shape) == 2 and name.endswith(_WEIGHT)
    is_stack = len(shape.shape) == 3 and _EXPERTS in name
    if not is_matrix and not is_stack:
        return None, "not a matrix of a layer"
    if jnp.dtype(shape.dtype).name not in _FLOATS:
        return None, f"{shape.dtype}, not one of {', '.join(_FLOATS)}"
    table, linear = KINDS
    layer_kind = table if is_table(name) else linear
    # [in, out], as Flax has it. Stacks of experts are stored like this.
    kernel = shape.shape if is_stack else shape.shape[::-1]
    paths = _paths(name, parents)
    for rule in recipe.rules:
        if not any(rule.matches(path, layer_kind, kernel) for path in paths):
            continue
        if rule.weight is None:
            return rule, rule.reason or "skipped"
        if is_stack and not kind.has_stacks:
            return rule, 'a stack of experts, which only format="mxfp4" holds'
        if is_matrix and kind.has_stacks:
            return rule, 'not a stack of experts, which format="mxfp4" holds'
        return rule, ""
    return None, "no rule matches"


def _parents_of_experts(names: Iterable[str]) -> set[str]:
    """The modules that have experts, for example "model.layers.0.mlp"."""
    return {name.partition(_EXPERTS)[0] for name in names if _EXPERTS in name}


def _paths(name: str, parents: set[str]) -> list[str]:
    """The paths by which rules and statistics can name a module.

    These are the path in the file and the path in `jaxq.models`. A path of these models
    does not begin with "model", all experts of a layer have one path, and the gate
    beside the experts is the router.
    """
    module = name.removesuffix(_WEIGHT)
    modules = [module, _NUMBER_OF_EXPERT.sub(_EXPERTS, module)]
    parent, _, last = module.rpartition(".")
    if last == "gate" and parent in parents:
        modules.append(f"{parent}.router")
    if _MIXTRAL_PARENT in module.split("."):
        words = modules[-1].split(".")
        modules.append(".".join(_MIXTRAL.get(word, word) for word in words))
    paths = [own.replace(".", "/") for own in modules]
    paths += [path.removeprefix("model/") for path in paths]
    return list(dict.fromkeys(paths))
