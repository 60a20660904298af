"""The quantized array `QTensor`, its `QuantSpec`, and conversions from and to floats.

`quantize` turns floats into a `QTensor` by a `QuantSpec` or the name of a preset.
`dequantize` returns floats. `fake_quant` does both and has a straight-through gradient.
`Geometry` contains all code about axes, blocks and padding.
"""

from jaxq.qtensor._bounds import inside_range, range_options, with_margin
from jaxq.qtensor._dequantize import decode_blocks, dequantize, scale_values
from jaxq.qtensor._fake_quant import fake_quant, quantize_computed
from jaxq.qtensor._fake_range import RANGE_GRADIENTS, RangeGradient
from jaxq.qtensor._geometry import ErrorContext, Geometry, describe, resolve
from jaxq.qtensor._granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
)
from jaxq.qtensor._inputs import (
    FLOATS,
    ON_NONFINITE,
    check_floats,
    check_key,
    is_traced,
    raise_if_not_finite,
)
from jaxq.qtensor._kept_slice import kept_slice
from jaxq.qtensor._layout import relayout, without_padding
from jaxq.qtensor._leaf_dtypes import check_leaves, leaf_dtypes
from jaxq.qtensor._leaf_specs import (
    divisible,
    find_cuts,
    fitting_spec,
    leaf_specs,
    num_shards,
    sharded_storage,
)
from jaxq.qtensor._mesh_axes import (
    axes_of_array,
    mesh_axes,
    quantized_like,
    shard_like,
)
from jaxq.qtensor._meta import Meta, input_size
from jaxq.qtensor._nnx_types import is_linen_module as is_linen_module
from jaxq.qtensor._nnx_types import is_nnx_module, is_nnx_state, is_nnx_variable
from jaxq.qtensor._partition import combine, partition
from jaxq.qtensor._presets import as_activation_spec, as_spec, presets
from jaxq.qtensor._product_operand import register_matmul
from jaxq.qtensor._qtensor import LEAVES, QTensor, is_qtensor
from jaxq.qtensor._quantize import quantize, quantize_array, without_gradient
from jaxq.qtensor._requantize import requantize
from jaxq.qtensor._row_codes import row_codes, row_quotients, row_scale
from jaxq.qtensor._scale_rules import ScaleRule
from jaxq.qtensor._spec import QuantSpec, activation_problem, as_static
from jaxq.qtensor._storage_axes import storage_axes
from jaxq.qtensor._trained_weight import (
    QUANTIZED,
    TRAINED_LEAVES,
    TrainedWeight,
    is_quantized,
)

# What users need. The other rooms of the package also import the names that are not
# listed: FLOATS, LEAVES, ON_NONFINITE, QUANTIZED, RANGE_GRADIENTS, TRAINED_LEAVES,
# ErrorContext, Meta, RangeGradient, ScaleRule, activation_problem, as_activation_spec,
# as_spec, as_static, axes_of_array, check_floats, check_key, check_leaves,
# decode_blocks, describe, divisible, find_cuts, inside_range, is_nnx_module,
# is_nnx_state, is_nnx_variable, is_qtensor, is_quantized, is_traced, kept_slice,
# leaf_dtypes, leaf_specs, mesh_axes, num_shards, quantize_array, quantize_computed,
# quantized_like, raise_if_not_finite, range_options, register_matmul, resolve,
# row_codes, row_quotients, row_scale, shard_like, sharded_storage, storage_axes,
# with_margin, without_gradient and without_padding.
__all__ = [
    "Geometry",
    "Granularity",
    "PerBlock",
    "PerChannel",
    "PerFlat",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantSpec",
    "TrainedWeight",
    "combine",
    "dequantize",
    "fake_quant",
    "partition",
    "presets",
    "quantize",
    "relayout",
    "requantize",
    "scale_values",
]
