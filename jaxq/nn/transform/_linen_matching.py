"""Which layer of a linen module which rule is for, after all of them were checked: nothing is quantized here."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen

from jaxq.nn.layers._linen import CALLS
from jaxq.nn.layers._linen_discovery import (
    Forward,
    Found,
    Params,
    Structure,
    check_weights,
)
from jaxq.nn.report._report import why_floats
from jaxq.nn.transform._nnx_matching import (
    check_axes,
    multiplies,
    raise_problems,
    raise_untouched,
    raise_unused,
)
from jaxq.nn.transform._weight import dry_run
from jaxq.qtensor import QTensor, raise_if_not_finite
from jaxq.recipes import Recipe, Rule


class Taken(NamedTuple):
    """A layer to be quantized.

    Attributes:
      found: the layer.
      rule: with a weight.
      contracting: axes of the whole weight, stacked ones in front.
      batch: of the whole weight.
      planned: the QTensor there will be, of `jax.ShapeDtypeStruct`s.
    """

    found: Found
    rule: Rule
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    planned: QTensor


class Matched(NamedTuple):
    """Rules of layers and bare matrices.

    Attributes:
      taken: layers to be quantized.
      rules: of everything else that is a weight or a bare matrix, by its key among the parameters.
      used: all rules that matched something.
    """

    taken: list[Taken]
    rules: dict[tuple[str, ...], Rule | None]
    used: list[Rule]


def match(
    module: linen.Module,
    variables: Any,
    structure: Structure,
    params: Params,
    recipe: Recipe,
    forward: Forward | None,
    on_nonfinite: str,
    *,
    strict: bool,
) -> Matched:
    """Each layer with its rule.

    Raises:
      ValueError: layers that cannot be quantized, all of them; rules that match nothing; bare matrices without a rule.
    """
    problems: list[str] = []
    out = Matched([], {}, [])
    names = []
    for path, found in structure.layers.items():
        value = linen.meta.unbox(params.get(found.key))
        cls = structure.classes[found.scope]
        rule = recipe.find(
            path, found.kind.name, tuple(getattr(value, "shape", ())), cls
        )
        names.append(f"{path or 'the model itself'} ({found.kind.name})")
        out.rules[found.key] = rule
        if rule is None:
            continue
        out.used.append(rule)
        if rule.weight is None:
            continue
        problem = found.problem
        if problem is None:
            stacked = value.ndim - len(found.roles.shape)
            axes = (
                found.roles.contracting,
                tuple(range(stacked + found.roles.num_batch)),
            )
            try:
                check_axes(rule, *axes, value.ndim)
                shaped = jax.ShapeDtypeStruct(value.shape, value.dtype)
                planned = dry_run(shaped, rule, *axes, found.kind.weight)
                why_floats(found.kind.name, planned, found.roles)
                if on_nonfinite == "raise" and not isinstance(
                    value, jax.ShapeDtypeStruct
                ):
                    raise_if_not_finite(
                        jnp.asarray(value), "/".join(found.key), "quantize"
                    )
                out.taken.append(Taken(found, rule, *axes, planned))
            except (TypeError, ValueError) as error:
                problem = str(error)
        if problem is not None:
            problems.append(f"  {path or cls.__name__} ({found.kind.name}): {problem}")
    weights = {one.found.path: one.planned for one in out.taken}
    problems += check_weights(module, variables, structure, forward, weights)
    untouched = _match_bare(structure, params, recipe, out, problems)
    unreached = _match_unreached(structure, params, recipe, out)
    raise_problems(problems, "quantize_model")
    if strict and unreached:
        raise ValueError(
            f"quantize_model: the call of the example does not reach {', '.join(unreached)}, which rules are about, so "
            "what layers they belong to is not known. Pass an example= (or forward=) whose call reaches them, a dict "
            "with method= for example, or leave them in floats: jaxq.Rule(path, skip=True), or strict=False for all."
        )
    if strict:
        raise_unused(recipe, out.used, names + untouched, "quantize_model", "layer")
        quantized = (
            "To quantize one, multiply with it in a Dense, DenseGeneral or Einsum."
        )
        raise_untouched(untouched, "To leave one in floats, add", quantized)
    return out


def _match_unreached(
    structure: Structure, params: Params, recipe: Recipe, out: Matched
) -> list[str]:
    """Matrices that the traced call did not reach: rules that skip them are noted, those to be quantized returned.

    Their kind is not known, but what layers call their weights is.
    """
    unreached = []
    for key, boxed in params.items():
        value = linen.meta.unbox(boxed)
        floats = (
            jnp.issubdtype(getattr(value, "dtype", int), jnp.floating)
            and value.ndim > 1
        )
        if key[:-1] in structure.classes or not floats or isinstance(value, QTensor):
            continue
        kinds = {
            call.kind.name for call in CALLS.values() if call.kind.weight == key[-1]
        }
        rules = [
            recipe.find("/".join(key[:-1]), kind, tuple(value.shape))
            for kind in sorted(kinds)
        ]
        rules = [rule for rule in rules if rule is not None]
        if any(rule.weight is not None for rule in rules):
            unreached.append("/".join(key))
        elif rules:
            out.used.extend(rules)
            out.rules[key] = rules[0]
    return unreached


def _match_bare(
    structure: Structure,
    params: Params,
    recipe: Recipe,
    out: Matched,
    problems: list[str],
) -> list[str]:
    """Matrices that modules of unknown classes ask for themselves: rules are noted, those without one returned."""
    untouched = []
    named = [rule for rule in recipe.rules if "Param" in rule.kinds]
    weights = {found.key for found in structure.layers.values()}
    for key, boxed in params.items():
        value, path, cls = (
            linen.meta.unbox(boxed),
            "/".join(key),
            structure.classes.get(key[:-1]),
        )
        if (
            key in weights
            or cls is None
            or not jnp.issubdtype(getattr(value, "dtype", int), jnp.floating)
        ):
            continue
        if isinstance(value, QTensor):
            continue
        rule = next(
            (r for r in named if r.matches(path, "Param", tuple(value.shape), cls)),
            None,
        )
        if rule is not None:
            out.used.append(rule)
            if value.ndim > 1:  # of others the report says that they are no matrices
                out.rules[key] = rule
            if rule.weight is not None:
                problems.append(
                    f"  {path} (Param): flax gives {cls.__name__} an array of the shape that it asks for, so this can "
                    "only be quantized in a Dense, DenseGeneral or Einsum"
                )
        elif multiplies(path, value.shape, cls):
            untouched.append(
                f"{path} {value.dtype.name}{list(value.shape)} ({cls.__name__})"
            )
    return untouched
