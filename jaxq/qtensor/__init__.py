"""The container: where scales vary, how a tensor is stored, and the way there and back.

`quantize` turns floats into a `QTensor` by a `QuantSpec` (or a preset's name), `dequantize` brings them back,
`fake_quant` does both with a straight-through gradient. All knowledge of axes, blocks and padding is in `Geometry`.
"""

from jaxq.qtensor._bounds import inside_range, with_margin
from jaxq.qtensor._dequantize import decode_blocks, dequantize, scale_values
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
)
from jaxq.qtensor._layout import relayout
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._partition import combine, partition
from jaxq.qtensor._presets import as_spec, presets
from jaxq.qtensor._qtensor import LEAVES, QTensor, register_matmul
from jaxq.qtensor._quantize import (
    ON_NONFINITE,
    check_floats,
    fake_quant,
    quantize,
    raise_if_not_finite,
    requantize,
)
from jaxq.qtensor._scale_rules import ScaleRule
from jaxq.qtensor._spec import QuantSpec, as_static

__all__ = [
    "LEAVES",
    "ON_NONFINITE",
    "Geometry",
    "Granularity",
    "Meta",
    "PerBlock",
    "PerChannel",
    "PerFlat",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantSpec",
    "as_spec",
    "as_static",
    "check_floats",
    "combine",
    "decode_blocks",
    "dequantize",
    "fake_quant",
    "inside_range",
    "partition",
    "presets",
    "quantize",
    "raise_if_not_finite",
    "relayout",
    "requantize",
    "scale_values",
    "with_margin",
]
