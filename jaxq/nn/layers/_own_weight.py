"""Quantizes the weight of a new nnx layer such as `QLinear`."""

from __future__ import annotations

from typing import Any

from jaxq.nn.layers._kind import find_kind, put_weight, weight_axes
from jaxq.nn.layers._quantized_param import quantized_param
from jaxq.qtensor import quantize


def quantize_own_weight(layer: Any, weight: Any, activation: Any) -> None:
    """Quantizes a newly initialized nnx layer, in place.

    Args:
      layer: an nnx layer of a kind that jaxq knows.
      weight: preset name or `QuantSpec` of the weight. None keeps the float weight,
        and the product accumulates in float32.
      activation: preset name or `QuantSpec` for dynamic activation quantization. None
        leaves the input in floats.

    Raises:
      ValueError: `activation` is given and `weight` is None; `weight` is not None and
        the layer has a mask, or its kind has another problem with it.
    """
    kind = find_kind(layer)
    assert kind is not None
    caller = type(layer).__name__
    if weight is None:
        if activation is not None:
            raise ValueError(
                f"{caller}: activation={activation!r} needs a quantized weight=, "
                "but weight is None. Pass a preset name as weight=."
            )
        kind.attach(layer)
        return
    if getattr(layer, "mask", None) is not None:
        raise ValueError(
            f"{caller}: mask= needs weight=None, because a quantized kernel has no "
            "mask. Pass weight=None, or multiply the mask into a float kernel first."
        )
    problem = kind.problem(layer)
    if problem is not None:
        raise ValueError(f"{caller}: {problem}. Or pass weight=None.")
    contracting, batch = weight_axes(layer, kind)
    variable = getattr(layer, kind.weight)
    qt = quantize(
        variable[...], weight, contracting=contracting, batch=batch, name=kind.weight
    )
    qt = qt.with_activation(activation)
    put_weight(layer, kind, quantized_param(qt, variable))
