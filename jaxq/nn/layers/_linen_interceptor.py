"""Runs linen layers whose weight is a QTensor, through `flax.linen.intercept_methods`.

If the stored weight is a QTensor, the layer multiplies by its codes. If the stored
weight is an array, Flax's own method runs. The caches of jit do not depend on
interceptors. They depend on the variables, so a function compiles again if a float
weight becomes a QTensor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import linen

from jaxq.nn.layers._linen_kind import find_call, find_setup
from jaxq.qtensor import QUANTIZED, QTensor, TrainedWeight
from jaxq.sharding import value_in_box

# The collection of moving averages. The average of the parameter "kernel" has the name
# `range_name("kernel")`.
QUANT_STATS = "quant_stats"

# `read(layer, name)` returns the QTensor or TrainedWeight of a parameter, or None if it
# is an array.
ReadWeight = Callable[[linen.Module, str], QTensor | TrainedWeight | None]


def use_codes(
    call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    """An interceptor that multiplies by codes in layers whose weight is a QTensor."""
    return run_with_codes(stored_qtensor, call, args, kwargs, context)


def run_with_codes(
    read: ReadWeight,
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """Does the same as `use_codes`, but reads the weight of a layer with `read`."""
    layer = context.module
    method_call = find_call(context) or find_setup(context)
    if method_call is None:
        return call(*args, **kwargs)
    weight = read(layer, method_call.kind.weight)
    if weight is None:
        return call(*args, **kwargs)
    problem = method_call.kind.problem(layer, *args, **kwargs)
    if problem is not None:
        raise ValueError(
            f"{'/'.join(layer.path) or type(layer).__name__}: its weight is quantized, "
            f"but {problem}. Use the float weight of this layer."
        )
    return method_call.method(layer, weight, *args, **kwargs)


def stored_qtensor(layer: linen.Module, name: str) -> QTensor | TrainedWeight | None:
    """A parameter of a layer if it is a QTensor or TrainedWeight, otherwise None."""
    value = value_in_box(layer.get_variable("params", name))
    if isinstance(value, TrainedWeight) and value.decay is not None:
        return _with_stored_range(layer, name, value)
    return value if isinstance(value, QUANTIZED) else None


def range_name(weight: str) -> str:
    """The name of the moving average of a parameter in the collection."""
    return f"{weight}_range"


def _with_stored_range(
    layer: linen.Module, weight_name: str, weight: TrainedWeight
) -> TrainedWeight:
    """The weight with its moving average, which changes if the collection is mutable.

    Raises:
      ValueError: the layer cannot see the average.
    """
    if weight.input_range is not None:
        return weight  # `prepare` has not moved the average to the collection yet
    name = range_name(weight_name)
    if not layer.has_variable(QUANT_STATS, name):
        path = "/".join((*layer.path, name))
        raise ValueError(
            f"The collection {QUANT_STATS!r} has no {path!r}. If the layer is inside "
            f"nn.scan or nn.vmap, pass variable_axes={{'params': 0, {QUANT_STATS!r}: "
            f"0}} to this transform, or variable_carry={QUANT_STATS!r} to an nn.scan "
            "whose steps share the parameters. Otherwise pass the variables that "
            f"jaxq.training.linen.prepare returned, with their {QUANT_STATS!r}."
        )
    record = None
    if layer.is_mutable_collection(QUANT_STATS):
        record = functools.partial(layer.put_variable, QUANT_STATS, name)
    input_range = layer.get_variable(QUANT_STATS, name)
    return dataclasses.replace(weight, input_range=input_range, record=record)
