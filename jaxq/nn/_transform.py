"""quantize_model: a Flax nnx model with quantized weights, and the report of what happened to each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import formats, methods
from jaxq.methods import LayerStats
from jaxq.nn._calibration import as_batches, calibrate, shown
from jaxq.nn._folding import foldable, folded
from jaxq.nn._layers import QuantizedParam, put_weight, replace_variables, weight_axes
from jaxq.nn._matching import Found, match, raise_unrunnable, raw_arrays, unused_rules, variables_of
from jaxq.nn._report import Report, Row, float_row, other_row, quantized_row, skip_reason
from jaxq.qtensor import ON_NONFINITE, QTensor, QuantSpec, quantize
from jaxq.recipes import Recipe, Rule, as_recipe


def quantize_model(
    model: nnx.Module,
    recipe: str | QuantSpec | Recipe,
    *,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    sequential: bool = False,
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
        weight, or a `jaxq.Recipe`. Names and specs leave embeddings, output heads and routers in floats.
      calibration: batches of real inputs, for methods that need data (`jaxq.methods`), or what `jaxq.nn.calibrate` made
        of them. Methods that do without are judged by them too, if they are given.
      mask: which rows of a batch count, as in `calibrate`.
      forward: how to run a batch, as in `calibrate`.
      sequential: quantize block by block, each on what the blocks before it make of the data when they are quantized.
        The data passes once for every block, and only one block's statistics are in memory.
      fallback: what becomes of a layer whose method does worse than rounding to nearest on held-out inputs: "rtn" takes
        that and says so in the report, "none" keeps the method's result, "raise" stops.
      strict: a rule that matches nothing, and a bare matrix that no rule is about, are errors. False leaves them, and
        the report says so.
      donate: frees each weight of `model` once it is quantized, so that a model larger than half the memory fits; it
        must not be used afterwards. Not with data: the model runs on them.
      key: PRNG key, for methods that draw.
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
        raise TypeError(f"quantize_model: model must be a flax nnx Module, got {type(model).__name__}.")
    recipe = as_recipe(recipe, "quantize_model")
    formats.check_choice("quantize_model: on_nonfinite", on_nonfinite, ON_NONFINITE)
    formats.check_choice("quantize_model: fallback", fallback, methods.FALLBACKS)
    if donate and calibration is not None:
        raise ValueError("quantize_model: donate=True frees weights that calibration= needs; pass one of them.")
    copy = nnx.clone(model)
    matched = match(copy, recipe, on_nonfinite, strict=strict)
    data = _Data(calibration, mask, forward, progress)
    rules = {found.path: rule for found, rule in matched}
    _check_data(matched, data)
    groups = foldable(copy, rules)
    smoothed: set[str] = set()
    if groups:
        data.check_batches()
        folding = data.of_model(copy, [group.targets[0] for group, _ in groups], hessian=False)
        copy, smoothed = folded(copy, groups, folding)
        matched = match(copy, recipe, on_nonfinite, strict=strict)
    variables = {id(v): (path, v) for path, v in variables_of(copy)}  # alive, so that identities stay theirs
    rows: dict[int, Row] = {}  # by the identity of the variable in the copy
    replaced: dict[int, QuantizedParam] = {}
    for (_, layer, kind), rule in matched:
        if rule is None or rule.weight is None:
            variable = getattr(layer, kind.weight)
            note = skip_reason(rule)
            where = variables[id(variable)][0]
            rows[id(variable)] = float_row(where, kind.name, variable.get_value(), note)
    taken = [(found, rule) for found, rule in matched if rule is not None and rule.weight is not None]
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(len(taken), 1))
    for block in _blocks(copy, taken, data, sequential):
        stats = data.of_block(copy, block)
        for found, rule in shown(block, "quantizing", progress and bool(stats)):
            path, layer, kind = found
            variable = getattr(layer, kind.weight)
            if id(variable) not in replaced and not isinstance(variable, QuantizedParam):
                contracting, batch = weight_axes(layer, kind)
                floats, name = variable.get_value(), variables[id(variable)][0]
                own = quantize(
                    floats,
                    nearest_spec(rule),
                    contracting=contracting,
                    batch=batch,
                    on_nonfinite=on_nonfinite,
                    name=name,
                )
                solved = None
                if rule.method == "smoothquant":  # its scales are in the floats by now
                    known = path in smoothed
                    note = "" if known else "not smoothed: nothing before it can take its scales"
                    solved = methods.Solved(own, rule.method if known else "rtn", note, None)
                elif rule.method != "rtn":
                    solved = solve_layer(
                        own, floats, stats.get(path), rule, fallback=fallback, key=keys[len(replaced)], name=name
                    )
                    own = solved.qt
                    if rule.method == "awq" and path not in smoothed:
                        note = "not scaled, only clipped: nothing before it can take its scales"
                        solved = solved._replace(note="; ".join(n for n in (note, solved.note) if n))
                qt = with_inputs(own, rule, static_bounds(rule, stats.get(path), name))
                replaced[id(variable)] = QuantizedParam(qt)
                row = quantized_row(variables[id(variable)][0], kind.name, floats, qt, solved)
                names = variable.get_metadata().get("out_sharding") or ()
                if any(name is not None for name in names):
                    dropped = "its sharding metadata is not kept"
                    row = dataclasses.replace(row, note="; ".join(n for n in (row.note, dropped) if n))
                rows[id(variable)] = row
                if donate:
                    jax.block_until_ready(qt)
                    floats.delete()
            put_weight(layer, kind, replaced.get(id(variable), variable))
    replace_variables(copy, replaced)
    layers = {found.path for found, _ in matched}
    notes = (
        () if strict else tuple(f"rule {p!r} matched nothing" for p in unused_rules(recipe, [r for _, r in matched]))
    )
    listed = [rows.get(i) or other_row(path, v, layers) for i, (path, v) in variables.items()]
    listed += [float_row(path, "array", a, "in no variable, left as it is") for path, a in raw_arrays(copy)]
    return copy, Report(tuple(listed), notes)


class _Data:
    """Calibration data, or statistics made of them before."""

    def __init__(self, calibration: Any, mask: Any, forward: Any, progress: bool | None):
        given = isinstance(calibration, Mapping)
        self._stats: dict[str, LayerStats] | None = dict(calibration) if given else None
        self._batches = None if given or calibration is None else list(as_batches(calibration, "quantize_model"))
        self._how = {"mask": mask, "forward": forward, "progress": progress}

    def __bool__(self) -> bool:
        return self._stats is not None or self._batches is not None

    def of_model(self, model: Any, paths: list[str], *, hessian: bool = True) -> dict[str, LayerStats]:
        """Statistics of layers of a model, as it is now."""
        if not paths or not self:
            return {}
        if self._batches is not None:
            return calibrate(model, self._batches, layers=paths, hessian=hessian, **self._how)
        assert self._stats is not None
        missing = [path for path in paths if path not in self._stats]
        if missing:
            raise ValueError(f"quantize_model: calibration has no statistics of {missing}.")
        return self._stats

    def of_block(self, model: Any, block: list[tuple[Found, Rule]]) -> dict[str, LayerStats]:
        """What methods and observers of some layers need: one pass for each observer."""
        if not self:
            return {}
        if self._stats is not None:
            return self.of_model(model, [found.path for found, rule in block if _looks(rule, self) or rule.observer])
        wanted: dict[Any, list[str]] = {}
        for found, rule in block:
            if _looks(rule, self) or rule.observer is not None:
                wanted.setdefault((rule.observer, _looks(rule, self)), []).append(found.path)
        out: dict[str, LayerStats] = {}
        for (observer, looks), paths in wanted.items():
            out |= calibrate(model, self._batches or [], layers=paths, hessian=looks, observer=observer, **self._how)
        return out

    def order(self, model: Any, paths: list[str]) -> list[str]:
        """Paths in the order in which the model reaches them."""
        if self._batches is None:
            return paths
        first = calibrate(model, self._batches[:1], layers=paths, hessian=False, **self._how)
        return list(first)

    def check_batches(self) -> None:
        """Raises where there are only statistics, which are of no use once the model changes."""
        if self._stats is not None:
            raise ValueError(
                "quantize_model: a method that folds scales changes what reaches the layers, so it needs the batches "
                "themselves as calibration=, not statistics."
            )


def with_inputs(qt: QTensor, rule: Rule, bounds: tuple[jax.Array, jax.Array] | None = None) -> QTensor:
    """A weight that quantizes its inputs as a rule says; columns of outliers that its method set apart stay so.

    Args:
      qt: the weight.
      rule: its rule.
      bounds: the static range of its input, or None.
    """
    outliers = qt.meta.outliers
    if outliers is not None and rule.activation is None:
        return qt
    return qt.with_activation(rule.activation, outliers=outliers, bounds=bounds)


def static_bounds(rule: Rule, stats: LayerStats | None, name: str) -> tuple[jax.Array, jax.Array] | None:
    """The range of a layer's input that its rule's observer found; None where the rule has none.

    Args:
      rule: of the layer.
      stats: of its input.
      name: what errors call the weight.
    """
    if rule.observer is None:
        return None
    assert isinstance(rule.activation, QuantSpec)
    assert not isinstance(rule.observer, str)
    if stats is None or stats.observed is None:
        raise ValueError(
            f"quantize_model: the statistics given have no state of {rule.observer!r}. Make them with "
            "jaxq.nn.calibrate(..., observer=...), or pass the batches themselves as calibration=."
        )
    observer, spec = rule.observer, rule.activation

    def bounds(state: Any) -> tuple[jax.Array, jax.Array]:
        return observer.bounds(state, spec.fmt, symmetric=spec.symmetric and spec.offset is None)

    for _ in range(stats.count.ndim):
        bounds = jax.vmap(bounds)
    low, high = bounds(stats.observed)
    if not bool(np.all(np.asarray(low) < np.asarray(high))):
        raise ValueError(
            f"quantize_model: {name}: calibration has seen no input of it but zeros, so a static range would make them "
            "all zero. Calibrate on data that reach it, or quantize its inputs on the fly (no observer=)."
        )
    return low, high


def _looks(rule: Rule, data: _Data) -> bool:
    """Whether a rule's method is shown the data."""
    return bool(data) and methods.METHODS[rule.method].judged


def _check_data(matched: list[tuple[Found, Rule | None]], data: _Data) -> None:
    """Raises where a method asks for what is not there, naming all layers."""
    problems = []
    for (path, layer, kind), rule in matched:
        if rule is None or rule.weight is None:
            continue
        name = path or type(layer).__name__
        if rule.observer is not None and kind.hook is None:
            problems.append(f"  {name} ({kind.name}): its input cannot be observed, so it has no static range")
        elif rule.observer is not None and not data:
            problems.append(f"  {name}: observer {rule.observer!r} needs data")
        if rule.method == "rtn":
            continue
        if methods.METHODS[rule.method].needs_data and not data:
            problems.append(f"  {name}: method {rule.method!r} needs data")
        elif (kind.hook is None or kind.windowed) and (data or methods.METHODS[rule.method].needs_data):
            problems.append(f"  {name} ({kind.name}): method {rule.method!r} is for Linear, LinearGeneral and Einsum")
    raise_unrunnable(problems)


def _blocks(
    model: Any, taken: list[tuple[Found, Rule]], data: _Data, sequential: bool
) -> Iterator[list[tuple[Found, Rule]]]:
    """Layers that are quantized on the same statistics: all, or block by block in the order of the forward pass."""
    if not sequential:
        yield taken
        return
    if not data:
        raise ValueError("quantize_model: sequential=True needs calibration=batches, not statistics or nothing.")
    seen = [found.path for found, rule in taken if found.kind.hook is not None]
    order = data.order(model, seen)
    place = {path: i for i, path in enumerate(order)}
    blocks: dict[str, list[tuple[Found, Rule]]] = {}
    for found, rule in sorted(taken, key=lambda pair: place.get(pair[0].path, -1)):
        blocks.setdefault(_block_name(found.path), []).append((found, rule))
    yield from blocks.values()


def _block_name(path: str) -> str:
    """The path up to its first number: "layers/3/mlp/up" is of block "layers/3"; without one, a layer is its own."""
    parts = path.split("/")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return "/".join(parts[: number + 1])


def solve_layer(
    own: QTensor, floats: jax.Array, stats: LayerStats | None, rule: Rule, *, fallback: str, key: jax.Array, name: str
) -> methods.Solved:
    """A layer's weight by the method of its rule.

    Args:
      own: the weight rounded to nearest: what the result's axes and blocks are to be.
      floats: the weight.
      stats: of the layer's inputs.
      rule: says method and options.
      fallback: as in `quantize_model`.
      key: PRNG key.
      name: what errors call the weight.
    """
    assert isinstance(rule.weight, QuantSpec)
    geometry = own.meta.geometry
    batch = own.batch_shape
    storage = jnp.reshape(geometry.to_storage(geometry.to_view(floats)), (*batch, -1, geometry.contracted_size))
    matrix = jnp.swapaxes(storage, -1, -2)  # [*batch, in, out]
    options = dict(rule.options)
    solved = methods.solve(
        rule.method, matrix, stats, rule.weight, options=options, fallback=fallback, key=key, name=name
    )
    return solved._replace(qt=_in_place_of(solved.qt, own, rule.method, name))


def nearest_spec(rule: Rule) -> QuantSpec:
    """How a rule's weight is rounded to nearest: in the blocks of its method, where that has some of its own."""
    assert isinstance(rule.weight, QuantSpec)
    granularity = methods.own_granularity(rule.method, dict(rule.options), rule.weight)
    return rule.weight.replace(granularity=granularity)


def _in_place_of(qt: QTensor, own: QTensor, method: str, name: str) -> QTensor:
    """The QTensor of a matrix as that of an array with more axes, which is stored in the same order."""
    matrix, whole = qt.meta, own.meta
    batch = own.batch_shape

    def fit(leaf: jax.Array | None, like: jax.Array | None) -> jax.Array | None:
        if leaf is None or like is None:
            return leaf
        if leaf.size != like.size:
            raise ValueError(
                f"{name}: method {method!r} sees the weight as a matrix, in which {whole.spec.granularity} means "
                "something else. Use PerChannel, PerGroup or PerTensor."
            )
        return leaf.reshape(like.shape)

    data = fit(qt.data, own.data)
    codebook = qt.codebook
    if codebook is not None:
        codebook = codebook.reshape(*batch, *whole.geometry.num_blocks, codebook.shape[-1])
    meta = dataclasses.replace(
        whole, spec=matrix.spec, packing=matrix.packing, activation=matrix.activation, outliers=matrix.outliers
    )
    scale = (
        jax.tree.map(fit, qt.scale, own.scale) if isinstance(qt.scale, QTensor) else fit(qt.scale, _scale_like(own, qt))
    )
    if isinstance(scale, QTensor):
        assert isinstance(own.scale, QTensor)
        scale = dataclasses.replace(scale, meta=own.scale.meta)
    like = _scale_like(own, qt)
    return QTensor(data, scale, fit(qt.zero_point, like), fit(qt.offset, like), codebook, meta)  # pyright: ignore[reportArgumentType]


def _scale_like(own: QTensor, qt: QTensor) -> jax.Array:
    return jnp.empty((*own.batch_shape, *own.meta.geometry.num_blocks), jnp.float32)
