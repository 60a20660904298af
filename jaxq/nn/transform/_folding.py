"""Scales that a method wants in front of a layer, folded into what comes before it.

What comes before a layer is a matter of the model, not of its parameters: a model class says it, by methods
`scale_groups()` and `fold_scales(scales)` or, for a class of others, by `register_folding`. Methods that need it (AWQ,
SmoothQuant, cross-layer equalization) are refused for classes of which it is not known. Rotations of a whole model are
told the same way, by a method `rotated(orthogonal, online)` or `register_rotation`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import methods, ops
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec, quantize
from jaxq.recipes import Recipe, Rule

FOLDED = ("awq", "equalize", "smoothquant")


class Group(Protocol):
    """Layers that read one input, and the module whose outputs can take a scale; all as paths."""

    @property
    def source(self) -> str: ...
    @property
    def targets(self) -> Sequence[str]: ...
    @property
    def kind(self) -> str: ...


class _Folding(NamedTuple):
    groups: Callable[[Any], Iterable[Group]]
    fold: Callable[[Any, Mapping[str, jax.Array]], Any]


class Outcome(NamedTuple):
    """What became of the scales of a layer's group.

    Attributes:
      taken: they are in the model now.
      note: why not, or what else is worth knowing.
      loss: mean squared error of the layer's output on held-out inputs, weights (and inputs) rounded to nearest with
        the scales, over the same without them; None where that was not measured.
    """

    taken: bool
    note: str = ""
    loss: float | None = None


_KNOWN: dict[type, _Folding] = {}
_Orthogonal = Callable[[int], jax.Array]
_Online = Callable[[jax.Array], jax.Array]
_ROTATIONS: dict[type, Callable[[Any, _Orthogonal, _Online], Any]] = {}


def register_folding(
    cls: type[nnx.Module],
    groups: Callable[[Any], Iterable[Group]],
    fold: Callable[[Any, Mapping[str, jax.Array]], Any],
) -> None:
    """Tells jaxq where scales can be folded in models of a class that has no `scale_groups` and `fold_scales`.

    Args:
      cls: an nnx module class; subclasses count too.
      groups: from a model its groups: objects with `source` (path of a norm or linear), `targets` (paths of the
        linears that read its output) and `kind` ("norm" or "linear").
      fold: from a model and scales by source, float32 `[n]`, a new model in which outputs of each source are divided by
        its scale and the rows of its targets multiplied.

    Example:
      >>> import jaxq
      >>> from jaxq.models import Llama
      >>> jaxq.nn.register_folding(Llama, Llama.scale_groups, Llama.fold_scales)
    """
    _KNOWN[cls] = _Folding(groups, fold)


def register_rotation(
    cls: type[nnx.Module], rotated: Callable[[Any, _Orthogonal, _Online], Any]
) -> None:
    """Tells jaxq how to rotate models of a class that has no method `rotated`, for `Recipe(rotate=True)`.

    Args:
      cls: an nnx module class; subclasses count too.
      rotated: `(model, orthogonal, online)` to a new model that computes the same in rotated coordinates. `orthogonal`
        gives a random Hadamard matrix `[n, n]` from n, to be multiplied into weights; `online` is such a map of the
        last axis of an array, for what must be rotated at run time.

    Example:
      >>> import jaxq
      >>> from jaxq.models import Llama
      >>> jaxq.nn.register_rotation(Llama, Llama.rotated)

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section 4.
    """
    _ROTATIONS[cls] = rotated


def rotated(model: nnx.Module, key: jax.Array) -> Any:
    """The model in coordinates rotated at random.

    Raises:
      ValueError: it is not known how.
    """
    cls = type(model)
    found = next(
        (found for known, found in _ROTATIONS.items() if issubclass(cls, known)), None
    )
    found = found or getattr(cls, "rotated", None)
    if found is None:
        raise ValueError(
            f"quantize_model: the recipe rotates the model, and nothing is known of how in {cls.__name__}. Tell it "
            "with jaxq.nn.register_rotation, or use a recipe without rotate=True."
        )

    def orthogonal(n: int) -> jax.Array:
        return methods.hadamard(
            jnp.diag(methods.random_hadamard(jax.random.fold_in(key, n), n))
        )

    return found(model, orthogonal, methods.hadamard)


def rotation_note(recipe: Recipe) -> tuple[str, ...]:
    """What a report says of a rotated model."""
    if not recipe.rotate:
        return ()
    return (
        "rotated by random Hadamard matrices first; errors are of rotated weights, and the rotation is not judged",
    )


def raise_if_rotating(recipe: Recipe, caller: str) -> None:
    """For what is no nnx model, and cannot say what rotations pass through it."""
    if recipe.rotate:
        raise ValueError(
            f"{caller}: rotate=True is for nnx models, whose class says how; use a recipe without it."
        )


def _known(cls: type) -> _Folding | None:
    found = next(
        (found for known, found in _KNOWN.items() if issubclass(cls, known)), None
    )
    if found is None and hasattr(cls, "scale_groups") and hasattr(cls, "fold_scales"):
        found = _Folding(cls.scale_groups, cls.fold_scales)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def foldable(
    model: nnx.Module, rules: Mapping[str, Rule | None]
) -> list[tuple[Group, Rule]]:
    """The groups of a model whose scales are wanted, each with the rule that all its layers have.

    A layer that is in no group is none of them: the report says that nothing before it can take its scales.

    Args:
      model: a flax nnx module.
      rules: path of each layer to its rule, or None.

    Raises:
      ValueError: a rule's method folds scales and nothing is known of the model's class; or only some layers of a group
        have such a rule, or they have different ones.
    """
    wanted = {
        path
        for path, rule in rules.items()
        if rule is not None and rule.method in FOLDED
    }
    if not wanted:
        return []
    known, name = _known(type(model)), type(model).__name__
    if known is None:
        raise ValueError(
            f"quantize_model: methods {list(FOLDED)} fold scales into what comes before a layer, and nothing is known "
            f"of that in {name}. Tell it with jaxq.nn.register_folding, or use another method."
        )
    out = []
    for group in known.groups(model):
        rule = rules.get(group.targets[0])
        asked = {_what(rules.get(target)) for target in group.targets}
        if len(asked) == 1 and rule is not None and rule.method in FOLDED:
            out.append((group, rule))
        elif wanted.intersection(group.targets):
            raise ValueError(
                f"quantize_model: {', '.join(group.targets)} read one input, so methods that fold scales into what "
                f"comes before them ({', '.join(sorted(wanted.intersection(group.targets)))}) need one rule for all."
            )
    return out


def _what(rule: Rule | None) -> Rule | None:
    """A rule without what says which layers it is about."""
    if rule is None or rule.skip:
        return None
    return dataclasses.replace(
        rule, pattern="**", kinds=(), where=None, reason=None, optional=False
    )


def looked_at(chosen: Sequence[tuple[Group, Rule]]) -> list[str]:
    """The layers whose inputs `folded` must know: one of each group; those before it too, where they are judged."""
    paths = [group.targets[0] for group, _ in chosen]
    return paths + [
        group.source
        for group, rule in chosen
        if rule.method == "equalize" and group.kind == "linear"
    ]


def folded(
    model: Any,
    chosen: Sequence[tuple[Group, Rule]],
    rules: Mapping[str, Rule | None],
    stats: Mapping[str, LayerStats],
    fallback: str,
) -> tuple[Any, dict[str, Outcome]]:
    """A model with the scales in it that methods find for the chosen groups, and what became of each layer's.

    What the model computes stays the same. SmoothQuant takes groups behind norms only; AWQ those behind linears too,
    where one output feeds one input; equalization those alone. Scales that do worse than none on held-out inputs are
    left out, if `fallback` is "rtn": by the sum of a group's errors; of equalization, which takes from one layer what
    it gives to the other, by the mean of their losses.

    Args:
      model: with float weights.
      chosen: groups and the rule of each.
      rules: of all layers.
      stats: of `looked_at`, by path.
      fallback: as in `quantize_model`.
    """
    known = _known(type(model))
    assert known is not None
    modules, scales, outcomes = _modules(model), {}, planned_outcomes(model, chosen)
    for group, rule in chosen:
        if not outcomes[group.targets[0]].taken:
            continue
        source, weights = _kernels(modules, group)
        seen = stats.get(group.targets[0])
        scale = _scales(rule, source, weights, seen)
        losses, overall = _losses(rule, weights, scale, seen)
        before = rules.get(group.source)
        if (
            overall is not None
            and rule.method == "equalize"
            and before is not None
            and before.weight is not None
        ):
            assert source is not None
            overall = (
                overall + _loss_before(before, source, scale, stats[group.source])
            ) / 2
        why = "" if overall is None else _why_worse(group, rule, overall, fallback)
        if not why:
            scales[group.source] = scale
        for target, loss in zip(group.targets, losses, strict=True):
            outcomes[target] = Outcome(not why, why, None if why else loss)
    return known.fold(model, scales), outcomes


def planned_outcomes(
    model: Any, chosen: Sequence[tuple[Group, Rule]]
) -> dict[str, Outcome]:
    """What can become of the scales of each layer's group, before any are known."""
    modules, out = _modules(model), {}
    for group, rule in chosen:
        why = _why_no_scales(rule.method, *_kernels(modules, group))
        out |= dict.fromkeys(group.targets, Outcome(not why, why))
    return out


def _modules(model: Any) -> dict[str, Any]:
    return {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model)
    }


def _kernels(
    modules: Mapping[str, Any], group: Group
) -> tuple[jax.Array | None, list[jax.Array]]:
    """The weight of what comes before a group, if it is a linear, and those of its layers."""
    source = (
        modules[group.source].kernel.get_value() if group.kind == "linear" else None
    )
    return source, [modules[target].kernel.get_value() for target in group.targets]


def _why_no_scales(
    method: str, source: jax.Array | None, weights: Sequence[jax.Array]
) -> str:
    if source is None:
        return (
            "not equalized: what comes before it is no linear"
            if method == "equalize"
            else ""
        )
    if method == "smoothquant":
        return "not smoothed: no norm before it can take its scales"
    if source.shape[-1] != weights[0].shape[-2]:
        return (
            "not scaled: an output of the linear before it feeds several of its inputs"
        )
    return ""


def _scales(
    rule: Rule,
    source: jax.Array | None,
    weights: list[jax.Array],
    seen: LayerStats | None,
) -> jax.Array:
    options = dict(rule.options)
    if rule.method == "equalize":
        found = functools.partial(methods.equalize, **options)
        for _ in range(weights[0].ndim - 2):
            found = jax.vmap(found)
        return found(source, weights[0])[1].scale
    assert seen is not None
    if rule.method == "smoothquant":
        return methods.smoothquant(
            seen.absmax, weights, alpha=options.get("alpha", 0.5)
        )[0]
    assert isinstance(rule.weight, QuantSpec)
    how = {name: options[name] for name in ("duo", "num") if name in options}
    return methods.awq_scale(weights, seen.samples, rule.weight, **how)[0]


def _losses(
    rule: Rule, weights: list[jax.Array], scale: jax.Array, seen: LayerStats | None
) -> tuple[Sequence[float | None], float | None]:
    """The loss of each layer of a group, and that of all; None where there are no rows to measure it by."""
    if seen is None or not int(seen.num_held_out):
        return [None] * len(weights), None
    pairs = [_errors(rule, w, scale, jnp.ones(w.shape[1]), seen) for w in weights]
    return [_ratio(*pair) for pair in pairs], _ratio(*np.sum(pairs, axis=0))


def _loss_before(rule: Rule, w: jax.Array, scale: jax.Array, seen: LayerStats) -> float:
    """The loss of the layer whose outputs are divided by the scales."""
    return _ratio(*_errors(rule, w, jnp.ones(w.shape[0]), scale, seen))


def _errors(
    rule: Rule, w: jax.Array, before: jax.Array, after: jax.Array, seen: LayerStats
) -> tuple[float, float]:
    """Squared errors of a layer's outputs on held-out inputs, with scales and without."""
    assert isinstance(rule.weight, QuantSpec)
    how: Any = {
        "weight": rule.weight,
        "activation": rule.activation,
        "static": rule.observer is not None,
    }
    with_scales = _error(w, before, after, seen, **how)
    return float(with_scales), float(
        _error(w, jnp.ones_like(before), jnp.ones_like(after), seen, **how)
    )


def _ratio(error: float, reference: float) -> float:
    return float(error / reference) if reference else 1.0


def _why_worse(group: Group, rule: Rule, loss: float, fallback: str) -> str:
    """Why the scales of a group are left out, if they are."""
    if loss <= 1 or fallback == "none":
        return ""
    worse = f"{rule.method}'s scales do worse than none on held-out inputs ({loss:.3g} times the error)"
    if fallback == "raise":
        raise ValueError(
            f"quantize_model: {', '.join(group.targets)}: {worse}. Pass fallback='rtn' or 'none'."
        )
    return f"{worse}, so none"


@functools.partial(jax.jit, static_argnames=("weight", "activation", "static"))
def _error(
    w: jax.Array,
    before: jax.Array,
    after: jax.Array,
    seen: LayerStats,
    *,
    weight: QuantSpec,
    activation: QuantSpec | None,
    static: bool,
) -> jax.Array:
    """`sum (x w - Q(x / b) Q(b w / a) a)^2` over held-out rows, both sides rounded to nearest as the rule says."""
    scaled = (w.astype(jnp.float32) * before[:, None] / after[None]).astype(w.dtype)
    qt = quantize(scaled, weight, contracting=-2, on_nonfinite="propagate")
    bounds = (
        (jnp.min(seen.low / before), jnp.max(seen.high / before)) if static else None
    )
    x = seen.held_out / before[None]
    y = (
        ops.matmul(
            x,
            qt.with_activation(activation, bounds=bounds),
            preferred_element_type=jnp.float32,
        )
        * after[None]
    )
    wanted = jnp.matmul(
        seen.held_out, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sum(jnp.square(wanted - y))
