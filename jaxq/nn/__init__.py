"""Flax: quantize whole nnx models, or write models of quantized layers.

`quantize_model` returns a copy of a model with quantized weights and a report; `QLinear` and its like are layers that
are quantized from the start. Both put a QTensor into the layer's weight and jaxq's functions into the layer's own
hooks: no class is edited and no jax function is replaced. `calibrate` looks at what reaches each layer.
"""

from jaxq.nn import linen
from jaxq.nn._calibration import calibrate
from jaxq.nn._explicit import QConv, QEinsum, QLinear, QLinearGeneral
from jaxq.nn._folding import register_folding, register_rotation
from jaxq.nn._layers import (
    QConvTranspose,
    QEmbed,
    QuantizedParam,
    find_kind,
    put_weight,
    replace_variables,
    weight_axes,
)
from jaxq.nn._matching import find_layers
from jaxq.nn._mixed import Sensitivity, assign, mixed_recipe, sensitivity
from jaxq.nn._params import dequantize_params, quantize_params
from jaxq.nn._plan import plan
from jaxq.nn._report import Report, Row
from jaxq.nn._transform import quantize_model

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
