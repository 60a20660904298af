"""Weights of GGUF files (llama.cpp): blocks of 32 numbers.

The array `weight` is uint8 `[out, bytes]`, as the package gguf reads it. The setting
`type` names the blocks. Blocks run along the inputs. A block starts with its float16
scale d, or a power of two, and perhaps its float16 minimum m:

| type | bytes | contents | number |
|---|---|---|---|
| `Q4_0` | 18 | d, 16 bytes of codes | `d * (code - 8)` |
| `Q4_1` | 20 | d, m, 16 bytes of codes | `d * code + m` |
| `Q5_0` | 22 | d, 4 bytes of fifth bits, 16 bytes of codes | `d * (code - 16)` |
| `Q5_1` | 24 | d, m, 4 bytes of fifth bits, 16 bytes of codes | `d * code + m` |
| `Q8_0` | 34 | d, 32 signed codes | `d * code` |
| `MXFP4` | 17 | the exponent + 127, 16 bytes of E2M1 codes | `2^e * code` |

Byte j of the codes has code j in its low bits and code j + 16 in its high bits. This is
`Packing.HALVES` with units of 32. Bit i of the fifth bits belongs to code i.

The types of `_k_quants` have blocks of 256 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import formats
from jaxq.formats import Packing
from jaxq.io.layouts import _k_quants
from jaxq.io.layouts._floats import E8M0, FP4, MX_GROUP, require_fp4, written_e8m0
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, qtensor, qtensor_of_codes
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.io.layouts._words import (
    bytes_of_float16,
    flip_signs,
    float16_at,
    word_bytes,
)
from jaxq.qtensor import PerGroup, QTensor, QuantSpec

_BLOCK = 32
_GROUP = PerGroup(_BLOCK)


class _Type(NamedTuple):
    """One type of block.

    Attributes:
      spec: of a weight of this type.
      num_bytes: of a block.
      read: a QTensor from blocks uint8 `[out, num_blocks, num_bytes]`.
      write: blocks from a weight.
    """

    spec: QuantSpec
    num_bytes: int
    read: Callable[[QuantSpec, jax.Array, WeightTensors], QTensor]
    write: Callable[[StoredWeight], jax.Array]


def _type(settings: Settings) -> str:
    return settings.choice("type", (*_TYPES, *_k_quants.TYPES))


def _spec(settings: Settings) -> QuantSpec:
    name = _type(settings)
    return _TYPES[name].spec if name in _TYPES else _k_quants.TYPES[name].spec


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    name = _type(settings)
    if name in _k_quants.TYPES:
        kind = _k_quants.TYPES[name]
        blocks = _blocks(tensors, name, kind.num_bytes)
        return kind.read(kind.spec, blocks, tensors)
    kind = _TYPES[name]
    return kind.read(kind.spec, _blocks(tensors, name, kind.num_bytes), tensors)


def _blocks(tensors: WeightTensors, name: str, num_bytes: int) -> jax.Array:
    """The array as blocks, uint8 `[out, num_blocks, num_bytes]`."""
    num_out, size = tensors.shape("weight", 2)
    if size % num_bytes:
        raise tensors.problem(
            "weight",
            f"has rows of {size} bytes, no whole number of {name} blocks of "
            f"{num_bytes} bytes",
        )
    array = tensors.array("weight", "uint8", (num_out, size))
    return array.reshape(num_out, size // num_bytes, num_bytes)


def _shape(blocks: jax.Array) -> tuple[int, int]:
    """(in, out)."""
    return blocks.shape[1] * _BLOCK, blocks.shape[0]


def _float16(blocks: jax.Array, start: int, tensors: WeightTensors) -> jax.Array:
    """The scales or minimums of blocks, float16 `[out, num_blocks]`."""
    values = float16_at(blocks, start)
    tensors.check_finite("weight", values)
    return values


def _rows(blocks: jax.Array, start: int) -> jax.Array:
    """The codes after `start` bytes of each block, uint8 `[out, bytes]`."""
    return blocks[..., start:].reshape(blocks.shape[0], -1)


# Reading.


def _read_q4_0(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    data = flip_signs(_rows(blocks, 2), 4, Packing.HALVES)
    scale = _float16(blocks, 0, tensors)
    return qtensor(spec, _shape(blocks), data, scale, dtype="float32")


def _read_q4_1(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    return qtensor(
        spec,
        _shape(blocks),
        _rows(blocks, 4),
        _float16(blocks, 0, tensors),
        offset=_float16(blocks, 2, tensors),
        dtype="float32",
    )


def _read_q5_0(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    codes = _five_bits(blocks, 2)
    signed = codes.astype(jnp.int8) - np.int8(16)
    scale = _float16(blocks, 0, tensors)
    return qtensor_of_codes(spec, _shape(blocks), signed, scale, dtype="float32")


def _read_q5_1(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    return qtensor_of_codes(
        spec,
        _shape(blocks),
        _five_bits(blocks, 4),
        _float16(blocks, 0, tensors),
        offset=_float16(blocks, 2, tensors),
        dtype="float32",
    )


def _five_bits(blocks: jax.Array, start: int) -> jax.Array:
    """Codes from four bytes of fifth bits and 16 bytes of low bits, `[out, in]`."""
    fifth = formats.unpack(blocks[..., start : start + 4], 1, Packing.LOW_FIRST)
    low = formats.unpack(blocks[..., start + 4 :], 4, Packing.HALVES)
    codes = low | (fifth << np.uint8(4))
    return codes.reshape(blocks.shape[0], -1)


def _read_q8_0(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    data = lax.bitcast_convert_type(_rows(blocks, 2), jnp.int8)
    scale = _float16(blocks, 0, tensors)
    return qtensor(spec, _shape(blocks), data, scale, dtype="float32")


def _read_mxfp4(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    scale = lax.bitcast_convert_type(blocks[..., 0], jnp.float8_e8m0fnu)
    tensors.check_finite("weight", scale)
    return qtensor(spec, _shape(blocks), _rows(blocks, 1), scale, dtype="float32")


# Writing. Each function returns uint8 `[out, num_blocks, num_bytes]`.


def _halves(weight: StoredWeight) -> jax.Array:
    """4-bit codes of blocks, uint8 `[out, num_blocks, 16]`."""
    data = weight.packed(Packing.HALVES, _BLOCK, unit=_BLOCK)
    return data.reshape(weight.num_out, -1, _BLOCK // 2)


def _scale_bytes(weight: StoredWeight) -> jax.Array:
    return bytes_of_float16(weight.array_scale("float16"))


def _offset_bytes(weight: StoredWeight) -> jax.Array:
    return bytes_of_float16(weight.exact("offset", weight.qt.offset, "float16"))


def _concatenate(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)


def _write_q4_0(weight: StoredWeight) -> jax.Array:
    codes = flip_signs(_halves(weight), 4, Packing.HALVES)
    return _concatenate(_scale_bytes(weight), codes)


def _write_q4_1(weight: StoredWeight) -> jax.Array:
    return _concatenate(_scale_bytes(weight), _offset_bytes(weight), _halves(weight))


def _write_q5_0(weight: StoredWeight) -> jax.Array:
    codes = (weight.codes() + np.int8(16)).astype(jnp.uint8)
    return _concatenate(_scale_bytes(weight), _bytes_of_five_bits(codes))


def _write_q5_1(weight: StoredWeight) -> jax.Array:
    return _concatenate(
        _scale_bytes(weight),
        _offset_bytes(weight),
        _bytes_of_five_bits(weight.codes()),
    )


def _bytes_of_five_bits(codes: jax.Array) -> jax.Array:
    """The inverse of `_five_bits`, uint8 `[out, num_blocks, 20]`."""
    codes = codes.reshape(codes.shape[0], -1, _BLOCK)
    fifth = formats.pack(codes >> np.uint8(4), 1, Packing.LOW_FIRST)
    return _concatenate(fifth, formats.pack(codes, 4, Packing.HALVES))


def _write_q8_0(weight: StoredWeight) -> jax.Array:
    codes = word_bytes(weight.codes()).reshape(weight.num_out, -1, _BLOCK)
    return _concatenate(_scale_bytes(weight), codes)


def _write_mxfp4(weight: StoredWeight) -> jax.Array:
    require_fp4(weight, MX_GROUP)
    return _concatenate(written_e8m0(weight)[..., None], _halves(weight))


def _signed_spec(fmt: str, rule: str = "signed_extreme") -> QuantSpec:
    return QuantSpec(fmt, _GROUP, scale="float16", scale_rule=rule)


def _offset_spec(fmt: str) -> QuantSpec:
    return QuantSpec(fmt, _GROUP, scale="float16", offset="min")


_MXFP4_SPEC = QuantSpec(FP4, _GROUP, scale=E8M0, scale_rule="mx_floor")
_TYPES = {
    "Q4_0": _Type(_signed_spec("int4"), 18, _read_q4_0, _write_q4_0),
    "Q4_1": _Type(_offset_spec("uint4"), 20, _read_q4_1, _write_q4_1),
    "Q5_0": _Type(_signed_spec("int5"), 22, _read_q5_0, _write_q5_0),
    "Q5_1": _Type(_offset_spec("uint5"), 24, _read_q5_1, _write_q5_1),
    "Q8_0": _Type(_signed_spec("int8", "absmax"), 34, _read_q8_0, _write_q8_0),
    "MXFP4": _Type(_MXFP4_SPEC, 17, _read_mxfp4, _write_mxfp4),
}


def _write(weight: StoredWeight) -> Written:
    name = _type_of(weight)
    size, num_in = weight.group_size(), weight.num_in
    weight.refuse_unless(
        num_in % _BLOCK == 0 and (size == _BLOCK or num_in == _BLOCK),
        f"its groups of {size} in rows of {num_in} are not blocks of {_BLOCK}",
    )
    blocks = _TYPES[name].write(weight)
    return {"weight": blocks.reshape(weight.num_out, -1)}, {"type": name}


def _type_of(weight: StoredWeight) -> str:
    """The type that holds the format and the offset of a weight."""
    fmt = weight.spec.fmt.name.removesuffix("_narrow")
    weight.refuse_unless(weight.qt.zero_point is None, "the layout has no zero point")
    weight.refuse_unless(
        weight.spec.offset != "mean", "its offset is one number for the whole weight"
    )
    has_offset = weight.qt.offset is not None
    for name, kind in _TYPES.items():
        same_offset = (kind.spec.offset is not None) == has_offset
        if kind.spec.fmt.name == fmt and same_offset:
            return name
    raise weight.problem(
        f"no type holds the format {weight.spec.fmt.name} "
        f"{'with' if has_offset else 'without'} an offset"
    )


GGUF = Layout(
    name="gguf",
    summary="GGUF blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4; reads Q2_K to Q6_K",
    tensors=("weight",),
    make_spec=_spec,
    read=_read,
    write=_write,
)
