"""quantize_model: a Flax nnx model with quantized weights, and the report of what happened to each parameter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq import formats, metrics
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
    model: nnx.Module, recipe: str | QuantSpec | Recipe, *, on_nonfinite: str = "raise"
) -> tuple[Any, Report]:
    """A copy of `model` whose matrix weights are quantized; the model and its class stay as they are.

    Layers it knows: Linear, LinearGeneral, Einsum, Conv, Embed, wherever they are in the model, stacked along leading
    axes (`nnx.vmap`, `nnx.scan`) or shared by several parents. All of them are checked before any is quantized, and
    all problems are named at once.

    Args:
      model: a flax nnx module with float parameters.
      recipe: a name (`jaxq.recipes.names()`: every preset as weight-only, "w8a8", ...), a `QuantSpec` for every
        weight, or a `jaxq.Recipe`. Names and specs leave embeddings, output heads and routers in floats.
      on_nonfinite: what to do about NaN and infinities, as in `jaxq.quantize`; "raise" names path and index.

    Returns:
      (model of the same class, `Report`). Quantized weights are `jaxq.nn.QuantizedParam` variables holding QTensors,
      unseen by an optimizer of `nnx.Param`.

    Raises:
      TypeError: not an nnx module.
      ValueError: an unknown recipe; layers that cannot be quantized; a rule that matches nothing; no layer at all.

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
    copy = nnx.clone(model)
    variables = {id(v): (path, v) for path, v in _variables(copy)}  # alive, so that identities stay theirs
    rows: dict[int, Row] = {}  # by the identity of the variable in the copy
    replaced: dict[int, QuantizedParam] = {}
    for (path, layer, kind), rule in _match(copy, recipe, on_nonfinite):
        variable = getattr(layer, kind.weight)
        where = variables[id(variable)][0]
        if rule is None or rule.weight is None:
            note = (rule.reason or "skipped by the recipe") if rule else "no rule of the recipe matches"
            rows[id(variable)] = _float_row(where, kind.name, variable.get_value(), note)
            continue
        if id(variable) not in replaced:
            contracting, batch = weight_axes(layer, kind)
            floats, name = variable.get_value(), f"{path}/{kind.weight}" if path else kind.weight
            qt = quantize(
                floats, rule.weight, contracting=contracting, batch=batch, on_nonfinite=on_nonfinite, name=name
            ).with_activation(rule.activation)
            replaced[id(variable)] = QuantizedParam(qt)
            rows[id(variable)] = _quantized_row(where, kind.name, floats, qt)
        put_weight(layer, kind, replaced[id(variable)])
    replace_variables(copy, replaced)
    layers = {found.path for found in find_layers(copy)}
    return copy, Report(tuple(rows.get(i) or _other_row(path, v, layers) for i, (path, v) in variables.items()))


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


def _quantized_row(path: str, kind: str, floats: jax.Array, qt: QTensor) -> Row:
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
    )


@functools.partial(jax.jit)
def _errors(floats: jax.Array, qt: QTensor) -> tuple[jax.Array, jax.Array]:
    """SQNR in dB and the worst block, blocks running along the contraction."""
    view = qt.meta.geometry
    back = dequantize(qt.with_activation(None), dtype=jnp.float32)
    a, b = (view.to_storage(view.to_view(v.astype(jnp.float32))) for v in (floats, back))
    return metrics.sqnr(a, b), metrics.worst_block(a, b)
