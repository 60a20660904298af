"""Checks before anything is quantized. One error names all problems.

Every slot is checked against its rule: axes, spec, activation, method and data. A rule
that matches nothing is an error unless `strict=False`. A matrix that no rule matches,
in a module that jaxq does not know, is also an error unless `strict=False`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import methods
from jaxq.nn.report import product_note
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._slot import Adapter, Inventory, Slot
from jaxq.nn.transform._weight import dry_run
from jaxq.qtensor import is_traced, raise_if_not_finite
from jaxq.recipes import Recipe, Rule

# The most names that an error lists.
_MOST_LISTED = 12

# The names of parameters that are not multiplied as matrices end with these words.
_NOT_MULTIPLIED = re.compile(
    r"(^|_)(bias|bias_table|emb|embed|embedding|gain|gamma|norm|pos|position|scale"
    r"|token|wpe|wte)s?$"
)


def matched_slots(
    adapter: Adapter, recipe: Recipe, options: Options, *, has_data: bool | None
) -> tuple[list[Slot], tuple[str, ...]]:
    """Checks the slots of a model, and fills in `Slot.planned`.

    Args:
      adapter: the adapter of the model.
      recipe: the rules.
      options: `strict` and `on_nonfinite`.
      has_data: whether there are calibration data. None if this is not known yet.

    Returns:
      (slots, notes for the report on rules that match nothing).

    Raises:
      ValueError: a weight cannot be quantized by its rule. With `strict`: a rule
        matches nothing, or no rule matches a matrix of a module that jaxq does not
        know.
    """
    inventory = adapter.inventory()
    slots = [_planned(slot, adapter, has_data, options) for slot in inventory.slots]
    unused = _unused_rules(recipe, inventory)
    messages = [_slot_problems(slots, adapter), *inventory.refused]
    if options.strict:
        # Matrices without a rule come first: they are often why a rule is unused.
        messages.append(_unmatched_problem(inventory, adapter))
        messages.append(_unused_problem(unused, inventory, adapter))
    messages = [f"{adapter.caller}: {message}" for message in messages if message]
    if messages:
        raise ValueError("\n".join(messages))
    if options.strict:
        return slots, ()
    return slots, tuple(f"rule {pattern!r} matched nothing" for pattern in unused)


def match_bare_array(
    recipe: Recipe, path: str, value: Any, module: type
) -> tuple[Rule | None, str]:
    """Matches the rules of a recipe against a bare array, which is in no known layer.

    Only rules with "Param" in `kinds` apply to such an array. Other rules apply to
    layers only.

    Args:
      recipe: the rules.
      path: the path of the array.
      value: the array.
      module: the class of the module that holds the array.

    Returns:
      (the first rule that matches or None, a description for `Inventory.unmatched`).
      The description is empty if a rule matches, or if the module does not seem to
      multiply by the array.
    """
    shape = tuple(value.shape)
    for rule in recipe.rules:
        if "Param" in rule.kinds and rule.matches(path, "Param", shape, module):
            return rule, ""
    if not _is_multiplied(path, shape, module):
        return None, ""
    return None, f"{path} {value.dtype.name}{list(shape)}"


def _is_multiplied(path: str, shape: Sequence[int], module: type) -> bool:
    """True if a module seems to multiply by an array that it holds.

    This is a guess from the class of the module and the name and shape of the array.

    Args:
      path: the path of the array.
      shape: the shape of the array.
      module: the class of the module.
    """
    # The classes of Flax hold gains and biases, not weight matrices. Recurrent cells
    # keep their weight matrices in DenseParams. ToNNX and ToLinen hold whole models.
    is_flax = module.__module__.startswith("flax.")
    if is_flax and module.__name__ not in ("DenseParams", "ToNNX", "ToLinen"):
        return False
    is_matrix = sum(size > 1 for size in shape) >= 2
    name = path.rpartition("/")[2].lower()
    return is_matrix and not _NOT_MULTIPLIED.search(name)


def _planned(
    slot: Slot, adapter: Adapter, has_data: bool | None, options: Options
) -> Slot:
    """A slot with `planned`, or with the problem that prevents its quantization."""
    if not slot.chosen or slot.problem:
        return slot
    slot = _served(slot)
    try:
        _check_axes(slot)
        planned = dry_run(slot)
        _check_method(slot, adapter, has_data)
        note = product_note(planned, slot.roles)
        is_abstract = isinstance(slot.value, jax.ShapeDtypeStruct)
        has_numbers = not is_abstract and not is_traced(slot.value)
        if options.on_nonfinite == "raise" and has_numbers:
            raise_if_not_finite(jnp.asarray(slot.value), slot.name or "w", "quantize")
    except (TypeError, ValueError) as error:
        return dataclasses.replace(slot, problem=str(error))
    return dataclasses.replace(slot, planned=planned, product_note=note)


def _served(slot: Slot) -> Slot:
    """A slot whose method can quantize its kind of layer, if its rule allows another.

    If the method of the rule cannot, and the rule has `or_nearest`, the weight is
    rounded to nearest.
    """
    rule = slot.rule
    assert rule is not None
    reason = _unserved(rule, slot)
    if not reason or not rule.or_nearest:
        return slot
    rule = dataclasses.replace(rule, method="rtn", options=())
    notes = (*slot.notes, f"rounded to nearest: {reason}")
    return dataclasses.replace(slot, rule=rule, notes=notes)


def _check_axes(slot: Slot) -> None:
    """Raises a ValueError if axes are unknown, or if the rule names other axes."""
    ndim, rule = len(slot.value.shape), slot.rule
    assert rule is not None
    if not slot.contracting:
        raise ValueError(
            f"jaxq does not know which of its {ndim} axes a product contracts "
            f"(shape {list(slot.value.shape)}). Pass contracting= to its rule. "
            "For a stack of matrices [layers, in, out], pass contracting=(-2,) and "
            "batch=(0,)"
        )
    for name in ("contracting", "batch"):
        wanted, actual = getattr(rule, name), getattr(slot, name)
        if wanted is None:
            continue
        if {axis % ndim for axis in wanted} != {axis % ndim for axis in actual}:
            raise ValueError(
                f"its rule has {name}={tuple(wanted)}, but its axes are "
                f"{name}={tuple(actual)}. Omit {name}= from the rule, or correct it"
            )


def _check_method(slot: Slot, adapter: Adapter, has_data: bool | None) -> None:
    """Raises a ValueError that names all problems of the rule's method with a slot."""
    rule = slot.rule
    assert rule is not None
    problems = [
        _observer_problem(rule, slot, adapter, has_data),
        _bias_problem(rule, slot, adapter, has_data),
        _method_problem(rule, slot, adapter, has_data),
    ]
    if any(problems):
        raise ValueError("; ".join(problem for problem in problems if problem))


def _observer_problem(
    rule: Rule, slot: Slot, adapter: Adapter, has_data: bool | None
) -> str:
    """Why a layer's input cannot have a static range; empty if it can."""
    if rule.observer is None:
        return ""
    if not slot.kind.watched:
        return "its input cannot be observed, so it has no static range"
    return _missing_data(f"observer {rule.observer!r}", adapter, has_data)


def _bias_problem(
    rule: Rule, slot: Slot, adapter: Adapter, has_data: bool | None
) -> str:
    """Why a layer's bias cannot be corrected; empty if it can."""
    if not rule.correct_bias:
        return ""
    if not slot.kind.corrects_bias or slot.kind.windowed:
        return f"correct_bias=True is for dense layers, not for {slot.kind.name}"
    return _missing_data("correct_bias=True", adapter, has_data)


def _method_problem(
    rule: Rule, slot: Slot, adapter: Adapter, has_data: bool | None
) -> str:
    """Why the rule's method cannot quantize a layer; empty if it can."""
    method, name = methods.get(rule.method), f"method {rule.method!r}"
    folding = method.folding
    if folding is not None and not folding.at_run_time and adapter.no_folding:
        return f"{name} moves scales into the previous layer, and {adapter.no_folding}"
    reason = _unserved(rule, slot)
    if reason:
        return reason
    if not method.needs_data(dict(rule.options)):
        return ""
    return _missing_data(name, adapter, has_data)


def _unserved(rule: Rule, slot: Slot) -> str:
    """Why the rule's method cannot quantize layers of this kind; empty if it can."""
    method, name = methods.get(rule.method), f"method {rule.method!r}"
    if slot.kind.windowed and method.folding is not None:
        return f"{name} scales rows of a matrix, not the windows of a convolution"
    if slot.kind.windowed and method.matrices_only:
        return f"{name} is for matrices, not for the windows of a convolution"
    if not method.needs_data(dict(rule.options)):
        return ""
    if not slot.kind.watched:
        return f"{name} needs data, and calibration cannot see the layer's input"
    if slot.kind.windowed and not slot.has_patches:
        return (
            f"{name} needs the windows that the layer reads, and calibration does not "
            f"collect the windows of {slot.kind.name}"
        )
    return ""


def _missing_data(what: str, adapter: Adapter, has_data: bool | None) -> str:
    """Says that `what` needs calibration data, if there are no data.

    Empty if there are data, or if this is not known yet.
    """
    if has_data is False:
        return f"{what} needs data. Pass {adapter.data_arguments}"
    return ""


def _unused_rules(recipe: Recipe, inventory: Inventory) -> list[str]:
    """Patterns of the rules that match nothing and are not optional.

    A last rule for all other layers may match nothing if another rule quantizes a
    weight, or if the error about matrices without a rule says what to do.
    """
    rules = [slot.rule for slot in inventory.slots] + list(inventory.other_rules)
    used = {id(rule): rule for rule in rules if rule is not None}
    any_quantized = any(rule.weight is not None for rule in used.values())
    required = [rule for rule in recipe.rules if not rule.optional]
    if (any_quantized or inventory.unmatched) and required and _is_rest(required[-1]):
        required.pop()
    return [rule.pattern for rule in required if id(rule) not in used]


def _is_rest(rule: Rule) -> bool:
    """True if a rule is for all layers that no earlier rule matches."""
    return rule.pattern == "**" and not rule.kinds and rule.where is None


def _slot_problems(slots: Sequence[Slot], adapter: Adapter) -> str:
    """Names every slot that cannot be quantized by its rule; empty if all can be."""
    problems = [
        f"  {slot.label}: {slot.problem}"
        for slot in slots
        if slot.chosen and slot.problem
    ]
    problems += adapter.problems(slots)
    if not problems:
        return ""
    kinds = {slot.kind.name for slot in slots if slot.chosen and slot.problem}
    skip = "jaxq.Rule(path, skip=True)"
    if kinds == {"Param"}:
        skip = "jaxq.Rule(path, skip=True, kinds=('Param',))"
    elif "Param" in kinds:
        skip += ", with kinds=('Param',) for a Param,"
    return (
        f"these {adapter.noun}s cannot be quantized:\n"
        + "\n".join(problems)
        + f"\nSkip these {adapter.noun}s with {skip} in a "
        "jaxq.Recipe before the rules that match them, give them a rule with another "
        f"spec or method, or change them.{_nearest_remedy(slots)}"
    )


def _nearest_remedy(slots: Sequence[Slot]) -> str:
    """Says how to round the layers to nearest that a rule's method cannot quantize."""
    unserved = [
        slot.rule.method
        for slot in slots
        if slot.rule is not None and slot.chosen and _unserved(slot.rule, slot)
    ]
    if not unserved:
        return ""
    names = " or ".join(sorted(set(unserved)))
    return (
        f" or_nearest=True in the rule rounds the layers that {names} cannot quantize "
        "to nearest."
    )


def _unused_problem(
    unused: Sequence[str], inventory: Inventory, adapter: Adapter
) -> str:
    """Names the rules that match nothing, and what rules can match; or is empty."""
    if not unused:
        return ""
    names = [_described(slot) for slot in inventory.slots]
    names += inventory.unmatched
    listing = ", ".join(names[:_MOST_LISTED]) or "none that jaxq knows"
    if len(names) > _MOST_LISTED:
        listing += f", ... ({len(names)} {adapter.noun}s)"
    advice = "".join(
        f" {slot.name!r} is a parameter. Write the path of its layer, {slot.path!r}."
        for slot in inventory.slots
        if slot.name in unused and slot.name != slot.path
    )
    return (
        f"rules {unused} match no {adapter.noun} (or only "
        f"{adapter.noun}s that an earlier rule matches). "
        f"{adapter.noun.capitalize()}s here: {listing}.{advice}"
    )


def _described(slot: Slot) -> str:
    """The label of a slot, and why its rule leaves it in floats."""
    reason = "" if slot.rule is None else slot.rule.reason
    return f"{slot.label[:-1]}; {reason})" if reason else slot.label


def _unmatched_problem(inventory: Inventory, adapter: Adapter) -> str:
    """Names the matrices of unknown modules that have no rule; or is empty."""
    if not inventory.unmatched:
        return ""
    return (
        "no rule matches these matrices of modules that jaxq does not know: "
        f"{', '.join(inventory.unmatched)}. "
        f"{adapter.unmatched_remedy} To leave a matrix in floats, add "
        "jaxq.Rule(path, skip=True, kinds=('Param',)). To leave all of them in "
        "floats, pass strict=False."
    )
