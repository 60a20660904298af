"""Quantization-aware and low-precision training, and LoRA, of Flax linen modules.

The functions are those of `jaxq.training`. They take a module and its variables instead
of a model. Weights in "params" become `TrainedWeight`s, which hold the floats and the
trained scales and ranges. So optax trains all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen
from flax.core import FrozenDict, freeze

from jaxq.nn.layers import Forward, Quantized, params_of, with_params
from jaxq.nn.report import Report, Row
from jaxq.nn.transform import LinenAdapter, Options, check_module, quantize_slots
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec, TrainedWeight
from jaxq.recipes import Recipe
from jaxq.sharding import value_in_box
from jaxq.sharding.boxes import boxed_like
from jaxq.training._averages import (
    check_averages,
    join_averages,
    split_averages,
)
from jaxq.training._convert import trained_row
from jaxq.training._low_precision_linen import (
    LowPrecisionModule,
    dot_general_cls,
    low_precision,
)
from jaxq.training._prepare import check_trained, replacement, trainable_recipe
from jaxq.training._ranges import Ranges, as_ranges
from jaxq.training._restore import restore_floats
from jaxq.training._schedule import Schedule
from jaxq.training._weights import trained_weights
from jaxq.training.lora.linen import (
    LoRAModule,
    add_lora,
    lora_mask,
    merge_lora,
    partition_lora,
)

__all__ = [
    "LoRAModule",
    "LowPrecisionModule",
    "Prepared",
    "add_lora",
    "convert",
    "dot_general_cls",
    "lora_mask",
    "low_precision",
    "merge_lora",
    "partition_lora",
    "prepare",
]


class Prepared(Quantized):
    """The module that `prepare` returns. It is used like the module that it wraps.

    Its attributes and methods are those of `jaxq.nn.linen.Quantized`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.prepare(module, variables, "int4")
      >>> isinstance(module, jaxq.training.linen.Prepared)
      True
    """

    # The report of `prepare`. `convert` replaces the rows of trained weights.
    _jaxq_report: Report = dataclasses.field(default=Report(()), repr=False)


def prepare(
    module: linen.Module,
    variables: Mapping[str, Any],
    recipe: str | QuantSpec | Recipe,
    *,
    ranges: str | Ranges = "dynamic",
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    example: Any = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    sequential: bool | str = False,
    fallback: str = "rtn",
    strict: bool = True,
    schedule: Schedule | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> tuple[Prepared, Any]:
    """Returns a linen module and variables for quantization-aware training.

    Each weight that the recipe quantizes becomes a `jaxq.qtensor.TrainedWeight` in
    `variables["params"]`. The arguments `module` and `variables` do not change.

    A prepared module can be prepared again, for example with fewer bits. Only its
    trained floats are kept. The scales, zero points, codebooks and ranges start again
    from the recipe, also if the recipe is the same.

    If a module has batch norms, fold them into the kernels before them with
    `jaxq.nn.linen.fold_batch_norm`, and prepare the folded variables.

    Args:
      module: a linen module, or the result of an earlier `prepare`.
      variables: its variables, a dict or a FrozenDict. A weight in a box of metadata
        (`nn.Partitioned`) stays in a `jaxq.nn.linen.QuantizedBox` around this box.
      recipe: as in `jaxq.quantize_model`.
      ranges: as in `jaxq.training.prepare`.
      calibration: as in `jaxq.nn.linen.quantize_model`.
      example: as in `jaxq.nn.linen.quantize_model`.
      mask: as in `jaxq.nn.linen.quantize_model`.
      forward: as in `jaxq.nn.linen.quantize_model`.
      sequential: as in `jaxq.quantize_model`.
      fallback: as in `jaxq.quantize_model`.
      strict: as in `jaxq.nn.linen.quantize_model`.
      schedule: a `jaxq.training.Schedule`. Call its `apply` on the parameters in every
        training step.
      key: as in `jaxq.quantize_model`.
      progress: as in `jaxq.quantize_model`.

    Returns:
      (a module, variables). The module is used like the float module. With
      `ranges=jaxq.training.ema()`, the variables have a collection "quant_stats". It is
      used like "batch_stats". An `nn.scan` over layers needs
      `variable_axes={"params": 0, "quant_stats": 0}`.

    Raises:
      TypeError: `ranges` is unknown; `module` is quantized by `quantize_model`.
      ValueError: the recipe quantizes no weight; a spec rounds stochastically; `ranges`
        has moving averages, but no rule has an activation with one range; `ranges` has
        clipping thresholds, but no rule has static ranges; or `schedule` freezes moving
        averages, but `ranges` has none. The errors of `jaxq.nn.linen.quantize_model`
        are raised too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, optax
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.prepare(
      ...   module, variables, "int4", ranges=jaxq.training.lsq())
      >>> params, tx = variables["params"], optax.adam(1e-3)
      >>> def loss(params):
      ...   return jnp.mean((module.apply({"params": params}, x) - 1) ** 2)
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params))
      >>> params = optax.apply_updates(params, updates)
      >>> qmodule, qvariables, report = jaxq.training.linen.convert(
      ...   module, {"params": params})
      >>> y = module.apply({"params": params}, x)
      >>> bool((qmodule.apply(qvariables, x) == y).all())
      True
    """
    caller = "training.linen.prepare"
    ranges = as_ranges(ranges, caller)
    recipe = trainable_recipe(recipe, ranges, caller)
    options = Options(
        caller=caller,
        calibration=calibration,
        mask=mask,
        forward=forward,
        sequential=sequential,
        fallback=fallback,
        strict=strict,
        key=key,
        progress=progress,
        replacement=replacement(ranges, schedule, caller),
    )
    is_frozen = isinstance(variables, FrozenDict)
    is_prepared = isinstance(module, Prepared)
    if isinstance(module, Prepared):
        module = module._jaxq_module
    check_module(module, variables, caller)
    if is_prepared:
        variables = restore_floats(join_averages(variables, caller))
    adapter = LinenAdapter(module, variables, recipe, example, options)
    (quantized, variables), report = quantize_slots(adapter, recipe, options)
    check_trained(report, caller)
    variables = split_averages(variables)
    variables = freeze(variables) if is_frozen else variables
    return Prepared(module, quantized._jaxq_weights, report), variables


def convert(
    module: linen.Module, variables: Mapping[str, Any]
) -> tuple[Quantized, Any, Report]:
    """Returns the quantized module and variables of a prepared module.

    The quantized module computes the same numbers as the prepared module.

    Args:
      module: the module that `prepare` returned.
      variables: its variables, trained or not.

    Returns:
      (a module, variables, a `Report`), as `jaxq.nn.linen.quantize_model` returns them.
      The rows compare the quantized weights with their trained floats.

    Raises:
      TypeError: `module` is not the result of `prepare`.
      ValueError: `variables` have no trained weight; no batch has set a moving average
        (`jaxq.training.ema`), or "quant_stats" lacks it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module, variables = jaxq.training.linen.prepare(module, variables, "int4")
      >>> qmodule, qvariables, _ = jaxq.training.linen.convert(module, variables)
      >>> qvariables["params"]["kernel"].spec.fmt.name
      'int4'
    """
    caller = "training.linen.convert"
    if not isinstance(module, Prepared):
        raise TypeError(
            f"{caller}: module must be the module that jaxq.training.linen.prepare "
            f"returned, got {type(module).__name__}. For a float module use "
            "jaxq.nn.linen.quantize_model."
        )
    check_module(module._jaxq_module, variables, caller)
    is_frozen = isinstance(variables, FrozenDict)
    variables = join_averages(variables, caller)
    check_averages(trained_weights(variables["params"], caller), caller)
    params = params_of(variables)
    trained_rows: dict[str, Row] = {}
    kinds = {row.path: row.kind for row in module._jaxq_report.rows}
    for keys, boxed in params.items():
        weight = value_in_box(boxed)
        if isinstance(weight, TrainedWeight):
            path = "/".join(keys)
            qt = weight.quantize()
            params[keys] = boxed_like(qt, boxed)
            trained_rows[path] = trained_row(path, kinds.get(path, "-"), weight, qt)
    rows = [trained_rows.get(row.path, row) for row in module._jaxq_report.rows]
    converted: Any = with_params(variables, params)
    if is_frozen:
        converted = freeze(converted)
    quantized = Quantized(module._jaxq_module, module._jaxq_weights)
    return quantized, converted, Report(tuple(rows))
