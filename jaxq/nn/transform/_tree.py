"""Any tree of parameters: quantized leaf by leaf, for models that are no Flax modules, or that one dequantizes inside.

An array's path is that of its leaf, and rules match it or the path of what holds it: "layers/0/up/kernel" is matched by
"layers/0/up" too, so a recipe for a model does for its parameters. Which axes a product contracts is not in an array:
of a matrix it is -2, as Flax keeps kernels `[in, out]`; else a rule says it (`contracting=`, `batch=`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import formats, methods
from jaxq.nn.report._report import (
    Report,
    Row,
    float_row,
    planned_row,
    quantized_row,
    skip_reason,
    why_floats,
)
from jaxq.nn.transform._donation import Donated
from jaxq.nn.transform._folding import FOLDED, raise_if_rotating
from jaxq.nn.transform._nnx_matching import (
    NO_WEIGHTS,
    check_axes,
    check_key,
    raise_problems,
    raise_unused,
    unused_notes,
)
from jaxq.nn.transform._weight import dry_run, quantize_weight
from jaxq.qtensor import (
    ON_NONFINITE,
    QTensor,
    QuantSpec,
    dequantize,
    raise_if_not_finite,
)
from jaxq.recipes import Recipe, Rule, as_recipe
from jaxq.sharding import on_auto_axes, shard_like


class _Leaf(NamedTuple):
    path: str
    value: Any
    rule: Rule | None
    axes: tuple[tuple[int, ...], tuple[int, ...]]  # contracting, batch
    note: str  # why it stays in floats
    planned: QTensor | None


def quantize_params(
    params: Any,
    recipe: str | QuantSpec | Recipe,
    *,
    strict: bool = True,
    donate: bool = False,
    key: jax.Array | None = None,
    on_nonfinite: str = "raise",
) -> tuple[Any, Report]:
    """A tree of the same structure whose matrices are QTensors, and the report of what happened to each leaf.

    A QTensor is a tree itself, so the result goes through `jax.jit`, `lax.scan`, `jax.tree.map` and `jaxq.save`, and
    multiplies with `@`, `jaxq.matmul` and `jaxq.einsum`. Code that needs floats calls `dequantize_params` inside jit.

    Args:
      params: any pytree of arrays: dicts of Haiku or Flax, Equinox modules, lists. An array of several names is
        quantized once, and stays shared.
      recipe: as in `jaxq.quantize_model`. A name or a spec takes every float matrix, but no embeddings, norms,
        biases, heads, routers and LoRA adapters, which it knows by their names; arrays of three axes and more need a
        rule that says `contracting=`.
      strict: a rule that matches nothing is an error; False says so in the report.
      donate: frees each array once it is quantized, so that a model larger than half the memory fits. The arrays in
        `params` must not be used afterwards. One that also stays in floats, under another path, is kept.
      key: PRNG key, for `rounding="stochastic"`.
      on_nonfinite: as in `jaxq.quantize`.

    Returns:
      (tree, `Report`).

    Raises:
      ValueError: an unknown recipe; leaves that cannot be quantized, all of them; a rule that matches nothing; a method
        that needs data, which are a matter of models.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> params = {"up": {"w": jnp.ones((64, 8)), "b": jnp.zeros(8)}}
      >>> qparams, report = jaxq.quantize_params(params, "int8")
      >>> (jnp.ones((2, 64)) @ qparams["up"]["w"]).shape, len(report.quantized)
      ((2, 8), 1)
    """
    recipe = as_recipe(recipe, "quantize_params")
    formats.check_choice("quantize_params: on_nonfinite", on_nonfinite, ON_NONFINITE)
    check_key(recipe, key, "quantize_params")
    raise_if_rotating(recipe, "quantize_params")
    leaves = _match(params, recipe, on_nonfinite, strict)
    keys = iter(
        jax.random.split(jax.random.key(0) if key is None else key, max(len(leaves), 1))
    )
    out, rows, donated = [], [], Donated(leaf.value for leaf in leaves)
    made: dict[
        Any, tuple[QTensor, Row]
    ] = {}  # an array of several names is quantized once
    for leaf in leaves:
        if leaf.planned is None:
            out.append(leaf.value)
            rows.append(_left_row(leaf))
            continue
        assert leaf.rule is not None
        at = (id(leaf.value), id(leaf.rule), leaf.axes)
        if at in made:
            qt, first = made[at]
            out.append(qt)
            note = f"the same array as {first.path}"
            rows.append(
                dataclasses.replace(
                    first, path=leaf.path, note=note, bytes_before=0, bytes_after=0
                )
            )
            if donate:
                donated.quantized(leaf.value, qt)
            continue
        with on_auto_axes((jnp.asarray(leaf.value), next(keys))) as (floats, own_key):
            how: Any = {
                "key": own_key,
                "stochastic": key is not None,
                "on_nonfinite": on_nonfinite,
            }
            name = leaf.path or "w"
            qt, solved = quantize_weight(
                floats, leaf.rule, leaf.axes, None, fallback="rtn", name=name, **how
            )
            rows.append(quantized_row(leaf.path, "Array", floats, qt, solved))
        qt = shard_like(qt, leaf.value)
        out.append(qt)
        made[at] = qt, rows[-1]
        if donate:
            donated.quantized(leaf.value, qt)
    tree = jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_qtensor), out)
    return tree, Report(
        tuple(rows), unused_notes(recipe, [leaf.rule for leaf in leaves], strict)
    )


def dequantize_params(params: Any, *, dtype: Any = None) -> Any:
    """The tree with every QTensor in it dequantized: inside `jax.jit`, only for as long as it is used.

    Args:
      params: a tree with QTensors.
      dtype: of the results; None takes each QTensor's own.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qparams, _ = jaxq.quantize_params({"w": jnp.eye(32)}, "int4")
      >>> jaxq.dequantize_params(qparams)["w"].dtype.name
      'float32'
    """

    def floats(leaf: Any) -> Any:
        return dequantize(leaf, dtype=dtype) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(floats, params, is_leaf=_is_qtensor)


def plan_params(params: Any, recipe: Recipe, *, strict: bool = True) -> Report:
    """The report `quantize_params` would give, without errors that must be measured."""
    leaves = _match(params, recipe, "raise", strict)
    rows = []
    for leaf in leaves:
        if leaf.planned is None:
            rows.append(_left_row(leaf))
        else:
            assert leaf.rule is not None
            rows.append(
                planned_row(
                    leaf.path, "Array", leaf.value, leaf.planned, leaf.rule.method
                )
            )
    return Report(
        tuple(rows), unused_notes(recipe, [leaf.rule for leaf in leaves], strict)
    )


def _match(params: Any, recipe: Recipe, on_nonfinite: str, strict: bool) -> list[_Leaf]:
    """Every leaf with what is to become of it, after all were checked."""
    problems, leaves = [], []
    held = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    variables = {
        keys: type(node) for keys, node in held if isinstance(node, nnx.Variable)
    }
    for keys, value in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_qtensor):
        own = (
            keys[:-1] if keys[:-1] in variables else keys
        )  # of `nnx.state`, without the variable's ".value"
        if issubclass(variables.get(own, nnx.Param), NO_WEIGHTS):
            note = f"{variables[own].__name__}, no weight: left as it is"
            leaf, problem = (
                _Leaf(_path_of(own), value, None, ((), ()), note, None),
                None,
            )
        else:
            leaf, problem = _match_leaf(_path_of(own), value, recipe, on_nonfinite)
        leaves.append(leaf)
        if problem is not None:
            problems.append(
                f"  {leaf.path or 'the array'} {list(np.shape(value))}: {problem}"
            )
    raise_problems(problems, "quantize_params")
    if strict:
        paths = [leaf.path or "the array itself" for leaf in leaves]
        raise_unused(
            recipe,
            [leaf.rule for leaf in leaves],
            paths,
            "quantize_params",
            "parameter",
        )
    return leaves


def _match_leaf(
    path: str, value: Any, recipe: Recipe, on_nonfinite: str
) -> tuple[_Leaf, str | None]:
    dtype = getattr(value, "dtype", None)
    shape = () if dtype is None else tuple(np.shape(value))
    note = None
    if isinstance(value, QTensor):
        note = "quantized already, left as it is"
    elif dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        note = "no floats, left as it is"
    elif len(shape) < 2:
        note = "not a matrix, left in floats"
    if note is not None:
        return _Leaf(path, value, None, ((), ()), note, None), None
    parent = path.rpartition("/")[0]
    found = (
        r
        for r in recipe.rules
        if r.matches(path, "Array", shape)
        or (parent and r.matches(parent, "Array", shape))
    )
    rule = next(found, None)
    if rule is None or rule.weight is None:
        return _Leaf(path, value, rule, ((), ()), skip_reason(rule), None), None
    batch = rule.batch or ()
    contracting = (
        rule.contracting
        if rule.contracting is not None
        else (-2,)
        if len(shape) == 2 + len(batch)
        else ()
    )
    try:
        check_axes(rule, contracting, batch, len(shape))
        _check_method(rule)
        planned = dry_run(value, rule, contracting, batch, path)
        why_floats("Array", planned)
        if on_nonfinite == "raise" and not isinstance(value, jax.ShapeDtypeStruct):
            raise_if_not_finite(jnp.asarray(value), path or "w", "quantize")
    except (TypeError, ValueError) as error:
        return _Leaf(path, value, rule, ((), ()), "", None), str(error)
    return _Leaf(
        path, value, rule, (tuple(contracting), tuple(batch)), "", planned
    ), None


def _check_method(rule: Rule) -> None:
    if rule.correct_bias:
        raise ValueError(
            "correct_bias=True needs calibration data, which pass through a model"
        )
    if rule.method in FOLDED:
        raise ValueError(
            f"method {rule.method!r} folds scales into what comes before a layer; a tree does not say what"
        )
    if rule.observer is not None:
        raise ValueError(
            f"observer {rule.observer!r} needs calibration data, which pass through a model"
        )
    if methods.get(rule.method).needs_data(dict(rule.options)):
        raise ValueError(
            f"method {rule.method!r} needs calibration data, which pass through a model"
        )


def _left_row(leaf: _Leaf) -> Row:
    value = (
        leaf.value
        if hasattr(leaf.value, "dtype") or isinstance(leaf.value, QTensor)
        else np.asarray(leaf.value)
    )
    return float_row(leaf.path, "Array", value, leaf.note)


def _path_of(keys: tuple[Any, ...]) -> str:
    """Components joined by "/": names of keys and attributes, numbers of positions."""
    parts = []
    for key in keys:
        named = (
            getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)
        )
        parts.append(str(next(named, key)))
    return "/".join(parts)


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)
