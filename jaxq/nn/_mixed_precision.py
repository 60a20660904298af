"""Mixed precision: measures each layer's sensitivity, and chooses a preset for each.

`sensitivity` quantizes one layer at a time, with each choice, and measures the change
of the model's predictions. `assign` finds the choices with the smallest total change
for a budget of bits per weight. `mixed_recipe` turns the choices into a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import metrics
from jaxq.debug_checks import allow_nonfinite
from jaxq.nn.calibration import Batch, as_batches, eval_copy, run_model
from jaxq.nn.layers import weight_axes
from jaxq.nn.transform._nnx_layers import find_layers
from jaxq.progress import with_progress
from jaxq.qtensor import QuantSpec, as_spec, dequantize, quantize
from jaxq.recipes import Recipe, Rule, as_recipe

# `assign` keeps at most about this many combinations of choices after each layer.
_MAX_COMBINATIONS = 20_000


class Sensitivity(NamedTuple):
    """The measurements of `sensitivity`. The first key is the path of a layer.

    Attributes:
      kl: the mean KL(float || quantized) in nats if only this layer is quantized. The
        second key is the name of a choice.
      bits: the bits of the quantized weight, scales included. The second key is the
        name of a choice.
      size: the number of weights of the layer.

    Example:
      >>> from jaxq.nn import Sensitivity
      >>> measured = Sensitivity({"a": {"int8": 0.1}}, {"a": {"int8": 800}}, {"a": 100})
      >>> measured.bits["a"]["int8"] / measured.size["a"]
      8.0
    """

    kl: dict[str, dict[str, float]]
    bits: dict[str, dict[str, int]]
    size: dict[str, int]

    def __str__(self) -> str:
        """A table: one row for each layer, KL in nats and bits per weight."""
        choices = list(next(iter(self.kl.values()), {}))
        table = [["layer", "weights", *(f"KL {name} (bits)" for name in choices)]]
        for path, divergences in self.kl.items():
            cells = [path or "the model itself", f"{self.size[path]:,}"]
            for name in choices:
                bits = self.bits[path][name] / max(self.size[path], 1)
                cells.append(f"{divergences[name]:.5f} ({bits:.2f})")
            table.append(cells)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for cells in table:
            first = cells[0].ljust(widths[0])
            others = map(str.rjust, cells[1:], widths[1:])
            lines.append("  ".join([first, *others]))
        return "\n".join(lines)


@allow_nonfinite()
def sensitivity(
    model: nnx.Module,
    choices: Sequence[str],
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measures how much a model's predictions change if one layer is quantized.

    The layers are those that a named recipe quantizes. Embeddings, output heads and
    routers are not among them. The dequantized weight takes the place of the float
    weight, so the model is compiled once for all layers and choices.

    Args:
      model: a float flax nnx module that returns logits `[..., classes]`. The model is
        not modified.
      choices: preset names.
      batches: inputs of the model, as in `calibrate`.
      mask: `mask(batch)` returns a bool array that is False for padding. The axes of
        this array are the first axes of the logits, without the class axis.
      forward: `forward(model, batch)` runs a batch and returns logits. None calls the
        model.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Returns:
      A `Sensitivity`.

    Raises:
      TypeError: `batches` is a single batch, or `choices` is a single name.
      ValueError: there is no batch or no choice; a preset is unknown; the model has no
        layer that a named recipe quantizes; the mask does not fit the logits or is
        False everywhere; the logits of the float model are not finite.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
      >>> result = jaxq.nn.sensitivity(model, ["int8", "int2"], [jnp.ones((4, 32))])
      >>> result.kl[""]["int8"] < result.kl[""]["int2"]
      True
    """
    specs = _specs(choices)
    batches = [Batch.of(batch) for batch in as_batches(batches, "sensitivity")]
    if not specs or not batches:
        raise ValueError(
            "sensitivity: at least one choice and one batch are needed, got "
            f"{len(specs)} choices and {len(batches)} batches."
        )
    copy = eval_copy(model)
    layers = _layers_by_name(copy, next(iter(specs)))
    divergence = _Divergence(copy, batches, mask, forward)
    kl, bits, size = {}, {}, {}
    for path, layer, kind in with_progress(layers, "sensitivity", progress):
        variable, axes = getattr(layer, kind.weight), weight_axes(layer, kind)
        floats = variable.get_value()
        kl[path], bits[path], size[path] = {}, {}, int(floats.size)
        for name, spec in specs.items():
            rounded, num_bits = _rounded_weight(floats, spec, *axes)
            variable.set_value(rounded)
            kl[path][name], bits[path][name] = divergence.mean(), num_bits
        variable.set_value(floats)
    return Sensitivity(kl, bits, size)


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


def _specs(choices: Sequence[str]) -> dict[str, QuantSpec]:
    """The spec of each choice by its name."""
    if isinstance(choices, str):
        raise TypeError(
            f"sensitivity: choices must be a list of preset names, got {choices!r}. "
            f"Pass [{choices!r}]."
        )
    return {name: as_spec(name, "sensitivity") for name in choices}


def _layers_by_name(model: nnx.Module, preset: str) -> list[Any]:
    """The layers that a named recipe quantizes: (path, layer, kind) of each."""
    recipe = as_recipe(preset, "sensitivity")
    layers = []
    for path, layer, kind in find_layers(model):
        rule = recipe.find(path, kind.name)
        is_quantized = rule is not None and rule.weight is not None
        if is_quantized and kind.problem(layer) is None:
            layers.append((path, layer, kind))
    if not layers:
        raise ValueError(
            "sensitivity: the model has no layer that a named recipe quantizes. Named "
            "recipes leave embeddings, output heads and routers in floats. Write a "
            "jaxq.Rule for these layers instead."
        )
    return layers


class _Divergence:
    """Measures how much a model's predictions changed since this object was created.

    Args:
      model: the model. Its weights may be changed in place afterwards.
      batches: inputs of the model.
      mask: `mask(batch)` returns the rows that count, or None.
      forward: `forward(model, batch)` returns logits, or None.
    """

    def __init__(
        self,
        model: nnx.Module,
        batches: Sequence[Batch],
        mask: Callable[[Any], Any] | None,
        forward: Callable[[Any, Any], Any] | None,
    ):
        @nnx.jit
        def logits_of(model: nnx.Module, batch: Batch) -> jax.Array:
            return run_model(model, batch.whole(), forward)

        @nnx.jit
        def divergence(
            model: nnx.Module,
            batch: Batch,
            reference: jax.Array,
            counts: jax.Array | None,
        ) -> jax.Array:
            logits = run_model(model, batch.whole(), forward)
            return _mean_divergence(reference, logits, counts)

        self._model, self._batches, self._divergence = model, batches, divergence
        self._references = [logits_of(model, batch) for batch in batches]
        for number, reference in enumerate(self._references):
            if not bool(jnp.isfinite(reference).all()):
                raise ValueError(
                    f"sensitivity: the float model's logits of batch {number} are not "
                    "finite. Check the model and the batch."
                )
        self._counts = [
            _counts(mask, batch.whole(), reference)
            for batch, reference in zip(batches, self._references, strict=True)
        ]
        self._num_rows = [
            reference[..., 0].size if counts is None else int(counts.sum())
            for reference, counts in zip(self._references, self._counts, strict=True)
        ]

    def mean(self) -> float:
        """The mean KL(before || now) over all rows that count."""
        arguments = zip(self._batches, self._references, self._counts, strict=True)
        divergences = [
            self._divergence(self._model, batch, reference, counts)
            for batch, reference, counts in arguments
        ]
        return float(np.average(divergences, weights=self._num_rows))


def _mean_divergence(
    reference: jax.Array, logits: jax.Array, counts: jax.Array | None
) -> jax.Array:
    """The mean KL(reference || logits) over the rows where `counts` is True."""
    if counts is None:
        return metrics.kl_divergence(reference, logits)
    row_divergence = metrics.kl_divergence
    for _ in reference.shape[:-1]:
        row_divergence = jax.vmap(row_divergence)
    return jnp.mean(row_divergence(reference, logits), where=counts)


def _counts(
    mask: Callable[[Any], Any] | None, batch: Any, logits: jax.Array
) -> jax.Array | None:
    """Which rows count: bool, with the shape of the logits without the last axis."""
    if mask is None:
        return None
    counts = np.asarray(mask(batch)).astype(bool)
    rows = logits.shape[:-1]
    if counts.shape != rows[: counts.ndim] or not counts.any():
        raise ValueError(
            f"sensitivity: the mask has the shape {list(counts.shape)} and is True for "
            f"{int(counts.sum())} rows. The mask must be True somewhere. Its axes must "
            f"be the first axes of {list(rows)}, the logits without the class axis."
        )
    whole = counts.reshape(*counts.shape, *(1 for _ in rows[counts.ndim :]))
    return jnp.broadcast_to(whole, rows)


def _rounded_weight(
    w: jax.Array,
    spec: QuantSpec,
    contracting: tuple[int, ...],
    batch: tuple[int, ...],
) -> tuple[jax.Array, int]:
    """The dequantized weight, and the bits of its codes and scales."""
    qt = quantize(w, spec, contracting=contracting, batch=batch)
    return dequantize(qt), 8 * qt.nbytes


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
