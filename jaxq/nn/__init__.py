"""Flax: quantize whole nnx models, or write models with quantized layers.

`quantize_model` returns a copy of a model with quantized weights, and a report.
`QLinear` and the other `Q` layers are quantized from the start. The weight of a
quantized layer is a QTensor. The layer's own hooks (`dot_general`, for example) hold
functions of jaxq that take a QTensor. No Flax class is edited, and no JAX function is
replaced. `calibrate` collects statistics of each layer's input. `jaxq.nn.linen` has the
same functions for Flax linen.
"""

from jaxq.nn import linen
from jaxq.nn._mixed_precision import assign, mixed_recipe
from jaxq.nn._sensitivity import Sensitivity, sensitivity
from jaxq.nn.calibration import calibrate
from jaxq.nn.layers import (
    FoldedBatchNorm,
    FoldedTrainedParam,
    LayerKind,
    QConv,
    QConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
    QuantizedParam,
    QuantStats,
    Roles,
    TrainedBatchNorm,
    TrainedParam,
    register_layer,
    unregister_layer,
)
from jaxq.nn.layers import find_kind as find_kind
from jaxq.nn.layers import put_weight as put_weight
from jaxq.nn.layers import replace_variables as replace_variables
from jaxq.nn.layers import weight_axes as weight_axes
from jaxq.nn.report import Report, Row
from jaxq.nn.transform import (
    dequantize_params,
    fold_batch_norm,
    plan,
    quantize_model,
    quantize_params,
    register_folding,
    register_rotation,
)
from jaxq.nn.transform import find_layers as find_layers

# The names imported with `as` are for other packages of jaxq, not for users.
__all__ = [
    "FoldedBatchNorm",
    "FoldedTrainedParam",
    "LayerKind",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QLinear",
    "QLinearGeneral",
    "QuantStats",
    "QuantizedParam",
    "Report",
    "Roles",
    "Row",
    "Sensitivity",
    "TrainedBatchNorm",
    "TrainedParam",
    "assign",
    "calibrate",
    "dequantize_params",
    "fold_batch_norm",
    "linen",
    "mixed_recipe",
    "plan",
    "quantize_model",
    "quantize_params",
    "register_folding",
    "register_layer",
    "register_rotation",
    "sensitivity",
    "unregister_layer",
]
