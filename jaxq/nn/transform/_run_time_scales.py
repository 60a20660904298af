"""Scales that stay with a layer, because no previous layer can take them.

Methods such as AWQ and SmoothQuant quantize `diag(s) w` instead of a weight w, and the
input of the layer is divided by the scales s. `_folding.py` moves this division into
the previous layer. Where this is not possible, the quantized weight keeps the factors
`1 / s` (`QTensor.with_input_scale`), and the layer multiplies its input by them at each
call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import methods
from jaxq.meshes import on_auto_axes
from jaxq.nn.calibration import StatsRequest
from jaxq.nn.report import multiplies_input, product_note
from jaxq.nn.transform._calibration_data import CalibrationData, of_stack
from jaxq.nn.transform._folding import Outcome, folding_of, why_worse
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Slot
from jaxq.nn.transform._weight import as_matrix, with_activation
from jaxq.observers import LayerStats
from jaxq.processes import to_numpy
from jaxq.qtensor import QuantSpec, quantize
from jaxq.recipes import Rule


def with_planned_scales(slots: Sequence[Slot]) -> list[Slot]:
    """The slots, with a mark for each layer that keeps its scales.

    A layer keeps its scales if its method allows it, and if they are not folded. The
    scales are not computed yet.
    """
    return [_with_planned_scale(slot) for slot in slots]


def with_scales(
    block: Sequence[Slot],
    data: CalibrationData,
    stats: Mapping[str, LayerStats],
    options: Options,
) -> tuple[list[Slot], Mapping[str, LayerStats]]:
    """Computes the scales of those layers in a block that keep their scales.

    If `fallback` is "rtn", scales that increase the error on held-out inputs are left
    out. In a stack, each matrix is compared separately.

    Args:
      block: slots of the block.
      data: calibration data. A static range needs a second pass, because it is the
        range of the divided input.
      stats: statistics of the layers' inputs, by path.
      options: `fallback`.

    Returns:
      (the slots with their scales, the statistics). The observers' states in the
      statistics belong to the divided inputs. All other statistics do not change.

    Raises:
      ValueError: `fallback` is "raise" and scales increase the error on held-out
        inputs; or a layer has a static range, and there are statistics instead of
        batches.
    """
    slots: list[Slot] = []
    static: dict[str, StatsRequest] = {}
    for slot in block:
        rule = slot.rule
        if rule is not None and slot.scales is not None and slot.scales.at_run_time:
            outcome = _outcome(slot, stats[slot.path], options)
            slot = dataclasses.replace(slot, scales=outcome)
            if outcome.scale is not None and rule.observer is not None:
                observer: Any = rule.observer
                request = StatsRequest(observer, False, 1 / outcome.scale)
                static[slot.path] = request
        slots.append(slot)
    observed = {
        path: stats[path]._replace(observed=divided.observed)
        for path, divided in data.of_multiplied_inputs(static).items()
    }
    return slots, {**stats, **observed}


def _with_planned_scale(slot: Slot) -> Slot:
    folding = folding_of(slot.rule) if slot.chosen else None
    keeps_scale = folding is not None and folding.at_run_time and slot.scales is None
    if not keeps_scale or not slot.has_rows:
        return slot
    planned = slot.planned
    assert planned is not None
    shape = (*planned.batch_shape, planned.meta.geometry.contracted_size)
    factors: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    planned = dataclasses.replace(planned, input_scale=factors)
    if not multiplies_input(planned, slot.roles):
        note = "its product dequantizes the weight, so the input cannot have scales"
        return dataclasses.replace(slot, scales=Outcome(note=note))
    return dataclasses.replace(
        slot,
        scales=Outcome(at_run_time=True),
        planned=planned,
        product_note=product_note(planned, slot.roles),
    )


def _outcome(slot: Slot, stats: LayerStats, options: Options) -> Outcome:
    """The scales of one layer, unless they increase the error on held-out inputs."""
    rule, planned, folding = slot.rule, slot.planned, folding_of(slot.rule)
    assert rule is not None
    assert folding is not None
    assert planned is not None
    floats = jnp.asarray(slot.value)
    stack = floats.shape[: len(slot.batch)]
    # On a mesh with explicit axes, the search for scales would need shardings.
    with on_auto_axes((floats, of_stack(stats, stack))) as (floats, stats):
        w = as_matrix(planned, floats).astype(jnp.float32)  # [*batch, in, out]
        with methods.names_layer(slot.name or "w", rule.method):
            device_scale = folding.find(
                None, [w], stats, rule.weight, dict(rule.options)
            )
        # A numpy array is on no mesh, so every later step can use it.
        scale = to_numpy(device_scale).astype(np.float32)  # [*batch, in]
        if not int(np.sum(stats.num_held_out)):
            return _kept(scale, None)
        without = _held_out_error(rule, w, np.ones_like(scale), stats)  # [*batch]
        error = _held_out_error(rule, w, scale, stats)
    worse = error > without
    reason = ""
    if worse.any():
        loss = methods.error_ratio(error[worse], without[worse])
        reason = why_worse(slot.path or "the model", rule, loss, options)
    if reason and worse.all():
        return Outcome(note=reason)
    if reason:
        scale = np.where(worse[..., None], np.float32(1), scale)
        error = np.minimum(error, without)
    return _kept(scale, methods.error_ratio(error, without))


def _kept(scale: np.ndarray, loss: float | None) -> Outcome:
    """The outcome of scales that a layer keeps. Scales of 1 are left out."""
    if (scale == 1).all():
        return Outcome(note="scales of 1 are best for its inputs")
    return Outcome(at_run_time=True, scale=scale, loss=loss)


def _held_out_error(
    rule: Rule, w: jax.Array, scale: np.ndarray, stats: LayerStats
) -> np.ndarray:
    """The squared output error of each matrix on held-out inputs, `[*batch]`.

    The weight is rounded to nearest after its rows are multiplied by the scale. If the
    rule has a static range, the range is the extremes of the divided inputs.
    """
    assert isinstance(rule.weight, QuantSpec)
    batch = tuple(range(w.ndim - 2))
    qt = quantize(
        w * scale[..., None],
        rule.weight,
        contracting=-2,
        batch=batch,
        on_nonfinite="propagate",
    )
    qt = with_activation(qt, rule, _divided_range(rule, scale, stats))
    qt = qt.with_input_scale(1 / scale)
    return to_numpy(methods.output_error(w, qt, stats.held_out))


def _divided_range(
    rule: Rule, scale: np.ndarray, stats: LayerStats
) -> tuple[np.ndarray, np.ndarray] | None:
    """The extremes of the divided inputs, `[*batch]`. None without a static range."""
    if rule.observer is None:
        return None
    low, high = (to_numpy(end) / scale for end in stats.extremes)
    low, high = np.min(low, axis=-1), np.max(high, axis=-1)
    # An input that is always zero has no range, and no error either.
    is_empty = ~(low < high)
    return np.where(is_empty, -1.0, low), np.where(is_empty, 1.0, high)
