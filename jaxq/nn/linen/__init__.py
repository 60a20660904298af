"""Flax linen: quantize whole modules, or write modules of quantized layers.

`quantize_model` returns a module, variables and a report; the module is used as before. `QDense` and its like are
layers that are quantized from the start. `calibrate` looks at what reaches each layer. No class of flax is edited and
no function of jax replaced: layers are met through `flax.linen.intercept_methods`.
"""

from jaxq.nn.linen._calibration import calibrate
from jaxq.nn.linen._explicit import QConv, QConvTranspose, QDense, QDenseGeneral, QEinsum, QEmbed
from jaxq.nn.linen._serialization import register_serialization
from jaxq.nn.linen._transform import quantize_model
from jaxq.nn.linen._wrapper import Quantized

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
