"""Flax linen: quantize whole modules, or write modules of quantized layers.

`quantize_model` returns a module, variables and a report; the module is used as before. `QDense` and its like are
layers that are quantized from the start. `calibrate` looks at what reaches each layer. No class of flax is edited and
no function of jax replaced: layers are met through `flax.linen.intercept_methods`.
"""

from jaxq.nn.calibration._linen import calibrate
from jaxq.nn.layers._linen_explicit import (
    QConv,
    QConvTranspose,
    QDense,
    QDenseGeneral,
    QEinsum,
    QEmbed,
)
from jaxq.nn.layers._linen_quantized import Quantized
from jaxq.nn.layers._linen_state import register_serialization
from jaxq.nn.transform._linen import quantize_model

register_serialization()

__all__ = [
    "QConv",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
    "Quantized",
    "calibrate",
    "quantize_model",
]
