"""quantize_model: a linen module and its variables, quantized, and the report of what happened to each parameter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict

from jaxq import formats, methods
from jaxq.nn.calibration._linen import calibrated, call_order
from jaxq.nn.calibration._nnx import as_batches, shown
from jaxq.nn.layers._linen_discovery import (
    Forward,
    Structure,
    find_layers,
    params_of,
    with_params,
)
from jaxq.nn.layers._linen_quantized import Quantized
from jaxq.nn.report._report import (
    Report,
    Row,
    float_row,
    planned_row,
    quantized_row,
    skip_reason,
)
from jaxq.nn.transform._donation import Donated
from jaxq.nn.transform._folding import raise_if_rotating
from jaxq.nn.transform._linen_matching import Matched, Taken, match
from jaxq.nn.transform._nnx import given_stats, in_order, unused_note, wanted_statistics
from jaxq.nn.transform._nnx_matching import (
    check_data,
    check_key,
    has_rows,
    unused_notes,
)
from jaxq.nn.transform._resume import Done, Resume, as_order
from jaxq.nn.transform._weight import corrected_bias, quantize_weight
from jaxq.observers import LayerStats
from jaxq.qtensor import ON_NONFINITE, QTensor, QuantSpec
from jaxq.recipes import Recipe, as_recipe
from jaxq.sharding import on_auto_axes, placed_like


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
    """A linen module and variables whose matrix weights are quantized; module and variables stay as they are.

    Layers it knows: Dense, DenseGeneral (and so attention), Einsum, Conv, ConvTranspose, Embed, wherever they are, in
    `nn.scan` or `nn.vmap` (stacked along axis 0), `nn.remat` and `nn.jit`. Rules of `kinds=("Linear",)` are about Dense
    too, "LinearGeneral" about DenseGeneral. Which parameter belongs to which layer is found by tracing a call, with
    abstract values; weights that would not reach their layer as they are stored are refused. All layers are checked
    before any is quantized, and all problems are named at once.

    Args:
      module: a linen module.
      variables: as `module.apply` takes them, float parameters; also a FrozenDict. Boxes of metadata
        (`nn.Partitioned`) are taken off the weights that are quantized, for they speak of axes that codes do not have.
      recipe: a name (`jaxq.recipes.names()`: every preset as weight-only, "w8a8", ...), a `QuantSpec` for every
        weight, or a `jaxq.Recipe`. Names and specs leave embeddings, output heads and routers in floats,
        which they know by kind and by name ("lm_head", "router", ...): the report says which.
      example: an input of the module, or its `jax.ShapeDtypeStruct`: an array, a tuple of arguments or a dict of named
        ones (`method=`, `rngs=` and `mutable=` of `apply` among them). None takes the first batch of `calibration`;
        without it, inputs of usual shapes are tried until one reaches all parameters.
      calibration: batches of real inputs, for methods that need data (`jaxq.methods`), or what
        `jaxq.nn.linen.calibrate` made of them. Layers inside `nn.scan` and its like cannot be watched.
      mask: which rows of a batch count, as in `calibrate`.
      forward: how to run an example or a batch, `forward(module, variables, batch)`.
      sequential: "blocks" (or True) or "layers", as in `jaxq.quantize_model`: some layers after others, each on what
        those before it make of the data when they are quantized. A block is what has the same path up to the first
        number ("layers_3").
      resume: a folder for the results of finished blocks, as in `jaxq.quantize_model`.
      fallback: what becomes of a layer whose method does worse than rounding to nearest on held-out inputs, as in
        `jaxq.quantize_model`.
      strict: a rule that matches nothing, a matrix that a module of yours asks for itself (`self.param`) and no rule is
        about, and a weight that a rule is about and the example does not reach, are errors. False leaves them, and the
        report says so.
      donate: frees each weight among `variables` once it is quantized, as in `jaxq.quantize_model`; not with data.
      key: PRNG key, for methods that draw and `rounding="stochastic"`.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`; "raise" names path and index.
      progress: show a line of progress; None does so on a terminal.

    Returns:
      (`Quantized` module, variables, `Report`). Quantized parameters are QTensors; the other variables are those given.

    Raises:
      TypeError: not a linen module.
      ValueError: an unknown recipe; no example where one is needed; layers that cannot be quantized; a rule that
        matches nothing, a matrix that no rule is about, a weight that the example does not reach; a method or an
        observer that needs data without `calibration`, a method that folds scales (linen modules do not say where), and
        what `calibrate` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from flax import linen
      >>> module, x = linen.Dense(8), jnp.ones((2, 64))
      >>> variables = module.init(jax.random.key(0), x)
      >>> qmodule, qvariables, report = jaxq.nn.linen.quantize_model(module, variables, "int8")
      >>> qvariables["params"]["kernel"]
      QTensor(kernel: int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
      >>> qmodule.apply(qvariables, x).shape
      (2, 8)
    """
    _check_module(module, variables, "quantize_model")
    recipe = as_recipe(recipe, "quantize_model")
    formats.check_choice("quantize_model: on_nonfinite", on_nonfinite, ON_NONFINITE)
    formats.check_choice("quantize_model: fallback", fallback, methods.FALLBACKS)
    check_key(recipe, key, "quantize_model")
    if donate and calibration is not None:
        raise ValueError(
            "quantize_model: donate=True frees weights that calibration= needs; pass one of them."
        )
    order = as_order(sequential, resume)
    batches = (
        None
        if calibration is None or isinstance(calibration, Mapping)
        else list(as_batches(calibration, "quantize_model"))
    )
    data_is_example = example is None and bool(batches)
    if example is None and batches:
        example = batches[0]
    structure = find_layers(module, variables, example, forward)
    params = params_of(variables)
    matched = match(
        module,
        variables,
        structure,
        params,
        recipe,
        forward,
        on_nonfinite,
        strict=strict,
    )
    taken = matched.taken
    raise_if_rotating(recipe, "linen.quantize_model")
    check_data(
        [(o.found.path, o.found.kind, o.rule) for o in taken],
        calibration is not None,
        folds=False,
    )
    donated = Donated(list(jax.tree.leaves(variables)) if donate else [])
    rows: dict[tuple[str, ...], Row] = {}
    keys = jax.random.split(
        jax.random.key(0) if key is None else key, max(len(taken), 1)
    )
    how = {"mask": mask, "forward": forward, "progress": progress}
    layers = list(zip(taken, keys, strict=False))
    blocks = (
        _blocks(module, variables, layers, batches, forward, order)
        if order
        else [layers]
    )
    kept = Resume(
        resume,
        recipe,
        batches or [],
        linen.meta.unbox(dict(variables)),
        key,
        (fallback, order),
    )
    used = False
    for number, block in enumerate(blocks):
        before = kept.read(number, ["/".join(one.found.key) for one, _ in block])
        made = {}
        now = (
            Quantized(module, tuple("/".join(where) for where in rows)),
            with_params(variables, params),
        )
        stats = (
            {}
            if before
            else _statistics(*now, calibration, batches, [one for one, _ in block], how)
        )
        used = used or bool(stats) or bool(before)
        for one, k in shown(block, "quantizing", progress and bool(stats)):
            where, found = one.found.key, one.found
            boxed, value, name = (
                params[where],
                linen.meta.unbox(params[where]),
                "/".join(where),
            )
            bias_at, bias = (*where[:-1], "bias"), None
            if name in before:
                qt, bias, rows[where] = before[name]
                params[where] = placed_like(qt, value)
                if bias is not None:
                    params[bias_at] = linen.meta.replace_boxed(params[bias_at], bias)
                continue
            with on_auto_axes((value, k, stats.get(found.path))) as (
                floats,
                own_key,
                seen,
            ):
                seen = _of_all(seen, floats.shape[: len(one.batch)])
                qt, solved = quantize_weight(
                    floats,
                    one.rule,
                    (one.contracting, one.batch),
                    seen,
                    rows=has_rows(found.kind),
                    fallback=fallback,
                    key=own_key,
                    stochastic=key is not None
                    and one.rule.weight.rounding == "stochastic",
                    name=name,
                    on_nonfinite=on_nonfinite,
                )
                notes = [_box(boxed)]
                if one.rule.correct_bias and bias_at not in params:
                    notes.append("no bias to correct")
                elif one.rule.correct_bias:
                    assert seen is not None
                    bias, said = corrected_bias(
                        linen.meta.unbox(params[bias_at]),
                        floats,
                        qt,
                        seen,
                        fallback,
                        name,
                    )
                    params[bias_at] = linen.meta.replace_boxed(params[bias_at], bias)
                    notes.append(said)
                rows[where] = quantized_row(
                    name, found.kind.name, floats, qt, solved, notes, found.roles
                )
            params[where], made[name] = (
                placed_like(qt, value),
                Done(qt, bias, rows[where]),
            )
            if donate:
                donated.quantized(value, params[where])
        if not before:
            kept.write(number, made)
    out: Any = with_params(variables, params)
    unused = unused_note(used, None if data_is_example else calibration, mask, None)
    notes = (*unused, *unused_notes(recipe, matched.used, strict))
    report = Report(tuple(_rows(out, rows, matched, structure)), notes)
    qmodule = Quantized(module, tuple("/".join(one.found.key) for one in taken))
    return qmodule, freeze(out) if isinstance(variables, FrozenDict) else out, report


def plan_linen(
    module: linen.Module,
    variables: Any,
    recipe: Recipe,
    example: Any,
    *,
    strict: bool = True,
) -> Report:
    """The report that `quantize_model` would give, without errors that must be measured; nothing is quantized.

    Args:
      module: a linen module.
      variables: its variables; leaves may be `jax.ShapeDtypeStruct`s.
      recipe: its rules.
      example: as in `quantize_model`.
      strict: as in `quantize_model`.
    """
    _check_module(module, variables, "plan")
    structure, params = (
        find_layers(module, variables, example, None),
        params_of(variables),
    )
    matched = match(
        module, variables, structure, params, recipe, None, "raise", strict=strict
    )
    check_data(
        [(o.found.path, o.found.kind, o.rule) for o in matched.taken], None, folds=False
    )
    rows = {}
    for one in matched.taken:
        where, value = one.found.key, linen.meta.unbox(params[one.found.key])
        note, roles, path = _box(params[where]), one.found.roles, "/".join(where)
        rows[where] = planned_row(
            path,
            one.found.kind.name,
            value,
            one.planned,
            one.rule.method,
            (note,),
            roles,
        )
    return Report(
        tuple(_rows(variables, rows, matched, structure)),
        unused_notes(recipe, matched.used, strict),
    )


def _check_module(module: Any, variables: Any, caller: str) -> None:
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"linen.{caller}: module must be a flax linen Module, got {type(module).__name__}."
        )
    if isinstance(module, Quantized):
        raise TypeError(
            f"linen.{caller}: the module is quantized already. Pass the float module and variables."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            f"linen.{caller}: variables must be a dict with 'params', as module.init returns it."
        )


def _of_all(stats: LayerStats | None, batch: tuple[int, ...]) -> LayerStats | None:
    """Statistics of a stack of weights; under `nn.vmap` all elements may have one input."""
    if stats is None or stats.count.ndim >= len(batch):
        return stats
    stacked = batch[: len(batch) - stats.count.ndim]
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (*stacked, *leaf.shape)), stats
    )


def _blocks(
    module: linen.Module,
    variables: Any,
    layers: list[tuple[Taken, Any]],
    batches: list[Any] | None,
    forward: Forward | None,
    order: str,
) -> list[list[tuple[Taken, Any]]]:
    """Layers, with their keys, some after others in the order in which a batch reaches them."""
    if not batches:
        raise ValueError(
            f"quantize_model: sequential={order!r} needs calibration=batches, not statistics or nothing."
        )
    reached = call_order(module, variables, batches[0], forward)
    return in_order(
        [(one.found.path, (one, key)) for one, key in layers], reached, order
    )


def _statistics(
    module: Quantized,
    variables: Any,
    calibration: Any,
    batches: list[Any] | None,
    taken: Sequence[Taken],
    how: Mapping[str, Any],
) -> Mapping[str, LayerStats]:
    """What methods and observers of some layers need."""
    wanted = wanted_statistics(
        (one.found.path, one.rule, has_rows(one.found.kind)) for one in taken
    )
    if calibration is None or not wanted:
        return {}
    if batches is None:
        return given_stats(calibration, wanted)
    return calibrated(module, variables, batches, wanted, **how)


# The report.


def _rows(
    variables: Mapping[str, Any],
    rows: Mapping[tuple[str, ...], Row],
    matched: Matched,
    structure: Structure,
) -> Iterable[Row]:
    """One row for each variable; parameters first, without the name of their collection."""
    kinds = {found.key: found.kind.name for found in structure.layers.values()}
    for where, boxed in params_of(variables).items():
        value, owner = linen.meta.unbox(boxed), structure.classes.get(where[:-1])
        if where in rows:
            yield rows[where]
            continue
        kind = kinds.get(where, owner.__name__ if owner else "-")
        note = (
            skip_reason(matched.rules[where])
            if where in matched.rules
            else _why_not(where, value, structure)
        )
        yield float_row("/".join(where), kind, value, note)
    for collection, tree in variables.items():
        if collection != "params":
            for where, boxed in flatten_dict({collection: tree}).items():
                owner = structure.classes.get(where[1:-1])
                kind = owner.__name__ if owner else "-"
                value = linen.meta.unbox(boxed)
                matrix = getattr(value, "ndim", 0) > 1 and jnp.issubdtype(
                    value.dtype, jnp.floating
                )
                note = "no parameter, passed through" + (
                    ": rules are about 'params' alone" if matrix else ""
                )
                yield float_row("/".join(where), kind, value, note)


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
    return f"used by {owner.__name__} itself, which is no layer jaxq quantizes, left in floats"


def _box(value: Any) -> str:
    """What is said of a weight that was in a box of metadata."""
    if not isinstance(value, linen.meta.AxisMetadata):
        return ""
    return f"its box {type(value).__name__}{getattr(value, 'names', '')} is taken off"
