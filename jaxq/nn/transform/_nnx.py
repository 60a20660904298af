"""quantize_model for Flax nnx: the public function and the adapter of nnx models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxq.nn.calibration import (
    NnxFunction,
    ParameterFunction,
    StatsRequest,
    Use,
    Watched,
    call_order,
    collect_stats,
    collect_traced_stats,
    eval_copy,
    find_uses,
    run_model,
    train_mode_note,
)
from jaxq.nn.layers import (
    LayerKind,
    TrainedParam,
    bare_kind,
    put_weight,
    quantized_param,
    replace_variables,
    stack_note,
    weight_axes,
)
from jaxq.nn.report import Report, Row, float_row, other_row
from jaxq.nn.transform._calibration_data import CalibrationData
from jaxq.nn.transform._folding import (
    fold_groups,
    groups_to_fold,
    layers_to_watch,
    planned_outcomes,
)
from jaxq.nn.transform._loop import quantize_slots
from jaxq.nn.transform._matching import match_bare_array
from jaxq.nn.transform._model_error import Run
from jaxq.nn.transform._nnx_layers import (
    BareArray,
    find_bare_arrays,
    find_layers,
    find_raw_arrays,
    find_variables,
    normalized_layers,
)
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._prepared import refuse_prepared
from jaxq.nn.transform._rotation import rotate_model, rotation_notes
from jaxq.nn.transform._same_function import check_folded, check_rotated, nnx_run
from jaxq.nn.transform._slot import Inventory, Slot
from jaxq.nn.transform._traced import ArrayKind, slot_with_use, spread_stats
from jaxq.nn.transform._traced_weights import refuse_data
from jaxq.observers import LayerStats
from jaxq.qtensor import QUANTIZED, QTensor, QuantSpec, TrainedWeight, is_quantized
from jaxq.recipes import Recipe, Rule, as_recipe


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
    """Returns a copy of a model with quantized weights. The model does not change.

    The function quantizes Linear, LinearGeneral, Einsum, Conv, ConvTranspose and Embed,
    and the kinds that `jaxq.nn.register_layer` added. Attention and LoRA layers consist
    of these. The layers may be anywhere in the model. They may be stacked along leading
    axes (`nnx.vmap`, `nnx.scan`), and several modules may share one layer.

    One of your own modules may hold a matrix as an `nnx.Param`. This matrix is
    quantized if a rule with `kinds=("Param",)` matches it. Then `x @ self.w`,
    `jaxq.matmul` and `jaxq.einsum` accept the matrix. Other functions raise an error.
    With calibration batches, a trace of the model shows which axes of the matrix are
    contracted. If the rule has `contracting` or `batch`, they must agree.

    All layers are checked before the first one is quantized. One error names all
    problems.

    The function also runs inside `jax.jit` and `nnx.eval_shape`, with recipes that need
    no data. Weights are not checked for NaN there, and the report has no errors. The
    result of `nnx.eval_shape` is a template of the quantized model, for example for
    `jaxq.load(path, into=template)`.

    Args:
      model: a flax nnx module with float parameters.
      recipe: a name, a `QuantSpec` for every weight, or a `jaxq.Recipe`.
        `jaxq.recipes.names()` lists the names: every preset for weight-only
        quantization, "w8a8", and others. Names and specs leave embeddings, output heads
        and routers in floats. These layers are recognized by their kind and by their
        names ("lm_head", "router", ...). The report lists them.
      calibration: batches of real inputs, or the statistics that `jaxq.nn.calibrate`
        returned for such batches. Some methods (`jaxq.methods`) need calibration data.
        The results of other methods are compared with rounding to nearest on the data.
        The batches run through an eval copy of the model (`model.eval()`).
      mask: which rows of a batch count, as in `calibrate`.
      forward: how to run a batch, as in `calibrate`. Its result is the output whose
        error the report shows.
      sequential: "blocks" (or True) quantizes block by block: the statistics of a block
        are collected after all earlier blocks are quantized. Layers whose paths are
        equal up to the first number are one block. "layers" does the same layer by
        layer. Layers that read the same array (queries, keys and values) are then one
        block. The data pass through the model once for each block, and only the
        statistics of one block are in memory. Scales that a method folds into the
        previous layer are computed before all blocks, on the float model.
      resume: a folder for the results of finished blocks. It needs `sequential`. If the
        same call is made again later, it continues with the first block that has no
        result in the folder. `mask` and `forward` must be the same too. This is not
        checked.
      fallback: what happens to a layer whose method does worse than rounding to nearest
        on held-out inputs. "rtn" rounds it to nearest, and the report says so. "none"
        keeps the method's result. "raise" raises an error. An observer's
        static range is compared with two plain ranges on calibration inputs: the
        extremes of the inputs, and the range of least squared error. If the observer's
        range does worse, "rtn" takes the better plain range.
      strict: raises an error for a rule that matches nothing, and for a matrix that no
        rule matches in a module that jaxq does not know. False leaves such a matrix in
        floats, and the report says so.
      donate: frees each float weight of `model` when its codes exist, so that a model
        larger than half of the memory can be quantized. `model` must not be used
        afterwards. It cannot be combined with `calibration`, which needs the weights.
      key: PRNG key, for methods that draw random numbers and for
        `rounding="stochastic"`.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`. The
        error of "raise" names the path and the index.
      progress: show a line of progress. None shows it on a terminal.

    Returns:
      (a model of the same class, a `Report`). Quantized weights are
      `jaxq.nn.QuantizedParam` variables that hold QTensors. An optimizer of `nnx.Param`
      does not see them.

    Raises:
      TypeError: `model` is not an nnx module, or `calibration` is one array instead of
        batches.
      ValueError: the recipe is unknown; a layer cannot be quantized by its rule; a rule
        matches nothing; no rule matches a matrix of a module that jaxq does not know; a
        method or an observer needs data and `calibration` is None; a rule has
        stochastic rounding and `key` is None; folded scales or a rotation change the
        outputs of the float model on the first batch. The errors of `calibrate` are
        raised too.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> qmodel, report = jaxq.quantize_model(model, "int8")
      >>> qmodel.kernel[...]
      QTensor(kernel: int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits,
              float32)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "quantize_model: model must be a flax nnx Module, got "
            f"{type(model).__name__}. For a linen module, use "
            "jaxq.nn.linen.quantize_model(module, variables, recipe). For a tree of "
            "arrays, use jaxq.quantize_params."
        )
    recipe = as_recipe(recipe, "quantize_model")
    options = Options(
        calibration=calibration,
        mask=mask,
        forward=forward,
        sequential=sequential,
        resume=resume,
        fallback=fallback,
        strict=strict,
        donate=donate,
        key=key,
        on_nonfinite=on_nonfinite,
        progress=progress,
    )
    adapter = NnxAdapter(nnx.clone(model), recipe, options)
    return quantize_slots(adapter, recipe, options)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of a weight in the model.

    Attributes:
      layer: the module that holds the weight.
      kind: the kind of the layer.
      variable: the variable of the float weight. Layers that share a weight share the
        variable.
    """

    layer: Any
    kind: LayerKind
    variable: nnx.Variable


@dataclasses.dataclass(frozen=True)
class _LeavesFunction:
    """An nnx model as a function of the leaves of its state.

    Attributes:
      function: the model as a function of its state.
      structure: the tree structure of the state.
    """

    function: NnxFunction
    structure: Any

    def __call__(self, leaves: Sequence[Any], batch: Any) -> Any:
        return self.function(jax.tree.unflatten(self.structure, leaves), batch)


class NnxAdapter:
    """The adapter of an nnx model.

    Args:
      model: the model. The adapter changes it in place, so pass a clone.
      recipe: the rules.
      options: `key` is the key for a rotation. Errors begin with `caller`.
    """

    noun = "layer"
    no_folding = ""
    data_arguments = "calibration=batches of real inputs"
    read_arguments: tuple[str, ...] = ()
    keys_follow_slots = False

    def __init__(self, model: nnx.Module, recipe: Recipe, options: Options):
        refuse_prepared(model, options.caller)
        refuse_data(jax.tree.leaves(nnx.state(model)), options)
        self.caller = options.caller
        self.unmatched_remedy = ""
        self._recipe = recipe
        self._options = options
        self.notes = rotation_notes(recipe, bool(options.batches))
        # An eval copy of the float model, to compare outputs. None without batches.
        self._original: Any = None
        if options.batches:
            self._original = eval_copy(model)
            note = train_mode_note(model, options.batches, run_model, options.forward)
            self.notes = (*self.notes, note)
        if recipe.rotate:
            key = jax.random.key(0) if options.key is None else options.key
            model = rotate_model(model, jax.random.fold_in(key, 1), self.caller)
            if options.batches:
                check_rotated(self._original, model, options)
        self._model = model
        self._slots: list[Slot] = []
        # `id` identifies a variable, so the variables must stay alive.
        self._variables: list[tuple[str, nnx.Variable]] = []
        self._quantized: dict[int, Any] = {}
        # How the model uses each variable, by its path. Empty if it has no bare array
        # that a rule quantizes, or if there are no batches.
        self._uses: dict[str, Use] = {}

    def inventory(self) -> Inventory:
        self._variables = list(find_variables(self._model))
        names = {id(variable): path for path, variable in self._variables}
        normalized = normalized_layers(self._model)
        slots = []
        for path, layer, kind in find_layers(self._model):
            shape = tuple(getattr(_weight(layer, kind), "shape", ()))
            rule = self._recipe.find(path, kind.name, shape, type(layer))
            slots.append(_slot(path, layer, kind, rule, names, normalized))
        layer_weights = {slot.weight for slot in slots}
        other_rules, unmatched, unmatched_linen, refused = [], [], [], []
        for array in find_bare_arrays(self._model, layer_weights):
            rule, description = match_bare_array(
                self._recipe, array.path, array.value, type(array.holder)
            )
            if rule is None:
                if description and isinstance(array.holder, nnx.bridge.ToNNX):
                    unmatched_linen.append(f"{description} (inside ToNNX)")
                elif description:
                    unmatched.append(description)
            elif isinstance(array.holder, nnx.bridge.ToNNX):
                other_rules.append(rule)
                if rule.weight is not None:
                    refused.append(
                        f"a rule quantizes {array.path}, which is inside an "
                        "nnx.bridge.ToNNX, where linen layers run with float weights. "
                        "Write these layers in nnx, or add "
                        "jaxq.Rule(path, skip=True, kinds=('Param',))."
                    )
            elif array.attribute is not None:
                kind = _bare_kind(array, array.attribute, rule)
                slot = _slot(array.path, array.owner, kind, rule, names, normalized)
                slots.append(dataclasses.replace(slot, kind=ArrayKind(kind.name)))
            else:
                other_rules.append(rule)
                if rule.weight is not None:
                    refused.append(
                        f"a rule quantizes {array.path}, which must be an nnx.Param "
                        "that a module, an nnx.List or an nnx.Dict holds. Change the "
                        "module, or add jaxq.Rule(path, skip=True, kinds=('Param',))."
                    )
        slots, traced_rules = self._with_uses(slots)
        self._slots = slots
        self.unmatched_remedy = _remedy(unmatched, unmatched_linen)
        unmatched += unmatched_linen
        return Inventory(slots, [*other_rules, *traced_rules], unmatched, refused)

    def problems(self, slots: Sequence[Slot]) -> list[str]:
        """Layers that share a weight, but whose rules or axes are not the same."""
        problems = []
        first_slots: dict[Hashable, Slot] = {}
        for slot in slots:
            if slot.problem:
                continue
            first = first_slots.setdefault(slot.weight, slot)
            other = f"it shares its weight with {first.path or 'the model itself'}"
            if _treatment(first) != _treatment(slot):
                difference = "and only one of them is quantized"
                if first.chosen and slot.chosen:
                    difference = "and the rules or axes of the two differ"
                problem = f"{other}, {difference}"
            elif slot is not first and slot.chosen and _is_static(slot):
                problem = f"{other}, and one static range does not fit both inputs. "
                problem += "Omit observer= from the rule"
            else:
                continue
            problems.append(f"  {slot.label}: {problem}")
        return problems

    def state(self) -> Any:
        return nnx.state(self._model)

    def arrays(self) -> Iterable[Any]:
        for slot in self._slots:
            yield slot.value
        slot_weights = {slot.weight for slot in self._slots}
        for _, variable in self._variables:
            if id(variable) not in slot_weights:
                yield variable.get_value()
        for _, array in find_raw_arrays(self._model):
            yield array

    def fold(
        self, slots: list[Slot], data: CalibrationData | None, options: Options
    ) -> list[Slot]:
        rules = {slot.path: slot.rule for slot in slots}
        groups = groups_to_fold(self._model, rules, self.caller)
        if not groups:
            return slots
        if data is None:
            outcomes = planned_outcomes(self._model, groups)
        else:
            stats = data.before_folding(layers_to_watch(groups))
            folded = fold_groups(self._model, groups, rules, stats, options)
            if options.batches:
                check_folded(self._model, folded, options)
            else:
                self.notes = (*self.notes, _NOT_COMPARED)
            self._model, outcomes = folded.model, folded.outcomes
            # The folded model is another object with other variables.
            checked = {slot.path: slot for slot in slots}
            slots = [
                dataclasses.replace(
                    slot,
                    planned=checked[slot.path].planned,
                    product_note=checked[slot.path].product_note,
                )
                for slot in self.inventory().slots
            ]
        return [
            dataclasses.replace(slot, scales=outcomes.get(slot.path)) for slot in slots
        ]

    def call_order(self, options: Options) -> Mapping[str, tuple[int, ...]]:
        assert options.batches
        if not self._uses:
            return call_order(self._model, options.batches[0], options.forward)
        # The numbers of this trace are those of all arrays, also of bare ones.
        uses = {slot.path: self._uses[slot.name] for slot in self._slots}
        paths = [path for path in uses if not uses[path].problem]
        paths.sort(key=lambda path: uses[path].order)
        return {path: uses[path].inputs for path in paths}

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        assert options.batches is not None
        bare = {slot.path: slot for slot in self._slots if _is_bare(slot)}
        in_layers = {path: wanted[path] for path in wanted if path not in bare}
        stats: dict[str, LayerStats] = {}
        if in_layers:
            stats |= collect_stats(
                self._model,
                options.batches,
                in_layers,
                mask=options.mask,
                forward=options.forward,
                progress=options.progress,
            )
        bare = {path: slot for path, slot in bare.items() if path in wanted}
        if bare:
            stats |= self._bare_statistics(bare, wanted)
        return stats

    def bias(self, slot: Slot) -> jax.Array | None:
        variable = self._bias_variable(slot)
        return None if variable is None else variable.get_value()

    def put_bias(self, slot: Slot, bias: jax.Array) -> None:
        variable = self._bias_variable(slot)
        assert variable is not None
        variable.set_value(bias)

    def put_weight(self, slot: Slot, weight: QTensor | TrainedWeight) -> None:
        place = slot.place
        # Layers that share a variable share the new one too.
        variable = self._quantized.get(id(place.variable))
        if variable is None:
            if isinstance(weight, QTensor):
                variable = quantized_param(weight, place.variable)
            else:
                metadata = place.variable.get_metadata()
                variable = TrainedParam(weight, **metadata)
            self._quantized[id(place.variable)] = variable
        put_weight(place.layer, place.kind, variable)

    def finish(self) -> Any:
        replace_variables(self._model, self._quantized)
        return self._model

    def runs(self, options: Options) -> tuple[Run, Run]:
        return nnx_run(self._original, options), nnx_run(self._model, options)

    def rows(self, rows: Mapping[Hashable, Row]) -> list[Row]:
        layers = {slot.path for slot in self._slots}
        out = []
        for path, variable in self._variables:
            row = rows.get(id(variable))
            out.append(other_row(path, variable, layers) if row is None else row)
        for path, array in find_raw_arrays(self._model):
            note = "in no variable, left as it is"
            out.append(float_row(path, "array", array, note))
        return out

    def _bias_variable(self, slot: Slot) -> nnx.Variable | None:
        """The variable of the bias of a slot's weight, or None."""
        if not _is_bare(slot):
            # A registered kind may correct biases, and some of its layers have no bias.
            return getattr(slot.place.layer, "bias", None)
        use = self._uses.get(slot.name)
        if use is None or use.bias is None:
            return None
        path = self._variable_paths()[use.bias]
        variables = dict(self._variables)
        is_weight = any(slot.name == path and slot.chosen for slot in self._slots)
        return None if is_weight else variables.get(path)

    def _with_uses(self, slots: list[Slot]) -> tuple[list[Slot], list[Rule]]:
        """The slots with the axes that a trace shows, and the rules of traced slots."""
        self._uses = {}
        traced = [slot for slot in slots if _is_bare(slot) and slot.chosen]
        if not traced or not self._options.batches:
            return slots, []
        paths = self._variable_paths()
        groups: dict[tuple[int, ...], str] = {
            (position,): path for position, path in enumerate(paths)
        }
        uses = find_uses(self._function(), self._options.batches[0], groups)
        self._uses = {groups[group]: use for group, use in uses.items()}
        rules = [slot.rule for slot in traced if slot.rule is not None]
        slots = [
            slot_with_use(slot, self._uses[slot.name]) if slot in traced else slot
            for slot in slots
        ]
        return slots, rules

    def _bare_statistics(
        self, slots: Mapping[str, Slot], wanted: Mapping[str, StatsRequest]
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of bare arrays, by path."""
        assert self._options.batches is not None
        positions = {path: i for i, path in enumerate(self._variable_paths())}
        watched = {
            path: Watched((positions[slot.name],), self._uses[slot.name], wanted[path])
            for path, slot in slots.items()
            if slot.name in self._uses  # empty if there is no batch
        }
        stats = collect_traced_stats(
            self._function(),
            self._options.batches,
            watched,
            caller=self.caller,
            mask=self._options.mask,
            progress=self._options.progress,
        )
        return {
            path: spread_stats(stats[path], slot, self._uses[slot.name])
            for path, slot in slots.items()
        }

    def _function(self) -> ParameterFunction:
        """The model in its present state, as a function of its variables' values."""
        graph, state = nnx.split(eval_copy(self._model))
        leaves, structure = jax.tree.flatten(state, is_leaf=is_quantized)
        function = NnxFunction(graph, self._options.forward)
        return ParameterFunction(_LeavesFunction(function, structure), leaves)

    def _variable_paths(self) -> list[str]:
        """The path of the variable of each leaf of `_function`."""
        state = nnx.state(self._model)
        leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
        # The last key is the ".value" of the variable.
        return [
            jax.tree_util.keystr(keys[:-1], simple=True, separator="/")
            for keys, _ in leaves
        ]


def _remedy(unmatched: Sequence[str], unmatched_linen: Sequence[str]) -> str:
    """How to quantize matrices that no rule matches. Some may be inside ToNNX."""
    remedies = []
    if unmatched:
        remedies.append(
            "To quantize a matrix, add jaxq.Rule(path, weight=..., kinds=('Param',)). "
            "It must come before the rules of a named recipe, "
            "jaxq.recipes.get(name).rules."
        )
    if unmatched_linen:
        remedies.append(
            "Linen layers inside an nnx.bridge.ToNNX run with float weights. To "
            "quantize them, write them in nnx."
        )
    return " ".join(remedies)


def _is_bare(slot: Slot) -> bool:
    """True if the slot is of an array in a module of an unknown class."""
    return isinstance(slot.kind, ArrayKind)


_NOT_COMPARED = (
    "scales were folded without a calibration batch, so the outputs before and after "
    "were not compared"
)


def _weight(layer: Any, kind: LayerKind) -> Any:
    return getattr(layer, kind.weight).get_value()


def _slot(
    path: str,
    layer: Any,
    kind: LayerKind,
    rule: Rule | None,
    names: Mapping[int, str],
    normalized: Mapping[int, str],
) -> Slot:
    """The slot of a layer.

    Args:
      path: the path of the layer.
      layer: the module.
      kind: the kind of the layer.
      rule: the rule that matches the layer, or None.
      names: the first path of each variable, by the `id` of the variable.
      normalized: reasons from `normalized_layers`, by the `id` of the layer.
    """
    variable = getattr(layer, kind.weight)
    slot = Slot(
        path=path,
        name=names[id(variable)],
        kind=kind,
        value=variable.get_value(),
        weight=id(variable),
        place=_Place(layer, kind, variable),
        rule=rule,
    )
    if not slot.chosen:
        return slot
    problem = normalized.get(id(layer)) or kind.problem(layer)
    if isinstance(slot.value, QUANTIZED):
        problem = "it is quantized already"
    if problem:
        return dataclasses.replace(slot, problem=problem)
    try:
        contracting, batch = weight_axes(layer, kind)
    except ValueError as error:
        return dataclasses.replace(slot, problem=str(error))
    return dataclasses.replace(
        slot,
        contracting=contracting,
        batch=batch,
        roles=kind.roles(layer),
        notes=(stack_note(layer, kind),),
    )


def _bare_kind(array: BareArray, attribute: str, rule: Rule) -> LayerKind:
    """The kind record of a bare matrix, which is an attribute of a module."""
    ndim = array.value.ndim
    contracting = rule.contracting
    if contracting is None:
        contracting = (-2,) if ndim == 2 else ()
    from_the_end = tuple(axis - ndim if axis >= 0 else axis for axis in contracting)
    return bare_kind(attribute, from_the_end, len(rule.batch or ()))


def _treatment(slot: Slot) -> Any:
    """The axes and the fields of the rule that decide how a weight is quantized.

    None if the weight stays in floats. Slots of one weight must have equal values.
    """
    rule = slot.rule
    if not slot.chosen or rule is None:
        return None
    return (
        slot.contracting,
        slot.batch,
        rule.weight,
        rule.activation,
        rule.observer,
        rule.method,
        rule.options,
    )


def _is_static(slot: Slot) -> bool:
    return slot.rule is not None and slot.rule.observer is not None
