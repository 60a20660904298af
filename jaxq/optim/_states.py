"""Which fields of which optax states hold first and second moments.

Moments are chosen by the type of a state and the name of a field, never by their
values. Some fields are not in the table, so they stay floats:

- Sums that only grow, such as `ScaleByRssState.sum_of_squares`. A late summand is
  smaller than half a step of the format and would be lost.
- The slow mean `ScaleByAdemamixState.m2`, for the same reason.
- `ScaleByRStdDevState`. The centered second moment is `nu - mu^2`. A rounding error of
  `nu` or `mu` can make the difference negative, and its root NaN.
- `SophiaState.nu`, which can be negative.
- `MomoState` and `MomoAdamState`. Their step size is a difference of inner products
  with the moment, and small errors of the moment change it much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

FIRST, SECOND = "first", "second"

# `ScaleByRmsState` has two types, and optax exports only one of them.
_RMS_WITH_COUNT = type(
    optax.scale_by_rms(bias_correction=True).init({})  # no parameters
)

MOMENTS: dict[type, dict[str, str]] = {
    optax.ScaleByAdaDeltaState: {"e_g": SECOND, "e_x": SECOND},
    optax.ScaleByAdamState: {"mu": FIRST, "nu": SECOND},
    optax.ScaleByAdanState: {"m": FIRST, "v": FIRST, "n": SECOND},
    optax.ScaleByAmsgradState: {"mu": FIRST, "nu": SECOND, "nu_max": SECOND},
    optax.ScaleByBeliefState: {"mu": FIRST, "nu": SECOND},
    optax.ScaleByLionState: {"mu": FIRST},
    optax.ScaleByNovogradState: {"mu": FIRST},
    optax.ScaleByRmsState: {"nu": SECOND},
    _RMS_WITH_COUNT: {"nu": SECOND},
    optax.TraceState: {"trace": FIRST},
    contrib.DAdaptAdamWState: {"exp_avg": FIRST, "exp_avg_sq": SECOND},
    contrib.MuonState: {"mu": FIRST},
    contrib.ProdigyState: {"exp_avg": FIRST, "exp_avg_sq": SECOND},
    contrib.ScaleByAdemamixState: {"m1": FIRST, "nu": SECOND},
    contrib.SophiaState: {"mu": FIRST},
}


def moments_of(
    state: Any, is_leaf: Callable[[Any], bool]
) -> list[tuple[str, Any, str | None]]:
    """The leaves of a state in the order of `jax.tree.leaves`.

    Args:
      state: the state of an optax transformation. Known states may be anywhere in it.
      is_leaf: as in `jax.tree.leaves`.

    Returns:
      (path, leaf, moment) of each leaf. The path is "0/mu/layers/kernel". The moment is
      `FIRST`, `SECOND` or None.
    """
    leaves: list[tuple[str, Any, str | None]] = []

    def is_known(node: Any) -> bool:
        return type(node) in MOMENTS or is_leaf(node)

    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_known):
        fields = MOMENTS.get(type(node), {})
        if not fields:
            leaves.append((_shown(path), node, None))
            continue
        inner_leaves = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf)
        for inner_path, leaf in inner_leaves:
            field = _shown(inner_path[:1])
            leaves.append((_shown((*path, *inner_path)), leaf, fields.get(field)))
    return leaves


def has_known_state(state: Any) -> bool:
    """Whether a state of `MOMENTS` is anywhere in `state`, even without arrays."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: type(node) in MOMENTS)
    return any(type(node) in MOMENTS for node in nodes)


def _shown(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
