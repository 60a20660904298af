"""fp8 with one scale for each block of the weight, as DeepSeek and Qwen ship it.

| array | dtype and shape | contents |
|---|---|---|
| `weight` | float8_e4m3fn `[*experts, out, in]` | |
| `weight_scale_inv` | float32 `[*experts, out/128, in/128]` | one for each block |

A number is `weight * weight_scale_inv`: the array has the scale, not its inverse.
Blocks at the end of a row or a column may be smaller.

References:
  DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.
"""

from __future__ import annotations

from jaxq.io.layouts._floats import FP8, codes_of_fp8, fp8_of_codes, fp8_spec
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, qtensor
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.qtensor import QTensor, QuantSpec

_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")


def _spec(settings: Settings) -> QuantSpec:
    return fp8_spec(*_block(settings))


def _block(settings: Settings) -> tuple[int, int]:
    """The block of a torch weight, (out, in)."""
    return settings.pair("weight_block_size", (128, 128))


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    settings.choice("fmt", ("e4m3",), "e4m3")
    out_block, in_block = _block(settings)
    *batch, num_out, num_in = tensors.shape("weight", 2, has_batch=True)
    weight = tensors.array("weight", FP8, (*batch, num_out, num_in))
    num_blocks = (-(-num_out // out_block), -(-num_in // in_block))
    scale = tensors.scale("weight_scale_inv", _SCALES, (*batch, *num_blocks))
    spec = fp8_spec(out_block, in_block).replace(scale=scale.dtype.name)
    shape = (num_in, num_out)
    return qtensor(spec, shape, codes_of_fp8(weight), scale, dtype="bfloat16")


def _write(weight: StoredWeight) -> Written:
    fmt = weight.spec.fmt.name
    weight.refuse_unless(fmt == FP8, f"expected the format {FP8}, got {fmt}")
    weight.plain()
    weight.refuse_unless(not weight.qt.meta.geometry.flat, "its blocks cross rows")
    sizes = list(weight.block_setting())
    tensors = {
        "weight": fp8_of_codes(weight.codes()),
        "weight_scale_inv": weight.array_scale("float32"),
    }
    return tensors, {"quant_method": "fp8", "weight_block_size": sizes, "fmt": "e4m3"}


FP8_BLOCK = Layout(
    name="fp8_block",
    summary="fp8 with block scales as DeepSeek and Qwen ship it",
    tensors=("weight", "weight_scale_inv"),
    make_spec=_spec,
    read=_read,
    write=_write,
    has_batch=True,
)
