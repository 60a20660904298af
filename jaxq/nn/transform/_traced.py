"""Slots of arrays whose products were found in a trace of `forward`.

The trace of a batch (`find_uses`) shows which axes of an array the products contract,
and which axes stack several matrices. A rule then does not have to name these
axes. If it names other axes, an error is raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.calibration import Use
from jaxq.nn.layers import Roles
from jaxq.nn.transform._calibration_data import needs_statistics
from jaxq.nn.transform._slot import Slot
from jaxq.observers import LayerStats
from jaxq.recipes import Rule


class ArrayKind(NamedTuple):
    """The kind record of an array that is in no layer.

    Attributes:
      name: "Array" in a tree, "Param" in a model.
      watched: calibration can see the input of the array's products.
      windowed: the product is a convolution.
      corrects_bias: the array may have a bias.
      read_patches: None. The patches of an array's convolutions are not collected.
    """

    name: str
    watched: bool = True
    windowed: bool = False
    corrects_bias: bool = True
    read_patches: None = None


def slot_with_use(slot: Slot, use: Use) -> Slot:
    """A slot with the axes that the products of its array contract and stack.

    If the slot's rule needs data and there are no data for this array, the slot gets a
    problem. The exception is an array that no product reads. It stays in floats, unless
    its rule has `contracting`.

    Args:
      slot: a slot whose rule quantizes the array. Its axes are those of the rule.
      use: the products of the array.
    """
    rule = slot.rule
    assert rule is not None
    if use.problem:
        kind = ArrayKind(slot.kind.name, watched=False)
        slot = dataclasses.replace(slot, kind=kind)
        if not _requires_data(rule):
            return slot
        if use.num_products or rule.contracting is not None or use.is_changed:
            return dataclasses.replace(slot, problem=_data_problem(use))
        reason = f"{use.problem}, left in floats"
        return dataclasses.replace(slot, rule=Rule(skip=True, reason=reason))
    kind = ArrayKind(slot.kind.name, windowed=use.windowed)
    uses_data = needs_statistics(rule, not use.windowed) or _requires_data(rule)
    notes = slot.notes
    if uses_data and use.is_shared:
        notes += (f"{use.num_products} products read it: their inputs are merged",)
    shape = tuple(slot.value.shape)
    contracting = _contracting_axes(rule, use, shape)
    batch = _batch_axes(rule, use, shape, uses_data)
    roles = slot.roles
    if roles is not None:
        from_the_end = tuple(
            sorted(axis % len(shape) - len(shape) for axis in contracting)
        )
        roles = Roles(from_the_end, shape, len(batch))
    return dataclasses.replace(
        slot,
        kind=kind,
        contracting=contracting,
        batch=batch,
        roles=roles,
        notes=notes,
    )


def spread_stats(stats: LayerStats, slot: Slot, use: Use) -> LayerStats:
    """Repeats statistics along the batch axes of a slot that share one input.

    Args:
      stats: with one leading axis for each of `use.batch`.
      slot: its batch axes include `use.batch`.
      use: of the slot's array.
    """
    ndim = slot.value.ndim
    for position, axis in enumerate(sorted(axis % ndim for axis in slot.batch)):
        if axis in use.batch:
            continue
        size = slot.value.shape[axis]

        def repeat(leaf: jax.Array, position: int = position, size: int = size) -> Any:
            shape = (*leaf.shape[:position], size, *leaf.shape[position:])
            return jnp.broadcast_to(jnp.expand_dims(leaf, position), shape)

        stats = jax.tree.map(repeat, stats)
    return stats


def _requires_data(rule: Rule) -> bool:
    """True if the rule cannot quantize an array without statistics of its inputs."""
    needs_data = methods.get(rule.method).needs_data(dict(rule.options))
    return needs_data or rule.observer is not None or rule.correct_bias


def _data_problem(use: Use) -> str:
    return (
        f"its rule needs data, but {use.problem}. Change forward, or use a rule that "
        "needs no data"
    )


def _contracting_axes(rule: Rule, use: Use, shape: Sequence[int]) -> tuple[int, ...]:
    """The contracted axes of the rule, or those of the products if the two differ."""
    if rule.contracting is None:
        return use.contracting
    is_same = _large(rule.contracting, shape) == _large(use.contracting, shape)
    return rule.contracting if is_same else use.contracting


def _batch_axes(
    rule: Rule, use: Use, shape: Sequence[int], uses_data: bool
) -> tuple[int, ...]:
    """The batch axes of the rule or of the products.

    If data are used, and the rule lacks a batch axis of the products, the result is the
    batch axes of the products.
    """
    if rule.batch is None:
        return use.batch
    has_data = _large(use.batch, shape) <= _large(rule.batch, shape)
    return rule.batch if has_data or not uses_data else use.batch


def _large(axes: Sequence[int], shape: Sequence[int]) -> set[int]:
    """Axes as numbers from 0. Axes of size 1 are left out: their role is arbitrary."""
    numbers = {axis % len(shape) for axis in axes}
    return {axis for axis in numbers if shape[axis] > 1}
