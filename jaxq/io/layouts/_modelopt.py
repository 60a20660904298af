"""NVFP4 as NVIDIA ModelOpt ships it.

| array | dtype and shape | contents |
|---|---|---|
| `weight` | uint8 `[*experts, out, in / 2]` | two E2M1 codes in a byte, the first low |
| `weight_scale` | float8_e4m3fn `[*experts, out, in / 16]` | |
| `weight_scale_2` | float32 `[*experts]` | the scale of `weight_scale` |

A number is `code * weight_scale * weight_scale_2`. The array `input_scale` of the files
belongs to the activations.

References:
  NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025.
"""

from __future__ import annotations

from jaxq.io.layouts._floats import (
    FP8,
    NVFP4_GROUP,
    NVFP4_SPEC,
    codes_of_fp8,
    nvfp4_scale,
    written_nvfp4,
)
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, qtensor
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.qtensor import QTensor, QuantSpec


def _spec(settings: Settings) -> QuantSpec:
    settings.choice("group_size", (NVFP4_GROUP,), NVFP4_GROUP)
    return NVFP4_SPEC


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    spec = _spec(settings)
    *batch, num_out, num_bytes = tensors.shape("weight", 2, has_batch=True)
    num_in = 2 * num_bytes
    if num_in % NVFP4_GROUP:
        raise tensors.problem(
            "weight", f"has rows of {num_in} codes, no multiple of {NVFP4_GROUP}"
        )
    data = tensors.array("weight", "uint8", (*batch, num_out, num_bytes))
    groups = (*batch, num_out, num_in // NVFP4_GROUP)
    scale = tensors.scale("weight_scale", FP8, groups)
    global_scale = tensors.scale("weight_scale_2", "float32", tuple(batch))
    return qtensor(
        spec,
        (num_in, num_out),
        data,
        nvfp4_scale(codes_of_fp8(scale), global_scale),
        dtype="bfloat16",
    )


def _write(weight: StoredWeight) -> Written:
    data, scale, global_scale = written_nvfp4(weight)
    tensors = {
        "weight": data,
        "weight_scale": scale,
        "weight_scale_2": global_scale,
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    return tensors, config


NVFP4 = Layout(
    name="modelopt_nvfp4",
    summary="NVFP4 as NVIDIA ModelOpt ships it",
    tensors=("weight", "weight_scale", "weight_scale_2"),
    make_spec=_spec,
    read=_read,
    write=_write,
    has_batch=True,
)
