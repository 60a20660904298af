"""Flax: quantize whole nnx models, or write models of quantized layers.

`quantize_model` returns a copy of a model with quantized weights and a report; `QLinear` and its like are layers that
are quantized from the start. Both put a QTensor into the layer's weight and jaxq's functions into the layer's own
hooks: no class is edited and no jax function is replaced. `calibrate` looks at what reaches each layer.
"""

from jaxq.nn import linen
from jaxq.nn._mixed_precision import Sensitivity, assign, mixed_recipe, sensitivity
from jaxq.nn.calibration import calibrate
from jaxq.nn.layers import (
    LayerKind,
    QConv,
    QConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
    QuantizedParam,
    Roles,
    find_kind,
    put_weight,
    register_layer,
    replace_variables,
    unregister_layer,
    weight_axes,
)
from jaxq.nn.report import Report, Row
from jaxq.nn.transform._folding import register_folding
from jaxq.nn.transform._nnx import quantize_model
from jaxq.nn.transform._nnx_layers import find_layers
from jaxq.nn.transform._plan import plan
from jaxq.nn.transform._rotation import register_rotation
from jaxq.nn.transform._tree import dequantize_params, quantize_params

__all__ = [
    "LayerKind",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QLinear",
    "QLinearGeneral",
    "QuantizedParam",
    "Report",
    "Roles",
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
    "register_layer",
    "register_rotation",
    "replace_variables",
    "sensitivity",
    "unregister_layer",
    "weight_axes",
]
