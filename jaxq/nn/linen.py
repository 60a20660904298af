"""Flax linen: quantize whole modules, or write modules with quantized layers.

`quantize_model` returns a module, its variables and a report. The returned module is
called in the same way as the float module. `QDense` and the other `Q` layers are
quantized from the start. `calibrate` collects statistics of each layer's input.
`sensitivity` measures how much the predictions change if one layer is quantized. No
Flax class is edited, and no JAX function is replaced. jaxq sees the calls of layers
through `flax.linen.intercept_methods`.
"""

from jaxq.nn._linen_sensitivity import sensitivity
from jaxq.nn.calibration import linen_calibrate as calibrate
from jaxq.nn.layers import Quantized, register_serialization
from jaxq.nn.layers._linen_conv import QConv
from jaxq.nn.layers._linen_conv_transpose import QConvTranspose
from jaxq.nn.layers._linen_dense import QDense, QDenseGeneral
from jaxq.nn.layers._linen_einsum import QEinsum
from jaxq.nn.layers._linen_embed import QEmbed
from jaxq.nn.transform import linen_fold_batch_norm as fold_batch_norm
from jaxq.nn.transform import linen_quantize_model as quantize_model
from jaxq.sharding.boxes import QuantizedBox

register_serialization()

__all__ = [
    "QConv",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
    "Quantized",
    "QuantizedBox",
    "calibrate",
    "fold_batch_norm",
    "quantize_model",
    "sensitivity",
]
