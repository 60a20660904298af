"""Quantizes one weight by its rule: format, method, and quantization of its inputs.

All kinds of models share these functions. A method takes matrices `[*batch, in, out]`
only. The weight of a layer may have more axes. It is reshaped to a matrix for the
method, and the result is reshaped back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.calibration import cached_program
from jaxq.nn.transform._folding import folding_of
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Slot
from jaxq.nn.transform._static_range import static_range, with_activation
from jaxq.observers import LayerStats, scaled_stats
from jaxq.qtensor import (
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    QuantSpec,
    check_floats,
    quantize,
)
from jaxq.recipes import Rule


def quantize_weight(
    slot: Slot,
    floats: jax.Array,
    stats: LayerStats | None,
    key: jax.Array,
    options: Options,
) -> methods.Solved:
    """Quantizes a weight by its rule.

    Args:
      slot: the slot of the weight. Its rule has `weight`.
      floats: the float weight.
      stats: statistics of the layer's inputs, or None.
      key: the PRNG key of this weight.
      options: `fallback` and `on_nonfinite`. If `key` is None, the spec may not have
        stochastic rounding.

    Returns:
      The quantized weight, with the method that made it, a note and a loss. If the rule
      has an activation, the weight also quantizes the layer's inputs.

    Raises:
      ValueError: the weight cannot be quantized to the spec, or by the method; the
        rule has an observer, and the statistics have no static range for it; or
        `fallback` is "raise", and the range of the observer gives a larger output error
        than a plain range (`_static_range.py`).
    """
    rule = _rule(slot)
    # None if the layer has no scales, or if they are folded into a previous layer.
    scale = None if slot.scales is None else slot.scales.scale
    if scale is None:
        solved = _solve_slot(slot, floats, stats, key, options)
    else:
        assert slot.planned is not None
        assert stats is not None
        factors = jnp.asarray(1 / scale)
        scaled = multiplied_rows(slot.planned, floats, scale)
        solved = _solve_slot(slot, scaled, scaled_stats(stats, factors), key, options)
        qt = solved.qt.astype(floats.dtype).with_input_scale(factors)
        solved = solved._replace(qt=qt)
    static = static_range(slot, floats, solved.qt, stats, options)
    if static is None:
        return solved._replace(qt=with_activation(solved.qt, rule, None))
    return solved._replace(
        qt=with_activation(solved.qt, rule, static.bounds),
        note=methods.join_notes(solved.note, static.note),
    )


def _solve_slot(
    slot: Slot,
    floats: jax.Array,
    stats: LayerStats | None,
    key: jax.Array,
    options: Options,
) -> methods.Solved:
    """The part of `quantize_weight` between the scales and the activation."""
    rule, name = _rule(slot), slot.name or "w"
    spec = _nearest_spec(rule)
    nearest = quantize(
        floats,
        spec,
        contracting=slot.contracting,
        batch=slot.batch,
        key=key if options.key is not None and spec.needs_key else None,
        on_nonfinite=options.on_nonfinite,
        name=name,
    )
    if _only_rounds(slot):
        return _rounded(nearest, slot)
    rows = slot.matrix_stats(stats)
    num_groups = rows.count.shape[-1] if rows is not None and slot.kind.windowed else 1
    if num_groups > 1 and not _splits_into_groups(nearest):
        note = (
            f"rounded to nearest: the method quantizes {num_groups} groups of features "
            f"separately, and {nearest.spec.granularity} has blocks over several groups"
        )
        methods.falls_back(options.fallback, f"{name}: {note}", "Use PerChannel().")
        return methods.Solved(nearest, "rtn", note, None)
    solved = _solve(nearest, floats, rows, rule, options.fallback, key, name)
    return _with_scales(solved, slot)


def dry_run(slot: Slot) -> QTensor:
    """Traces the quantization of a slot's weight. No number is computed.

    Returns:
      The quantized weight with `jax.ShapeDtypeStruct`s instead of arrays.

    Raises:
      TypeError: the weight is not float32, bfloat16 or float16.
      ValueError: the weight cannot be quantized to the spec, or by the method.
    """
    rule, w, name = _rule(slot), slot.value, slot.name or "w"
    method = methods.get(rule.method)
    # This check comes first, because jax would convert float64 to float32.
    check_floats(w.dtype, w.shape, name, "quantize")
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    facts = rule, method, slot.contracting, slot.batch
    try:
        # Layers with equal shapes share one trace, so the trace has no name.
        qt = jax.eval_shape(_quantization(*facts, "w"), shape)
    except (TypeError, ValueError):
        # Raises the same error again, with the name.
        qt = jax.eval_shape(_quantization(*facts, name), shape)
    return qt.with_meta(name=name)


@cached_program
def _quantization(
    rule: Rule,
    method: methods.Method,
    contracting: tuple[int, ...],
    batch: tuple[int, ...],
    name: str,
) -> Callable[[jax.Array], QTensor]:
    """A jitted function that quantizes a weight without data."""

    @jax.jit
    def run(w: jax.Array) -> QTensor:
        key = jax.random.key(0)
        spec = _nearest_spec(rule)
        qt = quantize(
            w,
            spec,
            contracting=contracting,
            batch=batch,
            key=key if spec.needs_key else None,
            name=name,
        )
        # The result of a method that needs data has these shapes too, so the method
        # does not run.
        if method.solve is not None and not method.needs_data(dict(rule.options)):
            qt = _solve(qt, w, None, rule, "rtn", key, name).qt
        return with_activation(qt, rule, None if rule.observer is None else (0.0, 1.0))

    return run


def _splits_into_groups(qt: QTensor) -> bool:
    """True if no block of a kernel holds features of two groups."""
    return isinstance(qt.spec.granularity, PerChannel | PerGroup)


def as_matrix(qt: QTensor, floats: jax.Array) -> jax.Array:
    """Reshapes an array with the shape of a QTensor to a matrix `[*batch, in, out]`."""
    geometry = qt.meta.geometry
    rows = geometry.to_storage(geometry.to_view(floats))  # [*batch, *kept, in]
    rows = rows.reshape(*qt.batch_shape, -1, geometry.contracted_size)
    return jnp.swapaxes(rows, -1, -2)


def multiplied_rows(
    qt: QTensor, floats: jax.Array, scale: jax.typing.ArrayLike
) -> jax.Array:
    """`diag(scale) @ floats` in float32, for an array with the axes of a QTensor.

    Args:
      qt: a QTensor. Its leaves may be `jax.ShapeDtypeStruct`s.
      floats: an array of the shape of `qt`.
      scale: `[*batch, K]`.
    """
    geometry = qt.meta.geometry
    view = geometry.to_view(floats).astype(jnp.float32)
    factors = geometry.contracted_to_view(jnp.asarray(scale, jnp.float32))
    return geometry.from_view(view * factors)


def scales_note(slot: Slot) -> str:
    """A note for the report: where the scales of a layer are, or why it has none.

    Empty if the method of the layer has no scales.
    """
    folding, outcome = folding_of(_rule(slot)), slot.scales
    if folding is None:
        return ""
    if outcome is not None and outcome.source:
        return f"scales folded into {outcome.source}"
    if outcome is not None and outcome.at_run_time:
        return "scales at run time"
    reason = "no previous layer can take its scales"
    if outcome is not None:
        reason = outcome.note
    if folding.without_scales:
        return f"{folding.without_scales}: {reason}"
    return reason


def method_without_data(slot: Slot) -> str:
    """The method in the row of a plan.

    This is "rtn" if the method only moves scales, and the scales cannot be moved.
    """
    has_scales = slot.scales is not None and slot.scales.applied
    if folding_of(slot.rule) is not None and _only_rounds(slot) and not has_scales:
        return "rtn"
    return _rule(slot).method


def _only_rounds(slot: Slot) -> bool:
    """True if the result of the method is the weight rounded to nearest.

    A method without `solve` rounds to nearest, and may move scales before.
    """
    return methods.get(_rule(slot).method).solve is None


def _rule(slot: Slot) -> Rule:
    assert slot.rule is not None
    return slot.rule


def _nearest_spec(rule: Rule) -> QuantSpec:
    """The spec for rounding to nearest, with the granularity of the rule's method."""
    assert isinstance(rule.weight, QuantSpec)
    return methods.get(rule.method).nearest_spec(rule.weight, dict(rule.options))


def _rounded(nearest: QTensor, slot: Slot) -> methods.Solved:
    """The result of a method that only moves scales and then rounds to nearest."""
    loss = None if slot.scales is None else slot.scales.loss
    return methods.Solved(nearest, method_without_data(slot), scales_note(slot), loss)


def _with_scales(solved: methods.Solved, slot: Slot) -> methods.Solved:
    """Adds the note and the loss of the scales to the result of a method.

    Such a method has two steps: it finds scales, and then it solves the weight. The
    loss of the method is the product of the losses of the two steps.
    """
    rule = _rule(slot)
    if folding_of(rule) is None:
        return solved
    scales, note = scales_note(slot), solved.note
    if slot.scales is None or not slot.scales.applied:
        return solved._replace(note=f"{scales}; {note}" if note else scales)
    loss = None
    if solved.loss is not None and slot.scales.loss is not None:
        loss = solved.loss * slot.scales.loss
    fell_back = solved.method != rule.method
    if fell_back:
        note = (
            "rounded to nearest with these scales: the method's codes have more error "
            "on held-out inputs"
        )
    note = f"{scales}; {note}" if note else scales
    return solved._replace(method=rule.method, loss=loss, note=note)


def _solve(
    nearest: QTensor,
    floats: jax.Array,
    stats: LayerStats | None,
    rule: Rule,
    fallback: str,
    key: jax.Array,
    name: str,
) -> methods.Solved:
    """Quantizes a weight by the method of its rule.

    Args:
      nearest: the weight rounded to nearest. The result has the same axes and blocks.
      floats: the float weight.
      stats: statistics of the rows that the matrix multiplies, or None. Those of a
        convolution have a last leading axis of groups.
      rule: the rule of the weight.
      fallback: as in `quantize_model`.
      key: PRNG key.
      name: the name of the weight in errors.
    """
    assert isinstance(rule.weight, QuantSpec)
    matrix = as_matrix(nearest, floats)  # [*batch, in, out]
    if stats is not None and stats.count.ndim > matrix.ndim - 2:
        matrix = _in_groups(matrix, stats.count.shape[-1])
    solved = methods.solve(
        rule.method,
        matrix,
        stats,
        rule.weight,
        options=dict(rule.options),
        fallback=fallback,
        key=key,
        name=name,
        nearest=_nearest_matrix(nearest, matrix),
    )
    return solved._replace(qt=_with_axes_of(nearest, solved.qt, rule.method, name))


def _in_groups(matrix: jax.Array, num_groups: int) -> jax.Array:
    """The matrices `[*batch, groups, in, out]` of the groups of a convolution.

    Args:
      matrix: `[*batch, in, groups * out]`.
      num_groups: of features. Each group reads its own channels of the input.
    """
    *batch, num_inputs, _ = matrix.shape
    matrix = matrix.reshape(*batch, num_inputs, num_groups, -1)
    return jnp.moveaxis(matrix, -2, -3)


def _nearest_matrix(nearest: QTensor, matrix: jax.Array) -> QTensor | None:
    """The rounded weight with the axes of its matrix, so that no method rounds again.

    None if blocks of the matrix would hold other numbers than blocks of the weight.

    Args:
      nearest: the weight rounded to nearest.
      matrix: the float weight as a matrix `[*batch, in, out]`.
    """
    if nearest.meta.geometry.contracted == (-2,) and nearest.shape == matrix.shape:
        return nearest
    if not isinstance(nearest.spec.granularity, PerChannel | PerGroup | PerTensor):
        return None
    round_matrix = functools.partial(
        quantize,
        spec=nearest.spec,
        contracting=-2,
        batch=tuple(range(matrix.ndim - 2)),
        key=jax.random.key(0) if nearest.spec.needs_key else None,
    )
    as_planned = jax.eval_shape(
        round_matrix, jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
    )
    return _reshaped_like(nearest, as_planned)


def _reshaped_like(qt: QTensor, like: QTensor) -> QTensor | None:
    """The numbers of `qt` with the shapes and static facts of `like`.

    Both store their numbers in the same order, so only shapes change. None if they have
    other numbers of codes or scales.
    """
    leaves, shapes = jax.tree.leaves(qt), jax.tree.leaves(like)
    if [leaf.size for leaf in leaves] != [leaf.size for leaf in shapes]:
        return None
    reshaped = [
        leaf.reshape(shape.shape) for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), reshaped)


def _with_axes_of(nearest: QTensor, matrix: QTensor, method: str, name: str) -> QTensor:
    """Reshapes the QTensor of a matrix to the axes of the layer's weight.

    Both QTensors store their codes in the same order, so only shapes change.

    Args:
      nearest: a QTensor with the axes of the layer's weight.
      matrix: the QTensor that the method returned for the matrix.
      method: the name of the method, for errors.
      name: the name of the weight, for errors.

    Raises:
      ValueError: the granularity gives another number of blocks for the matrix than for
        the weight.
    """
    geometry = nearest.meta.geometry
    blocks = (*nearest.batch_shape, *geometry.num_blocks)
    other_blocks = (
        f"{name}: method {method!r} quantizes the weight as a matrix. With "
        f"{nearest.spec.granularity}, the matrix has other blocks than the weight. Use "
        "PerChannel, PerGroup or PerTensor."
    )

    def reshape(leaf: jax.Array | None, shape: tuple[int, ...]) -> Any:
        if leaf is None:
            return leaf
        if leaf.size != math.prod(shape):
            raise ValueError(other_blocks)
        return leaf.reshape(shape)

    data = reshape(matrix.data, nearest.data.shape)
    codebook = matrix.codebook
    if codebook is not None:
        codebook = codebook.reshape(*blocks, codebook.shape[-1])
    if isinstance(matrix.scale, QTensor):
        assert isinstance(nearest.scale, QTensor)
        scale = _reshaped_like(matrix.scale, nearest.scale)
        if scale is None:
            raise ValueError(other_blocks)
    else:
        scale = reshape(matrix.scale, blocks)
    meta = dataclasses.replace(
        nearest.meta,
        spec=matrix.meta.spec,
        packing=matrix.meta.packing,
        activation=matrix.meta.activation,
        outliers=matrix.meta.outliers,
    )
    zero_point = reshape(matrix.zero_point, blocks)
    offset = reshape(matrix.offset, blocks)
    return QTensor(data, scale, zero_point, offset, codebook, meta)
