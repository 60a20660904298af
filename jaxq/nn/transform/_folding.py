"""Folding: a method moves scales from a layer's inputs into the previous layer.

AWQ, SmoothQuant and cross-layer equalization multiply the rows of a weight by scales,
and divide the outputs of the previous layer by the same scales. The model computes the
same as before, and its weights or inputs are easier to quantize. The method finds the
best scales (`Method.folding`). The model's class says where scales can be moved. It has
the methods `scale_groups()` and `fold_scales(scales)`, or `register_folding` adds them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import methods, ops
from jaxq.methods import Folding
from jaxq.nn.layers import find_kind, weight_axes
from jaxq.nn.transform._options import Options
from jaxq.observers import LayerStats
from jaxq.qtensor import QuantSpec, quantize
from jaxq.recipes import Rule


class Group(Protocol):
    """Layers that read the same input, and the module that computes this input.

    Attributes:
      source: path of the module. Its outputs can be scaled.
      targets: paths of the layers that read the outputs of the source.
      kind: of the source, "norm" or "linear".
    """

    @property
    def source(self) -> str: ...
    @property
    def targets(self) -> Sequence[str]: ...
    @property
    def kind(self) -> str: ...


class Outcome(NamedTuple):
    """Where the scales of a layer are, and their effect on its error.

    Attributes:
      source: path of the layer whose outputs are divided by the scales. Empty if the
        scales are not folded.
      at_run_time: the layer keeps the scales, and divides its input by them at each
        call.
      scale: float32 `[*batch, K]`, the scales of a layer that keeps them. None before
        they are computed, and if they are folded.
      note: why the layer has no scales, for the report. Empty if it has scales.
      loss: mean squared error of the layer's output on held-out inputs with the scales,
        divided by the error without them. Both errors are those of rounding to nearest.
        None if the loss was not measured.
    """

    source: str = ""
    at_run_time: bool = False
    scale: np.ndarray | None = None
    note: str = ""
    loss: float | None = None

    @property
    def applied(self) -> bool:
        """The layer has scales. In a plan: it can have scales."""
        return bool(self.source) or self.at_run_time


class Folded(NamedTuple):
    """A model with folded scales.

    Attributes:
      model: the new model. It must compute the same as the old one.
      scales: the scales that were folded, by the source of their group.
      targets: the layers that read each source's outputs, by source.
      outcomes: the outcome of each target, by path.
    """

    model: Any
    scales: dict[str, jax.Array]
    targets: dict[str, Sequence[str]]
    outcomes: dict[str, Outcome]


class _ModelFolding(NamedTuple):
    groups: Callable[[Any], Iterable[Group]]
    fold: Callable[[Any, Mapping[str, jax.Array]], Any]


_MODELS: dict[type, _ModelFolding] = {}


def register_folding(
    cls: type[nnx.Module],
    groups: Callable[[Any], Iterable[Group]],
    fold: Callable[[Any, Mapping[str, jax.Array]], Any],
) -> None:
    """Tells jaxq where scales can be moved in the models of a class.

    A class with the methods `scale_groups` and `fold_scales` does not need this.

    Args:
      cls: an nnx module class. Subclasses count too.
      groups: `(model) -> groups`. A group has `source` (path of a norm or of a linear
        layer), `targets` (paths of the linear layers that read its output) and `kind`
        ("norm" or "linear").
      fold: `(model, scales) -> model`. `scales` maps sources to float32 `[n]`. In the
        new model, the outputs of each source are divided by the scale of the source.
        The rows of its targets' weights are multiplied by the same scale. If the
        outputs have several axes, as those of attention heads, n flattens these axes.

    Example:
      >>> import jaxq
      >>> from jaxq.models import Llama, fold_scales, norm_groups
      >>> jaxq.nn.register_folding(Llama, norm_groups, fold_scales)
    """
    _MODELS[cls] = _ModelFolding(groups, fold)


def groups_to_fold(
    model: nnx.Module, rules: Mapping[str, Rule | None], caller: str
) -> list[tuple[Group, Rule]]:
    """The groups whose scales are moved, each with the rule that its layers share.

    The scales of a layer that is not in a group are not moved. A layer whose method has
    `Folding.at_run_time` then keeps its scales. For other methods, the report says why
    the layer has no scales.

    Args:
      model: a flax nnx module.
      rules: the rule of each layer, by path.
      caller: the name of the public function, for errors.

    Raises:
      ValueError: a rule's method can only move scales, and jaxq does not know where
        scales can go in the model's class; or such a rule has layers whose group has
        different rules.
    """
    wanted = {path for path, rule in rules.items() if folding_of(rule) is not None}
    if not wanted:
        return []
    only_folds = {path for path in wanted if not _folding(rules[path]).at_run_time}
    registered = _model_folding(type(model))
    if registered is None and not only_folds:
        return []
    if registered is None:
        raise ValueError(
            f"{caller}: the methods {_only_folding_methods()} move scales into the "
            "previous layer. jaxq does not know where scales can go in a "
            f"{type(model).__name__}. Register the class with "
            "jaxq.nn.register_folding, or use another method."
        )
    groups = []
    modules = _modules_by_path(model)
    for group in registered.groups(model):
        rule = rules.get(group.targets[0])
        folding = folding_of(rule)
        actions = {_action(rules.get(target)) for target in group.targets}
        if len(actions) == 1 and rule is not None and folding is not None:
            reason = _why_not(folding, modules, group)
            # The layers of other groups keep their scales.
            if not (reason and folding.at_run_time):
                groups.append((group, rule))
        elif only_folds.intersection(group.targets):
            paths = ", ".join(sorted(only_folds.intersection(group.targets)))
            raise ValueError(
                f"{caller}: the layers {', '.join(group.targets)} read the same "
                f"input, and the method of {paths} scales this input. Give all of "
                "these layers the same rule."
            )
    return groups


def layers_to_watch(groups: Sequence[tuple[Group, Rule]]) -> list[str]:
    """Paths of layers. `fold_groups` needs statistics of the inputs of these layers.

    The layers are the first target of each group, and the source if the method also
    judges the rounding error of the source.
    """
    targets = [group.targets[0] for group, _ in groups]
    sources = [
        group.source
        for group, rule in groups
        if _folding(rule).judges_source and group.kind == "linear"
    ]
    return targets + sources


def planned_outcomes(
    model: Any, groups: Sequence[tuple[Group, Rule]]
) -> dict[str, Outcome]:
    """Whether scales can be moved to each target, by path, before they are computed."""
    modules = _modules_by_path(model)
    outcomes: dict[str, Outcome] = {}
    for group, rule in groups:
        reason = _why_not(_folding(rule), modules, group)
        source = "" if reason else group.source
        for target in group.targets:
            outcomes[target] = Outcome(source, note=reason)
    return outcomes


def fold_groups(
    model: Any,
    groups: Sequence[tuple[Group, Rule]],
    rules: Mapping[str, Rule | None],
    stats: Mapping[str, LayerStats],
    options: Options,
) -> Folded:
    """Computes the scales of each group and moves them into the model.

    The new model computes the same as the old one, if the groups are right.
    `check_folded` compares the two. If `options.fallback` is "rtn", scales that
    increase the error on held-out inputs are not moved. The error of a group is the sum
    over its targets. If the method also judges the source, the mean of the targets'
    loss and the source's loss decides.

    Args:
      model: with float weights. It is not changed.
      groups: the groups, each with its rule.
      rules: the rule of each layer, by path.
      stats: statistics of the layers that `layers_to_watch` names, by path.
      options: `fallback`.

    Raises:
      ValueError: `options.fallback` is "raise" and scales increase the error on
        held-out inputs.
    """
    modules = _modules_by_path(model)
    scales: dict[str, jax.Array] = {}
    outcomes = planned_outcomes(model, groups)
    for group, rule in groups:
        if not outcomes[group.targets[0]].applied:
            continue
        scale, losses, total = _judged_scale(group, rule, rules, modules, stats)
        layers = ", ".join(group.targets)
        reason = "" if total is None else why_worse(layers, rule, total, options)
        if not reason:
            scales[group.source] = scale
        for target, loss in zip(group.targets, losses, strict=True):
            outcome = Outcome(group.source, loss=loss)
            outcomes[target] = Outcome(note=reason) if reason else outcome
    targets = {group.source: group.targets for group, _ in groups}
    return Folded(fold_into(model, scales), scales, targets, outcomes)


def fold_into(model: Any, scales: Mapping[str, jax.Array]) -> Any:
    """The model with some scales moved by the function of its class.

    Args:
      model: with float weights. It is not changed.
      scales: the scale of each source, by path.
    """
    registered = _model_folding(type(model))
    assert registered is not None
    return registered.fold(model, scales)


def folding_of(rule: Rule | None) -> Folding | None:
    """The `folding` of a rule's method. None if there is no rule or no folding."""
    return None if rule is None else methods.get(rule.method).folding


def why_worse(layers: str, rule: Rule, loss: float, options: Options) -> str:
    """Why the scales of layers are left out. Empty if the layers get the scales.

    Args:
      layers: the paths of the layers, for errors.
      rule: the rule of the layers.
      loss: the error of the layers with the scales, divided by the error without them.
      options: `fallback`.

    Raises:
      ValueError: `options.fallback` is "raise" and the loss is over 1.
    """
    if loss <= 1:
        return ""
    reason = (
        f"{rule.method}'s scales increase the error on held-out inputs "
        f"({loss:.3g} times the error without them)"
    )
    falls_back = methods.falls_back(
        options.fallback,
        f"{options.caller}: {layers}: {reason}",
        "Pass fallback='rtn' to leave out the scales, or 'none' to keep them.",
    )
    return f"{reason}, so they are left out" if falls_back else ""


def _folding(rule: Rule | None) -> Folding:
    folding = folding_of(rule)
    assert folding is not None
    return folding


def _only_folding_methods() -> list[str]:
    """The methods whose scales cannot stay with a layer."""
    foldings = {name: methods.get(name).folding for name in methods.names()}
    return [
        name
        for name, folding in foldings.items()
        if folding is not None and not folding.at_run_time
    ]


def _model_folding(cls: type) -> _ModelFolding | None:
    """The folding of a class, or of its closest base class that has one."""
    for base in cls.__mro__:
        if base in _MODELS:
            return _MODELS[base]
        if "scale_groups" in vars(base) and hasattr(cls, "fold_scales"):
            methods_of: Any = cls
            return _ModelFolding(methods_of.scale_groups, methods_of.fold_scales)
    return None


def _action(rule: Rule | None) -> Rule | None:
    """What a rule does to a layer, in a form that can be compared.

    This is the rule without the fields that say which layers it matches. It is None if
    the rule skips the layer, or if there is no rule.
    """
    if rule is None or rule.skip:
        return None
    return dataclasses.replace(
        rule, pattern="**", kinds=(), where=None, reason=None, optional=False
    )


def _modules_by_path(model: Any) -> dict[str, Any]:
    return {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model)
    }


def _why_not(folding: Folding, modules: Mapping[str, Any], group: Group) -> str:
    """Why no scale can be moved in a group. Empty if one can be moved."""
    layers = list(group.targets)
    if group.kind == "linear":
        layers.append(group.source)
    for path in layers:
        kind = find_kind(modules[path])
        if kind is not None and kind.windowed:
            return f"not scaled: {path} is a convolution, and its windows share rows"
    return folding.why_not(*_weights(modules, group))


def _weights(
    modules: Mapping[str, Any], group: Group
) -> tuple[jax.Array | None, list[jax.Array]]:
    """The weight of the source and the weights of the targets, as matrices.

    The first is None unless the source is a linear layer.
    """
    source = None
    if group.kind == "linear":
        source = _matrix_of_layer(modules, group.source)
    return source, [_matrix_of_layer(modules, target) for target in group.targets]


def _matrix_of_layer(modules: Mapping[str, Any], path: str) -> jax.Array:
    """The weight of a layer as a matrix `[*batch, in, out]`.

    The kind of the layer says which attribute holds the weight, and which of its axes
    are contracted. Attention layers keep `[d, heads, h]` and `[heads, h, d]`.
    """
    layer = modules[path]
    kind = find_kind(layer)
    if kind is None:
        # A source may be a module that jaxq does not know. Flax calls its weight
        # `kernel`.
        return layer.kernel.get_value()
    w = getattr(layer, kind.weight).get_value()
    contracting, batch = weight_axes(layer, kind)
    rows = sorted(axis % w.ndim for axis in contracting)
    columns = [axis for axis in range(w.ndim) if axis not in (*batch, *rows)]
    num_inputs = math.prod(w.shape[axis] for axis in rows)
    w = jnp.transpose(w, (*batch, *rows, *columns))
    return w.reshape(*w.shape[: len(batch)], num_inputs, -1)


def _judged_scale(
    group: Group,
    rule: Rule,
    rules: Mapping[str, Rule | None],
    modules: Mapping[str, Any],
    stats: Mapping[str, LayerStats],
) -> tuple[jax.Array, Sequence[float | None], float | None]:
    """The scale of a group, and the losses on held-out inputs with this scale.

    Returns:
      (scale `[in]`, the loss of each target, the loss of the group). The losses are
      None if there are no held-out inputs. If the loss of the group is over 1, the
      scale increases the error.
    """
    folding = _folding(rule)
    source, weights = _weights(modules, group)
    input_stats = stats.get(group.targets[0])
    with methods.names_layer(", ".join(group.targets), rule.method):
        scale = folding.find(
            source, weights, input_stats, rule.weight, dict(rule.options)
        )
    losses, total = _target_losses(rule, weights, scale, input_stats)
    source_rule = rules.get(group.source)
    if total is None or not folding.judges_source:
        return scale, losses, total
    if source_rule is None or source_rule.weight is None:
        return scale, losses, total  # the source stays in floats
    assert source is not None
    source_loss = _source_loss(source_rule, source, scale, stats[group.source])
    return scale, losses, (total + source_loss) / 2


def _target_losses(
    rule: Rule,
    weights: list[jax.Array],
    scale: jax.Array,
    stats: LayerStats | None,
) -> tuple[Sequence[float | None], float | None]:
    """The loss of each target, and the loss of all targets together.

    The losses are None if there are no held-out rows.
    """
    if stats is None or not int(stats.num_held_out):
        return [None] * len(weights), None
    errors = []
    for w in weights:
        no_scale = jnp.ones(w.shape[1])
        errors.append(_errors(rule, w, scale, no_scale, stats))
    losses = [methods.error_ratio(*pair) for pair in errors]
    return losses, methods.error_ratio(*np.sum(errors, axis=0))


def _source_loss(
    rule: Rule, w: jax.Array, scale: jax.Array, stats: LayerStats
) -> float:
    """The loss of the layer whose outputs are divided by the scales."""
    return methods.error_ratio(*_errors(rule, w, jnp.ones(w.shape[0]), scale, stats))


def _errors(
    rule: Rule,
    w: jax.Array,
    row_scale: jax.Array,
    column_scale: jax.Array,
    stats: LayerStats,
) -> tuple[float, float]:
    """Squared output errors on held-out inputs, with the scales and without them."""
    assert isinstance(rule.weight, QuantSpec)
    error = functools.partial(
        _output_error,
        weight=rule.weight,
        activation=rule.activation,
        static=rule.observer is not None,
    )
    no_row_scale, no_column_scale = (
        jnp.ones_like(row_scale),
        jnp.ones_like(column_scale),
    )
    with_scales = error(w, row_scale, column_scale, stats)
    without = error(w, no_row_scale, no_column_scale, stats)
    return float(with_scales), float(without)


@functools.partial(jax.jit, static_argnames=("weight", "activation", "static"))
def _output_error(
    w: jax.Array,
    row_scale: jax.Array,
    column_scale: jax.Array,
    stats: LayerStats,
    *,
    weight: QuantSpec,
    activation: QuantSpec | None,
    static: bool,
) -> jax.Array:
    """The squared output error on held-out rows: `sum (x w - Q(x / r) Q(r w / c) c)^2`.

    `x` are the held-out rows, `r` the scales of the rows of `w`, and `c` the scales of
    its columns. `Q` rounds to nearest by the spec of the weight or of the inputs.

    Args:
      w: float `[in, out]`.
      row_scale: `[in]`.
      column_scale: `[out]`.
      stats: statistics of the inputs.
      weight: the spec of the weight.
      activation: the spec of the inputs. None leaves them in floats.
      static: the inputs have a static range, from their extremes in `stats`.
    """
    scaled = w.astype(jnp.float32) * row_scale[:, None] / column_scale[None]
    qt = quantize(
        scaled.astype(w.dtype), weight, contracting=-2, on_nonfinite="propagate"
    )
    bounds = None
    if static:
        low, high = stats.extremes
        bounds = (jnp.min(low / row_scale), jnp.max(high / row_scale))
    x = stats.held_out / row_scale[None]  # [rows, in]
    y = ops.matmul(
        x,
        qt.with_activation(activation, bounds=bounds),
        preferred_element_type=jnp.float32,
    )
    exact = jnp.matmul(
        stats.held_out, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sum(jnp.square(exact - y * column_scale[None]))
