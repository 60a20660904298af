"""Which parameter belongs to which layer of a linen module, found by tracing it: nothing is computed.

Paths and shapes alone do not tell a layer's kind, so the module is called with abstract values and every call of a
layer jaxq knows is written down. A second trace has in place of each weight one of another shape, that only an
untouched weight can still have when its layer is called; it finds weights that change on their way (`nn.WeightNorm`,
`nn.map_variables`), are stacked along another axis than the first, or are used by hand where codes cannot be.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxq.nn.layers._linen import LayerKind, find_call, intercepted, stored
from jaxq.nn.layers._nnx import Roles
from jaxq.qtensor import QTensor

Forward = Callable[[linen.Module, Any, Any], Any]
# Lengths that inputs are tried with: of tokens, and of the sides of images.
_LENGTHS, _SIDES = (8, 1), (8, 28, 32, 64, 224)
_MOST_TRIED = 96
# Arguments beside the input that a call without gradients has a usual value for.
_USUAL = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
}


class Found(NamedTuple):
    """A layer of a module.

    Attributes:
      scope: names of the modules that lead to it.
      kind: of the layer.
      roles: of the axes of its weight, without stacked ones.
      problem: why it cannot be quantized, or None.
    """

    scope: tuple[str, ...]
    kind: LayerKind
    roles: Roles
    problem: str | None

    @property
    def path(self) -> str:
        return "/".join(self.scope)

    @property
    def key(self) -> tuple[str, ...]:
        """Of the weight among the parameters."""
        return (*self.scope, self.kind.weight)


class Structure(NamedTuple):
    """What a trace finds.

    Attributes:
      layers: by path, in the order in which they are reached.
      classes: the module's class in each scope that was called.
      example: with which it was found.
    """

    layers: dict[str, Found]
    classes: dict[tuple[str, ...], type]
    example: Any


Params = dict[tuple[str, ...], Any]


def params_of(variables: Mapping[str, Any]) -> Params:
    """Parameters by the names that lead to them; what is no dict is a leaf."""
    return flatten_dict(_plain(variables.get("params", {})))


def with_params(variables: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The variables with other parameters, as `params_of` names them."""
    return {**_plain(variables), "params": unflatten_dict(params)}


def _plain(tree: Any) -> Any:
    return (
        {str(k): _plain(v) for k, v in tree.items()}
        if isinstance(tree, Mapping)
        else tree
    )


def trace(
    module: linen.Module,
    variables: Any,
    example: Any,
    forward: Forward | None,
    interceptor: Callable[..., Any],
) -> None:
    """Calls a module with abstract values.

    Args:
      module: a linen module.
      variables: for `module.apply`.
      example: an array (or its shape), a tuple of arguments or a dict of named ones, of `apply` too.
      forward: how else to call it, `forward(module, variables, example)`.
      interceptor: sees the calls.
    """
    leaves, treedef = jax.tree.flatten(
        ({**_plain(variables), "jaxq_trace": _tags(variables)}, example)
    )
    arrays = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    more = {
        "mutable": linen.DenyList("params"),
        "rngs": {"params": _key(), "dropout": _key()},
    }

    def run(arrays: dict[int, Any]) -> None:
        given, batch = jax.tree.unflatten(
            treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        with linen.intercept_methods(interceptor):
            if forward is not None:
                forward(module, given, batch)
            elif isinstance(batch, dict):
                module.apply(given, **{**more, **batch})
            else:
                module.apply(
                    given, *(batch if isinstance(batch, tuple) else (batch,)), **more
                )

    jax.eval_shape(
        run, {i: jax.ShapeDtypeStruct(a.shape, a.dtype) for i, a in arrays.items()}
    )


def _key() -> jax.Array:
    return jax.random.key(0)


@jax.tree_util.register_static
class _Tag:
    """A variable of its own in every module: `nn.jit` would not call again what it has traced with equal variables."""


def _tags(variables: Mapping[str, Any]) -> dict[str, Any]:
    scopes = {path[:i] for path in params_of(variables) for i in range(len(path))}
    return unflatten_dict({(*scope, "tag"): _Tag() for scope in scopes})


# What layers there are.


def find_layers(
    module: linen.Module, variables: Any, example: Any, forward: Forward | None
) -> Structure:
    """The layers that a call of a module reaches.

    Args:
      module: a linen module.
      variables: its float variables.
      example: as in `trace`; None tries inputs until one reaches every parameter.
      forward: as in `trace`.

    Raises:
      ValueError: the module cannot be called with the example; without one, none that was tried fits.
    """
    if example is not None or forward is not None:
        try:
            return _structure(module, variables, example, forward)
        except Exception as error:
            raise ValueError(
                f"quantize_model: {type(module).__name__} cannot be called with the example {_shapes(example)}: "
                f"{_short(error)}. Pass example= as apply takes it (an array, a tuple of arguments, a dict of named "
                "ones), or forward=."
            ) from error
    paths, tried = list(params_of(variables)), 0
    for guess in itertools.islice(_examples(module, variables), _MOST_TRIED):
        tried += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = _structure(module, variables, guess, None)
        except Exception:  # whatever a module says of an input that is not for it
            continue
        if all(path[:-1] in found.classes for path in paths):
            return found
    raise ValueError(
        f"quantize_model: how {type(module).__name__} is called is not known, and which parameter belongs to which "
        f"layer shows only then ({tried} inputs were tried: none fits, and reaches all parameters). Pass example=, an "
        "input or its jax.ShapeDtypeStruct (a tuple of arguments, a dict of named ones), or calibration=."
    )


def _structure(
    module: linen.Module, variables: Any, example: Any, forward: Forward | None
) -> Structure:
    params = params_of(variables)
    found: dict[str, Found] = {}
    classes: dict[tuple[str, ...], type] = {}

    def watch(
        call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
    ) -> Any:
        layer, method = context.module, find_call(context)
        path = "/".join(layer.path)
        if context.method_name not in ("setup", "<lambda>"):
            classes[tuple(layer.path)] = type(layer)
        if method is not None and layer.has_variable("params", method.kind.weight):
            here = _found(layer, method.kind, params, args, kwargs)
            before = found.setdefault(path, here)
            if before != here and before.problem is None:
                found[path] = before._replace(
                    problem=here.problem or "it is used in more than one way"
                )
        return intercepted(stored, call, args, kwargs, context)

    trace(module, variables, example, forward, watch)
    return Structure(found, classes, example)


def _found(
    layer: Any, kind: LayerKind, params: Params, args: tuple, kwargs: dict[str, Any]
) -> Found:
    shape = tuple(linen.meta.unbox(layer.get_variable("params", kind.weight)).shape)
    found = Found(tuple(layer.path), kind, Roles((), shape), None)
    outer = linen.meta.unbox(params.get(found.key))
    # An Embed is called in two ways; nothing it is called with matters.
    given = ((), {}) if kind.name == "Embed" else (args, kwargs)
    problem = kind.problem(layer, *given[0], **given[1])
    if isinstance(outer, QTensor):
        problem = "it is quantized already"
    elif outer is None:
        problem = f"its {kind.weight} is not at {'/'.join(found.key)} of the variables"
    elif tuple(outer.shape[outer.ndim - len(shape) :]) != shape:
        problem = (
            f"its {kind.weight} is {list(outer.shape)}, which is not {list(shape)} with stacked axes in front. "
            "Stack layers along axis 0 (variable_axes={'params': 0})"
        )
    if problem is not None:
        return found._replace(problem=problem)
    return found._replace(roles=kind.roles(layer, shape, *given[0], **given[1]))


def _examples(module: linen.Module, variables: Any) -> Iterator[Any]:
    """Inputs a module may take, by the sizes of its parameters."""
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    needed = [
        p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if not needed or any(p.name not in _USUAL for p in needed[1:]):
        return
    usual = {p.name: _USUAL[p.name] for p in needed[1:]}
    leaves = [linen.meta.unbox(leaf) for leaf in params_of(variables).values()]
    shapes = [tuple(leaf.shape) for leaf in leaves if getattr(leaf, "ndim", 0) > 1]
    sizes = list(dict.fromkeys(size for shape in shapes for size in shape))
    channels = dict.fromkeys(shape[-2] for shape in shapes if len(shape) == 4)
    images = ((1, side, side, c) for c in channels for side in _SIDES)
    floats = ((1, *length, size) for size in sizes for length in ((), (_LENGTHS[0],)))
    tokens = ((1, length) for length in dict.fromkeys((*_LENGTHS, *sizes)))
    kinds = ((floats, jnp.float32), (tokens, jnp.int32), (images, jnp.float32))
    for shape, dtype in ((shape, dtype) for shapes, dtype in kinds for shape in shapes):
        x = jax.ShapeDtypeStruct(shape, dtype)
        yield {needed[0].name: x, **usual} if usual else x


# What becomes of their weights.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["path", "tail"]
)
class QuantizedWeight:
    """Stands for a weight to be quantized: uint8 `[*stacked, *tail]`, a tail that no weight has."""

    def __init__(self, data: Any, path: str, tail: tuple[int, ...]):
        self.data, self.path, self.tail = data, path, tail


def check_weights(
    module: linen.Module,
    variables: Any,
    structure: Structure,
    forward: Forward | None,
    weights: Mapping[str, QTensor],
) -> list[str]:
    """Why weights cannot be used as QTensors, one line each.

    Args:
      module: a linen module.
      variables: its float variables.
      structure: of it.
      forward: as in `trace`.
      weights: QTensors of `jax.ShapeDtypeStruct`s by path of the layer, stacked axes included.
    """

    def run(chosen: Sequence[str]) -> None:
        params = params_of(variables)
        for path in chosen:
            found = structure.layers[path]
            outer = linen.meta.unbox(params[found.key]).shape
            stacked = outer[: len(outer) - len(found.roles.shape)]
            sizes = [n for n in (7, 11, 13, 17, 19, 23, 29, 31) if n not in stacked]
            tail = tuple(sizes[:3])
            params[found.key] = QuantizedWeight(
                jax.ShapeDtypeStruct((*stacked, *tail), jnp.uint8), path, tail
            )

        def read(layer: linen.Module, name: str) -> QTensor | None:
            value = layer.get_variable("params", name)
            if not isinstance(value, QuantizedWeight):
                return stored(layer, name)
            if value.data.shape != value.tail or value.data.dtype != jnp.uint8:
                raise ValueError(
                    f"its {name} is changed on its way to the layer (by nn.WeightNorm, nn.map_variables), or stacked "
                    "along another axis than 0"
                )
            num_stacked = len(weights[value.path].shape) - len(
                structure.layers[value.path].roles.shape
            )
            return jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape[num_stacked:], leaf.dtype),
                weights[value.path],
            )

        trace(
            module,
            with_params(variables, params),
            structure.example,
            forward,
            functools.partial(intercepted, read),
        )

    try:
        run(list(weights))
    except Exception as error:
        problems = []
        for path in weights:
            try:
                run([path])
            except (
                Exception
            ) as alone:  # whatever a module says of a weight that is no array
                kind = structure.layers[path].kind
                reason = (
                    str(alone)
                    if type(alone) is ValueError and str(alone).startswith("its ")
                    else (
                        f"its {kind.weight} is used in a way that a QTensor cannot be ({_short(alone)})"
                    )
                )
                problems.append(f"  {path or kind.name} ({kind.name}): {reason}")
        return problems or [f"  {', '.join(weights)}: {_short(error)}"]
    return []


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + (text[0].rstrip(".") if text else "")


def _shapes(example: Any) -> str:
    return str(
        jax.tree.map(
            lambda v: f"{v.dtype}{list(v.shape)}" if hasattr(v, "shape") else v, example
        )
    )
