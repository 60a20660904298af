"""Which layer of a model which rule is for, after all of them were checked: nothing is quantized here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import methods
from jaxq.nn.layers import LayerKind, bare_kind, find_kind, weight_axes
from jaxq.nn.report._report import why_floats
from jaxq.nn.transform._folding import FOLDED
from jaxq.nn.transform._weight import dry_run
from jaxq.qtensor import QTensor, QuantSpec, raise_if_not_finite
from jaxq.recipes import Recipe, Rule


class Found(NamedTuple):
    """A layer of a model."""

    path: str
    layer: Any
    kind: LayerKind


def find_layers(model: nnx.Module) -> Iterator[Found]:
    """Every layer of a kind jaxq knows, with its path; each once, however many parents share it."""
    for path, module in nnx.iter_modules(model):
        kind = find_kind(module)
        if kind is not None:
            yield Found("/".join(map(str, path)), module, kind)


def variables_of(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Path and variable of everything a model holds but its random states; shared ones once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            yield "/".join(map(str, path)), node


def match(
    model: nnx.Module, recipe: Recipe, on_nonfinite: str, *, strict: bool = True
) -> list[tuple[Found, Rule | None]]:
    """Each layer with its rule (None: no rule matches).

    Args:
      model: a flax nnx module.
      recipe: its rules.
      on_nonfinite: "raise" looks for NaN and infinities.
      strict: a rule that matches nothing is an error.

    Raises:
      ValueError: layers that cannot be quantized, all of them; rules that match nothing.
    """
    problems: list[str] = []
    matched: list[tuple[Found, Rule | None]] = []
    for found in find_layers(model):
        value = getattr(found.layer, found.kind.weight).get_value()
        shape = tuple(getattr(value, "shape", ()))
        matched.append(
            (found, recipe.find(found.path, found.kind.name, shape, type(found.layer)))
        )
    known = {id(getattr(found.layer, found.kind.weight)) for found, _ in matched}
    bare, untouched = _match_bare(model, recipe, known)
    changed = _changed_on_their_way(model)
    matched += bare
    uses: dict[int, tuple[str, Any]] = {}
    for found, rule in matched:
        variable, problem, use = getattr(found.layer, found.kind.weight), None, None
        value = variable.get_value()
        name = found.path or type(found.layer).__name__
        if rule is not None and rule.weight is not None:
            problem = changed.get(id(found.layer)) or found.kind.problem(found.layer)
            if isinstance(value, QTensor):
                problem = "it is quantized already"
            if problem is None:
                try:
                    axes = weight_axes(found.layer, found.kind)
                    check_axes(rule, *axes, len(value.shape))
                    planned = dry_run(value, rule, *axes, found.kind.weight)
                    why_floats(found.kind.name, planned, found.kind.roles(found.layer))
                    if on_nonfinite == "raise" and not isinstance(
                        value, jax.ShapeDtypeStruct
                    ):
                        where = (
                            found.path
                            if found.kind.name == "Param"
                            else f"{found.path}/{found.kind.weight}"
                        )
                        where = where.lstrip("/")
                        raise_if_not_finite(jnp.asarray(value), where, "quantize")
                    use = (
                        axes,
                        rule.weight,
                        rule.activation,
                        rule.observer,
                        rule.method,
                        rule.options,
                    )
                except (TypeError, ValueError) as error:
                    problem = str(error)
        if problem is None:
            other, other_use = uses.setdefault(id(variable), (name, use))
            if other_use != use:
                how = (
                    "which uses it in another way"
                    if use and other_use
                    else "and only one of them is quantized"
                )
                problem = f"it shares its weight with {other}, {how}"
            elif (
                use and other != name and rule is not None and rule.observer is not None
            ):
                problem = f"it shares its weight with {other}, and no static range serves both; leave observer= out"
        if problem is not None:
            problems.append(f"  {name} ({found.kind.name}): {problem}")
    raise_problems(problems, "quantize_model")
    if strict:
        paths = [f"{f.path or 'the model itself'} ({f.kind.name})" for f, _ in matched]
        raise_unused(
            recipe, [rule for _, rule in matched], paths, "quantize_model", "layer"
        )
        raise_untouched(
            untouched,
            "To quantize one that is multiplied with, add jaxq.Rule(path, weight=..., kinds=('Param',)); to leave it "
            "in floats,",
            "jaxq.recipes.get(name).rules are the rules of a recipe by name.",
        )
    return matched


def raise_untouched(untouched: Sequence[str], how: str, more: str) -> None:
    """Raises where there are matrices that no rule is about; `how` one says so, and what `more` there is to know."""
    if untouched:
        raise ValueError(
            f"quantize_model: {', '.join(untouched)}: matrices of modules jaxq does not know, and no rule says what to "
            f"do with them. {how} jaxq.Rule(path, skip=True, kinds=('Param',)); strict=False leaves them all. {more}"
        )


def _changed_on_their_way(model: nnx.Module) -> dict[int, str]:
    """What stands against quantizing modules whose weights another one normalizes at each call, by identity."""
    changed = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.SpectralNorm | nnx.WeightNorm):
            where = "/".join(map(str, path)) or "the model itself"
            reason = (
                f"{where}, an nnx.{type(module).__name__}, normalizes its weight at each call, which codes cannot be; "
                "put the normalized weight into the layer, and the layer in the place of its wrapper"
            )
            changed |= {
                id(inner): reason
                for _, inner in nnx.iter_modules(module)
                if inner is not module
            }
    return changed


def multiplies(path: str, shape: Sequence[int], module: type) -> bool:
    """Whether a module of this class seems to multiply with an array that it holds itself."""
    # Flax's own classes hold gains and biases, but for what its recurrent cells keep their matrices in.
    foreign = (
        not module.__module__.startswith("flax.") or module.__name__ == "DenseParams"
    )
    return (
        sum(size > 1 for size in shape) >= 2
        and foreign
        and not _NO_MATRIX.search(path.rpartition("/")[2].lower())
    )


# Last words of the names of parameters that are added or looked up, not multiplied with.
_NO_MATRIX = re.compile(
    r"(^|_)(bias|embed|embedding|gain|gamma|norm|pos|position|scale|token)s?$"
)
# What holds numbers, or would in a model that holds none.
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
# Variables that no product reads as a weight; adapters stay in floats.
NO_WEIGHTS = (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.LoRAParam)


def _match_bare(
    model: nnx.Module, recipe: Recipe, known: set[int]
) -> tuple[list[tuple[Found, Rule | None]], list[str]]:
    """Matrices that modules of unknown classes hold themselves: those a rule names, and the others.

    Args:
      model: a flax nnx module.
      recipe: its rules.
      known: identities of the weights of known layers, which others may share.
    """
    matched: list[tuple[Found, Rule | None]] = []
    untouched = []
    named = [rule for rule in recipe.rules if "Param" in rule.kinds]
    for path, holder, attribute, value in _bare_arrays(model, known):
        rule = next(
            (r for r in named if r.matches(path, "Param", value.shape, type(holder))),
            None,
        )
        if rule is not None and attribute is not None:
            contracting = (
                rule.contracting
                if rule.contracting is not None
                else (-2,)
                if value.ndim == 2
                else ()
            )
            axes = tuple(a - value.ndim if a >= 0 else a for a in contracting)
            matched.append(
                (
                    Found(
                        path, holder, bare_kind(attribute, axes, len(rule.batch or ()))
                    ),
                    rule,
                )
            )
        elif rule is not None and rule.weight is not None:
            raise ValueError(
                f"quantize_model: {path} must be an nnx.Param that a module holds as an attribute."
            )
        elif rule is None and multiplies(path, value.shape, type(holder)):
            untouched.append(f"{path} {value.dtype.name}{list(value.shape)}")
    return matched, untouched


def raw_arrays(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Path and value of every array that a model holds outside variables."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, _ARRAYS):
            yield "/".join(map(str, path)), node


def _bare_arrays(
    model: nnx.Module, known: set[int]
) -> Iterator[tuple[str, Any, str | None, Any]]:
    """Path, the module in whose code it is used, its attribute and value of every float array outside known layers.

    The attribute is None for what is in a list or dict, and for arrays that are no `nnx.Param`.
    """
    modules = dict(nnx.iter_modules(model))
    for path, node in nnx.iter_graph(model):
        variable = isinstance(node, nnx.Variable) and not isinstance(node, NO_WEIGHTS)
        if id(node) in known or not path or not (variable or isinstance(node, _ARRAYS)):
            continue
        owner = path[:-1]
        of_flax = owner in modules and type(modules[owner]).__module__.startswith(
            "flax."
        )
        if of_flax and find_kind(modules[owner]) is not None:
            continue
        direct = owner in modules and not isinstance(
            modules[owner], nnx.List | nnx.Dict
        )
        while owner and (
            owner not in modules or isinstance(modules[owner], nnx.List | nnx.Dict)
        ):
            owner = owner[:-1]
        name, holder = "/".join(map(str, path)), modules.get(owner, model)
        whole = direct and isinstance(node, nnx.Param) and isinstance(path[-1], str)
        held = node.get_value() if isinstance(node, nnx.Variable) else node
        for keys, value in jax.tree_util.tree_leaves_with_path(held):
            if isinstance(value, _ARRAYS) and jnp.issubdtype(value.dtype, jnp.floating):
                own = name + "".join(
                    f"/{getattr(key, 'key', getattr(key, 'idx', key))}" for key in keys
                )
                yield own, holder, str(path[-1]) if whole and not keys else None, value


def raise_problems(problems: Sequence[str], caller: str) -> None:
    """Raises one error for all of them, if there are any."""
    if problems:
        raise ValueError(
            f"{caller}: these layers cannot be quantized:\n" + "\n".join(problems)
            + "\nSkip them with jaxq.Rule(path, skip=True) in a jaxq.Recipe, or change them."
        )  # fmt: skip


def unused_rules(recipe: Recipe, taken: Sequence[Rule | None]) -> list[str]:
    """Patterns of rules that are not optional and not among those that were taken."""
    used = {id(rule) for rule in taken if rule is not None}
    return [
        rule.pattern
        for rule in recipe.rules
        if id(rule) not in used and not rule.optional
    ]


def unused_notes(
    recipe: Recipe, taken: Sequence[Rule | None], strict: bool
) -> tuple[str, ...]:
    """What a report says of rules that matched nothing, where that is no error."""
    return (
        ()
        if strict
        else tuple(
            f"rule {pattern!r} matched nothing"
            for pattern in unused_rules(recipe, taken)
        )
    )


def raise_unused(
    recipe: Recipe,
    taken: Sequence[Rule | None],
    paths: Sequence[str],
    caller: str,
    what: str,
) -> None:
    """Raises where a rule matched nothing, naming what there is."""
    unused = unused_rules(recipe, taken)
    if unused:
        listed = ", ".join(paths[:12]) + (
            f", ... ({len(paths)} {what}s)" if len(paths) > 12 else ""
        )
        raise ValueError(
            f"{caller}: rules {unused} match no {what} (or only {what}s an earlier rule took). "
            f"{what.capitalize()}s here: {listed or 'none that jaxq knows'}."
        )


def has_rows(kind: LayerKind | Any) -> bool:
    """Whether rows of a layer's input, as calibration sees them, meet its weight as a matrix."""
    return kind.watched and not kind.windowed


def check_data(
    layers: Iterable[tuple[str, LayerKind | Any, Rule]],
    data: bool | None,
    *,
    folds: bool = True,
) -> None:
    """Raises where methods or observers cannot run on their layers, or ask for data that are not there; names them all.

    Args:
      layers: path, kind and rule of each layer to be quantized.
      data: whether there are data; None where that is not known yet.
      folds: whether the model can say what comes before a layer.
    """
    problems = []
    for path, kind, rule in layers:
        name, method = (
            f"{path or 'the model itself'} ({kind.name})",
            methods.get(rule.method),
        )
        reads = method.needs_data(dict(rule.options))
        if rule.observer is not None and not kind.watched:
            problems.append(
                f"  {name}: its input cannot be observed, so it has no static range"
            )
        elif rule.observer is not None and data is False:
            problems.append(f"  {name}: observer {rule.observer!r} needs data")
        if rule.correct_bias and data is False:
            problems.append(f"  {name}: correct_bias=True needs data")
        elif rule.correct_bias and kind.name not in (
            "Dense",
            "DenseGeneral",
            "Linear",
            "LinearGeneral",
        ):
            problems.append(
                f"  {name}: correct_bias=True is for Linear and LinearGeneral"
            )
        if rule.method in FOLDED and not folds:
            problems.append(f"  {name}: method {rule.method!r} folds scales into what comes before a layer, and linen "
                            "modules do not say what that is; use another method, or an nnx model")  # fmt: skip
        elif reads and data is False:
            problems.append(f"  {name}: method {rule.method!r} needs data")
        elif (reads and not has_rows(kind)) or (
            rule.method == "llm_int8" and kind.windowed
        ):
            problems.append(
                f"  {name}: method {rule.method!r} is for matrices: Linear, LinearGeneral and Einsum"
            )
    if problems:
        raise ValueError(
            "quantize_model: these layers' methods or observers cannot run:\n" + "\n".join(problems)
            + "\nPass calibration=batches of real inputs, or give the layers a rule with another method."
        )  # fmt: skip


def check_key(recipe: Recipe, key: Any, caller: str) -> None:
    """Raises where a rule rounds at random and there is no key to draw with."""
    for rule in recipe.rules:
        if (
            key is None
            and isinstance(rule.weight, QuantSpec)
            and rule.weight.rounding == "stochastic"
        ):
            raise ValueError(
                f"{caller}: the weight= of Rule({rule.pattern!r}) has rounding='stochastic', which needs a PRNG key. "
                "Pass key=jax.random.key(0)."
            )


def check_axes(
    rule: Rule, contracting: Sequence[int], batch: Sequence[int], ndim: int
) -> None:
    """Raises where a rule says other axes than the layer, or axes are not known at all."""
    if not contracting:
        raise ValueError(
            f"which of its {ndim} axes a product contracts is not known: say contracting= in its rule"
        )
    for name, said, known in (
        ("contracting", rule.contracting, contracting),
        ("batch", rule.batch, batch),
    ):
        if said is not None and {a % ndim for a in said} != {a % ndim for a in known}:
            raise ValueError(
                f"its rule says {name}={tuple(said)}, and the layer itself {name}={tuple(known)}"
            )
