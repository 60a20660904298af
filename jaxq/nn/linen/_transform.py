"""quantize_model: a linen module and its variables, quantized, and the report of what happened to each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict

from jaxq import formats, methods
from jaxq.methods import LayerStats
from jaxq.nn._calibration import shown
from jaxq.nn._folding import FOLDED
from jaxq.nn._report import Report, Row
from jaxq.nn._transform import _float_row, _quantized_row, solve_layer
from jaxq.nn.linen._calibration import calibrate
from jaxq.nn.linen._discovery import (
    Forward,
    Found,
    Params,
    Structure,
    check_weights,
    find_layers,
    params_of,
    with_params,
)
from jaxq.nn.linen._wrapper import Quantized
from jaxq.qtensor import ON_NONFINITE, QTensor, QuantSpec, quantize, raise_if_not_finite
from jaxq.recipes import Recipe, Rule, as_recipe


class _Taken(NamedTuple):
    """A layer to be quantized: its rule, and the axes of its whole weight."""

    found: Found
    rule: Rule
    contracting: tuple[int, ...]
    batch: tuple[int, ...]


def quantize_model(
    module: linen.Module,
    variables: Mapping[str, Any],
    recipe: str | QuantSpec | Recipe,
    *,
    example: Any = None,
    calibration: Iterable[Any] | Mapping[str, LayerStats] | None = None,
    mask: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    fallback: str = "rtn",
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
) -> tuple[Quantized, Any, Report]:
    """A linen module and variables whose matrix weights are quantized; module and variables stay as they are.

    Layers it knows: Dense, DenseGeneral (and so attention), Einsum, Conv, Embed, wherever they are in the module, in
    `nn.scan` or `nn.vmap` (stacked along axis 0), `nn.remat` and `nn.jit`. Rules of `kinds=("Linear",)` are about Dense
    too, "LinearGeneral" about DenseGeneral. Which parameter belongs to which layer is found by tracing a call, with
    abstract values; weights that would not reach their layer as they are stored are refused. All layers are checked
    before any is quantized, and all problems are named at once. Parameters that no such layer multiplies stay in floats
    and have a row in the report that says why.

    Args:
      module: a linen module.
      variables: as `module.apply` takes them, float parameters; also a FrozenDict. Boxes of metadata
        (`nn.Partitioned`) are taken off the weights that are quantized, for they speak of axes that codes do not have.
      recipe: a name (`jaxq.recipes.names()`: every preset as weight-only, "w8a8", ...), a `QuantSpec` for every
        weight, or a `jaxq.Recipe`. Names and specs leave embeddings, output heads and routers in floats.
      example: an input of the module, or its `jax.ShapeDtypeStruct`: an array, a tuple of arguments or a dict of named
        ones (`method=`, `rngs=` and `mutable=` of `apply` among them). None takes the first batch of `calibration`;
        without it, inputs of usual shapes are tried until one reaches all parameters.
      calibration: batches of real inputs, for methods that need data (`jaxq.methods`), or what
        `jaxq.nn.linen.calibrate` made of them. Layers inside `nn.scan` and its like cannot be watched.
      mask: which rows of a batch count, as in `calibrate`.
      forward: how to run an example or a batch, `forward(module, variables, batch)`.
      fallback: what becomes of a layer whose method does worse than rounding to nearest on held-out inputs, as in
        `jaxq.quantize_model`.
      key: PRNG key, for methods that draw.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`; "raise" names path and index.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      (`Quantized` module, variables, `Report`). Quantized parameters are QTensors; the other variables are those given.

    Raises:
      TypeError: not a linen module.
      ValueError: an unknown recipe; no example where one is needed; layers that cannot be quantized; a rule that
        matches nothing; a method that needs data without `calibration`, one that folds scales (linen modules do not say
        where), and what `calibrate` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> qmodule, qvariables, report = jaxq.nn.linen.quantize_model(module, variables, "int8")
      >>> qvariables["params"]["kernel"]
      QTensor(int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
      >>> qmodule.apply(qvariables, x).shape
      (2, 8)
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"linen.quantize_model: module must be a flax linen Module, got {type(module).__name__}.")
    if isinstance(module, Quantized):
        raise TypeError("linen.quantize_model: the module is quantized already. Pass the float module and variables.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError("linen.quantize_model: variables must be a dict with 'params', as module.init returns it.")
    recipe = as_recipe(recipe, "quantize_model")
    formats.check_choice("quantize_model: on_nonfinite", on_nonfinite, ON_NONFINITE)
    formats.check_choice("quantize_model: fallback", fallback, methods.FALLBACKS)
    batches = None if calibration is None or isinstance(calibration, Mapping) else list(calibration)
    if example is None and batches:
        example = batches[0]
    structure = find_layers(module, variables, example, forward)
    params = params_of(variables)
    rules = _match(module, variables, structure, params, recipe, forward, on_nonfinite)
    taken = [v for v in rules.values() if isinstance(v, _Taken)]
    seen = [v.found.path for v in taken if calibration is not None and methods.METHODS[v.rule.method].judged]
    _check_data(taken, calibration is not None)
    stats = _statistics(module, variables, calibration, batches, seen, mask, forward, progress)
    rows: dict[tuple[str, ...], Row] = {}
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(len(taken), 1))
    for one, k in zip(shown(taken, "quantizing", progress and bool(stats)), keys, strict=False):
        where = one.found.key
        boxed, floats = params[where], linen.meta.unbox(params[where])
        qt, solved = _quantize(floats, one, stats.get(one.found.path), fallback, k, on_nonfinite)
        row = _quantized_row("/".join(where), one.found.kind.name, floats, qt, solved)
        if boxed is not floats:
            note = f"its box {type(boxed).__name__}{_names(boxed)} is taken off"
            row = dataclasses.replace(row, note="; ".join(filter(None, (row.note, note))))
        params[where], rows[where] = qt, row
    out: Any = with_params(variables, params)
    weights = tuple("/".join(one.found.key) for one in taken)
    report = Report(tuple(_rows(out, rows, rules, structure)))
    return Quantized(module, weights), freeze(out) if isinstance(variables, FrozenDict) else out, report


def _match(
    module: linen.Module,
    variables: Any,
    structure: Structure,
    params: Params,
    recipe: Recipe,
    forward: Forward | None,
    on_nonfinite: str,
) -> dict[str, _Taken | Rule | None]:
    """Each layer with its rule, after checking all of them."""
    problems: list[str] = []
    rules: dict[str, _Taken | Rule | None] = {}
    weights: dict[str, QTensor] = {}
    used: list[Rule] = []
    for path, found in structure.layers.items():
        rules[path] = rule = recipe.find(path, found.kind.name)
        if rule is None:
            continue
        used.append(rule)
        if rule.weight is None:
            continue
        problem = found.problem
        if problem is None:
            value = linen.meta.unbox(params[found.key])
            stacked = value.ndim - len(found.roles.shape)
            one = _Taken(found, rule, found.roles.contracting, tuple(range(stacked + found.roles.num_batch)))
            try:
                weights[path] = _abstract(value, one)
                if on_nonfinite == "raise":
                    raise_if_not_finite(jnp.asarray(value), "/".join(found.key), "quantize")
                rules[path] = one
            except (TypeError, ValueError) as error:
                problem = str(error)
        if problem is not None:
            problems.append(f"  {path or type(module).__name__} ({found.kind.name}): {problem}")
    problems += check_weights(module, variables, structure, forward, weights)
    if problems:
        raise ValueError(
            "quantize_model: these layers cannot be quantized:\n" + "\n".join(problems)
            + "\nSkip them with jaxq.Rule(path, skip=True) in a jaxq.Recipe, or change them."
        )  # fmt: skip
    unused = [rule.pattern for rule in recipe.rules if not rule.optional and not any(rule is r for r in used)]
    if unused:
        listed = [f"{path or 'the model itself'} ({found.kind.name})" for path, found in structure.layers.items()]
        others = [
            f"{'/'.join(k)} ({structure.classes.get(k[:-1], 'not reached')})" for k in _by_hand(params, structure)
        ]
        raise ValueError(
            f"quantize_model: rules {unused} match no layer (or only layers an earlier rule took). "
            f"Layers here: {_few(listed) or 'none that jaxq knows'}."
            + (f" Matrices that no such layer multiplies: {_few(others)}." if others else "")
        )
    return rules


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")


def _by_hand(params: Params, structure: Structure) -> list[tuple[str, ...]]:
    weights = {found.key for found in structure.layers.values()}
    return [k for k, v in params.items() if k not in weights and getattr(linen.meta.unbox(v), "ndim", 0) > 1]


def _abstract(value: Any, one: _Taken) -> QTensor:
    """The QTensor there will be, of `jax.ShapeDtypeStruct`s; raises what quantizing raises."""
    weight = one.rule.weight
    assert weight is not None

    def made(w: jax.Array) -> QTensor:
        qt = quantize(w, weight, contracting=one.contracting, batch=one.batch, name=one.found.kind.weight)
        return qt.with_activation(one.rule.activation)

    return jax.eval_shape(made, jax.ShapeDtypeStruct(value.shape, value.dtype))


def _quantize(
    floats: jax.Array, one: _Taken, stats: LayerStats | None, fallback: str, key: jax.Array, on_nonfinite: str
) -> tuple[QTensor, methods.Solved | None]:
    """A weight by its rule, and what its method says."""
    rule, name = one.rule, "/".join(one.found.key)
    assert rule.weight is not None
    own = quantize(
        floats, rule.weight, contracting=one.contracting, batch=one.batch, on_nonfinite=on_nonfinite, name=name
    )
    solved = None
    if rule.method != "rtn":
        solved = solve_layer(own, floats, stats, rule, fallback=fallback, key=key, name=name)
        own = solved.qt
    return own if own.meta.outliers is not None else own.with_activation(rule.activation), solved


def _check_data(taken: Sequence[_Taken], data: bool) -> None:
    """Raises where a method asks for what is not there, naming all layers."""
    problems = []
    for found, rule, *_ in taken:
        name, method = f"{found.path or 'the model itself'} ({found.kind.name})", methods.METHODS[rule.method]
        if rule.method in FOLDED:
            problems.append(f"  {name}: method {rule.method!r} folds scales into what comes before a layer, and linen "
                            "modules do not say what that is; use another method, or an nnx model")  # fmt: skip
        elif method.needs_data and not data:
            problems.append(f"  {name}: method {rule.method!r} needs data")
        elif not found.kind.watched and rule.method != "rtn" and (data or method.needs_data):
            problems.append(f"  {name}: method {rule.method!r} is for Dense, DenseGeneral and Einsum")
    if problems:
        raise ValueError(
            "quantize_model: these layers' methods cannot run:\n" + "\n".join(problems)
            + "\nPass calibration=batches of real inputs, or give the layers a rule with another method."
        )  # fmt: skip


def _statistics(
    module: linen.Module,
    variables: Any,
    calibration: Any,
    batches: list[Any] | None,
    paths: list[str],
    mask: Any,
    forward: Any,
    progress: bool | None,
) -> Mapping[str, LayerStats]:
    if not paths:
        return {}
    if batches is not None:
        return calibrate(module, variables, batches, layers=paths, mask=mask, forward=forward, progress=progress)
    missing = [path for path in paths if path not in calibration]
    if missing:
        raise ValueError(f"quantize_model: calibration has no statistics of {missing}.")
    return calibration


# The report.


def _rows(
    variables: Mapping[str, Any],
    rows: Mapping[tuple[str, ...], Row],
    rules: Mapping[str, _Taken | Rule | None],
    structure: Structure,
) -> Iterable[Row]:
    """One row for each variable; parameters first, without the name of their collection."""
    weights = {found.key: found for found in structure.layers.values()}
    for where, value in params_of(variables).items():
        owner = structure.classes.get(where[:-1], "-")
        if where in rows:
            yield rows[where]
            continue
        found = weights.get(where)
        if found is not None:
            rule = rules[found.path]
            note = (
                (rule.reason or "skipped by the recipe") if isinstance(rule, Rule) else "no rule of the recipe matches"
            )
            owner = found.kind.name
        else:
            note = _why_not(where, linen.meta.unbox(value), structure)
        yield _float_row("/".join(where), owner, linen.meta.unbox(value), note)
    for collection, tree in variables.items():
        if collection != "params":
            for where, value in flatten_dict({collection: tree}).items():
                owner = structure.classes.get(where[1:-1], "-")
                yield _float_row("/".join(where), owner, linen.meta.unbox(value), "no parameter, passed through")


def _why_not(where: tuple[str, ...], value: Any, structure: Structure) -> str:
    """Why a parameter that is no layer's weight stays as it is."""
    owner = structure.classes.get(where[:-1])
    if isinstance(value, QTensor):
        return "quantized already, left as it is"
    if not jnp.issubdtype(getattr(value, "dtype", int), jnp.floating):
        return "no floats, left as it is"
    if value.ndim < 2:
        return "not a matrix, left in floats"
    if owner is None:
        return "not reached by the call of the example, left in floats"
    if "/".join(where[:-1]) in structure.layers:
        return "not the weight of its layer, left in floats"
    return f"used by {owner} itself, which is no layer jaxq quantizes, left in floats"


def _names(box: Any) -> str:
    return str(getattr(box, "names", ""))
