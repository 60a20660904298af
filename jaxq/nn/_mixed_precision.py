"""Mixed precision: how much each layer's quantization alone moves a model's predictions, and what to give each.

`sensitivity` measures every layer with every choice, the others in floats; `assign` finds the choices that cost least
in all within an average number of bits; `mixed_recipe` makes a recipe of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import metrics
from jaxq.nn.calibration._nnx import Batch, as_batches, run, shown
from jaxq.nn.layers import weight_axes
from jaxq.nn.transform._nnx_layers import find_layers
from jaxq.qtensor import QuantSpec, as_spec, dequantize, quantize
from jaxq.recipes import Recipe, Rule, as_recipe

# Parts of the budget that `assign` counts in; a layer's size is rounded up to them.
_PARTS = 20_000


class Sensitivity(NamedTuple):
    """What `sensitivity` measures.

    Attributes:
      kl: path of each layer to the mean KL(float || model) in nats of each choice, the layer alone being quantized.
      bits: path of each layer to the bits of each choice, scales included, for the whole weight.
      size: path of each layer to its number of weights.
    """

    kl: dict[str, dict[str, float]]
    bits: dict[str, dict[str, int]]
    size: dict[str, int]


def sensitivity(
    model: nnx.Module,
    choices: Sequence[str],
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """How far a model's predictions move when one layer is quantized and the others are not.

    Layers are those that a recipe by name would quantize: no embeddings, heads or routers. The weight is replaced by
    what it dequantizes to, so the model is compiled once, whatever the number of layers and choices.

    Args:
      model: a flax nnx module in floats whose result are logits `[..., classes]`; it stays as it is.
      choices: preset names.
      batches: inputs of the model, as in `calibrate`.
      mask: gives the rows of a batch that count, bool with as many axes as logits have before the last, or fewer; False
        for padding.
      forward: how to run a batch, `forward(model, batch) -> logits`.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      A `Sensitivity`.

    Raises:
      TypeError: `batches` is one array, or `choices` one name.
      ValueError: no batch, no choice, an unknown preset, no layer; a mask that does not fit, or is False everywhere;
        logits that are not finite before anything is quantized.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> found = jaxq.nn.sensitivity(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), ["int8", "int2"], [jnp.ones((4, 32))])
      >>> found.kl[""]["int8"] < found.kl[""]["int2"]
      True
    """
    if isinstance(choices, str):
        raise TypeError(
            f"sensitivity: choices must be a list of presets, got {choices!r}: pass [{choices!r}]."
        )
    specs = {name: as_spec(name, "sensitivity") for name in choices}
    batches = [Batch.of(batch) for batch in as_batches(batches, "sensitivity")]
    recipe = as_recipe(next(iter(choices)), "sensitivity") if specs else None
    if recipe is None or not batches:
        raise ValueError(
            f"sensitivity: needs choices and batches, got {len(specs)} and {len(batches)}."
        )
    copy = nnx.clone(model)
    layers = []
    for found in find_layers(copy):
        rule = recipe.find(found.path, found.kind.name)
        if (
            rule is not None
            and rule.weight is not None
            and found.kind.problem(found.layer) is None
        ):
            layers.append(found)
    if not layers:
        raise ValueError(
            "sensitivity: the model has no layer that a recipe by name would quantize."
        )

    @nnx.jit
    def logits_of(model: nnx.Module, batch: Batch) -> jax.Array:
        return run(model, batch.given(), forward)

    @nnx.jit
    def divergence(
        model: nnx.Module, batch: Batch, reference: jax.Array, counts: jax.Array | None
    ) -> jax.Array:
        logits = run(model, batch.given(), forward)
        if counts is None:
            return metrics.kl_divergence(reference, logits)
        each = metrics.kl_divergence
        for _ in reference.shape[:-1]:
            each = jax.vmap(each)
        return jnp.mean(each(reference, logits), where=counts)

    references = [logits_of(copy, batch) for batch in batches]
    for number, reference in enumerate(references):
        if not bool(jnp.isfinite(reference).all()):
            raise ValueError(
                f"sensitivity: the logits of batch {number} are not finite, in floats already."
            )
    counts = [
        _counts(mask, batch.given(), ref)
        for batch, ref in zip(batches, references, strict=True)
    ]
    weights = [
        reference[..., 0].size if c is None else int(c.sum())
        for reference, c in zip(references, counts, strict=True)
    ]
    kl, bits, size = {}, {}, {}
    for found in shown(layers, "sensitivity", progress):
        variable = getattr(found.layer, found.kind.weight)
        floats = variable.get_value()
        axes = weight_axes(found.layer, found.kind)
        kl[found.path], bits[found.path], size[found.path] = {}, {}, int(floats.size)
        for name, spec in specs.items():
            rounded, total = _rounded(floats, spec, *axes)
            variable.set_value(rounded)
            moved = [
                divergence(copy, *one)
                for one in zip(batches, references, counts, strict=True)
            ]
            kl[found.path][name], bits[found.path][name] = (
                float(np.average(moved, weights=weights)),
                total,
            )
        variable.set_value(floats)
    return Sensitivity(kl, bits, size)


def _counts(
    mask: Callable[[Any], Any] | None, batch: Any, logits: jax.Array
) -> jax.Array | None:
    """Which rows of logits count, as many as there are."""
    if mask is None:
        return None
    counts = np.asarray(mask(batch)).astype(bool)
    rows = logits.shape[:-1]
    if counts.shape != rows[: counts.ndim] or not counts.any():
        raise ValueError(
            f"sensitivity: the mask {list(counts.shape)} must have True somewhere and fit rows of logits {list(rows)}."
        )
    return jnp.broadcast_to(
        counts.reshape(*counts.shape, *(1 for _ in rows[counts.ndim :])), rows
    )


def _rounded(
    w: jax.Array, spec: QuantSpec, contracting: Any, batch: Any
) -> tuple[jax.Array, int]:
    qt = quantize(w, spec, contracting=contracting, batch=batch)
    return dequantize(qt), 8 * qt.nbytes


def assign(found: Sensitivity, budget: float) -> dict[str, str]:
    """The choice of each layer that makes the sum of divergences least, within an average of bits.

    `min over choices c of sum_l kl[l, c_l]  subject to  sum_l bits[l, c_l] <= budget * sum_l size[l]`, a knapsack with
    one choice a layer, solved by dynamic programming over the bits (counted in 20,000ths of the budget, rounded up, so
    that the budget holds). Divergences are taken to add up, which for small ones they nearly do.

    Args:
      found: of `sensitivity`.
      budget: bits per weight on average, scales included.

    Returns:
      Path of each layer to the name of its choice.

    Raises:
      ValueError: even the smallest choices need more; the message says how much.

    Example:
      >>> from jaxq.nn import Sensitivity, assign
      >>> kl = {"a": {"int8": 0.0, "int4": 0.1}, "b": {"int8": 0.0, "int4": 0.5}}
      >>> bits = {"a": {"int8": 800, "int4": 400}, "b": {"int8": 800, "int4": 400}}
      >>> assign(Sensitivity(kl, bits, {"a": 100, "b": 100}), budget=6.0)
      {'a': 'int4', 'b': 'int8'}
    """
    if not np.isfinite(budget):
        raise ValueError(
            f"assign: budget must be a number of bits per weight, got {budget}."
        )
    paths, total = list(found.kl), budget * sum(found.size.values())
    least = sum(min(found.bits[path].values()) for path in paths)
    if least > total:
        raise ValueError(
            f"assign: the smallest choices take {least / sum(found.size.values()):.3f} bits per weight, more than the "
            f"budget of {budget}. Add a smaller choice or raise the budget."
        )
    lost = [
        f"{path} as {name}"
        for path in paths
        for name, kl in found.kl[path].items()
        if not np.isfinite(kl)
    ]
    if lost:
        raise ValueError(
            f"assign: the sensitivity of {', '.join(lost[:8])} is not finite."
        )
    # No fewer parts than layers would let each be rounded up by one.
    unit = (total - least) / _PARTS or 1.0
    best = np.zeros(
        _PARTS + 1
    )  # of the layers so far, within j parts over their smallest choices
    taken = []
    for path in paths:
        names, base = list(found.kl[path]), min(found.bits[path].values())
        over = {
            name: int(np.ceil((found.bits[path][name] - base) / unit - 1e-9))
            for name in names
        }
        options = np.full((len(names), _PARTS + 1), np.inf)
        for i, name in enumerate(names):
            if over[name] <= _PARTS:
                options[i, over[name] :] = (
                    best[: _PARTS + 1 - over[name]] + found.kl[path][name]
                )
        taken.append((names, over, np.argmin(options, 0)))
        best = np.min(options, 0)
    out, j = {}, _PARTS
    for path, (names, over, chosen) in zip(
        reversed(paths), reversed(taken), strict=True
    ):
        name = names[int(chosen[j])]
        out[path], j = name, j - over[name]
    return {path: out[path] for path in paths}


def mixed_recipe(choices: Mapping[str, str], **how: Any) -> Recipe:
    """A recipe that gives each layer its choice, and leaves all others in floats.

    Args:
      choices: path of a layer to a preset name, as `assign` gives them.
      **how: of every `Rule`: `method="gptq"`, for example.

    Example:
      >>> import jaxq
      >>> len(jaxq.nn.mixed_recipe({"mlp/up": "int4", "mlp/down": "int8"}).rules)
      2
    """
    return Recipe(
        tuple(Rule(path, weight=name, **how) for path, name in choices.items())
    )
