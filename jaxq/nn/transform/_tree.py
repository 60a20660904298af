"""quantize_params: quantizes the arrays of any tree of parameters.

This is for models that are not Flax modules, and for models that call
`dequantize_params` in their own code.

The path of an array is the path of its leaf. A rule matches an array if it matches the
array's path or the path of the array's parent: "layers/0/up" matches
"layers/0/up/kernel" too. A recipe for a model therefore works for the model's
parameters.

An array does not show which axes a product contracts. For a matrix, jaxq takes axis -2,
because Flax stores kernels as `[in, out]`. For other arrays, the rule names the axes
(`contracting=`, `batch=`).

With calibration batches and `forward=`, a trace of forward shows the products of each
array. Then the axes come from the trace, and methods can have statistics of the inputs
(`jaxq.nn.calibration`).
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxq import methods
from jaxq.nn.calibration import (
    ParameterFunction,
    StatsRequest,
    Use,
    Watched,
    collect_traced_stats,
    find_uses,
)
from jaxq.nn.report import Report, Row, float_row, why_not_weight
from jaxq.nn.transform._calibration_data import CalibrationData
from jaxq.nn.transform._equinox import EquinoxArray, find_equinox_array
from jaxq.nn.transform._loop import quantize_slots
from jaxq.nn.transform._model_error import Run
from jaxq.nn.transform._nnx_layers import NOT_WEIGHTS
from jaxq.nn.transform._options import Options
from jaxq.nn.transform._prepared import refuse_prepared
from jaxq.nn.transform._rotation import refuse_rotation
from jaxq.nn.transform._slot import Inventory, Slot
from jaxq.nn.transform._traced import ArrayKind, slot_with_use, spread_stats
from jaxq.nn.transform._traced_weights import refuse_data
from jaxq.observers import LayerStats
from jaxq.qtensor import (
    QTensor,
    QuantSpec,
    TrainedWeight,
    dequantize,
    is_linen_module,
    is_nnx_variable,
    is_quantized,
)
from jaxq.recipes import Recipe, Rule, as_recipe
from jaxq.sharding.boxes import with_quantized_boxes


def quantize_params(
    params: Any,
    recipe: str | QuantSpec | Recipe,
    *,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    sequential: bool | str = False,
    fallback: str = "rtn",
    strict: bool = True,
    donate: bool = False,
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """Returns a tree of the same structure whose matrices are QTensors.

    A QTensor is a tree itself. The result therefore works with `jax.jit`, `lax.scan`,
    `jax.tree.map` and `jaxq.save`. It multiplies with `@`, `jaxq.matmul` and
    `jaxq.einsum`. Code that needs floats calls `dequantize_params` inside jit.

    Args:
      params: any pytree of arrays, such as the dicts of Haiku or Flax, Equinox modules
        or lists. An array that is at several places is quantized once, and stays
        shared.
      recipe: as in `jaxq.quantize_model`. A name or a spec quantizes every float
        matrix, except embeddings, norms, biases, heads, routers and LoRA adapters.
        These are recognized by their names. Without calibration batches, arrays with
        three or more axes need a rule with `contracting=`.
      calibration: batches of real inputs, for methods (`jaxq.methods`), observers and
        `correct_bias`, which need data. With batches, `forward` is needed too.
        Statistics (`jaxq.observers.LayerStats`) by the path of the array may be passed
        instead of batches.
      mask: `mask(batch)` returns a bool array `[b, t]` or `[b]` that is False for
        padding. Its axes must be the first axes of the rows of every product.
      forward: `forward(params, batch)` computes the model with jax. Its result is
        the output whose error the report shows. It is compiled. Later calls with the
        same function and equal shapes use the compiled program again. It is traced,
        and the products `dot_general` (`@`, `jnp.matmul`, `jnp.einsum`) and
        `conv_general_dilated` of each array are found. On its way to a product, an
        array may be cast, transposed, reshaped, broadcast or indexed by layer. The
        products may be inside jit, vmap, remat and the loops of `jax.lax`. A stack that
        a scan goes through has statistics for each layer. The axes that the products
        contract replace the default axes, and `contracting=` of a rule must agree with
        them.
      sequential: "blocks" (or True) or "layers", as in `jaxq.quantize_model`. Forward
        then runs with QTensors among the parameters. If it cannot, it runs with their
        dequantized arrays, and the report says so. A stack of layers is one array, so
        its layers are quantized together.
      fallback: as in `jaxq.quantize_model`.
      strict: a rule that matches nothing is an error. If False, the report says so.
      donate: frees each array when its codes exist, so that a model larger than half of
        the memory can be quantized. The arrays in `params` must not be used afterwards.
        An array that also has a path where it stays in floats is not freed.
      key: PRNG key, for `rounding="stochastic"`.
      on_nonfinite: as in `jaxq.quantize`.
      progress: show a line of progress. None shows it on a terminal.

    Returns:
      (the tree, a `Report`). If a rule needs data, an array that no product reads stays
      in floats, and its row says so.

    Raises:
      TypeError: `params` is a linen module; `calibration` is one array instead of
        batches.
      ValueError: the recipe is unknown; a leaf cannot be quantized by its rule (the
        error names all such leaves); a rule matches nothing; a method, an observer or
        `correct_bias` needs data and `calibration` is None; there are batches and
        `forward` is None; forward computes with an array before the product
        (`x @ (2 * w)`), or its products contract different axes, and the rule needs
        data; the axes of a rule are not those of the products; a method can only move
        scales between layers; the recipe has rotate=True; a rule has stochastic
        rounding and `key` is None; `key` is not None and no rule can use it.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> params = {"up": {"w": jnp.ones((64, 8)), "b": jnp.zeros(8)}}
      >>> qparams, report = jaxq.quantize_params(params, "int8")
      >>> (jnp.ones((2, 64)) @ qparams["up"]["w"]).shape, len(report.quantized)
      ((2, 8), 1)
      >>> def forward(params, x):
      ...   return x @ params["up"]["w"] + params["up"]["b"][None]
      >>> qparams, report = jaxq.quantize_params(
      ...   params, "w8a8_static", calibration=[jnp.ones((2, 64))], forward=forward)
      >>> qparams["up"]["w"].input_range.shape
      (2,)
    """
    if is_linen_module(params):
        raise TypeError(
            f"quantize_params: {type(params).__name__} is a flax linen module, which "
            "holds no arrays. Pass its variables, or call "
            "jaxq.nn.linen.quantize_model(module, variables, recipe)."
        )
    recipe = as_recipe(recipe, "quantize_params")
    options = Options(
        caller="quantize_params",
        calibration=calibration,
        mask=mask,
        forward=forward,
        sequential=sequential,
        fallback=fallback,
        strict=strict,
        donate=donate,
        key=key,
        on_nonfinite=on_nonfinite,
        progress=progress,
    )
    if key is not None and not any(_may_draw(rule) for rule in recipe.rules):
        raise ValueError(
            "quantize_params: key= was passed, but no rule can use it. Omit key=, or "
            "use a spec with rounding='stochastic' or a method that may draw numbers."
        )
    return quantize_slots(TreeAdapter(params, recipe, options), recipe, options)


def dequantize_params(params: Any, *, dtype: Any = None) -> Any:
    """Returns the tree with every QTensor dequantized.

    A `TrainedWeight` becomes its `fake_quant()`, which has gradients. Inside `jax.jit`,
    XLA frees the float arrays after their last use.

    Args:
      params: a tree with QTensors or `TrainedWeight`s.
      dtype: the dtype of the results. None uses the dtype of each weight.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qparams, _ = jaxq.quantize_params({"w": jnp.eye(32)}, "int4")
      >>> jaxq.dequantize_params(qparams)["w"].dtype.name
      'float32'
    """
    return jax.tree.map(
        lambda leaf: _dequantized(leaf, dtype), params, is_leaf=is_quantized
    )


def _dequantized(leaf: Any, dtype: Any = None) -> Any:
    """A leaf, as floats if it is quantized."""
    if isinstance(leaf, TrainedWeight):
        return (leaf if dtype is None else leaf.astype(dtype)).fake_quant()
    return dequantize(leaf, dtype=dtype) if isinstance(leaf, QTensor) else leaf


def _may_draw(rule: Rule) -> bool:
    """True if a rule may use a PRNG key, for stochastic rounding or in its method."""
    spec = rule.weight
    rounds_at_random = isinstance(spec, QuantSpec) and spec.needs_key
    return rounds_at_random or methods.get(rule.method).solve is not None


@dataclasses.dataclass
class _Leaf:
    """A leaf of the tree.

    Attributes:
      path: components joined by "/".
      value: the value of the leaf. The adapter replaces it by the QTensor.
      note: why the leaf cannot be quantized. Empty if it has a slot.
      slot: the slot of the leaf, or None.
      array: identifies the array of the leaf. Several leaves may hold one array.
      equinox: the array of an Equinox module. None for other leaves.
      has_assumed_axes: the contracted axis is an assumption about an Equinox module.
    """

    path: str
    value: Any
    note: str
    slot: Slot | None = None
    array: int = 0
    equinox: EquinoxArray | None = None
    has_assumed_axes: bool = False

    def __post_init__(self):
        self.array = id(self.value)


@dataclasses.dataclass(frozen=True)
class _TreeFunction:
    """`forward` as a function of the leaves of a tree.

    Attributes:
      forward: `forward(params, batch)`.
      structure: the tree structure of `params`.
    """

    forward: Callable[[Any, Any], Any]
    structure: Any

    def __call__(self, leaves: Sequence[Any], batch: Any) -> Any:
        return self.forward(jax.tree.unflatten(self.structure, leaves), batch)


class TreeAdapter:
    """The adapter of a tree of arrays.

    Args:
      params: any pytree.
      recipe: the rules.
      options: errors begin with `caller`.
    """

    noun = "parameter"
    no_folding = "a tree does not say which layer that is. Use quantize_model"
    data_arguments = (
        "calibration=batches of real inputs, and forward=a function that computes the "
        "model, forward(params, batch)"
    )
    unmatched_remedy = ""
    keys_follow_slots = True

    def __init__(self, params: Any, recipe: Recipe, options: Options):
        refuse_prepared(params, options.caller)
        refuse_rotation(recipe, options.caller)
        refuse_data(jax.tree.leaves(params), options)
        self.caller = options.caller
        self.notes: tuple[str, ...] = ()
        # `inventory` runs forward with the first batch.
        self.read_arguments: tuple[str, ...] = ()
        if options.batches is not None:
            if options.forward is None:
                raise ValueError(
                    f"{self.caller}: calibration= needs forward=, because a tree does "
                    "not say how it computes a model. Pass forward=lambda params, "
                    "batch: ..., a function that runs a batch."
                )
            self.read_arguments = ("calibration", "forward")
        self._recipe = recipe
        self._options = options
        self._structure = jax.tree.structure(params, is_leaf=is_quantized)
        self._leaves = list(_leaves_of(params))
        # `id` identifies an original array, so these arrays must stay alive.
        self._arrays = [leaf.value for leaf in self._leaves]
        # How forward uses each array, by `_Leaf.array`. Empty without batches.
        self._uses: dict[int, Use] = {}
        self._runs_dequantized = False
        # Statistics of arrays at several places, by `Slot.weight`. The first place
        # quantizes the array, and another place may be in a later block.
        self._shared_stats: dict[Hashable, LayerStats] = {}

    def inventory(self) -> Inventory:
        self._uses = self._find_uses()
        other_rules = []
        for position, leaf in enumerate(self._leaves):
            if leaf.note:
                continue
            slot = leaf.slot = self._slot(leaf, position)
            use = self._uses.get(leaf.array)
            if use is not None and slot.chosen:
                leaf.slot = slot_with_use(slot, use)
                other_rules.append(slot.rule)
            if use is None or use.problem:
                self._note_assumed_axes(leaf)
        other_rules += self._leave_stacked_vectors()
        slots = [leaf.slot for leaf in self._leaves if leaf.slot is not None]
        return Inventory(slots, other_rules)

    def problems(self, slots: Sequence[Slot]) -> list[str]:
        return []

    def state(self) -> Any:
        return None  # a tree has no blocks that a run could resume

    def arrays(self) -> Iterable[Any]:
        return [leaf.value for leaf in self._leaves]

    def fold(
        self, slots: list[Slot], data: CalibrationData | None, options: Options
    ) -> list[Slot]:
        return slots  # because of `no_folding`, methods that only fold are refused

    def call_order(self, options: Options) -> Mapping[str, tuple[int, ...]]:
        uses = {leaf.path: self._uses[leaf.array] for leaf in self._leaves_with_use()}
        paths = sorted(uses, key=lambda path: uses[path].order)
        return {path: uses[path].inputs for path in paths}

    def statistics(
        self, options: Options, wanted: Mapping[str, StatsRequest]
    ) -> Mapping[str, LayerStats]:
        assert options.batches is not None
        watched: dict[str, Watched] = {}
        slots: dict[Hashable, list[Slot]] = {}
        for leaf in self._leaves_with_use():
            assert leaf.slot is not None
            if leaf.path not in wanted:
                continue
            slots.setdefault(leaf.slot.weight, []).append(leaf.slot)
            if len(slots[leaf.slot.weight]) == 1:
                positions, use = self._positions(leaf.array), self._uses[leaf.array]
                watched[leaf.path] = Watched(positions, use, wanted[leaf.path])
        collected = collect_traced_stats(
            self._function(),
            options.batches,
            watched,
            caller=self.caller,
            mask=options.mask,
            progress=options.progress,
        )
        stats = {
            leaf.path: self._shared_stats[leaf.slot.weight]
            for leaf in self._leaves
            if leaf.slot is not None and leaf.slot.weight in self._shared_stats
        }
        for weight, (first, *others) in slots.items():
            group = watched[first.path]
            own_stats = spread_stats(collected[first.path], first, group.use)
            stats |= {slot.path: own_stats for slot in (first, *others)}
            if len(group.leaves) > 1:
                self._shared_stats[weight] = own_stats
        return {path: stats[path] for path in wanted if path in stats}

    def bias(self, slot: Slot) -> jax.Array | None:
        bias = self._bias_leaf(slot)
        return None if bias is None else bias.value

    def put_bias(self, slot: Slot, bias: jax.Array) -> None:
        leaf = self._bias_leaf(slot)
        assert leaf is not None
        leaf.value = bias

    def put_weight(self, slot: Slot, weight: QTensor | TrainedWeight) -> None:
        for leaf in self._leaves:
            if leaf.slot is not None and leaf.slot.weight == slot.weight:
                leaf.value = weight

    def finish(self) -> Any:
        values = [leaf.value for leaf in self._leaves]
        return with_quantized_boxes(jax.tree.unflatten(self._structure, values))

    def runs(self, options: Options) -> tuple[Run, Run]:
        assert options.forward is not None
        floats = jax.tree.unflatten(self._structure, self._arrays)
        return Run(options.forward, floats), Run(options.forward, self.finish())

    def rows(self, rows: Mapping[Hashable, Row]) -> list[Row]:
        out: list[Row] = []
        first_paths: dict[Hashable, str] = {}
        for leaf in self._leaves:
            if leaf.slot is None:
                value = leaf.value
                if not hasattr(value, "dtype"):
                    # A model of Equinox has functions as leaves too.
                    if not isinstance(value, numbers.Number):
                        continue
                    value = np.asarray(value)
                out.append(float_row(leaf.path, "Array", value, leaf.note))
                continue
            row = rows[leaf.slot.weight]
            if leaf.has_assumed_axes and row.format is not None:
                # The inputs are quantized only if the axis is right.
                codes_format = row.format.partition(" + ")[0]
                row = dataclasses.replace(row, format=codes_format)
            first = first_paths.setdefault(leaf.slot.weight, leaf.path)
            if first != leaf.path:
                # Its bytes are counted in the first row.
                note = f"the same array as {first}"
                row = dataclasses.replace(
                    row, path=leaf.path, note=note, bytes_before=0, bytes_after=0
                )
            out.append(row)
        return out

    def _find_uses(self) -> dict[int, Use]:
        """How forward uses each array, for the first batch. Empty without batches."""
        if not self._options.batches:
            return {}
        arrays = [leaf.array for leaf in self._leaves if not leaf.note]
        groups = {self._positions(array): array for array in arrays}
        uses = find_uses(self._function(), self._options.batches[0], groups)
        if groups and not any(use.is_read for use in uses.values()):
            raise ValueError(
                f"{self.caller}: forward reads no array of params that a rule may "
                "quantize. Forward must compute the model from its first argument, "
                "forward=lambda params, batch: ..."
            )
        return {groups[group]: use for group, use in uses.items()}

    def _function(self) -> ParameterFunction:
        """`forward` with the present leaves.

        Some leaves are quantized already if `sequential` is set. If forward cannot run
        with them, it gets their dequantized arrays.
        """
        forward = self._options.forward
        assert forward is not None
        run = _TreeFunction(forward, self._structure)
        leaves = [leaf.value for leaf in self._leaves]
        has_quantized = any(
            is_quantized(leaf.value) and not is_quantized(array)
            for leaf, array in zip(self._leaves, self._arrays, strict=True)
        )
        function = ParameterFunction(run, leaves)
        if has_quantized and not self._runs_dequantized:
            assert self._options.batches
            try:
                find_uses(function, self._options.batches[0], ())
            except Exception as error:  # any code of the user may run
                self._runs_dequantized = True
                reason = str(error).partition("\n")[0]
                note = (
                    "sequential: forward does not run with QTensors "
                    f"({type(error).__name__}: {reason}). It ran with the dequantized "
                    "weights, so the statistics include the errors of weights, but not "
                    "those of quantized inputs"
                )
                self.notes = (*self.notes, note)
        if not (has_quantized and self._runs_dequantized):
            return function
        leaves = [
            leaf.value if is_quantized(array) else _dequantized(leaf.value)
            for leaf, array in zip(self._leaves, self._arrays, strict=True)
        ]
        return ParameterFunction(run, leaves)

    def _leaves_with_use(self) -> list[_Leaf]:
        """The float leaves whose products have statistics."""
        return [
            leaf
            for leaf in self._leaves
            if leaf.slot is not None
            and leaf.array in self._uses
            and not self._uses[leaf.array].problem
            and not is_quantized(leaf.value)
        ]

    def _positions(self, array: int) -> tuple[int, ...]:
        """The positions of the leaves that hold an array."""
        return tuple(i for i, leaf in enumerate(self._leaves) if leaf.array == array)

    def _bias_leaf(self, slot: Slot) -> _Leaf | None:
        """The leaf that forward adds to the output of a slot's weight, or None."""
        use = self._uses.get(self._leaves[slot.place].array)
        if use is None or use.bias is None:
            return None
        leaf = self._leaves[use.bias]
        is_float = leaf.slot is None or not leaf.slot.chosen
        is_alone = len(self._positions(leaf.array)) == 1
        return leaf if is_float and is_alone else None

    def _slot(self, leaf: _Leaf, position: int) -> Slot:
        """The slot of a float array with two or more axes."""
        rule = self._rule(leaf)
        slot = Slot(
            path=leaf.path,
            name=leaf.path,
            kind=ArrayKind("Array"),
            value=leaf.value,
            weight=position,
            place=position,
            rule=rule,
        )
        if rule is None or rule.weight is None:
            return slot
        batch, contracting = rule.batch or (), rule.contracting
        problem = ""
        if leaf.equinox is not None and leaf.equinox.has_known_axes:
            problem = leaf.equinox.problem
            # Leading axes are those of a stack of layers (`eqx.filter_vmap`).
            batch = rule.batch or tuple(range(leaf.value.ndim - 2))
            contracting = contracting or (-1,)
        elif contracting is None:
            contracting = (-2,) if leaf.value.ndim == 2 + len(batch) else ()
        return dataclasses.replace(
            slot,
            contracting=contracting,
            batch=batch,
            problem=problem,
            # An array at several places is quantized once if its rule is the same.
            weight=(id(leaf.value), id(rule), contracting, batch),
        )

    def _leave_stacked_vectors(self) -> list[Rule]:
        """Leaves biases and gains beside a stack of weights in floats.

        A stack of them, [layers, features], looks like a matrix. Codes of this matrix
        could not be sliced by layer, so a scan over the stack would fail. A rule for
        the path itself, or a trace of `forward`, says that it is a matrix.

        Returns:
          The rules that the arrays match.
        """
        stacks = [
            leaf
            for leaf in self._leaves
            if leaf.slot is not None and leaf.slot.chosen and leaf.slot.batch == (0,)
        ]
        rules = []
        for leaf in self._leaves:
            slot = leaf.slot
            if slot is None or not slot.chosen or leaf.array in self._uses:
                continue
            rule = slot.rule
            if rule is None or rule.pattern == leaf.path:
                continue
            stack = next((s for s in stacks if _is_vector_of(leaf, s)), None)
            if stack is not None:
                leaf.slot = None
                leaf.note = f"a stack of vectors beside {stack.path}, left in floats"
                rules.append(rule)
        return rules

    def _note_assumed_axes(self, leaf: _Leaf) -> None:
        """Notes that the contracted axis of an Equinox module's array is assumed."""
        slot, equinox = leaf.slot, leaf.equinox
        if equinox is None or equinox.has_known_axes:
            return
        if slot is None or not slot.chosen or not slot.contracting:
            return
        assert slot.rule is not None
        if slot.rule.contracting is not None:
            return
        leaf.has_assumed_axes = True
        quantizes_inputs = slot.rule.activation is not None
        condition = ", and quantizes inputs only then" if quantizes_inputs else ""
        note = (
            f"assumes that products contract axis {slot.contracting[0]}, as in "
            f"`x @ w`{condition}. For `w @ x`, use a jaxq.Rule with contracting=(-1,)"
        )
        if not self._options.batches:
            note += ", or pass calibration= and forward="
        leaf.slot = dataclasses.replace(slot, notes=(*slot.notes, note))

    def _rule(self, leaf: _Leaf) -> Rule | None:
        """The first rule that matches the path of an array or of its parent."""
        holder = leaf.path.rpartition("/")[0]
        shape = tuple(leaf.value.shape)
        is_table = leaf.equinox is not None and leaf.equinox.is_table
        for rule in self._recipe.rules:
            if rule.matches(leaf.path, "Array", shape):
                return rule
            # Named recipes leave embeddings in floats, whatever their path is.
            if is_table and rule.matches(leaf.path, "Embed", shape):
                return rule
            if holder and rule.matches(holder, "Array", shape):
                return rule
        return None


def _is_vector_of(leaf: _Leaf, stack: _Leaf) -> bool:
    """Whether an array has one vector for each matrix of a stack in the same dict."""
    if leaf.path.rpartition("/")[0] != stack.path.rpartition("/")[0]:
        return False
    shape, (num_stacked, *matrix) = leaf.value.shape, stack.value.shape
    return len(shape) == 2 and shape[0] == num_stacked and shape[1] in matrix


def _leaves_of(params: Any) -> Iterable[_Leaf]:
    """Yields every leaf of a tree. `note` says why a leaf is not a weight."""
    variable_types = {
        keys: type(node)
        for keys, node in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=is_nnx_variable
        )
        if is_nnx_variable(node)
    }
    for keys, value in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=is_quantized
    ):
        # In `nnx.state`, the last key is the ".value" of a variable.
        own_keys = keys[:-1] if keys[:-1] in variable_types else keys
        variable_type = variable_types.get(own_keys)
        equinox = find_equinox_array(params, keys)
        is_other = equinox is not None and not equinox.is_weight
        note = why_not_weight(value, in_layer=is_other)
        if variable_type is not None and issubclass(variable_type, NOT_WEIGHTS):
            note = f"{variable_type.__name__}, not a weight: left as it is"
        yield _Leaf(_path_of(own_keys), value, note, equinox=equinox)


def _path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf: keys, names of attributes and positions, joined by "/"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")
