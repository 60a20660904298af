"""Flax linen: quantize whole modules, or write modules of quantized layers.

`quantize_model` returns a module, variables and a report; the module is used as before. `QDense` and its like are
layers that are quantized from the start. `calibrate` looks at what reaches each layer. No class of flax is edited and
no function of jax replaced: layers are met through `flax.linen.intercept_methods`.
"""

from jaxq.nn.calibration import linen_calibrate as calibrate
from jaxq.nn.layers import Quantized, register_serialization
from jaxq.nn.layers._linen_conv import QConv
from jaxq.nn.layers._linen_conv_transpose import QConvTranspose
from jaxq.nn.layers._linen_dense import QDense, QDenseGeneral
from jaxq.nn.layers._linen_einsum import QEinsum
from jaxq.nn.layers._linen_embed import QEmbed
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
