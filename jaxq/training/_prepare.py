"""prepare: makes a model for quantization-aware training from a float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxq.nn.transform import (
    NnxAdapter,
    Options,
    TreeAdapter,
    fold_norms,
    quantize_slots,
)
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, TrainedWeight
from jaxq.recipes import Recipe, as_recipe
from jaxq.training._averages import averaged_recipe
from jaxq.training._batch_norm import norms_to_fold, start_norms
from jaxq.training._ranges import Ranges, as_ranges
from jaxq.training._restore import restore_floats
from jaxq.training._schedule import Schedule, switched

CALLER = "training.prepare"


def prepare(
    model: Any,
    recipe: str | QuantSpec | Recipe,
    *,
    ranges: str | Ranges = "dynamic",
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    sequential: bool | str = False,
    fallback: str = "rtn",
    strict: bool = True,
    schedule: Schedule | None = None,
    fold_batch_norm: bool | Sequence[str] = False,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> Any:
    """Returns a copy of a float model for quantization-aware training.

    Each weight that the recipe quantizes becomes a `jaxq.qtensor.TrainedWeight`. It
    keeps the floats, and every product quantizes them. The gradients pass straight
    through the rounding. All leaves are floats, so `nnx.Optimizer`, optax and
    checkpoints treat them like other parameters.

    The method of the recipe sets the start of training. After GPTQ, AWQ or HQQ, the
    quantized values of the prepared model are those of `quantize_model`. With
    `ranges="dynamic"` this holds only if the scales of the method are those that are
    computed from the floats.

    A prepared model can be prepared again, for example with fewer bits. Only its
    trained floats are kept. The scales, zero points, codebooks and ranges start again
    from the recipe, also if the recipe is the same.

    With `fold_batch_norm`, each batch norm is trained together with the kernel of the
    layer in front of it. Products quantize the folded kernel, which is computed with
    the running statistics: `kernel * scale / sqrt(var + epsilon)`.

    - In train mode, the batch norm first divides its input by this factor. Then it
      normalizes by the statistics of the batch, and updates its running statistics.
    - In eval mode, the model computes the same numbers as the converted model: the bias
      of the layer contains the batch norm.
    - To freeze the running statistics in the last steps, set
      `use_running_average=True`. The scale and the bias of the batch norm still train.
    - A batch norm after a layer that the recipe leaves in floats does not change.
    - For weights with few bits, use scales for each channel, because the factors of the
      channels differ by orders of magnitude.

    `jaxq.nn.fold_batch_norm` explains which batch norms can be folded.

    Args:
      model: a flax nnx module, or a tree of arrays as in `jaxq.quantize_params`.
      recipe: as in `jaxq.quantize_model`.
      ranges: "dynamic" computes the scales of weights from the floats in every product.
        `jaxq.training.lsq()` trains the scales, and static ranges of inputs.
        `jaxq.training.pact()` trains clipping thresholds of inputs.
        `jaxq.training.ema()` averages the ranges of inputs during training.
      calibration: batches or statistics, as in `jaxq.quantize_model`. Methods such as
        GPTQ and static ranges need them.
      mask: as in `jaxq.quantize_model`.
      forward: as in `jaxq.quantize_model`, or in `jaxq.quantize_params` for a tree.
      sequential: as in `jaxq.quantize_model`.
      fallback: as in `jaxq.quantize_model`.
      strict: as in `jaxq.quantize_model`.
      schedule: a `jaxq.training.Schedule`. Call its `apply` in every training step.
      fold_batch_norm: True trains each kernel together with the `nnx.BatchNorm` after
        its layer, see above. Patterns for the paths of batch norms choose some of them.
        This needs an nnx model, and at least one batch in `calibration`.
      key: as in `jaxq.quantize_model`.
      progress: as in `jaxq.quantize_model`.

    Returns:
      A model of the same class, or a tree of the same structure. In an nnx model, each
      of these weights is a `jaxq.nn.TrainedParam`. Its trained arrays are `nnx.Param`s.

    Raises:
      TypeError: `model` is neither an nnx module nor a tree of arrays; `ranges` is
        unknown; or `fold_batch_norm` is not False, but `model` is a tree.
      ValueError: the recipe quantizes no weight; a spec rounds stochastically; `ranges`
        has moving averages, but the model is a tree; `ranges` has moving averages, but
        no rule has an activation with one range; `ranges` has clipping thresholds, but
        no rule has static ranges; `schedule` freezes moving averages, but `ranges` has
        none; or `fold_batch_norm` is not False, but there is no batch.
        The errors of `quantize_model`, `quantize_params` and `jaxq.nn.fold_batch_norm`
        are raised too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> qat = jaxq.training.prepare(model, "int4", ranges=jaxq.training.lsq())
      >>> optimizer = nnx.Optimizer(qat, optax.adam(1e-3), wrt=nnx.Param)
      >>> grads = nnx.grad(lambda qat: jnp.mean((qat(x) - 1) ** 2))(qat)
      >>> _ = optimizer.update(qat, grads)
      >>> qmodel, report = jaxq.training.convert(qat)
      >>> bool((qmodel(x) == qat(x)).all())
      True

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.
      Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
      2018, section 3.2.2 (batch norms).
    """
    _check_model(model)
    ranges = as_ranges(ranges, CALLER)
    recipe = trainable_recipe(recipe, ranges, CALLER)
    if ranges.decay is not None and not isinstance(model, nnx.Module):
        raise ValueError(
            f"{CALLER}: ranges=ema() stores moving averages in a model, and a tree of "
            "arrays is no model. Use an nnx module, or jaxq.training.linen.prepare. "
            "For a tree, use a recipe with observers (w8a8_static) and calibration=."
        )
    options = Options(
        caller=CALLER,
        calibration=calibration,
        mask=mask,
        forward=forward,
        sequential=sequential,
        fallback=fallback,
        strict=strict,
        key=key,
        progress=progress,
        replacement=replacement(ranges, schedule, CALLER),
    )
    model = restore_floats(model)
    pairs = norms_to_fold(model, fold_batch_norm, options)
    if not isinstance(model, nnx.Module):
        adapter = TreeAdapter(model, recipe, options)
    elif pairs:
        adapter = NnxAdapter(fold_norms(model, pairs, options), recipe, options)
    else:
        adapter = NnxAdapter(model, recipe, options)
    prepared, report = quantize_slots(adapter, recipe, options)
    check_trained(report, CALLER)
    if pairs:
        start_norms(prepared, model, pairs)
    return prepared


def _check_model(model: Any) -> None:
    """Raises a TypeError unless a model is an nnx module or a tree of arrays."""
    if isinstance(model, nnx.Module):
        return
    leaves = jax.tree.leaves(model)
    if any(isinstance(leaf, linen.Module) for leaf in leaves):
        raise TypeError(
            f"{CALLER}: model is a flax linen module. Call "
            "jaxq.training.linen.prepare(module, variables, recipe)."
        )
    if not any(hasattr(leaf, "dtype") for leaf in leaves):
        raise TypeError(
            f"{CALLER}: model must be a flax nnx module or a tree of arrays, got "
            f"{type(model).__name__} without an array."
        )


def replacement(
    ranges: Ranges, schedule: Schedule | None, caller: str
) -> Callable[[jax.Array, QTensor], TrainedWeight]:
    """The function that makes trained weights, for `Options`.

    Raises:
      ValueError: `schedule` freezes moving averages, and `ranges` has none.
    """
    freezes = schedule is not None and schedule.freeze is not None
    if freezes and ranges.decay is None:
        raise ValueError(
            f"{caller}: {schedule} freezes moving averages, but ranges={ranges} has "
            "none. Use ranges=jaxq.training.ema(), or leave freeze= out."
        )

    def trained(floats: jax.Array, qt: QTensor) -> TrainedWeight:
        weight = ranges.weight(floats, qt)
        if schedule is None:
            return weight
        return switched(weight, schedule, jnp.zeros((), jnp.int32))

    return trained


def trainable_recipe(
    recipe: str | QuantSpec | Recipe, ranges: Ranges, caller: str
) -> Recipe:
    """The recipe, after a check that its weights can be trained.

    With moving averages, the recipe has no observers.

    Raises:
      ValueError: the spec of a weight rounds stochastically; `ranges` has moving
        averages, but no rule has an activation with one range; or `ranges` has clipping
        thresholds, but no rule has static ranges.
    """
    recipe = as_recipe(recipe, caller)
    for rule in recipe.rules:
        if isinstance(rule.weight, QuantSpec) and rule.weight.needs_key:
            raise ValueError(
                f"{caller}: the weight= of Rule({rule.pattern!r}) rounds "
                "stochastically, which needs a key in every product. Use "
                "rounding='nearest_even'. To train with stochastic rounding, call "
                "jaxq.fake_quant(w, spec, key=key) in your own layer."
            )
    has_static_ranges = any(rule.observer is not None for rule in recipe.rules)
    if ranges.range_gradient == "pact" and not has_static_ranges:
        raise ValueError(
            f"{caller}: ranges=pact() trains static ranges of inputs, but no rule of "
            "the recipe has them. Use 'w8a8_static', or rules with activation= and "
            "observer=."
        )
    return recipe if ranges.decay is None else averaged_recipe(recipe, caller)


def check_trained(report: Any, caller: str) -> None:
    """Raises a ValueError if a recipe leaves all weights in floats."""
    if not report.quantized:
        raise ValueError(
            f"{caller}: the recipe quantizes no weight of the model, so there is "
            "nothing to prepare. jaxq.nn.plan shows why each weight stays in floats."
        )
