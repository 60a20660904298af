"""Scales that a method wants in front of a layer, folded into what comes before it.

What comes before a layer is a matter of the model, not of its parameters: a model class says it, by methods
`scale_groups()` and `fold_scales(scales)` or, for a class of others, by `register_folding`. Methods that need it (AWQ,
SmoothQuant) are refused for classes of which it is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from jaxq import methods
from jaxq.methods import LayerStats
from jaxq.qtensor import QuantSpec
from jaxq.recipes import Rule

FOLDED = ("awq", "smoothquant")


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


_KNOWN: dict[type, _Folding] = {}


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


def _known(cls: type) -> _Folding | None:
    found = next((found for known, found in _KNOWN.items() if issubclass(cls, known)), None)
    if found is None and hasattr(cls, "scale_groups") and hasattr(cls, "fold_scales"):
        found = _Folding(cls.scale_groups, cls.fold_scales)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def foldable(model: nnx.Module, rules: Mapping[str, Rule | None]) -> list[tuple[Group, Rule]]:
    """The groups of a model whose layers all ask for one method that folds scales, with the rule.

    Raises:
      ValueError: a layer asks for such a method and the model's class has no groups, or none with this layer.
    """
    wanted = {path for path, rule in rules.items() if rule is not None and rule.method in FOLDED}
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
        asked = {rules.get(target) for target in group.targets}
        rule = next(iter(asked))
        if len(asked) == 1 and rule is not None and rule.method in FOLDED:
            out.append((group, rule))
        elif wanted.intersection(group.targets):
            raise ValueError(
                f"quantize_model: {', '.join(group.targets)} read one input, so methods that fold scales into what "
                f"comes before them ({', '.join(sorted(wanted.intersection(group.targets)))}) need one rule for all."
            )
    return out


def folded(model: Any, chosen: Sequence[tuple[Group, Rule]], stats: Mapping[str, LayerStats]) -> tuple[Any, set[str]]:
    """A model with the scales in it that methods find for the chosen groups, and the layers that have some now.

    What the model computes stays the same.

    SmoothQuant takes groups behind norms only; AWQ those behind linears too, where one output feeds one input.
    """
    known = _known(type(model))
    assert known is not None
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    scales = {}
    for group, rule in chosen:
        weights = [modules[target].kernel.get_value() for target in group.targets]
        seen = stats[group.targets[0]]
        source = modules[group.source]
        size = source.kernel.get_value().shape[-1] if group.kind == "linear" else None
        if group.kind == "linear" and (rule.method == "smoothquant" or size != weights[0].shape[0]):
            continue
        options = dict(rule.options)
        if rule.method == "smoothquant":
            scales[group.source] = methods.smoothquant(seen.absmax, weights, alpha=options.get("alpha", 0.5))[0]
        else:
            assert isinstance(rule.weight, QuantSpec)
            scales[group.source] = methods.awq_scale(weights, seen.samples, rule.weight, duo=options.get("duo", False))[
                0
            ]
    taken = {target for group, _ in chosen if group.source in scales for target in group.targets}
    return known.fold(model, scales), taken
