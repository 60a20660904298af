"""quantize_model: a Flax nnx model with quantized weights, and the report of what happened to each parameter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxq import formats, methods
from jaxq.nn.calibration._nnx import (
    Wanted,
    as_batches,
    as_stats,
    calibrated,
    call_order,
    shown,
)
from jaxq.nn.layers._nnx import (
    QuantizedParam,
    put_weight,
    replace_variables,
    stack_note,
    weight_axes,
)
from jaxq.nn.report._report import (
    Report,
    Row,
    dropped_metadata,
    float_row,
    other_row,
    quantized_row,
    skip_reason,
)
from jaxq.nn.transform._donation import Donated
from jaxq.nn.transform._folding import (
    Group,
    Outcome,
    foldable,
    folded,
    looked_at,
    rotated,
    rotation_note,
)
from jaxq.nn.transform._nnx_matching import (
    Found,
    check_data,
    check_key,
    has_rows,
    match,
    raw_arrays,
    unused_notes,
    variables_of,
)
from jaxq.nn.transform._resume import Done, Resume, as_order
from jaxq.nn.transform._weight import corrected_bias, quantize_weight
from jaxq.observers import LayerStats, empty_stats
from jaxq.qtensor import ON_NONFINITE, QuantSpec
from jaxq.recipes import Recipe, Rule, as_recipe
from jaxq.sharding import on_auto_axes, placed_like

T = TypeVar("T")


def quantize_model(
    model: nnx.Module,
    recipe: str | QuantSpec | Recipe,
    *,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    sequential: bool | str = False,
    resume: str | os.PathLike[str] | None = None,
    fallback: str = "rtn",
    strict: bool = True,
    donate: bool = False,
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """A copy of `model` whose matrix weights are quantized; the model and its class stay as they are.

    Layers it knows: Linear, LinearGeneral, Einsum, Conv, ConvTranspose, Embed, those that attention and LoRA layers are
    made of too, wherever they are in the model, stacked along leading axes (`nnx.vmap`, `nnx.scan`) or shared by
    several parents. A bare matrix, an `nnx.Param` of a module of yours, is quantized where a rule of
    `kinds=("Param",)` says so: then `x @ self.w`, `jaxq.matmul` and `jaxq.einsum` take it, and all else raises. All
    are checked before any is quantized, and all problems are named at once.

    Args:
      model: a flax nnx module with float parameters.
      recipe: a name (`jaxq.recipes.names()`: every preset as weight-only, "w8a8", ...), a `QuantSpec` for every
        weight, or a `jaxq.Recipe`. Names and specs leave embeddings, output heads and routers in floats,
        which they know by kind and by name ("lm_head", "router", ...): the report says which.
      calibration: batches of real inputs, for methods that need data (`jaxq.methods`), or what `jaxq.nn.calibrate` made
        of them. Methods that do without are judged by them too, if they are given.
      mask: which rows of a batch count, as in `calibrate`.
      forward: how to run a batch, as in `calibrate`.
      sequential: "blocks" (or True) quantizes block by block, each on what the blocks before it make of the data when
        they are quantized; a block is what has the same path up to the first number. "layers" does so layer by layer;
        layers that read one array (queries, keys and values) go together. The data pass once for each, and only its
        statistics are in memory. Scales that a method folds are found before, on the float model.
      resume: a folder for the results of finished blocks, with `sequential`: the same call goes on with the first that
        has none. `mask` and `forward` are taken to be the same.
      fallback: what becomes of a layer whose method does worse than rounding to nearest on held-out inputs: "rtn" takes
        that and says so in the report, "none" keeps the method's result, "raise" stops.
      strict: a rule that matches nothing, and a bare matrix that no rule is about, are errors. False leaves them, and
        the report says so.
      donate: frees each weight of `model` once it is quantized, so that a model larger than half the memory fits; it
        must not be used afterwards. Not with data: the model runs on them.
      key: PRNG key, for methods that draw and `rounding="stochastic"`.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`; "raise" names path and index.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      (model of the same class, `Report`). Quantized weights are `jaxq.nn.QuantizedParam` variables holding QTensors,
      unseen by an optimizer of `nnx.Param`.

    Raises:
      TypeError: not an nnx module.
      ValueError: an unknown recipe; layers that cannot be quantized; a rule that matches nothing; bare matrices no rule
        is about; no layer at all; a method or an observer that needs data without `calibration`, and what `calibrate`
        raises.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> qmodel, report = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int8")
      >>> qmodel.kernel[...]
      QTensor(kernel: int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"quantize_model: model must be a flax nnx Module, got {type(model).__name__}."
        )
    recipe = as_recipe(recipe, "quantize_model")
    formats.check_choice("quantize_model: on_nonfinite", on_nonfinite, ON_NONFINITE)
    formats.check_choice("quantize_model: fallback", fallback, methods.FALLBACKS)
    check_key(recipe, key, "quantize_model")
    order = as_order(sequential, resume)
    if donate and calibration is not None:
        raise ValueError(
            "quantize_model: donate=True frees weights that calibration= needs; pass one of them."
        )
    copy = nnx.clone(model)
    stochastic, key = key is not None, jax.random.key(0) if key is None else key
    if recipe.rotate:
        copy = rotated(copy, jax.random.fold_in(key, 1))
    matched = match(copy, recipe, on_nonfinite, strict=strict)
    data = _Data(calibration, mask, forward, progress)
    if recipe.rotate and data and not data.has_batches:
        raise ValueError(
            "quantize_model: rotate=True changes what reaches the layers, so it needs the batches themselves as "
            "calibration=, not statistics."
        )
    check_data(
        [(f.path, f.kind, rule) for f, rule in matched if rule and rule.weight],
        bool(data),
    )
    rules = {found.path: rule for found, rule in matched}
    groups = foldable(copy, rules)
    outcomes: dict[str, Outcome] = {}
    if groups:
        copy, outcomes = folded(
            copy, groups, rules, data.of_groups(copy, groups), fallback
        )
        matched = match(copy, recipe, on_nonfinite, strict=strict)
    variables = {
        id(v): (path, v) for path, v in variables_of(copy)
    }  # alive, so that identities stay theirs
    donated = Donated(
        [
            *(v.get_value() for _, v in variables.values()),
            *(array for _, array in raw_arrays(copy)),
        ]
    )
    rows: dict[int, Row] = {}  # by the identity of the variable in the copy
    replaced: dict[int, QuantizedParam] = {}
    for (_, layer, kind), rule in matched:
        if rule is None or rule.weight is None:
            variable = getattr(layer, kind.weight)
            note = skip_reason(rule)
            where = variables[id(variable)][0]
            rows[id(variable)] = float_row(where, kind.name, variable.get_value(), note)
    taken = [
        (found, rule)
        for found, rule in matched
        if rule is not None and rule.weight is not None
    ]
    keys = jax.random.split(key, max(len(taken), 1))
    blocks = _blocks(copy, taken, data, order)
    kept = Resume(
        resume,
        recipe,
        data.batches,
        nnx.state(model),
        key,
        (fallback, order, stochastic),
    )
    for number, block in enumerate(blocks):
        names = {
            found.path: variables[id(getattr(found.layer, found.kind.weight))][0]
            for found, _ in block
        }
        before, done = kept.read(number, list(names.values())), {}
        stats = {} if before else data.of_block(copy, block)
        data.used = data.used or bool(before)
        for (path, layer, kind), rule in shown(
            block, "quantizing", progress and bool(stats)
        ):
            variable = getattr(layer, kind.weight)
            if id(variable) not in replaced and not isinstance(
                variable, QuantizedParam
            ):
                value, name = variable.get_value(), names[path]
                if name in before:
                    qt, bias, rows[id(variable)] = before[name]
                    replaced[id(variable)] = QuantizedParam(placed_like(qt, value))
                    if bias is not None:
                        layer.bias.set_value(bias)
                    put_weight(layer, kind, replaced[id(variable)])
                    continue
                bias = None
                with on_auto_axes((value, keys[len(replaced)], stats.get(path))) as (
                    floats,
                    own_key,
                    seen,
                ):
                    qt, solved = quantize_weight(
                        floats,
                        rule,
                        weight_axes(layer, kind),
                        seen,
                        rows=has_rows(kind),
                        fallback=fallback,
                        key=own_key,
                        stochastic=stochastic and rule.weight.rounding == "stochastic",
                        name=name,
                        on_nonfinite=on_nonfinite,
                        outcome=outcomes.get(path),
                    )
                    notes = [dropped_metadata(variable), stack_note(layer, kind)]
                    if rule.correct_bias and layer.bias is None:
                        notes.append("no bias to correct")
                    elif rule.correct_bias:
                        bias, said = corrected_bias(
                            layer.bias.get_value(), floats, qt, seen, fallback, name
                        )
                        layer.bias.set_value(bias)
                        notes.append(said)
                    row = quantized_row(
                        name, kind.name, floats, qt, solved, notes, kind.roles(layer)
                    )
                rows[id(variable)], done[name] = row, Done(qt, bias, row)
                replaced[id(variable)] = QuantizedParam(placed_like(qt, value))
                if donate:
                    donated.quantized(value, qt)
            put_weight(layer, kind, replaced.get(id(variable), variable))
        if not before:
            kept.write(number, done)
    replace_variables(copy, replaced)
    layers = {found.path for found, _ in matched}
    notes = (
        *rotation_note(recipe),
        *unused_note(data.used, calibration, mask, forward),
        *unused_notes(recipe, [rule for _, rule in matched], strict),
    )
    listed = [
        rows.get(i) or other_row(path, v, layers) for i, (path, v) in variables.items()
    ]
    listed += [
        float_row(path, "array", a, "in no variable, left as it is")
        for path, a in raw_arrays(copy)
    ]
    return copy, Report(tuple(listed), notes)


class _Data:
    """Calibration data, or statistics made of them before."""

    def __init__(
        self, calibration: Any, mask: Any, forward: Any, progress: bool | None
    ):
        self.used = False
        given = isinstance(calibration, Mapping)
        self._stats: dict[str, LayerStats] | None = dict(calibration) if given else None
        self._batches = (
            None
            if given or calibration is None
            else list(as_batches(calibration, "quantize_model"))
        )
        self._how = {"mask": mask, "forward": forward, "progress": progress}

    def __bool__(self) -> bool:
        return self._stats is not None or self._batches is not None

    @property
    def has_batches(self) -> bool:
        return bool(self._batches)

    @property
    def batches(self) -> list[Any]:
        return self._batches or []

    def of_model(
        self, model: Any, wanted: Mapping[str, Wanted]
    ) -> dict[str, LayerStats]:
        """Statistics of layers of a model, as it is now."""
        if not wanted or not self:
            return {}
        self.used = True
        if self._batches is not None:
            return calibrated(model, self._batches, wanted, **self._how)
        assert self._stats is not None
        return given_stats(self._stats, wanted)

    def of_block(
        self, model: Any, block: list[tuple[Found, Rule]]
    ) -> dict[str, LayerStats]:
        """What methods and observers of some layers need."""
        layers = ((found.path, rule, has_rows(found.kind)) for found, rule in block)
        return self.of_model(model, wanted_statistics(layers))

    def of_groups(
        self, model: Any, groups: Sequence[tuple[Group, Rule]]
    ) -> dict[str, LayerStats]:
        """What methods that fold scales need of their groups."""
        if self._stats is not None:
            raise ValueError(
                "quantize_model: a method that folds scales changes what reaches the layers, so it needs the batches "
                "themselves as calibration=, not statistics."
            )
        return self.of_model(
            model, dict.fromkeys(looked_at(groups), Wanted(hessian=False))
        )

    def order(self, model: Any) -> dict[str, tuple[int, ...]]:
        """The layers in the order in which the model reaches them, and what they read."""
        return call_order(model, self.batches[0], self._how["forward"])


def unused_note(used: bool, calibration: Any, mask: Any, forward: Any) -> list[str]:
    """What a report says of data that no layer looked at, and of what says how to look at them."""
    given = {"calibration": calibration, "mask": mask, "forward": forward}
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if used or not names:
        return []
    return [f"not used, for no rule looks at data: {', '.join(names)}"]


def given_stats(
    stats: Mapping[str, Any], wanted: Mapping[str, Wanted]
) -> dict[str, LayerStats]:
    """Of statistics that were made before those of some layers, or a ValueError that names what is missing."""
    missing = [path for path in wanted if path not in stats]
    if missing:
        raise ValueError(f"quantize_model: calibration has no statistics of {missing}.")
    found = {
        path: as_stats(stats[path], empty_stats(1, observer=one.observer))
        for path, one in wanted.items()
    }
    for path, one in wanted.items():
        if one.observer is not None and found[path].observed is not None:
            one.observer.check_state(
                found[path].observed, f"calibration of {path or 'the model'}"
            )
    return found


def wanted_statistics(layers: Iterable[tuple[str, Rule, bool]]) -> dict[str, Wanted]:
    """The layers that look at data, and at what.

    Args:
      layers: path, rule, and whether rows of the input meet the weight as a matrix.
    """
    return {
        path: Wanted(rule.observer, rows and rule.method == "gptq")  # pyright: ignore[reportArgumentType]
        for path, rule, rows in layers
        if looks(rule, rows)
    }


def looks(rule: Rule, rows: bool) -> bool:
    """Whether a rule has a use for data about a layer's input, if there are any; `rows`: see `wanted_statistics`."""
    return rule.observer is not None or (
        rows and (rule.correct_bias or methods.METHODS[rule.method].judged)
    )


def _blocks(
    model: Any, taken: list[tuple[Found, Rule]], data: _Data, order: str
) -> list[list[tuple[Found, Rule]]]:
    """Layers that are quantized on the same statistics: all, or some after others in the order of the forward pass."""
    if not order:
        return [taken]
    if not data.has_batches:
        raise ValueError(
            f"quantize_model: sequential={order!r} needs calibration=batches, not statistics or nothing."
        )
    return in_order(
        [(found.path, (found, rule)) for found, rule in taken], data.order(model), order
    )


def in_order(
    layers: Sequence[tuple[str, T]], reached: Mapping[str, tuple[int, ...]], order: str
) -> list[list[T]]:
    """What belongs to layers by path, some after others in the order in which data reach them; unseen ones first.

    Args:
      layers: path, and what belongs to it.
      reached: the layers in order, each with the numbers of the arrays it reads.
      order: "blocks", or "layers": those that read the same arrays go together.
    """
    place = {path: i for i, path in enumerate(reached)}
    out: dict[Any, list[T]] = {}
    for path, item in sorted(layers, key=lambda pair: place.get(pair[0], -1)):
        out.setdefault(
            _block_name(path) if order == "blocks" else reached.get(path), []
        ).append(item)
    return list(out.values())


def _block_name(path: str) -> str:
    """The path up to its first number: "layers/3/mlp/up" is of block "layers/3", "layers_3/up" of "layers_3".

    Without one, a layer is its own.
    """
    parts = path.split("/")
    number = next(
        (i for i, part in enumerate(parts) if part.rpartition("_")[2].isdigit()),
        len(parts),
    )
    return "/".join(parts[: number + 1])
