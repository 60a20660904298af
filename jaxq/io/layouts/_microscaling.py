"""MXFP4 as GPT-OSS ships it: `blocks` and `scales`.

| array | dtype and shape | contents |
|---|---|---|
| `blocks` | uint8 `[*experts, out, in/32, 16]` | two E2M1 codes a byte, the first low |
| `scales` | uint8 `[*experts, out, in/32]` | exponents + 127 (E8M0) |

The files have longer names, such as `gate_up_proj_blocks`. The codes have the same
bytes in a QTensor, and experts are batch axes.

References:
  Open Compute Project, "OCP Microscaling Formats (MX) Specification", 2023.
"""

from __future__ import annotations

from jaxq.formats import Packing
from jaxq.io.layouts._floats import (
    MX_GROUP,
    MXFP4_SPEC,
    read_e8m0,
    require_fp4,
    written_e8m0,
)
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, qtensor
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.qtensor import QTensor, QuantSpec


def _spec(settings: Settings) -> QuantSpec:
    del settings
    return MXFP4_SPEC


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    del settings
    *batch, num_out, num_groups, num_bytes = tensors.shape("blocks", 3, has_batch=True)
    shape = (*batch, num_out, num_groups, MX_GROUP // 2)
    blocks = tensors.array("blocks", "uint8", shape)
    scale = read_e8m0(tensors, "scales", (*batch, num_out, num_groups))
    data = blocks.reshape(*batch, num_out, num_groups * num_bytes)
    num_in = num_groups * MX_GROUP
    return qtensor(MXFP4_SPEC, (num_in, num_out), data, scale, dtype="bfloat16")


def _write(weight: StoredWeight) -> Written:
    require_fp4(weight, MX_GROUP)
    data = weight.packed(Packing.LOW_FIRST, MX_GROUP)
    tensors = {
        "blocks": data.reshape(*data.shape[:-1], -1, MX_GROUP // 2),
        "scales": written_e8m0(weight),
    }
    return tensors, {"quant_method": "mxfp4"}


MXFP4 = Layout(
    name="mxfp4",
    summary="MXFP4 as GPT-OSS ships it, with stacked experts",
    tensors=("blocks", "scales"),
    make_spec=_spec,
    read=_read,
    write=_write,
    has_batch=True,
)
