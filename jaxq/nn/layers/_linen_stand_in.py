"""Runs the code of Flax's own linen layers on a quantized weight.

Dense, DenseGeneral and Conv read their product from fields (`dot_general`,
`conv_general_dilated`, `promote_dtype`). Their code runs on a `StandIn` object. This
object has jaxq's functions in these fields, and the QTensor as its parameter. Flax
itself is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen

from jaxq.nn.layers._conv_product import conv_general_dilated
from jaxq.nn.layers._linen_kind import QuantizedMethod, code_of
from jaxq.nn.layers._promotion import PromoteQTensors
from jaxq.nn.layers._weight_marks import mark
from jaxq.ops import dot_general
from jaxq.qtensor import QTensor


class StandIn:
    """Takes the place of a linen layer, with another weight and jaxq's products.

    Args:
      layer: the layer. All other attributes are read from the layer.
      name: of the parameter that holds the weight.
      weight: `weight(init, shape, dtype)` returns the weight. The arguments are those
        that the layer's code passes to `self.param`.
    """

    dot_general = staticmethod(dot_general)
    dot_general_cls = None
    conv_general_dilated = staticmethod(conv_general_dilated)
    conv_general_dilated_cls = None

    def __init__(self, layer: linen.Module, name: str, weight: Callable[..., Any]):
        self._layer, self._name, self._weight = layer, name, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, name: str, init: Callable[..., Any], *args: Any) -> Any:
        if name == self._name:
            return self._weight(init, *args)
        return self._layer.param(name, init, *args)

    def promote_dtype(self, *arrays: Any, **kwargs: Any) -> tuple:
        return promote(self._layer, *arrays, **kwargs)


class MarkedWeight:
    """Takes the place of a linen layer with a float weight, and marks the weight.

    Args:
      layer: the layer. All attributes are read from the layer.
      name: for `mark`.
    """

    def __init__(self, layer: linen.Module, name: str):
        self._layer, self._name = layer, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def promote_dtype(self, *arrays: Any, **kwargs: Any) -> tuple:
        """The layer's `promote_dtype`. Its result goes straight into the product."""
        promoted = list(self._layer.promote_dtype(*arrays, **kwargs))
        # Flax passes (input, weight, bias), (input, table) or (table,).
        position = min(1, len(promoted) - 1)
        promoted[position] = mark(promoted[position], self._name)
        return tuple(promoted)


def promote(layer: Any, *arrays: Any, **kwargs: Any) -> tuple:
    """Applies the layer's `promote_dtype` to arrays and QTensors."""

    def original(arrays: tuple, **kwargs: Any) -> tuple:
        return layer.promote_dtype(*arrays, **kwargs)

    return PromoteQTensors(original)(arrays, **kwargs)


def with_own_code(flax_method: Any, name: str) -> QuantizedMethod:
    """Returns a method for quantized weights. It runs the code of Flax's own method.

    Args:
      flax_method: a method that reads its product from the fields of the layer.
      name: of the parameter that holds the weight.
    """
    code = code_of(flax_method)

    def method(layer: Any, weight: QTensor, *args: Any, **kwargs: Any) -> Any:
        return code(StandIn(layer, name, lambda *_: weight), *args, **kwargs)

    return method
