"""Sensitivity of linen modules: one layer at a time is quantized, as in nnx."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import linen

from jaxq.debug_checks import allow_nonfinite
from jaxq.nn._sensitivity import (
    Divergence,
    Sensitivity,
    Weight,
    checked_arguments,
    measure,
    recipe_of,
)
from jaxq.nn.calibration import LinenFunction
from jaxq.nn.layers import (
    Forward,
    LinenLayer,
    find_linen_layers,
    params_of,
    with_params,
)
from jaxq.nn.transform import check_module
from jaxq.recipes import Recipe

_CALLER = "linen.sensitivity"


@allow_nonfinite()
def sensitivity(
    module: linen.Module,
    variables: Mapping[str, Any],
    choices: Sequence[str],
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measures how much a linen module's predictions change if one layer is quantized.

    The first batch shows which layers the module has, as in `quantize_model`. The
    layers that count are those of `jaxq.nn.sensitivity`. Give the result to
    `jaxq.nn.assign`.

    Args:
      module: a linen module that returns logits `[..., classes]`.
      variables: its float variables. They do not change.
      choices: preset names.
      batches: inputs of the module, as in `jaxq.nn.linen.calibrate`. They must run in
        eval mode.
      mask: as in `jaxq.nn.sensitivity`.
      forward: `forward(module, variables, batch)` runs a batch and returns logits. None
        uses `module.apply`.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Returns:
      A `jaxq.nn.Sensitivity`. Its first keys are the paths of layers ("blocks_0/up").

    Raises:
      TypeError: `module` is not a float linen module; `variables` has no "params";
        `batches` is a single batch; `choices` is not a list of names.
      ValueError: the module cannot be called with the first batch. The errors of
        `jaxq.nn.sensitivity` are raised too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((4, 32))
      >>> variables = module.init(jax.random.key(0), x)
      >>> result = jaxq.nn.linen.sensitivity(module, variables, ["int8", "int2"], [x])
      >>> result.kl[""]["int8"] < result.kl[""]["int2"]
      True
    """
    check_module(module, variables, _CALLER)
    specs, batches = checked_arguments(choices, batches, _CALLER)
    example = batches[0].whole()
    structure = find_linen_layers(module, variables, example, forward, caller=_CALLER)
    layers = structure.layers.values()
    weights = _weights(variables, layers, recipe_of(specs, _CALLER))
    # A FrozenDict becomes a dict, as in the variables with another weight.
    floats = with_params(variables, params_of(variables))
    run = LinenFunction(module, forward)
    divergence = Divergence(jax.jit, run, floats, batches, mask)
    return measure(weights, specs, divergence, progress)


def _weights(
    variables: Mapping[str, Any], layers: Iterable[LinenLayer], recipe: Recipe
) -> list[Weight]:
    """The weights that the recipe quantizes. `put` returns variables."""
    params = params_of(variables)
    weights = []
    for layer in layers:
        rule = recipe.find(layer.path, layer.kind.name)
        is_quantized = rule is not None and rule.weight is not None
        if not is_quantized or layer.problem is not None:
            continue
        value = linen.meta.unbox(params[layer.key])
        num_stacked = value.ndim - len(layer.roles.shape)
        batch = tuple(range(num_stacked + layer.roles.num_batch))
        put = functools.partial(_with_weight, variables, layer)
        weights.append(Weight(layer.path, value, layer.roles.contracting, batch, put))
    return weights


def _with_weight(
    variables: Mapping[str, Any], layer: LinenLayer, value: jax.Array
) -> dict[str, Any]:
    """The variables with another weight of one layer."""
    params = params_of(variables)
    params[layer.key] = linen.meta.replace_boxed(params[layer.key], value)
    return with_params(variables, params)
