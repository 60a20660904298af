"""Mixed precision: chooses a preset for each layer, within a budget of bits.

`assign` finds the choices with the smallest total change for a budget of bits per
weight. `mixed_recipe` turns the choices into a recipe. `sensitivity` in
`_sensitivity.py` measures the changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.nn._sensitivity import Sensitivity
from jaxq.recipes import Recipe, Rule

# `assign` keeps at most about this many combinations of choices after each layer.
_MAX_COMBINATIONS = 20_000


def assign(sensitivity: Sensitivity, budget: float) -> dict[str, str]:
    """Chooses a preset for each layer, within a budget of bits per weight.

    The choices minimize the sum of the divergences:

      min over choices c of  sum_l kl[l, c_l]
      subject to  sum_l bits[l, c_l] <= budget * sum_l size[l]

    This is a knapsack problem with one choice for each layer. After each layer,
    dynamic programming keeps the combinations that no other combination beats in both
    bits and divergence. If there are more than 20,000, the spare bits are divided into
    20,000 equal parts, and the combination with the smallest divergence is kept in each
    part. The spare bits are the budget minus the bits of the smallest choices. Bits are
    never rounded, so the result never exceeds the budget. `assign` assumes that
    divergences of layers add up. This assumption is good for small divergences.

    Args:
      sensitivity: from `jaxq.nn.sensitivity`.
      budget: bits per weight on average, scales included.

    Returns:
      A dict from the path of each layer to the name of its choice.

    Raises:
      ValueError: the budget is not finite; the smallest choices need more bits than the
        budget; a divergence is not finite.

    Example:
      >>> from jaxq.nn import Sensitivity, assign
      >>> kl = {"a": {"int8": 0.0, "int4": 0.1}, "b": {"int8": 0.0, "int4": 0.5}}
      >>> bits = {"a": {"int8": 800, "int4": 400}, "b": {"int8": 800, "int4": 400}}
      >>> assign(Sensitivity(kl, bits, {"a": 100, "b": 100}), budget=6.0)
      {'a': 'int4', 'b': 'int8'}
    """
    if not np.isfinite(budget):
        raise ValueError(
            f"assign: budget must be a finite number of bits per weight, got {budget}."
        )
    paths, size = list(sensitivity.kl), sum(sensitivity.size.values())
    # A relative error of 1e-12 covers the rounding of a budget that is a quotient.
    max_bits = math.floor(budget * size * (1 + 1e-12))
    min_bits = sum(min(sensitivity.bits[path].values()) for path in paths)
    if min_bits > max_bits:
        least_budget = math.ceil(1000 * min_bits / size) / 1000
        raise ValueError(
            f"assign: the smallest choices take {least_budget:.3f} bits per weight, "
            f"more than the budget of {budget}. Add a smaller choice or raise the "
            "budget."
        )
    _check_finite(sensitivity)
    spare_bits = max_bits - min_bits

    # Forward. A combination is one choice for each layer so far.
    used = np.zeros(1, np.int64)  # the spare bits of each combination, ascending
    divergence = np.zeros(1)  # the total divergence of each combination, descending
    steps = []
    for path in paths:
        kl, bits = sensitivity.kl[path], sensitivity.bits[path]
        names, least = list(kl), min(bits.values())
        extra = np.array([[bits[name] - least] for name in names])  # [choices, 1]
        new_used = (used + extra).ravel()
        new_divergence = (divergence + [[kl[name]] for name in names]).ravel()
        best = _best_combinations(new_used, new_divergence, spare_bits)
        choice, previous = np.divmod(best, used.size)
        steps.append((names, choice, previous))
        used, divergence = new_used[best], new_divergence[best]

    # Backward, from the combination with the smallest divergence.
    choices, index = {}, -1
    for path, (names, choice, previous) in zip(
        reversed(paths), reversed(steps), strict=True
    ):
        choices[path] = names[choice[index]]
        index = previous[index]
    return {path: choices[path] for path in paths}


def mixed_recipe(choices: Mapping[str, str], **rule_arguments: Any) -> Recipe:
    """Returns a recipe that quantizes each layer with the preset chosen for it.

    Layers that are not in `choices` stay in floats.

    Args:
      choices: a dict from layer path to preset name, as `assign` returns it.
      **rule_arguments: further arguments of every `Rule`, `method="gptq"` for example.

    Example:
      >>> import jaxq
      >>> len(jaxq.nn.mixed_recipe({"mlp/up": "int4", "mlp/down": "int8"}).rules)
      2
    """
    rules = [
        Rule(path, weight=name, **rule_arguments) for path, name in choices.items()
    ]
    return Recipe(tuple(rules))


def _check_finite(sensitivity: Sensitivity) -> None:
    """Raises if a divergence is not finite."""
    problems = []
    for path, kl in sensitivity.kl.items():
        names = [name for name, value in kl.items() if not np.isfinite(value)]
        problems += [f"layer {path!r} with choice {name!r}" for name in names]
    if problems:
        raise ValueError(
            "assign: all divergences must be finite. The divergence is not finite for "
            f"{', '.join(problems[:8])}. Remove these choices."
        )


def _best_combinations(
    used: np.ndarray, divergence: np.ndarray, spare_bits: int
) -> np.ndarray:
    """The indices of the combinations that fit the budget and are not dominated.

    A combination is dominated if another one uses no more bits and has no larger
    divergence. If too many combinations remain, some of them are left out.

    Args:
      used: the spare bits that each combination uses.
      divergence: the total divergence of each combination.
      spare_bits: the spare bits of the budget.

    Returns:
      Indices in ascending order of bits and descending order of divergence.
    """
    fits = np.flatnonzero(used <= spare_bits)
    order = fits[np.lexsort((divergence[fits], used[fits]))]
    least = np.minimum.accumulate(divergence[order])
    best = order[np.concatenate([[True], least[1:] < least[:-1]])]
    if best.size <= _MAX_COMBINATIONS:
        return best
    part = used[best] * _MAX_COMBINATIONS // (spare_bits + 1)
    last_of_part = np.concatenate([part[1:] != part[:-1], [True]])
    # The smallest combination always stays, because it fits every budget.
    last_of_part[0] = True
    return best[last_of_part]
