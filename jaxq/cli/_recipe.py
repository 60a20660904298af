"""The recipe of a command: a name, a JSON file, or a budget of bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxq import methods, nn, recipes
from jaxq.qtensor import QuantSpec
from jaxq.recipes import Recipe, Rule


def read_recipe(text: str) -> Recipe:
    """The recipe of a name, or of a JSON file that `Recipe.to_dict` describes.

    Raises:
        click.UsageError: no recipe has this name, or the file is not a recipe.
    """
    try:
        if not text.endswith(".json"):
            return recipes.get(text)
        return Recipe.from_dict(json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise click.UsageError(f"--recipe {text}: {error}") from error


def has_methods(recipe: Recipe) -> bool:
    """True if a method of a recipe does more than round each weight to nearest."""
    records = [methods.get(rule.method) for rule in recipe.rules]
    return any(record.solve or record.folding for record in records)


def rounding_to_nearest(recipe: Recipe) -> Recipe:
    """The recipe that gives the same formats and scales without data."""
    return Recipe(tuple(_nearest(rule) for rule in recipe.rules))


def _nearest(rule: Rule) -> Rule:
    if rule.skip:
        return rule
    weight, options = rule.weight, dict(rule.options)
    if isinstance(weight, QuantSpec):
        weight = methods.get(rule.method).nearest_spec(weight, options)
    return dataclasses.replace(
        rule, weight=weight, method="rtn", options=(), correct_bias=False
    )


def needs_data(recipe: Recipe) -> bool:
    """True if a rule of a recipe cannot work without calibration data."""
    return any(_rule_needs_data(rule) for rule in recipe.rules if not rule.skip)


def _rule_needs_data(rule: Rule) -> bool:
    method = methods.get(rule.method)
    return rule.observer is not None or method.needs_data(dict(rule.options))


def with_budget(
    recipe: Recipe,
    model: Any,
    target_bits: float,
    choices: Sequence[str],
    batches: Sequence[Any],
) -> tuple[Recipe, dict[str, str]]:
    """A recipe that chooses a preset for each layer, within a budget of bits.

    Each layer is quantized alone with each choice, and the change of the model's
    predictions is measured (`jaxq.nn.sensitivity`). `jaxq.nn.assign` then chooses.

    Args:
        recipe: its method, activation and observer are those of the result. It has one
            rule that quantizes.
        model: the float model.
        target_bits: bits per weight on average, scales included.
        choices: preset names.
        batches: calibration batches.

    Returns:
        The recipe, and the choice of each layer.

    Raises:
        click.UsageError: the recipe has several rules that quantize, or rotates the
            model.
    """
    rules = [rule for rule in recipe.rules if not rule.skip]
    if len(rules) != 1 or recipe.rotate:
        raise click.UsageError(
            "--target-bits needs a recipe with one rule for all layers, which does not "
            "rotate the model."
        )
    measured = nn.sensitivity(model, list(choices), list(batches))
    chosen = nn.assign(measured, target_bits)
    rule = rules[0]
    mixed = nn.mixed_recipe(
        chosen,
        activation=rule.activation,
        observer=rule.observer,
        method=rule.method,
        options=rule.options,
        or_nearest=rule.or_nearest,
    )
    # The other rules say why a layer stays in floats.
    skips = [rule for rule in recipe.rules if rule.skip]
    return Recipe((*mixed.rules, *skips)), chosen
