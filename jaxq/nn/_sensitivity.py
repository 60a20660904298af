"""Sensitivity: how much a model's predictions change if one layer is quantized.

`measure` quantizes one weight at a time, with each choice, and measures the change.
`sensitivity` is for nnx models. `_linen_sensitivity.py` has the same for linen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import metrics
from jaxq.debug_checks import allow_nonfinite
from jaxq.nn.calibration import (
    Batch,
    as_batches,
    cached_program,
    eval_copy,
    run_model,
)
from jaxq.nn.layers import weight_axes
from jaxq.nn.transform import find_layers
from jaxq.processes import to_numpy
from jaxq.progress import with_progress
from jaxq.qtensor import QuantSpec, as_spec, dequantize, is_linen_module, quantize
from jaxq.recipes import Recipe, as_recipe


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
        not modified. For a linen module, see `jaxq.nn.linen.sensitivity`.
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
      TypeError: `model` is not an nnx module; `batches` is a single batch; `choices`
        is not a list of names.
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
    _check_model(model)
    specs, batches = checked_arguments(choices, batches, "sensitivity")
    copy = eval_copy(model)
    weights = _weights(copy, recipe_of(specs, "sensitivity"))
    divergence = Divergence(nnx.jit, _Run(forward), copy, batches, mask)
    return measure(weights, specs, divergence, progress)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs a batch. `forward(model, batch)` may be None, as in `sensitivity`."""

    forward: Callable[[Any, Any], Any] | None

    def __call__(self, model: nnx.Module, batch: Any) -> Any:
        return run_model(model, batch, self.forward)


class Weight(NamedTuple):
    """The weight of one layer.

    Attributes:
      path: of the layer.
      value: the float weight.
      contracting: the axes that the layer's product contracts.
      batch: the leading axes that stack several weights.
      put: `put(value)` returns the model, or the variables, with another weight.
    """

    path: str
    value: jax.Array
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    put: Callable[[jax.Array], Any]


def measure(
    weights: Sequence[Weight],
    specs: dict[str, QuantSpec],
    divergence: Divergence,
    progress: bool | None,
) -> Sensitivity:
    """Measures the change if one weight is quantized, for each weight and each spec.

    Raises:
      ValueError: there are no weights.
    """
    if not weights:
        raise ValueError(
            "sensitivity: the model has no layer that a named recipe quantizes. Named "
            "recipes leave embeddings, output heads and routers in floats. Write a "
            "jaxq.Rule for these layers instead."
        )
    kl, bits, size = {}, {}, {}
    for weight in with_progress(weights, "sensitivity", progress):
        path = weight.path
        kl[path], bits[path], size[path] = {}, {}, int(weight.value.size)
        for name, spec in specs.items():
            rounded, bits[path][name] = _rounded_weight(weight, spec)
            kl[path][name] = divergence.mean(weight.put(rounded))
        weight.put(weight.value)
    return Sensitivity(kl, bits, size)


def checked_arguments(
    choices: Sequence[str], batches: Iterable[Any], caller: str
) -> tuple[dict[str, QuantSpec], list[Batch]]:
    """The spec of each choice by its name, and the batches.

    Raises:
      TypeError: `batches` is a single batch, or `choices` is not a list of names.
      ValueError: there is no batch or no choice, or a preset is unknown.
    """
    if isinstance(choices, str):
        raise TypeError(
            f"{caller}: choices must be a list of preset names, got {choices!r}. "
            f"Pass [{choices!r}]."
        )
    is_list = isinstance(choices, list | tuple | dict)
    if not is_list or not all(isinstance(name, str) for name in choices):
        kinds = sorted({type(name).__name__ for name in choices}) if is_list else []
        got = type(choices).__name__ + (f" of {', '.join(kinds)}" if kinds else "")
        raise TypeError(
            f"{caller}: choices must be a list of preset names, such as ['int8', "
            f"'int4'], got a {got}. The batches of inputs are the argument after "
            "choices."
        )
    specs = {name: as_spec(name, caller) for name in choices}
    checked = [Batch.of(batch) for batch in as_batches(batches, caller)]
    if not specs or not checked:
        raise ValueError(
            f"{caller}: at least one choice and one batch are needed, got "
            f"{len(specs)} choices and {len(checked)} batches."
        )
    return specs, checked


def recipe_of(specs: dict[str, QuantSpec], caller: str) -> Recipe:
    """A named recipe. Its rules say which layers count."""
    return as_recipe(next(iter(specs)), caller)


def _check_model(model: Any) -> None:
    """Raises TypeError unless the model is an nnx module."""
    if is_linen_module(model):
        raise TypeError(
            f"sensitivity: {type(model).__name__} is a flax linen module. Use "
            "jaxq.nn.linen.sensitivity(module, variables, choices, batches)."
        )
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"sensitivity: model must be a flax nnx module, got {type(model).__name__}."
        )


def _weights(model: nnx.Module, recipe: Recipe) -> list[Weight]:
    """The weights that the recipe quantizes. `put` changes the model in place."""
    weights = []
    for path, layer, kind in find_layers(model):
        rule = recipe.find(path, kind.name)
        is_quantized = rule is not None and rule.weight is not None
        if not is_quantized or kind.problem(layer) is not None:
            continue
        variable = getattr(layer, kind.weight)
        put = functools.partial(_put, model, variable)
        axes = weight_axes(layer, kind)
        weights.append(Weight(path, variable.get_value(), *axes, put))
    return weights


def _put(model: nnx.Module, variable: nnx.Variable, value: jax.Array) -> nnx.Module:
    variable.set_value(value)
    return model


class Divergence:
    """Measures how much a model's predictions changed since this object was created.

    Args:
      jit: `nnx.jit` or `jax.jit`.
      run: `run(model, batch)` returns logits. Later calls with an equal function and
        equal shapes compile nothing.
      model: the model, or the variables that `run` takes as its first argument.
      batches: inputs of the model.
      mask: `mask(batch)` returns the rows that count, or None.
    """

    def __init__(
        self,
        jit: Callable[..., Any],
        run: Callable[[Any, Any], Any],
        model: Any,
        batches: Sequence[Batch],
        mask: Callable[[Any], Any] | None,
    ):
        logits_of, self._divergence = _programs(jit, run)
        self._batches = batches
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

    def mean(self, model: Any) -> float:
        """The mean KL(before || model) over all rows that count."""
        arguments = zip(self._batches, self._references, self._counts, strict=True)
        divergences = [
            self._divergence(model, batch, reference, counts)
            for batch, reference, counts in arguments
        ]
        return float(np.average(divergences, weights=self._num_rows))


@cached_program
def _programs(
    jit: Callable[..., Any], run: Callable[[Any, Any], Any]
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The jitted functions `logits_of` and `divergence`."""

    @jit
    def logits_of(model: Any, batch: Batch) -> jax.Array:
        return run(model, batch.whole())

    @jit
    def divergence(
        model: Any, batch: Batch, reference: jax.Array, counts: jax.Array | None
    ) -> jax.Array:
        return _mean_divergence(reference, run(model, batch.whole()), counts)

    return logits_of, divergence


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
    counts = to_numpy(mask(batch)).astype(bool)
    rows = logits.shape[:-1]
    if counts.shape != rows[: counts.ndim] or not counts.any():
        raise ValueError(
            f"sensitivity: the mask has the shape {list(counts.shape)} and is True for "
            f"{int(counts.sum())} rows. The mask must be True somewhere. Its axes must "
            f"be the first axes of {list(rows)}, the logits without the class axis."
        )
    whole = counts.reshape(*counts.shape, *(1 for _ in rows[counts.ndim :]))
    return jnp.broadcast_to(whole, rows)


def _rounded_weight(weight: Weight, spec: QuantSpec) -> tuple[jax.Array, int]:
    """The dequantized weight, and the bits of its codes and scales."""
    qt = quantize(
        weight.value, spec, contracting=weight.contracting, batch=weight.batch
    )
    return dequantize(qt), 8 * qt.nbytes
