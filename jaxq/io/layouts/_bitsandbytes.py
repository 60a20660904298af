"""The weights of bitsandbytes: 4-bit tables in flat blocks, and LLM.int8.

NF4 and FP4. The torch weight `[out, in]` is flattened, and blocks of `blocksize`
numbers cross rows. These are the blocks of `PerFlat`.

| array | dtype and shape | contents |
|---|---|---|
| `weight` | uint8 `[n/2, 1]` | two codes in a byte, the first in the high bits |
| `weight.absmax` | float32 `[blocks]`, uint8 if nested | scales, or their codes |
| `weight.quant_map` | float32 `[16]` | the number of each code |
| `weight.nested_absmax` | float32 `[blocks/256]` | scales of the scales |
| `weight.nested_quant_map` | float32 `[256]` | the number of each code of a scale |
| `weight.quant_state.bitsandbytes__nf4` (or `__fp4`) | uint8 | JSON in UTF-8 |

A nested (double-quantized) scale is
`nested_quant_map[absmax] * nested_absmax + nested_offset`. Where this is below 0, a
QTensor has the scale 0 (see `jaxq.qtensor.scale_values`).

LLM.int8 has one scale for each output channel: `weight` int8 `[out, in]` and `SCB`
float32 `[out]`, the largest magnitude of the channel, which is 127 times the scale.

References:
  Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
  2022. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.formats import CodebookFormat, Format, Packing
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import (
    StoredWeight,
    pad_last,
    qtensor,
    quantized_scale,
)
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.io.layouts._words import word_bytes
from jaxq.qtensor import PerChannel, PerFlat, QTensor, QuantSpec, is_traced

_FORMATS = {"nf4": "nf4", "fp4": "float4_bitsandbytes"}
_STATES = {kind: f"weight.quant_state.bitsandbytes__{kind}" for kind in _FORMATS}
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("float32", "bfloat16", "float16")
# `bnb_4bit_quant_storage` reads the same bytes as another dtype.
_STORAGE = ("uint8", "int8", "float32", "bfloat16", "float16")
_NESTED_BLOCK = 256
_SCALE_OF_SCALES = QuantSpec("dynamic8", PerFlat(_NESTED_BLOCK), offset="mean")


def _spec_4bit(settings: Settings) -> QuantSpec:
    kind = settings.choice("bnb_4bit_quant_type", tuple(_FORMATS), "fp4")
    nested = settings.choice("bnb_4bit_use_double_quant", (True, False), False)
    size = settings.size("blocksize", 64)
    return QuantSpec(
        _FORMATS[kind],
        PerFlat(size),
        scale=_SCALE_OF_SCALES if nested else "float32",
        packing=Packing.HIGH_FIRST,
        codes_from="ideal",
    )


def _read_4bit(tensors: WeightTensors, settings: Settings) -> QTensor:
    del settings  # the arrays carry their own
    kind, state = _quant_state(tensors)
    num_out, num_in = state.pair("shape")
    size, block = num_out * num_in, state.size("blocksize")
    dtype = state.choice("dtype", _DTYPES)
    num_blocks = -(-size // block)
    data = _codes(tensors, -(-size // 2))
    table = _table(tensors, "weight.quant_map", 16, _FORMATS[kind])
    spec = QuantSpec(
        table, PerFlat(block), packing=Packing.HIGH_FIRST, codes_from="ideal"
    )
    if "nested_offset" in state.values or "weight.nested_absmax" in tensors:
        scale = _nested_scale(tensors, state, num_blocks)
        spec = spec.replace(scale=scale.spec)
    else:
        scale = tensors.scale("weight.absmax", "float32", (num_blocks,))
    return qtensor(spec, (num_in, num_out), data, scale, dtype=dtype)


def _quant_state(tensors: WeightTensors) -> tuple[str, Settings]:
    """The type of the codes, and the fields of the JSON."""
    names = [kind for kind, name in _STATES.items() if name in tensors]
    if len(names) != 1:
        raise ValueError(
            f"{tensors.layout}: expected one of {' and '.join(_STATES.values())}, got "
            f"{len(names)}."
        )
    (kind,) = names
    name = _STATES[kind]
    content = tensors.constant(name)
    if content.dtype != np.uint8 or content.ndim != 1 or content.size > 1 << 16:
        raise tensors.problem(
            name, f"is {content.dtype}{list(content.shape)}, expected JSON as uint8"
        )
    try:
        fields = json.loads(content.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise tensors.problem(name, f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise tensors.problem(name, "is not a JSON object")
    state = Settings(f"{tensors.layout}: {name}", fields)
    state.choice("quant_type", (kind,))
    return kind, state


def _codes(tensors: WeightTensors, num_bytes: int) -> Any:
    """The packed codes, uint8 `[num_bytes]`, whatever dtype stores them."""
    array = tensors.raw("weight")
    dtype = np.dtype(array.dtype).name
    total = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    padded = -(-num_bytes // np.dtype(array.dtype).itemsize)
    if dtype not in _STORAGE or math.prod(array.shape) != padded:
        raise tensors.problem(
            "weight",
            f"is {dtype}{list(array.shape)} with {total} bytes, expected {num_bytes} "
            "bytes for the shape in its quant_state",
        )
    return word_bytes(jnp.asarray(array).reshape(-1))


def _table(tensors: WeightTensors, name: str, size: int, usual: str) -> Format:
    """The format with the numbers of a table: jaxq's own if they are equal."""
    table = tensors.constant(name)
    if table.dtype != np.float32 or table.shape != (size,):
        raise tensors.problem(
            name, f"is {table.dtype}{list(table.shape)}, expected float32[{size}]"
        )
    fmt = formats.get(usual)
    assert isinstance(fmt, CodebookFormat)
    if np.array_equal(table, np.asarray(fmt.table, np.float32)):
        return fmt
    try:
        return CodebookFormat(f"bitsandbytes_{size}", tuple(table.tolist()))
    except ValueError as error:
        raise tensors.problem(name, f"is not a table of numbers: {error}") from None


def _nested_scale(tensors: WeightTensors, state: Settings, num_blocks: int) -> QTensor:
    """The scale that is quantized itself."""
    block, offset = state.size("nested_blocksize"), state.number("nested_offset")
    fmt = _table(tensors, "weight.nested_quant_map", 256, "dynamic8")
    spec = QuantSpec(fmt, PerFlat(block), offset="mean")
    codes = tensors.array("weight.absmax", "uint8", (num_blocks,))
    size = -(-num_blocks // block)
    scale = tensors.scale("weight.nested_absmax", "float32", (size,))
    mean = jnp.full((1,), offset, jnp.float32)
    return quantized_scale(spec, (num_blocks,), codes, scale, mean)


def _write_4bit(weight: StoredWeight) -> Written:
    names = {name: kind for kind, name in _FORMATS.items()}
    kind = names.get(weight.spec.fmt.name, "")
    weight.refuse_unless(bool(kind), f"expected one of the formats {', '.join(names)}")
    weight.plain()
    block = _block_size(weight)
    fmt = weight.spec.fmt
    padded = pad_last(weight.codes().reshape(-1), 2, fmt.zero_code)
    data = formats.pack(padded, 4, Packing.HIGH_FIRST)
    assert isinstance(fmt, CodebookFormat)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": weight.qt.dtype.name,
        "shape": [weight.num_out, weight.num_in],
    }
    tensors: dict[str, Any] = {
        "weight": data.reshape(-1, 1),
        "weight.quant_map": np.asarray(fmt.table, np.float32),
    }
    scale = weight.qt.scale
    nested = isinstance(scale, QTensor)
    if isinstance(scale, QTensor):
        arrays, fields = _written_scale(weight, scale)
        tensors |= arrays
        state |= fields
    else:
        tensors["weight.absmax"] = weight.array_scale("float32").reshape(-1)
    text = json.dumps(state).encode()
    tensors[_STATES[kind]] = np.frombuffer(text, np.uint8)
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
    }
    return tensors, config


def _block_size(weight: StoredWeight) -> int:
    """The number of codes of a block of the flattened weight."""
    granularity = weight.spec.granularity
    if isinstance(granularity, PerFlat):
        block = granularity.size
    else:
        block = weight.group_size()
        weight.refuse_unless(
            weight.num_in % block == 0,
            f"groups of {block} do not divide a row of {weight.num_in}, and blocks of "
            "this layout cross rows",
        )
    allowed = ", ".join(map(str, _BLOCK_SIZES))
    weight.refuse_unless(
        block in _BLOCK_SIZES, f"blocks have {block} numbers, expected one of {allowed}"
    )
    return block


def _written_scale(
    weight: StoredWeight, scale: QTensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the fields of the JSON of a scale that is quantized itself."""
    fmt, granularity = scale.spec.fmt, scale.spec.granularity
    right = isinstance(fmt, CodebookFormat) and len(fmt.table) == 256
    right = right and isinstance(granularity, PerFlat)
    weight.refuse_unless(
        right and isinstance(scale.scale, jax.Array | np.ndarray),
        "expected a scale that is quantized to a table of 256 numbers in flat blocks",
    )
    assert isinstance(fmt, CodebookFormat)
    assert isinstance(granularity, PerFlat)
    assert not isinstance(scale.scale, QTensor)
    offset = 0.0
    if scale.offset is not None:
        weight.refuse_unless(
            not is_traced(scale.offset), "its offset is traced, and JSON holds it"
        )
        offset = float(np.asarray(scale.offset).reshape(()))
    arrays = {
        "weight.absmax": scale.stored_codes()[: scale.size],
        "weight.nested_absmax": weight.exact("scale", scale.scale, "float32"),
        "weight.nested_quant_map": np.asarray(fmt.table, np.float32),
    }
    fields = {
        "nested_blocksize": granularity.size,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return arrays, fields


def _spec_int8(settings: Settings) -> QuantSpec:
    del settings
    return QuantSpec("int8", PerChannel())


def _read_int8(tensors: WeightTensors, settings: Settings) -> QTensor:
    num_out, num_in = tensors.shape("weight", 2)
    data = tensors.array("weight", "int8", (num_out, num_in))
    absmax = tensors.scale("SCB", "float32", (num_out,))
    if "weight_format" in tensors and tensors.constant("weight_format").any():
        raise tensors.problem(
            "weight_format", "is not 0, the order of rows. Save the weight again"
        )
    scale = (absmax * np.float32(1 / 127))[:, None]
    return qtensor(_spec_int8(settings), (num_in, num_out), data, scale)


def _write_int8(weight: StoredWeight) -> Written:
    fmt = weight.spec.fmt.name
    weight.refuse_unless(fmt in ("int8", "int8_narrow"), "expected the format int8")
    weight.plain()
    weight.refuse_unless(
        weight.num_groups() == 1, "expected one scale for each output channel"
    )
    scale = weight.array_scale("float32")
    tensors = {
        "weight": weight.codes(),
        "SCB": (scale * np.float32(127)).reshape(-1),
        "weight_format": np.zeros((), np.uint8),
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}


FOUR_BIT = Layout(
    name="bitsandbytes_4bit",
    summary="NF4 and FP4 of bitsandbytes, with plain or double-quantized scales",
    tensors=(
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
        *("weight.nested_quant_map", *_STATES.values()),
    ),
    static=("weight.quant_map", "weight.nested_quant_map", *_STATES.values()),
    make_spec=_spec_4bit,
    read=_read_4bit,
    write=_write_4bit,
)
INT8 = Layout(
    name="bitsandbytes_int8",
    summary="LLM.int8 of bitsandbytes",
    tensors=("weight", "SCB", "weight_format"),
    static=("weight_format",),
    make_spec=_spec_int8,
    read=_read_int8,
    write=_write_int8,
)
