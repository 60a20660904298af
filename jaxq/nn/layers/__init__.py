"""The kinds of layers that jaxq can quantize.

Each kind has its own file (`_nnx_linear.py`, `_linen_dense.py`, ...). The file holds
the record of the kind, and the layer class that is quantized from the start.
`register_layer` adds a kind.
"""

from jaxq.nn.layers._batch_norm import (
    FoldedBatchNorm,
    FoldedTrainedParam,
    TrainedBatchNorm,
    folded_bias,
    folded_kernel,
    norm_factor,
)
from jaxq.nn.layers._call_inputs import InputRows
from jaxq.nn.layers._conv_patches import conv_patches, patches_shape
from jaxq.nn.layers._input_transform import TransformInput, input_transforms
from jaxq.nn.layers._kind import (
    LayerKind,
    bare_kind,
    find_kind,
    foreign_hook,
    layer_kinds,
    put_weight,
    register_layer,
    stack_note,
    unregister_layer,
    weight_axes,
)
from jaxq.nn.layers._linen_conv import CONV
from jaxq.nn.layers._linen_conv_transpose import CONV_TRANSPOSE
from jaxq.nn.layers._linen_dense import DENSE, GENERAL
from jaxq.nn.layers._linen_discovery import LinenLayer, Structure, find_linen_layers
from jaxq.nn.layers._linen_einsum import EINSUM
from jaxq.nn.layers._linen_embed import EMBED
from jaxq.nn.layers._linen_interceptor import QUANT_STATS, range_name
from jaxq.nn.layers._linen_kind import LinenKind, find_call, linen_kinds
from jaxq.nn.layers._linen_quantized import Quantized
from jaxq.nn.layers._linen_serialization import register_serialization
from jaxq.nn.layers._linen_trace import FlatParams, Forward, params_of, with_params
from jaxq.nn.layers._linen_weight_check import check_weights
from jaxq.nn.layers._nnx_conv import QConv
from jaxq.nn.layers._nnx_conv_transpose import QConvTranspose
from jaxq.nn.layers._nnx_einsum import QEinsum
from jaxq.nn.layers._nnx_embed import QEmbed
from jaxq.nn.layers._nnx_linear import QLinear, QLinearGeneral
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import (
    PromoteQTensors,
    accept_arrays,
    accept_qtensors,
)
from jaxq.nn.layers._quantized_param import (
    QuantizedParam,
    float_param,
    quantized_param,
    replace_variables,
)
from jaxq.nn.layers._roles import Roles
from jaxq.nn.layers._trained_param import (
    QuantStats,
    TrainedFacts,
    TrainedParam,
    trained_facts,
)

# Other packages of jaxq import the names above as well. Importing the linen kinds
# (`CONV`, `DENSE`, ...) registers them.
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
    "Roles",
    "TrainedBatchNorm",
    "TrainedParam",
    "register_layer",
    "unregister_layer",
]
