"""Flax: quantize whole nnx models, or write models of quantized layers.

`quantize_model` returns a copy of a model with quantized weights and a report; `QLinear` and its like are layers that
are quantized from the start. Both put a QTensor into the layer's weight and jaxq's functions into the layer's own
hooks: no class is edited and no jax function is replaced. `calibrate` looks at what reaches each layer.
"""

from jaxq.nn import linen
from jaxq.nn._mixed_precision import Sensitivity, assign, mixed_recipe, sensitivity
from jaxq.nn.calibration._nnx import calibrate
from jaxq.nn.layers._nnx import (
    QConvTranspose,
    QEmbed,
    QuantizedParam,
    find_kind,
    put_weight,
    replace_variables,
    weight_axes,
)
from jaxq.nn.layers._nnx_explicit import QConv, QEinsum, QLinear, QLinearGeneral
from jaxq.nn.report._report import Report, Row
from jaxq.nn.transform._folding import register_folding, register_rotation
from jaxq.nn.transform._nnx import quantize_model
from jaxq.nn.transform._nnx_matching import find_layers
from jaxq.nn.transform._plan import plan
from jaxq.nn.transform._tree import dequantize_params, quantize_params

__all__ = [
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QLinear",
    "QLinearGeneral",
    "QuantizedParam",
    "Report",
    "Row",
    "Sensitivity",
    "assign",
    "calibrate",
    "dequantize_params",
    "find_kind",
    "find_layers",
    "linen",
    "mixed_recipe",
    "plan",
    "put_weight",
    "quantize_model",
    "quantize_params",
    "register_folding",
    "register_rotation",
    "replace_variables",
    "sensitivity",
    "weight_axes",
]
