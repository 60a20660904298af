"""Runs the code of Flax's own linen layers on a quantized weight.

Dense, DenseGeneral and Conv read their product from fields (`dot_general`,
`conv_general_dilated`, `promote_dtype`). Their code runs on a stand-in, which has
jaxq's functions in these fields and the QTensor as its parameter. Nothing of Flax is
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen

from jaxq.nn.layers._conv_product import conv_general_dilated
from jaxq.nn.layers._linen_kind import QuantizedMethod, code_of
from jaxq.nn.layers._promotion import PromoteQTensors
from jaxq.ops import dot_general
from jaxq.qtensor import QTensor


class StandIn:
    """A linen layer as its own code sees it, with another weight and jaxq's products.

    Args:
      layer: the layer. Everything else is read from it.
      name: of the parameter that holds the weight.
      weight: `weight(init, shape, dtype)` returns the weight. The arguments are those
        with which the layer's code reads its parameter.
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


def promote(layer: Any, *arrays: Any, **kwargs: Any) -> tuple:
    """The layer's `promote_dtype` of arrays and QTensors."""

    def original(arrays: tuple, **kwargs: Any) -> tuple:
        return layer.promote_dtype(*arrays, **kwargs)

    return PromoteQTensors(original)(arrays, **kwargs)


def with_own_code(flax_method: Any, name: str) -> QuantizedMethod:
    """A method for a quantized weight that runs the code of Flax's method.

    Args:
      flax_method: reads its product from the fields of its layer.
      name: of the parameter that holds the weight.
    """
    code = code_of(flax_method)

    def method(layer: Any, weight: QTensor, *args: Any, **kwargs: Any) -> Any:
        return code(StandIn(layer, name, lambda *_: weight), *args, **kwargs)

    return method
