"""Checks, before anything is quantized, that linen layers can get QTensors as weights.

The module is traced with a placeholder for each weight: a uint8 array with a shape that
no weight has. If the placeholder still has this shape when its layer is called, the
module does not change the weight. The check finds three kinds of weights:

- weights that are changed before the layer gets them (`nn.WeightNorm`,
  `nn.map_variables`);
- weights that are stacked along another axis than 0;
- weights that the module itself uses in a way that a QTensor does not support.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxq.nn.layers._linen_discovery import LinenLayer, Structure, first_line
from jaxq.nn.layers._linen_interceptor import run_with_codes, stored_qtensor
from jaxq.nn.layers._linen_trace import (
    FlatParams,
    Forward,
    params_of,
    trace,
    with_params,
)
from jaxq.qtensor import QTensor

# Possible sizes of a placeholder. The first three that differ from all stack sizes are
# used.
_SIZES = (7, 11, 13, 17, 19, 23, 29, 31)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["path", "tail"]
)
class Placeholder:
    """Takes the place of a weight that will be quantized.

    Args:
      data: uint8 `[*stack, *tail]`.
      path: of the layer.
      tail: a shape that no weight has.
    """

    def __init__(self, data: Any, path: str, tail: tuple[int, ...]):
        self.data, self.path, self.tail = data, path, tail


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

    def run(paths: Sequence[str]) -> None:
        """Traces the module with placeholders in the layers at these paths."""
        params = params_of(variables)
        for path in paths:
            layer = structure.layers[path]
            params[layer.key] = _placeholder(layer, params)

        def read(layer: linen.Module, name: str) -> QTensor | None:
            value = layer.get_variable("params", name)
            if not isinstance(value, Placeholder):
                return stored_qtensor(layer, name)
            _check_untouched(value, name)
            roles = structure.layers[value.path].roles
            return _one_element(weights[value.path], len(roles.shape))

        interceptor = functools.partial(run_with_codes, read)
        changed = with_params(variables, params)
        trace(module, changed, structure.example, forward, interceptor)

    try:
        run(list(weights))
    except Exception as error:
        # One trace with all weights is fast. If it fails, one trace for each weight
        # finds the weights that fail.
        problems = []
        for path in weights:
            try:
                run([path])
            except Exception as layer_error:  # a module may raise anything here
                problems.append(_problem_line(structure.layers[path], layer_error))
        return problems or [f"  {', '.join(weights)}: {first_line(error)}"]
    return []


def _placeholder(layer: LinenLayer, params: FlatParams) -> Placeholder:
    """A value for a layer's weight with the same stack axes and another shape."""
    outer = linen.meta.unbox(params[layer.key]).shape
    stack = outer[: len(outer) - len(layer.roles.shape)]
    tail = tuple([size for size in _SIZES if size not in stack][:3])
    data = jax.ShapeDtypeStruct((*stack, *tail), jnp.uint8)
    return Placeholder(data, layer.path, tail)


def _check_untouched(value: Placeholder, name: str) -> None:
    """Raises a ValueError if the module changed a placeholder."""
    if value.data.shape != value.tail or value.data.dtype != jnp.uint8:
        raise ValueError(
            f"its {name} is changed before the layer gets it (by nn.WeightNorm or "
            "nn.map_variables, for example), or stacked along another axis than 0"
        )


def _one_element(qt: QTensor, ndim: int) -> QTensor:
    """A QTensor of zeros like one element of a stack. The element has `ndim` axes."""
    num_stacked = len(qt.shape) - ndim
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape[num_stacked:], leaf.dtype), qt
    )


def _problem_line(layer: LinenLayer, error: Exception) -> str:
    kind = layer.kind
    reason = str(error)
    if type(error) is not ValueError or not reason.startswith("its "):
        reason = (
            f"its {kind.weight} is used in a way that a QTensor does not support "
            f"({first_line(error)})"
        )
    return f"  {layer.path or kind.name} ({kind.name}): {reason}"
