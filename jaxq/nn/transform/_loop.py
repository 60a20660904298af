"""The loop that quantizes a model. All kinds of models share it.

`quantize_slots` checks all weights, and folds scales if a method does this. Then it
goes through the blocks of the model. For each block it collects statistics of the
layers' inputs, quantizes each weight by its rule, and puts the results into the model.
`plan_slots` makes the same checks and returns the report. It quantizes nothing. The
`Adapter` of a model does everything that depends on the kind of model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxq.debug_checks import allow_nonfinite
from jaxq.meshes import on_auto_axes
from jaxq.nn.calibration import StatsRequest
from jaxq.nn.report import (
    LayerErrors,
    Report,
    Row,
    float_row,
    layer_errors,
    planned_row,
    quantized_row,
    skip_reason,
)
from jaxq.nn.transform._bias import corrected_bias
from jaxq.nn.transform._calibration_data import (
    CalibrationData,
    of_stack,
    wanted_statistics,
)
from jaxq.nn.transform._donation import Donated
from jaxq.nn.transform._matching import matched_slots
from jaxq.nn.transform._model_error import model_error
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._order import blocks_in_order
from jaxq.nn.transform._resume import Result, Resume
from jaxq.nn.transform._run_time_scales import with_planned_scales, with_scales
from jaxq.nn.transform._slot import Adapter, Slot
from jaxq.nn.transform._traced_weights import NOT_MEASURED, has_traced, refuse_shapes
from jaxq.nn.transform._weight import (
    method_without_data,
    quantize_weight,
    scales_note,
)
from jaxq.observers import LayerStats
from jaxq.progress import with_progress
from jaxq.qtensor import QTensor, TrainedWeight, find_cuts, shard_like
from jaxq.recipes import Recipe


@allow_nonfinite()
def quantize_slots(
    adapter: Adapter, recipe: Recipe, options: Options
) -> tuple[Any, Report]:
    """Quantizes the weights of a model by the rules of a recipe.

    Args:
      adapter: the adapter of the model. It holds a copy that may be changed.
      recipe: the rules.
      options: the other arguments of `quantize_model`.

    Returns:
      (the quantized model, the report).
    """
    options.check_recipe(recipe)
    data = CalibrationData(adapter, options)
    slots, rule_notes = matched_slots(adapter, recipe, options, has_data=bool(data))
    refuse_shapes(adapter.arrays(), adapter.caller)
    resume = Resume(recipe, slots, adapter.state(), options)
    slots = with_planned_scales(adapter.fold(slots, data, options))
    chosen = [slot for slot in slots if slot.chosen]
    blocks = blocks_in_order(adapter, chosen, options)
    keys = _keys(chosen, blocks, adapter, options)
    donated = Donated(adapter.arrays() if options.donate else ())
    rows = {slot.weight: _row_before(slot) for slot in slots if not slot.chosen}
    # What takes the place of the float weights, by `Slot.weight`.
    weights: dict[Hashable, QTensor | TrainedWeight] = {}
    for number, block in enumerate(blocks):
        # Not empty if an earlier run has finished this block.
        finished = resume.read(number, [slot.name for slot in block])
        data.used = data.used or bool(finished)
        # The earlier blocks are quantized now, so their errors are in the statistics.
        stats: Mapping[str, LayerStats] = {}
        if not finished:
            stats = _statistics(data, block)
            block, stats = with_scales(block, data, stats, options)
        results: dict[str, Result] = {}
        for slot in with_progress(block, "quantizing", options.progress):
            # Several layers may share one weight. The first of them quantizes it.
            if slot.weight not in weights:
                result = finished.get(slot.name)
                if result is None:
                    layer_stats, key = stats.get(slot.path), keys[slot.weight]
                    result = _quantize_slot(adapter, slot, layer_stats, key, options)
                results[slot.name] = result
                rows[slot.weight] = result.row
                qt = shard_like(result.weight, slot.value)
                weights[slot.weight] = options.replacement(slot.value, qt)
                if result.bias is not None:
                    adapter.put_bias(slot, result.bias)
            adapter.put_weight(slot, weights[slot.weight])
            donated.end_use(slot.value, weights[slot.weight])
        if not finished:
            resume.write(number, results)
    model = adapter.finish()
    output_sqnr, error_note = None, ""
    if options.batches:
        output_sqnr, error_note = model_error(*adapter.runs(options), options)
    data_notes = data.unused_notes(adapter.read_arguments, output_sqnr is not None)
    traced_note = NOT_MEASURED if has_traced(list(adapter.arrays())) else ""
    notes = (*adapter.notes, *data_notes, error_note, *rule_notes, traced_note)
    notes = tuple(note for note in notes if note)
    return model, Report(tuple(adapter.rows(rows)), notes, output_sqnr)


@allow_nonfinite()
def plan_slots(adapter: Adapter, recipe: Recipe, options: Options) -> Report:
    """The report of `quantize_slots` without measured errors. Nothing is quantized."""
    slots, rule_notes = matched_slots(adapter, recipe, options, has_data=None)
    slots = with_planned_scales(adapter.fold(slots, None, options))
    rows = {slot.weight: _row_before(slot) for slot in reversed(slots)}
    notes = (*adapter.notes, *rule_notes)
    return Report(tuple(adapter.rows(rows)), notes)


def _keys(
    chosen: Sequence[Slot],
    blocks: Sequence[Sequence[Slot]],
    adapter: Adapter,
    options: Options,
) -> dict[Hashable, jax.Array]:
    """A PRNG key for each weight."""
    key = jax.random.key(0) if options.key is None else options.key
    in_order = list(itertools.chain.from_iterable(blocks))
    slots = chosen if adapter.keys_follow_slots else in_order
    weights = list(dict.fromkeys(slot.weight for slot in slots))
    keys = jax.random.split(key, max(len(slots), 1))
    return {weight: keys[i] for i, weight in enumerate(weights)}


def _statistics(
    data: CalibrationData, block: Sequence[Slot]
) -> Mapping[str, LayerStats]:
    """The statistics that the rules of a block use, by the path of the layer."""
    layers, scaled = [], {}
    for slot in block:
        assert slot.rule is not None
        layers.append((slot.path, slot.rule, slot.has_rows, slot.reads_patches))
        if slot.scales is not None and slot.scales.at_run_time:
            observer: Any = slot.rule.observer
            scaled[slot.path] = StatsRequest(observer, hessian=False)
    return data.statistics(scaled | wanted_statistics(layers))


def _quantize_slot(
    adapter: Adapter,
    slot: Slot,
    stats: LayerStats | None,
    key: jax.Array,
    options: Options,
) -> Result:
    """Quantizes one weight, corrects its bias, and measures its row of the report."""
    rule = slot.rule
    assert rule is not None
    # On a mesh with explicit axes, the steps of a method would need shardings.
    with on_auto_axes((jnp.asarray(slot.value), key, stats)) as (floats, key, stats):
        stats = of_stack(stats, floats.shape[: len(slot.batch)])
        _check_inputs(stats, slot)
        solved = quantize_weight(slot, floats, stats, key, options)
        qt, notes, new_bias = solved.qt, list(slot.notes), None
        if rule.correct_bias:
            bias = adapter.bias(slot)
            note = "no bias to correct"
            if bias is not None:
                assert stats is not None
                new_bias, note = corrected_bias(
                    bias, floats, qt, stats, options.fallback, slot.name
                )
            notes.append(note)
        errors = LayerErrors()
        if stats is not None:
            errors = layer_errors(floats, qt, stats, slot.inputs(stats))
        notes.append(slot.note_on_product(qt))
        notes.append(_note_on_shards(slot.value, qt))
        row = quantized_row(
            slot.name, slot.kind.name, floats, qt, solved, notes, errors
        )
    return Result(qt, new_bias, row)


def _note_on_shards(floats: Any, qt: QTensor) -> str:
    """Says where the shards of a float weight cut groups or bytes of its QTensor.

    Codes or scales are then replicated along these axes, and a product gathers codes.
    """
    sharding = getattr(floats, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return ""
    cuts = find_cuts(qt, sharding.spec, sharding.mesh)
    if not cuts:
        return ""
    shown = "; ".join(f"axis {cut.axis}: {cut.problem}" for cut in cuts)
    return f"not all of it is sharded, because shards would cut groups ({shown})"


def _check_inputs(stats: LayerStats | None, slot: Slot) -> None:
    """Raises a ValueError if statistics are not those of a slot's inputs."""
    if stats is None or not slot.has_rows:
        return
    shape = slot.value.shape
    size = math.prod(shape[axis] for axis in slot.contracting)
    expected = [*shape[: len(slot.batch)], size]
    if list(stats.mean.shape) != expected:
        raise ValueError(
            f"{slot.name or 'w'}: the statistics are for inputs of shape "
            f"{list(stats.mean.shape)}, expected {expected}. Pass the statistics of "
            "this layer's inputs."
        )


def _row_before(slot: Slot) -> Row:
    """The row of a slot before anything is quantized, without measured errors."""
    if not slot.chosen:
        return float_row(slot.name, slot.kind.name, slot.value, skip_reason(slot.rule))
    assert slot.rule is not None
    assert slot.planned is not None
    return planned_row(
        slot.name,
        slot.kind.name,
        slot.value,
        slot.planned,
        method_without_data(slot),
        (scales_note(slot), *slot.notes, slot.product_note),
    )
