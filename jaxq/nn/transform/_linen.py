"""quantize_model for Flax linen: the public function and the adapter of modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict

from jaxq.nn.calibration import (
    LinenFunction,
    StatsRequest,
    collect_linen_stats,
    linen_call_order,
)
from jaxq.nn.layers import (
    Forward,
    LinenKind,
    LinenLayer,
    Quantized,
    Roles,
    check_weights,
    find_linen_layers,
    linen_kinds,
    params_of,
    with_params,
)
from jaxq.nn.report import Report, Row, float_row, skip_reason, why_not_weight
from jaxq.nn.transform._calibration_data import CalibrationData
from jaxq.nn.transform._loop import quantize_slots
from jaxq.nn.transform._matching import match_bare_array
from jaxq.nn.transform._model_error import Run
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._rotation import refuse_rotation
from jaxq.nn.transform._slot import Inventory, Slot
from jaxq.nn.transform._traced_weights import refuse_data
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor, QuantSpec, TrainedWeight
from jaxq.recipes import Recipe, Rule, as_recipe
from jaxq.sharding.boxes import boxed_like

# The names that lead to a parameter.
_Key = tuple[str, ...]


def quantize_model(
    module: linen.Module,
    variables: Mapping[str, Any],
    recipe: str | QuantSpec | Recipe,
    *,
    example: Any = None,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    sequential: bool | str = False,
    resume: str | os.PathLike[str] | None = None,
    fallback: str = "rtn",
    strict: bool = True,
    donate: bool = False,
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
) -> tuple[Quantized, Any, Report]:
    """Returns a linen module and variables with quantized weights.

    The arguments `module` and `variables` do not change.

    The function quantizes Dense, DenseGeneral, Einsum, Conv, ConvTranspose and Embed.
    Attention layers consist of DenseGeneral layers, so they are quantized too. The
    layers may be anywhere in the module: in `nn.scan` or `nn.vmap` (stacked along axis
    0), `nn.remat` and `nn.jit`. A rule with `kinds=("Linear",)` matches Dense too, and
    a rule with "LinearGeneral" matches DenseGeneral.

    A call of the module with abstract values shows which parameter belongs to which
    layer. If the module changes a weight before its layer reads it, an error is raised.
    All layers are checked before the first one is quantized. One error names all
    problems.

    Args:
      module: a linen module.
      variables: float variables as `module.apply` takes them, a dict or a FrozenDict.
        A quantized weight in a box of metadata (`nn.Partitioned`) gets a
        `QuantizedBox`, which gives codes and scales the mesh axes of the float weight.
      recipe: a name, a `QuantSpec` for every weight, or a `jaxq.Recipe`, as in
        `jaxq.quantize_model`.
      example: an input of the module or its `jax.ShapeDtypeStruct`: an array, a tuple
        of arguments or a dict of named ones. The dict may have `method=`, `rngs=` and
        `mutable=` of `apply`. None uses the first batch of `calibration`. If there are
        no batches, inputs of usual shapes are tried until one reaches all parameters.
      calibration: batches of real inputs, for methods that need data (`jaxq.methods`),
        or the statistics that `jaxq.nn.linen.calibrate` returned for such batches.
        Calibration cannot see the inputs of layers inside `nn.scan` or another lifted
        transform.
      mask: which rows of a batch count, as in `calibrate`.
      forward: `forward(module, variables, batch)` runs an example or a batch.
      sequential: "blocks" (or True) or "layers", as in `jaxq.quantize_model`. Layers
        whose paths are equal up to the first number ("layers_3") are one block.
      resume: a folder for the results of finished blocks, as in `jaxq.quantize_model`.
      fallback: what happens to a layer whose method does worse than rounding to nearest
        on held-out inputs, as in `jaxq.quantize_model`.
      strict: raises an error for a rule that matches nothing, for a matrix that one of
        your modules creates with `self.param` and that no rule matches, and for a
        weight that a rule quantizes but the example does not reach. False leaves these
        weights in floats, and the report says so.
      donate: frees each float weight among `variables` when its codes exist, as in
        `jaxq.quantize_model`. It cannot be combined with `calibration`.
      key: PRNG key, for methods that draw random numbers and for
        `rounding="stochastic"`.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`. The
        error of "raise" names the path and the index.
      progress: show a line of progress. None shows it on a terminal.

    Returns:
      (a `Quantized` module, variables, a `Report`). Quantized parameters are QTensors.
      The other variables are those of `variables`; only corrected biases differ.

    Raises:
      TypeError: `module` is not a linen module; `module` is quantized already;
        `variables` has no "params"; `calibration` is one array instead of batches.
      ValueError: the recipe is unknown; the module cannot be called with the example;
        a layer cannot be quantized by its rule; a rule matches nothing; no rule matches
        a matrix of a module that jaxq does not know; the example does not reach a
        weight; a method or an observer needs data and `calibration` is None; a method
        can only move scales into other layers (equalization), because linen modules do
        not say where scales can go; a rule has stochastic rounding and `key` is None.
        The errors of `calibrate` are raised too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen, nnx
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> qmodule, qvariables, report = jaxq.nn.linen.quantize_model(
      ...   module, variables, "int8")
      >>> qvariables["params"]["kernel"]
      QTensor(kernel: int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits,
              float32)
      >>> qmodule.apply(qvariables, x).shape
      (2, 8)
    """
    check_module(module, variables, "linen.quantize_model")
    recipe = as_recipe(recipe, "linen.quantize_model")
    options = Options(
        caller="linen.quantize_model",
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
    adapter = LinenAdapter(module, variables, recipe, example, options)
    (qmodule, qvariables), report = quantize_slots(adapter, recipe, options)
    return qmodule, qvariables, report


def check_module(module: Any, variables: Any, caller: str) -> None:
    """Raises a TypeError unless the arguments are a float linen module and variables.

    Args:
      module: anything.
      variables: anything.
      caller: the name of the public function. Errors begin with this name.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"{caller}: module must be a flax linen Module, got "
            f"{type(module).__name__}. For an nnx module, use the function of this "
            "name that is not in a linen package."
        )
    if isinstance(module, Quantized):
        raise TypeError(
            f"{caller}: the module is quantized already. Pass the float module "
            "and variables."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            f"{caller}: variables must be a dict with 'params', as module.init "
            f"returns it, got {type(variables).__name__}."
        )


class LinenAdapter:
    """The adapter of a linen module and its variables.

    Args:
      module: a linen module.
      variables: its float variables. Leaves may be `jax.ShapeDtypeStruct`s in a plan.
      recipe: the rules.
      example: an input of the module, or None.
      options: `caller`, `forward` and `strict`. The first batch is the example if
        `example` is None.
    """

    noun = "layer"
    no_folding = (
        "linen modules do not say which layer that is. Use another method or an nnx "
        "model"
    )
    data_arguments = "calibration=batches of real inputs"
    keys_follow_slots = True

    def __init__(
        self,
        module: linen.Module,
        variables: Mapping[str, Any],
        recipe: Recipe,
        example: Any,
        options: Options,
    ):
        refuse_rotation(recipe, options.caller)
        refuse_data(jax.tree.leaves(variables), options)
        self.caller = options.caller
        self.unmatched_remedy = ""
        self.notes: tuple[str, ...] = ()
        # Finding the layers runs `forward`, and may run the first batch.
        self.read_arguments: tuple[str, ...] = ("forward",)
        if example is None and options.batches:
            example = options.batches[0]
            self.read_arguments = ("forward", "calibration")
        self._module = module
        self._variables = variables
        self._recipe = recipe
        self._options = options
        self._structure = find_linen_layers(
            module, variables, example, options.forward, caller=options.caller
        )
        # Quantized weights replace the float parameters here.
        self._params = params_of(variables)
        self._slots: list[Slot] = []
        self._quantized: list[_Key] = []
        # Rules that skip parameters outside of slots. The report gives their reasons.
        self._skipped: dict[_Key, Rule] = {}
        self._unreached: list[str] = []

    def inventory(self) -> Inventory:
        self._slots = [self._slot(layer) for layer in self._structure.layers.values()]
        bare, bare_rules, unmatched = self._bare_arrays()
        unreached_rules = self._match_unreached()
        self._slots += bare
        return Inventory(self._slots, [*bare_rules, *unreached_rules], unmatched)

    def problems(self, slots: Sequence[Slot]) -> list[str]:
        """Weights whose layers do not accept QTensors, or that the example misses."""
        planned = {
            slot.path: slot.planned for slot in slots if slot.planned is not None
        }
        problems = check_weights(
            self._module,
            self._variables,
            self._structure,
            self._options.forward,
            planned,
        )
        if self._unreached and self._options.strict:
            problems.append(
                f"  the call of the example does not reach "
                f"{', '.join(self._unreached)}, so jaxq does not know their layers. "
                "Pass an example= (or forward=) whose call reaches them, for example a "
                "dict with method=. Or pass strict=False to leave them in floats"
            )
        return problems

    def state(self) -> Any:
        return linen.meta.unbox(dict(self._variables))

    def arrays(self) -> Iterable[Any]:
        return jax.tree.leaves(self._variables)

    def fold(
        self, slots: list[Slot], data: CalibrationData | None, options: Options
    ) -> list[Slot]:
        return slots  # because of `no_folding`, methods that only fold are refused

    def call_order(self, options: Options) -> Mapping[str, tuple[int, ...]]:
        assert options.batches
        return linen_call_order(
            self._module, self._variables, options.batches[0], options.forward
        )

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        assert options.batches is not None
        module = Quantized(self._module, _joined(self._quantized))
        stats, note = collect_linen_stats(
            module,
            with_params(self._variables, self._params),
            options.batches,
            wanted,
            mask=options.mask,
            forward=options.forward,
            progress=options.progress,
        )
        if note not in self.notes:
            self.notes = (*self.notes, note)
        return stats

    def bias(self, slot: Slot) -> jax.Array | None:
        key = _bias_key(slot)
        return linen.meta.unbox(self._params[key]) if key in self._params else None

    def put_bias(self, slot: Slot, bias: jax.Array) -> None:
        key = _bias_key(slot)
        self._params[key] = linen.meta.replace_boxed(self._params[key], bias)

    def put_weight(self, slot: Slot, weight: QTensor | TrainedWeight) -> None:
        self._params[slot.place] = boxed_like(weight, self._params[slot.place])
        self._quantized.append(slot.place)

    def finish(self) -> tuple[Quantized, Any]:
        weights = [slot.place for slot in self._slots if slot.chosen]
        module = Quantized(self._module, _joined(weights))
        variables = with_params(self._variables, self._params)
        is_frozen = isinstance(self._variables, FrozenDict)
        return module, freeze(variables) if is_frozen else variables

    def runs(self, options: Options) -> tuple[Run, Run]:
        quantized, variables = self.finish()
        before = LinenFunction(self._module, options.forward)
        after = LinenFunction(quantized, options.forward)
        return Run(before, self._variables), Run(after, variables)

    def rows(self, rows: Mapping[Hashable, Row]) -> list[Row]:
        kinds = {slot.place: slot.kind.name for slot in self._slots}
        out = []
        for key, boxed in self._params.items():
            row = rows.get(key)
            if row is None:
                kind = kinds.get(key, self._class_name(key[:-1]))
                value = linen.meta.unbox(boxed)
                row = float_row("/".join(key), kind, value, self._why_float(key, value))
            out.append(row)
        for collection, tree in self._variables.items():
            if collection != "params":
                out += self._rows_of_collection(collection, tree)
        return out

    def _slot(self, layer: LinenLayer) -> Slot:
        """The slot of a layer that the call of the example reached."""
        boxed = self._params.get(layer.key)
        value = linen.meta.unbox(boxed)
        shape = tuple(getattr(value, "shape", ()))
        cls = self._structure.classes[layer.scope]
        rule = self._recipe.find(layer.path, layer.kind.name, shape, cls)
        num_stacked = len(shape) - len(layer.roles.shape)
        return Slot(
            path=layer.path,
            name="/".join(layer.key),
            kind=layer.kind,
            value=value,
            weight=layer.key,
            place=layer.key,
            rule=rule,
            contracting=layer.roles.contracting,
            batch=tuple(range(num_stacked + layer.roles.num_batch)),
            roles=layer.roles,
            problem=layer.problem or "",
        )

    def _bare_arrays(self) -> tuple[list[Slot], list[Rule], list[str]]:
        """Arrays that modules of unknown classes create with `self.param`.

        Returns:
          (slots, rules, descriptions). The slots are the arrays that a rule quantizes.
          Their `problem` says why this is not possible. The rules skip other arrays.
          The descriptions are of matrices that no rule matches.
        """
        slots, rules, unmatched = [], [], []
        unmatched_classes: list[type] = []
        weights = {layer.key for layer in self._structure.layers.values()}
        for key, boxed in self._params.items():
            value, path = linen.meta.unbox(boxed), "/".join(key)
            cls = self._structure.class_of(key[:-1])
            if key in weights or cls is None or not _is_float(value):
                continue
            rule, description = match_bare_array(self._recipe, path, value, cls)
            if rule is None:
                if description:
                    unmatched.append(f"{description} ({cls.__name__})")
                    unmatched_classes.append(cls)
            elif rule.weight is not None:
                slots.append(_bare_slot(key, value, rule, cls))
            else:
                rules.append(rule)
                # For a vector, the report says "not a matrix" instead of the rule.
                if value.ndim > 1:
                    self._skipped[key] = rule
        self.unmatched_remedy = _remedy(unmatched_classes)
        return slots, rules, unmatched

    def _match_unreached(self) -> list[Rule]:
        """Matches rules against matrices that the call of the example did not reach.

        The layer kind of such a matrix is not known. The name of the parameter says
        which kinds are possible. A matrix that a rule would quantize goes to
        `_unreached`.

        Returns:
          The rules that skip such matrices.
        """
        used_rules: list[Rule] = []
        for key, boxed in self._params.items():
            value = linen.meta.unbox(boxed)
            is_matrix = _is_float(value) and value.ndim > 1
            if self._structure.class_of(key[:-1]) or not is_matrix:
                continue
            path, shape = "/".join(key[:-1]), tuple(value.shape)
            kinds = {kind.name for kind in linen_kinds() if kind.weight == key[-1]}
            candidates = [
                self._recipe.find(path, kind, shape) for kind in sorted(kinds)
            ]
            rules = [rule for rule in candidates if rule is not None]
            if any(rule.weight is not None for rule in rules):
                self._unreached.append("/".join(key))
            elif rules:
                used_rules += rules
                self._skipped[key] = rules[0]
        return used_rules

    def _class_name(self, scope: _Key) -> str:
        """The class of a scope's module. "-" if the example's call did not reach it."""
        cls = self._structure.class_of(scope)
        return cls.__name__ if cls else "-"

    def _why_float(self, key: _Key, value: Any) -> str:
        """Why a parameter that is not a slot stays as it is."""
        scope = key[:-1]
        if key in self._skipped:
            return skip_reason(self._skipped[key])
        in_layer = "/".join(scope) in self._structure.layers
        reason = why_not_weight(value, in_layer=in_layer)
        if reason:
            return reason
        if self._structure.class_of(scope) is None:
            return "not reached by the call of the example, left in floats"
        name = self._class_name(scope)
        return f"used by {name} itself, which jaxq does not quantize, left in floats"

    def _rows_of_collection(self, collection: str, tree: Any) -> Iterable[Row]:
        """The rows of variables that are not parameters, such as batch statistics."""
        for key, boxed in flatten_dict({collection: tree}).items():
            value = linen.meta.unbox(boxed)
            note = "not a parameter, passed through"
            if _is_float(value) and value.ndim > 1:
                note += ": rules apply to 'params' only"
            yield float_row("/".join(key), self._class_name(key[1:-1]), value, note)


def _no_roles(*args: Any, **kwargs: Any) -> Roles:
    raise NotImplementedError("a matrix of a user's module has no roles")


# A matrix that a module creates with `self.param`.
_BARE = LinenKind(name="Param", weight="", roles=_no_roles, methods={})


def _remedy(classes: Sequence[type]) -> str:
    """How to quantize matrices of these classes, which no rule matches."""
    remedies = []
    if any(not issubclass(cls, nnx.bridge.ToLinen) for cls in classes):
        remedies.append(
            "To quantize a matrix, make it the kernel of a Dense, DenseGeneral or "
            "Einsum."
        )
    if any(issubclass(cls, nnx.bridge.ToLinen) for cls in classes):
        remedies.append(
            "The nnx layers inside an nnx.bridge.ToLinen run with float weights. To "
            "quantize them, write them in linen."
        )
    return " ".join(remedies)


def _bare_slot(key: _Key, value: Any, rule: Rule, cls: type) -> Slot:
    """The slot of a matrix that a module creates with `self.param`.

    Such a matrix cannot be quantized. Flax checks that the stored value has the shape
    that the module passes to `self.param`. Inside `nnx.bridge.ToLinen`, nnx layers run
    with float weights.
    """
    path = "/".join(key)
    problem = (
        f"{cls.__name__} creates it with self.param, and flax checks its shape, so a "
        "QTensor cannot replace it. Make it the kernel of a Dense, DenseGeneral or "
        "Einsum"
    )
    if issubclass(cls, nnx.bridge.ToLinen):
        problem = (
            "it is inside an nnx.bridge.ToLinen, where nnx layers run with float "
            "weights. Write these layers in linen"
        )
    problem += (
        ", or quantize variables['params'] with jaxq.quantize_params and apply the "
        "module to the result of jaxq.dequantize_params"
    )
    return Slot(
        path=path,
        name=path,
        kind=_BARE,
        value=value,
        weight=key,
        place=key,
        rule=rule,
        problem=problem,
    )


def _bias_key(slot: Slot) -> _Key:
    return (*slot.place[:-1], "bias")


def _joined(keys: Iterable[_Key]) -> tuple[str, ...]:
    return tuple("/".join(key) for key in keys)


def _is_float(value: Any) -> bool:
    dtype = getattr(value, "dtype", int)
    return not isinstance(value, QTensor) and jnp.issubdtype(dtype, jnp.floating)
