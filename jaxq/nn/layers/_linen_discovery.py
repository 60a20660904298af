"""Finds which parameter belongs to which layer of a linen module.

Paths and shapes alone do not tell a layer's kind. The module is therefore called with
abstract values, and every call of a known layer is recorded.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxq.nn.layers._kind import wrong_stack
from jaxq.nn.layers._linen_interceptor import run_with_codes, stored_qtensor
from jaxq.nn.layers._linen_kind import LinenKind, find_call
from jaxq.nn.layers._linen_trace import FlatParams, Forward, params_of, trace
from jaxq.nn.layers._roles import Roles
from jaxq.qtensor import QTensor

# Sequence lengths and image sides of the inputs that are tried.
_LENGTHS, _SIDES = (8, 1), (8, 28, 32, 64, 224)
_MAX_TRIES = 96
# Common arguments other than the input, with their values for inference.
_INFERENCE_ARGUMENTS = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
}


class LinenLayer(NamedTuple):
    """A layer of a linen module.

    Attributes:
      scope: the names of the modules that lead to the layer.
      kind: of the layer.
      roles: of the axes of its weight, without stack axes.
      problem: why the layer cannot be quantized. None if it can.
    """

    scope: tuple[str, ...]
    kind: LinenKind
    roles: Roles
    problem: str | None

    @property
    def path(self) -> str:
        """The names in `scope`, joined by "/"."""
        return "/".join(self.scope)

    @property
    def key(self) -> tuple[str, ...]:
        """The names that lead to the weight among the parameters."""
        return (*self.scope, self.kind.weight)


class Structure(NamedTuple):
    """The layers of a linen module.

    Attributes:
      layers: by path, in the order in which the call reaches them.
      classes: the class of each module that was called, by scope.
      example: the input that the module was called with.
    """

    layers: dict[str, LinenLayer]
    classes: dict[tuple[str, ...], type]
    example: Any

    def class_of(self, scope: tuple[str, ...]) -> type | None:
        """The class of the module at a scope. None if it was not called.

        The modules inside an `nnx.bridge.ToLinen` are not linen modules. Their
        parameters belong to the `ToLinen`.
        """
        for end in range(len(scope), -1, -1):
            cls = self.classes.get(scope[:end])
            if cls is not None:
                is_own = end == len(scope) or issubclass(cls, nnx.bridge.ToLinen)
                return cls if is_own else None
        return None


def find_linen_layers(
    module: linen.Module,
    variables: Any,
    example: Any,
    forward: Forward | None,
    *,
    caller: str,
) -> Structure:
    """Finds the layers that a call of a module reaches.

    Args:
      module: a linen module.
      variables: its float variables.
      example: as in `trace`. None tries guessed inputs until one reaches every
        parameter.
      forward: as in `trace`.
      caller: the name of the public function, for errors.

    Raises:
      ValueError: the module cannot be called with the example; `example` and `forward`
        are None, and no guessed input fits the module and reaches every parameter.
    """
    name = type(module).__name__
    if example is not None or forward is not None:
        try:
            return _structure_of_call(module, variables, example, forward)
        except Exception as error:
            raise ValueError(
                f"{caller}: {name} cannot be called with the example "
                f"{_describe_example(example)}: {first_line(error)}. "
                "Pass an example= that apply takes (an array, a tuple of arguments, or "
                "a dict of named arguments), or pass forward=."
            ) from error
    parameters, num_tried = list(params_of(variables)), 0
    for guess in itertools.islice(_examples(module, variables), _MAX_TRIES):
        num_tried += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                structure = _structure_of_call(module, variables, guess, None)
        except Exception:  # a module may raise anything if an input does not fit
            continue
        if all(structure.class_of(key[:-1]) for key in parameters):
            return structure
    raise ValueError(
        f"{caller}: it is not known how to call {name}. A call is needed to find "
        f"the layer of each parameter. {num_tried} guessed inputs were tried. None of "
        "them fits the module and reaches all parameters. Pass calibration=, or "
        "example=. An example is an input or its jax.ShapeDtypeStruct, a tuple of "
        "arguments, or a dict of named arguments."
    )


def _structure_of_call(
    module: linen.Module, variables: Any, example: Any, forward: Forward | None
) -> Structure:
    """The layers that a call with this example reaches."""
    params = params_of(variables)
    layers: dict[str, LinenLayer] = {}
    classes: dict[tuple[str, ...], type] = {}

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
    ) -> Any:
        module, layer_call = context.module, find_call(context)
        if _has_other_variables(module, params):
            return run_with_codes(stored_qtensor, call, args, kwargs, context)
        if context.method_name not in ("setup", "<lambda>"):
            classes[tuple(module.path)] = type(module)
        if layer_call is not None:
            kind = layer_call.kind
            if module.has_variable("params", kind.weight):
                layer = _layer(module, kind, params, args, kwargs)
                _add_layer(layers, layer)
        return run_with_codes(stored_qtensor, call, args, kwargs, context)

    trace(module, variables, example, forward, record)
    return Structure(layers, classes, example)


def _has_other_variables(module: linen.Module, params: FlatParams) -> bool:
    """True if other code of the model made the variables of a module.

    An example is an output head: `dec.apply({"params": {"kernel": table.T}}, x)`. Such
    a module has no parameters of its own. The paths of its layers begin at the module
    itself, so they do not lead to parameters of the model.

    Args:
      module: a module that is called.
      params: the parameters of the model.
    """
    root = module.scope.root if module.scope else None
    # A transform such as nn.scan makes a root as well, with the path of its module.
    if root is None or root.path:
        return False
    return any(key not in params for key in params_of(root.variables()))


def _add_layer(layers: dict[str, LinenLayer], layer: LinenLayer) -> None:
    """Adds a layer. If two calls use its weight differently, it gets a problem."""
    earlier = layers.setdefault(layer.path, layer)
    if earlier != layer and earlier.problem is None:
        problem = layer.problem or "its calls use the weight in different ways"
        layers[layer.path] = earlier._replace(problem=problem)


def _layer(
    module: Any,
    kind: LinenKind,
    params: FlatParams,
    args: tuple,
    kwargs: dict[str, Any],
) -> LinenLayer:
    """The layer of a call. If it cannot be quantized, `problem` says why."""
    weight = linen.meta.unbox(module.get_variable("params", kind.weight))
    shape = tuple(weight.shape)
    layer = LinenLayer(tuple(module.path), kind, Roles((), shape), None)
    # The variables of a lifted layer hold a stack. Its call sees one stack element.
    outer = linen.meta.unbox(params.get(layer.key))
    problem = kind.problem(module, *args, **kwargs)
    if isinstance(outer, QTensor):
        problem = "it is quantized already"
    elif outer is None:
        problem = f"its {kind.weight} is not in the variables at {'/'.join(layer.key)}"
    elif tuple(outer.shape[outer.ndim - len(shape) :]) != shape:
        problem = (
            f"its {kind.weight} is {list(outer.shape)}, "
            f"{wrong_stack(outer.shape, shape)}. Stack layers along axis 0 "
            "(variable_axes={'params': 0})"
        )
    if problem is not None:
        return layer._replace(problem=problem)
    return layer._replace(roles=kind.roles(module, shape, *args, **kwargs))


def _examples(module: linen.Module, variables: Any) -> Iterator[Any]:
    """Inputs that a module may take, guessed from the sizes of its parameters."""
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if not required or any(p.name not in _INFERENCE_ARGUMENTS for p in required[1:]):
        return
    others = {p.name: _INFERENCE_ARGUMENTS[p.name] for p in required[1:]}
    leaves = [linen.meta.unbox(leaf) for leaf in params_of(variables).values()]
    shapes = [tuple(leaf.shape) for leaf in leaves if getattr(leaf, "ndim", 0) > 1]
    for shape, dtype in _input_shapes(shapes):
        x = jax.ShapeDtypeStruct(shape, dtype)
        yield {required[0].name: x, **others} if others else x


def _input_shapes(
    shapes: list[tuple[int, ...]],
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Guesses shapes and dtypes of inputs: float features, then tokens, then images.

    Args:
      shapes: of the parameters that have at least two axes.
    """
    sizes: dict[int, None] = {}  # a dict keeps the order of the parameters
    for shape in shapes:
        sizes |= dict.fromkeys(shape)
    for size in sizes:
        yield (1, size), jnp.float32
        yield (1, _LENGTHS[0], size), jnp.float32
    for length in dict.fromkeys((*_LENGTHS, *sizes)):
        yield (1, length), jnp.int32
    for channels in dict.fromkeys(shape[-2] for shape in shapes if len(shape) == 4):
        for side in _SIDES:
            yield (1, side, side, channels), jnp.float32


def first_line(error: Exception) -> str:
    """The first line of an error's text, after the type if that is not ValueError."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    if type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text}"


def _describe_example(example: Any) -> str:
    """An example with each array shown as its dtype and shape."""

    def describe(value: Any) -> Any:
        if hasattr(value, "shape"):
            return f"{value.dtype}{list(value.shape)}"
        return value

    return str(jax.tree.map(describe, example))
