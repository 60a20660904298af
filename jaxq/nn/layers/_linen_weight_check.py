"""Checks, before anything is quantized, that linen layers can get QTensors as weights.

The module is traced twice. The first trace has float weights. It finds weights that
change before their layer multiplies by them:

- by a wrapper (`nn.WeightNorm`, `nn.map_variables`);
- by a subclass that overrides `param` (weight standardization);
- by the layer's own `promote_dtype`;
- by a stack along another axis than 0.

The second trace has QTensors. It finds modules that use a QTensor in a way that it does
not support, or that change its codes or scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen

from jaxq.nn.layers._linen_discovery import LinenLayer, Structure, first_line
from jaxq.nn.layers._linen_interceptor import run_with_codes, stored_qtensor
from jaxq.nn.layers._linen_kind import find_call
from jaxq.nn.layers._linen_stand_in import MarkedWeight
from jaxq.nn.layers._linen_trace import (
    Forward,
    leaf_name,
    params_of,
    trace,
    with_params,
)
from jaxq.nn.layers._weight_marks import changed_weights, mark
from jaxq.qtensor import QTensor, TrainedWeight


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qtensor"], meta_fields=[]
)
class Placeholder:
    """Takes the place of a weight that will be quantized.

    Layers take the QTensor out. If other code of the module uses the weight, it raises
    an error. Most operations would also raise an error for a QTensor.

    Args:
      qtensor: the planned QTensor, or one element of its stack.
    """

    def __init__(self, qtensor: Any):
        self.qtensor = qtensor

    def __getattr__(self, name: str) -> Any:
        # jax and flax ask for special names, such as `__jax_array__`.
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"other code than the layer reads {name!r} of it")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("other code than the layer indexes it")


class _LinenCall(NamedTuple):
    """A linen module, and how it is called."""

    module: linen.Module
    variables: Any
    structure: Structure
    forward: Forward | None

    def changed_leaves(
        self, variables: Any, interceptor: Callable[..., Any]
    ) -> set[str]:
        """The names of the marked leaves that change in a trace with `variables`."""
        example = self.structure.example
        traced = trace(self.module, variables, example, self.forward, interceptor)
        return set(changed_weights(*traced))


def check_weights(
    module: linen.Module,
    variables: Any,
    structure: Structure,
    forward: Forward | None,
    weights: Mapping[str, QTensor],
) -> list[str]:
    """Returns one line for each weight that cannot be a QTensor, with the reason.

    Args:
      module: a linen module.
      variables: its float variables.
      structure: the layers of the module.
      forward: as in `trace`.
      weights: the QTensors that are planned, by path of the layer. Leaves are
        `jax.ShapeDtypeStruct`s and have the stack axes.
    """
    model = _LinenCall(module, variables, structure, forward)
    layers = [structure.layers[path] for path in weights]
    interceptor = functools.partial(_run_marked, [layer.path for layer in layers])
    changed = model.changed_leaves(variables, interceptor)
    problems = [
        _problem_line(layer, _changed(layer.kind.weight))
        for layer in layers
        if leaf_name(layer.key, 0) in changed
    ]
    unchanged = [
        layer.path for layer in layers if leaf_name(layer.key, 0) not in changed
    ]

    def run(paths: Sequence[str]) -> list[str]:
        """The problems of a trace with QTensors in the layers at these paths."""
        return _problems_with_codes(model, {path: weights[path] for path in paths})

    try:
        return problems + run(unchanged)
    except Exception as error:
        # One trace with all weights is fast. If it fails, one trace for each weight
        # finds the weights that fail.
        for path in unchanged:
            try:
                problems += run([path])
            except Exception as layer_error:  # a module may raise anything here
                problems.append(_problem_line(structure.layers[path], layer_error))
        return problems or [f"  {', '.join(weights)}: {first_line(error)}"]


def _run_marked(
    paths: Sequence[str],
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """An interceptor that marks the float weights of the layers at these paths."""
    layer, layer_call = context.module, find_call(context)
    if layer_call is None or "/".join(layer.path) not in paths:
        return run_with_codes(stored_qtensor, call, args, kwargs, context)
    name = leaf_name((*layer.path, layer_call.kind.weight), 0)
    return context.orig_method.func(MarkedWeight(layer, name), *args, **kwargs)


def _problems_with_codes(
    model: _LinenCall, weights: Mapping[str, QTensor]
) -> list[str]:
    """The weights whose codes or scales change, in a trace with these QTensors.

    Raises:
      Exception: of any type, if the module does not support a QTensor.
    """
    layers = model.structure.layers
    keys = {path: layers[path].key for path in weights}

    def read(layer: linen.Module, name: str) -> QTensor | TrainedWeight | None:
        path = "/".join(layer.path)
        if path not in weights:
            return stored_qtensor(layer, name)
        num_stacked = weights[path].ndim - len(layers[path].roles.shape)
        value = layer.get_variable("params", name)
        return _marked(value, weights[path], num_stacked, keys[path])

    interceptor = functools.partial(run_with_codes, read)
    params = params_of(model.variables)
    params |= {keys[path]: Placeholder(qt) for path, qt in weights.items()}
    variables = with_params(model.variables, params)
    changed = model.changed_leaves(variables, interceptor)
    return [
        _problem_line(layers[path], _changed(key[-1]))
        for path, key in keys.items()
        if changed
        & {leaf_name(key, i) for i in range(len(jax.tree.leaves(weights[path])))}
    ]


def _marked(
    value: Any, planned: QTensor, num_stacked: int, key: tuple[str, ...]
) -> QTensor:
    """The QTensor that a layer gets, with marked leaves.

    Args:
      value: the parameter that the layer gets.
      planned: the QTensor of the whole stack of layers.
      num_stacked: the number of stack axes of `planned`.
      key: the names that lead to the parameter.

    Raises:
      ValueError: `value` is not one element of the stack.
    """
    if not isinstance(value, Placeholder):
        raise _changed(key[-1])
    leaves, treedef = jax.tree.flatten(value.qtensor)
    for leaf, whole in zip(leaves, jax.tree.leaves(planned), strict=True):
        if (leaf.shape, leaf.dtype) != (whole.shape[num_stacked:], whole.dtype):
            raise _changed(key[-1])
    marked = [mark(leaf, leaf_name(key, i)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, marked)


def _changed(name: str) -> ValueError:
    return ValueError(
        f"its {name} is changed before the layer multiplies by it (for example by "
        "nn.WeightNorm, nn.map_variables, a subclass that overrides `param`, or "
        "promote_dtype=), or it is stacked along another axis than 0. To quantize the "
        "layer, store the changed weight in the variables of a plain layer"
    )


def _problem_line(layer: LinenLayer, error: Exception) -> str:
    kind = layer.kind
    reason = str(error)
    if type(error) is not ValueError or not reason.startswith("its "):
        reason = (
            f"its {kind.weight} is used in a way that a QTensor does not support "
            f"({first_line(error)})"
        )
        if kind.name == "Embed":
            reason += ". Embed.attend supports it, for an output head"
    return f"  {layer.path or kind.name} ({kind.name}): {reason}"
