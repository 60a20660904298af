"""quantize_model: a Flax nnx model with quantized weights, and the report of what happened to each parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq import formats, methods, metrics
from jaxq.methods import LayerStats
from jaxq.nn._calibration import calibrate, hook_of, shown
from jaxq.nn._folding import foldable, folded
from jaxq.nn._layers import LayerKind, QuantizedParam, find_kind, put_weight, replace_variables, weight_axes
from jaxq.nn._report import Report, Row
from jaxq.qtensor import ON_NONFINITE, QTensor, QuantSpec, dequantize, quantize, raise_if_not_finite
from jaxq.recipes import Recipe, Rule, as_recipe


class Found(NamedTuple):
    """A layer of a model."""

    path: str
    layer: Any
    kind: LayerKind


def quantize_model(
    model: nnx.Module,
    recipe: str | QuantSpec | Recipe,
    *,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    sequential: bool = False,
    fallback: str = "rtn",
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """A copy of `model` whose matrix weights are quantized; the model and its class stay as they are.

    Layers it knows: Linear, LinearGeneral, Einsum, Conv, Embed, wherever they are in the model, stacked along leading
    axes (`nnx.vmap`, `nnx.scan`) or shared by several parents. All of them are checked before any is quantized, and
    all problems are named at once.

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
      key: PRNG key, for methods that draw.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`; "raise" names path and index.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      (model of the same class, `Report`). Quantized weights are `jaxq.nn.QuantizedParam` variables holding QTensors,
      unseen by an optimizer of `nnx.Param`.

    Raises:
      TypeError: not an nnx module.
      ValueError: an unknown recipe; layers that cannot be quantized; a rule that matches nothing; no layer at all; a
        method that needs data without `calibration`, and what `calibrate` raises.

    Example:
      >>> import jaxq
      >>> from flax import nnx
      >>> qmodel, report = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int8")
      >>> qmodel.kernel[...]
      QTensor(int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"quantize_model: model must be a flax nnx Module, got {type(model).__name__}.")
    recipe = as_recipe(recipe, "quantize_model")
    formats.check_choice("quantize_model: on_nonfinite", on_nonfinite, ON_NONFINITE)
    formats.check_choice("quantize_model: fallback", fallback, methods.FALLBACKS)
    copy = nnx.clone(model)
    matched = _match(copy, recipe, on_nonfinite)
    data = _Data(calibration, mask, forward, progress)
    rules = {found.path: rule for found, rule in matched}
    _check_data(matched, data)
    groups = foldable(copy, rules)
    if groups:
        data.check_batches()
        folding = data.of_model(copy, [group.targets[0] for group, _ in groups], hessian=False)
        copy = folded(copy, groups, folding)
        matched = _match(copy, recipe, on_nonfinite)
    variables = {id(v): (path, v) for path, v in _variables(copy)}  # alive, so that identities stay theirs
    rows: dict[int, Row] = {}  # by the identity of the variable in the copy
    replaced: dict[int, QuantizedParam] = {}
    for (_, layer, kind), rule in matched:
        if rule is None or rule.weight is None:
            variable = getattr(layer, kind.weight)
            note = (rule.reason or "skipped by the recipe") if rule else "no rule of the recipe matches"
            where = variables[id(variable)][0]
            rows[id(variable)] = _float_row(where, kind.name, variable.get_value(), note)
    taken = [(found, rule) for found, rule in matched if rule is not None and rule.weight is not None]
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(len(taken), 1))
    for block in _blocks(copy, taken, data, sequential):
        stats = data.of_model(copy, [found.path for found, rule in block if _looks(rule, data)])
        for found, rule in shown(block, "quantizing", progress and bool(stats)):
            path, layer, kind = found
            variable = getattr(layer, kind.weight)
            if id(variable) not in replaced and not isinstance(variable, QuantizedParam):
                contracting, batch = weight_axes(layer, kind)
                floats, name = variable.get_value(), f"{path}/{kind.weight}" if path else kind.weight
                own = quantize(
                    floats, rule.weight, contracting=contracting, batch=batch, on_nonfinite=on_nonfinite, name=name
                )
                solved = None
                if rule.method == "smoothquant":  # its scales are in the floats by now
                    solved = methods.Solved(own, rule.method, "", None)
                elif rule.method != "rtn":
                    solved = solve_layer(
                        own, floats, stats.get(path), rule, fallback=fallback, key=keys[len(replaced)], name=name
                    )
                    own = solved.qt
                outliers = own.meta.outliers
                qt = own if outliers is not None else own.with_activation(rule.activation)
                replaced[id(variable)] = QuantizedParam(qt)
                rows[id(variable)] = _quantized_row(variables[id(variable)][0], kind.name, floats, qt, solved)
            put_weight(layer, kind, replaced.get(id(variable), variable))
    replace_variables(copy, replaced)
    layers = {found.path for found in find_layers(copy)}
    return copy, Report(tuple(rows.get(i) or _other_row(path, v, layers) for i, (path, v) in variables.items()))


class _Data:
    """Calibration data, or statistics made of them before."""

    def __init__(self, calibration: Any, mask: Any, forward: Any, progress: bool | None):
        given = isinstance(calibration, Mapping)
        self._stats: dict[str, LayerStats] | None = dict(calibration) if given else None
        self._batches = None if given or calibration is None else list(calibration)
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


def _looks(rule: Rule, data: _Data) -> bool:
    """Whether a rule's method is shown the data."""
    return bool(data) and methods.METHODS[rule.method].judged


def _check_data(matched: list[tuple[Found, Rule | None]], data: _Data) -> None:
    """Raises where a method asks for what is not there, naming all layers."""
    problems = []
    for (path, layer, kind), rule in matched:
        if rule is None or rule.weight is None or rule.method == "rtn":
            continue
        name = path or type(layer).__name__
        if methods.METHODS[rule.method].needs_data and not data:
            problems.append(f"  {name}: method {rule.method!r} needs data")
        elif hook_of(kind) is None and (data or methods.METHODS[rule.method].needs_data):
            problems.append(f"  {name} ({kind.name}): method {rule.method!r} is for Linear, LinearGeneral and Einsum")
    if problems:
        raise ValueError(
            "quantize_model: these layers' methods cannot run:\n" + "\n".join(problems)
            + "\nPass calibration=batches of real inputs, or give the layers a rule with another method."
        )  # fmt: skip


def _blocks(
    model: Any, taken: list[tuple[Found, Rule]], data: _Data, sequential: bool
) -> Iterator[list[tuple[Found, Rule]]]:
    """Layers that are quantized on the same statistics: all, or block by block in the order of the forward pass."""
    if not sequential:
        yield taken
        return
    if not data:
        raise ValueError("quantize_model: sequential=True needs calibration=batches, not statistics or nothing.")
    seen = [found.path for found, rule in taken if hook_of(found.kind) is not None]
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
    if rule.method == "awq":
        options.pop("duo", None)
    solved = methods.solve(
        rule.method, matrix, stats, rule.weight, options=options, fallback=fallback, key=key, name=name
    )
    return solved._replace(qt=_in_place_of(solved.qt, own, rule.method, name))


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


def find_layers(model: nnx.Module) -> Iterator[Found]:
    """Every layer of a kind jaxq knows, with its path; each once, however many parents share it."""
    for path, module in nnx.iter_modules(model):
        kind = find_kind(module)
        if kind is not None:
            yield Found("/".join(map(str, path)), module, kind)


def _match(model: nnx.Module, recipe: Recipe, on_nonfinite: str) -> list[tuple[Found, Rule | None]]:
    """Each layer with its rule (None: no rule matches), after checking all of them."""
    problems: list[str] = []
    matched: list[tuple[Found, Rule | None]] = []
    used: set[int] = set()
    uses: dict[int, tuple[str, Any]] = {}
    for found in find_layers(model):
        rule = recipe.find(found.path, found.kind.name)
        if rule is not None:
            used.add(next(i for i, r in enumerate(recipe.rules) if r is rule))
        matched.append((found, rule))
        variable, problem, use = getattr(found.layer, found.kind.weight), None, None
        name = found.path or type(found.layer).__name__
        if rule is not None and rule.weight is not None:
            value, problem = variable.get_value(), found.kind.problem(found.layer)
            if isinstance(value, QTensor):
                problem = "it is quantized already"
            if problem is None:
                try:
                    axes = weight_axes(found.layer, found.kind)
                    _dry_run(value, rule, *axes, found.kind.weight, found.kind.name)
                    if on_nonfinite == "raise":
                        where = f"{found.path}/{found.kind.weight}".lstrip("/")
                        raise_if_not_finite(jnp.asarray(value), where, "quantize")
                    use = (axes, rule.weight, rule.activation)
                except (TypeError, ValueError) as error:
                    problem = str(error)
        if problem is None:
            other, other_use = uses.setdefault(id(variable), (name, use))
            if other_use != use:
                how = "which uses it in another way" if use and other_use else "and only one of them is quantized"
                problem = f"it shares its weight with {other}, {how}"
        if problem is not None:
            problems.append(f"  {name} ({found.kind.name}): {problem}")
    if problems:
        raise ValueError(
            "quantize_model: these layers cannot be quantized:\n" + "\n".join(problems)
            + "\nSkip them with jaxq.Rule(path, skip=True) in a jaxq.Recipe, or change them."
        )  # fmt: skip
    unused = [r.pattern for i, r in enumerate(recipe.rules) if i not in used and not r.optional]
    if unused:
        paths = [f"{f.path or 'the model itself'} ({f.kind.name})" for f, _ in matched]
        listed = ", ".join(paths[:12]) + (f", ... ({len(paths)} layers)" if len(paths) > 12 else "")
        raise ValueError(
            f"quantize_model: rules {unused} match no layer (or only layers an earlier rule took). "
            f"Layers here: {listed or 'none that jaxq knows'}."
        )
    return matched


def _dry_run(w: Any, rule: Rule, contracting: Any, batch: Any, name: str, kind: str) -> None:
    """Raises what quantizing a weight, and later its input, would raise; nothing is computed."""
    weight, activation = rule.weight, rule.activation
    assert weight is not None
    qt = jax.eval_shape(lambda v: quantize(v, weight, contracting=contracting, batch=batch, name=name), w)
    qt.with_activation(activation)
    if activation is not None and kind != "Conv":  # how much a window of a convolution sees is not known here
        x = jax.ShapeDtypeStruct((1, *(w.shape[a] for a in contracting)), w.dtype)
        along = tuple(range(1, len(x.shape)))
        jax.eval_shape(lambda v: quantize(v, activation, contracting=along, name="activation"), x)


def _variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Path and variable of everything a model holds but its random states; shared ones once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            yield "/".join(map(str, path)), node


def _other_row(path: str, variable: nnx.Variable, layers: set[str]) -> Row:
    """The row of what is no weight of a known layer."""
    value = variable.get_value()
    if not jnp.issubdtype(getattr(value, "dtype", int), jnp.floating):
        note = "no floats, left as it is"
    elif value.ndim < 2:
        note = "not a matrix, left in floats"
    elif path.rpartition("/")[0] in layers:
        note = "not the weight of its layer, left in floats"
    else:
        note = "in no layer jaxq knows, left as it is"
    return _float_row(path, type(variable).__name__, value, note)


def _float_row(path: str, kind: str, value: Any, note: str) -> Row:
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    size = value.size if isinstance(value, QTensor) else sum(leaf.size for leaf in leaves)
    bits = 8 * nbytes / size if size else 0.0
    shape = tuple(getattr(value, "shape", ()))
    return Row(path, kind, shape, None, None, bits, nbytes, nbytes, None, None, note)


def _quantized_row(path: str, kind: str, floats: jax.Array, qt: QTensor, solved: methods.Solved | None) -> Row:
    sqnr, worst = _errors(floats, qt)
    spec = qt.spec
    name = spec.fmt.name + (f" + {qt.meta.activation.fmt.name}" if qt.meta.activation else "")
    sizes = ",".join(str(b) for b in qt.meta.geometry.block_shape if b not in (None, 1))
    granularity = type(spec.granularity).__name__ + (f"({sizes})" if sizes else "")
    return Row(
        path,
        kind,
        qt.shape,
        name,
        granularity,
        qt.bits_per_element,
        floats.nbytes,
        qt.nbytes,
        float(sqnr),
        float(worst),
        note=solved.note if solved else "",
        method=solved.method if solved else "rtn",
        loss=solved.loss if solved else None,
    )


@functools.partial(jax.jit)
def _errors(floats: jax.Array, qt: QTensor) -> tuple[jax.Array, jax.Array]:
    """SQNR in dB and the worst block, blocks running along the contraction."""
    view = qt.meta.geometry
    back = dequantize(qt.with_activation(None), dtype=jnp.float32)
    a, b = (view.to_storage(view.to_view(v.astype(jnp.float32))) for v in (floats, back))
    return metrics.sqnr(a, b), metrics.worst_block(a, b)
