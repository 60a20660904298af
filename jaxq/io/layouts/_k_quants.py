"""The K-quants of GGUF files: blocks of 256 numbers whose scales are quantized.

A block has a float16 scale d and an integer scale for each of its 8 or 16 groups. The
types with minimums also have a float16 scale dmin and an integer minimum a group.

| type | bytes | groups | scales | number |
|---|---|---|---|---|
| `Q2_K` | 84 | 16 of 16 | 4 bits | `d * scale * code - dmin * min` |
| `Q3_K` | 110 | 16 of 16 | 6 bits, signed | `d * scale * (code - 4)` |
| `Q4_K` | 144 | 8 of 32 | 6 bits | `d * scale * code - dmin * min` |
| `Q5_K` | 176 | 8 of 32 | 6 bits | `d * scale * code - dmin * min` |
| `Q6_K` | 210 | 16 of 16 | 8 bits, signed | `d * scale * (code - 32)` |

A QTensor holds these with a scale that is quantized itself: the integer scales are its
codes, and d is its scale. The minimums become the offset in float32, which is exact:
`dmin * min` has at most 17 bits. So a QTensor of a type with minimums is larger than
the block: by 1 bit a weight for groups of 32, and by 2 bits for groups of 16.

All bit fields are `Packing.HALVES`, in units of 64, 128 or 256 codes.
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
from jaxq.io.layouts._stored import qtensor_of_codes, quantized_scale
from jaxq.io.layouts._tensors import WeightTensors
from jaxq.io.layouts._words import float16_at
from jaxq.qtensor import PerGroup, QTensor, QuantSpec

_BLOCK = 256


class KQuant(NamedTuple):
    """One type of block.

    Attributes:
      spec: of a weight of this type.
      num_bytes: of a block.
      read: a QTensor from blocks uint8 `[out, num_blocks, num_bytes]`.
    """

    spec: QuantSpec
    num_bytes: int
    read: Callable[[QuantSpec, jax.Array, WeightTensors], QTensor]


def _read_q2_k(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    packed, codes, d = blocks[..., :16], blocks[..., 16:80], blocks[..., 80:]
    scales = packed & np.uint8(15)
    minimums = packed >> np.uint8(4)
    return _build(spec, _fields(codes, 2, 128), scales, d, tensors, minimums=minimums)


def _read_q3_k(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    top, low = blocks[..., :32], blocks[..., 32:96]
    packed, d = blocks[..., 96:108], blocks[..., 108:]
    codes = _fields(low, 2, 128) | (_fields(top, 1, 256) << np.uint8(2))
    low_bits = formats.unpack(packed[..., :8], 4, Packing.HALVES)
    high_bits = formats.unpack(packed[..., 8:], 2, Packing.HALVES)
    scales = low_bits | (high_bits << np.uint8(4))
    return _build(
        spec,
        codes.astype(jnp.int8) - np.int8(4),
        scales.astype(jnp.int8) - np.int8(32),
        d,
        tensors,
    )


def _read_q4_k(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    d, packed, codes = blocks[..., :4], blocks[..., 4:16], blocks[..., 16:]
    scales, minimums = _six_bits(packed)
    return _build(spec, _fields(codes, 4, 64), scales, d, tensors, minimums=minimums)


def _read_q5_k(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    d, packed = blocks[..., :4], blocks[..., 4:16]
    fifth, low = blocks[..., 16:48], blocks[..., 48:]
    codes = _fields(low, 4, 64) | (_fields(fifth, 1, 256) << np.uint8(4))
    scales, minimums = _six_bits(packed)
    return _build(spec, codes, scales, d, tensors, minimums=minimums)


def _read_q6_k(spec: QuantSpec, blocks: jax.Array, tensors: WeightTensors) -> QTensor:
    low, high = blocks[..., :128], blocks[..., 128:192]
    scales, d = blocks[..., 192:208], blocks[..., 208:]
    codes = _fields(low, 4, 128) | (_fields(high, 2, 128) << np.uint8(4))
    return _build(
        spec,
        codes.astype(jnp.int8) - np.int8(32),
        lax.bitcast_convert_type(scales, jnp.int8),
        d,
        tensors,
    )


def _fields(data: jax.Array, bits: int, unit: int) -> jax.Array:
    """The bit fields of the codes of each block, uint8 `[out, num_blocks, 256]`."""
    return formats.unpack(data, bits, Packing.HALVES, unit=unit)


def _six_bits(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scales and minimums of 8 groups in 12 bytes.

    The low 6 bits of bytes 0 to 3 are scales 0 to 3, and those of bytes 4 to 7 minimums
    0 to 3. The low 4 bits of the other four scales and minimums are the halves of bytes
    8 to 11. Their high 2 bits are the high bits of bytes 0 to 3 and 4 to 7.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    six, four, two = np.uint8(63), np.uint8(15), np.uint8(6)
    top = np.uint8(4)
    scales = [first & six, (third & four) | (first >> two << top)]
    minimums = [second & six, (third >> top) | (second >> two << top)]
    return jnp.concatenate(scales, -1), jnp.concatenate(minimums, -1)


def _build(
    spec: QuantSpec,
    codes: jax.Array,
    scales: jax.Array,
    d: jax.Array,
    tensors: WeightTensors,
    *,
    minimums: jax.Array | None = None,
) -> QTensor:
    """A QTensor from the fields of blocks.

    Args:
      spec: of the type.
      codes: `[out, num_blocks, 256]`.
      scales: the integer scales, `[out, num_blocks, groups]`.
      d: the bytes of d and dmin, uint8 `[out, num_blocks, 2 or 4]`.
      tensors: the arrays, for error messages.
      minimums: the integer minimums, like `scales`, or None.
    """
    num_out, num_blocks, num_groups = scales.shape
    scale_of_scales = float16_at(d, 0)
    tensors.check_finite("weight", scale_of_scales)
    assert isinstance(spec.scale, QuantSpec)
    shape = (num_out, num_blocks * num_groups)
    scale = quantized_scale(spec.scale, shape, scales.reshape(shape), scale_of_scales)
    offset = None
    if minimums is not None:
        dmin = float16_at(d, 2)
        tensors.check_finite("weight", dmin)
        products = dmin.astype(jnp.float32)[..., None] * minimums.astype(jnp.float32)
        offset = -products.reshape(shape)
    rows = codes.reshape(num_out, num_blocks * _BLOCK)
    return qtensor_of_codes(
        spec,
        (num_blocks * _BLOCK, num_out),
        rows,
        scale,
        offset=offset,
        dtype="float32",
    )


def _spec(fmt: str, group: int, scale: str, *, has_minimum: bool) -> QuantSpec:
    groups = PerGroup(_BLOCK // group)
    return QuantSpec(
        fmt,
        PerGroup(group),
        scale=QuantSpec(scale, groups, scale="float16", offset=None, symmetric=True),
        offset="min" if has_minimum else None,
    )


TYPES = {
    "Q2_K": KQuant(_spec("uint2", 16, "uint4", has_minimum=True), 84, _read_q2_k),
    "Q3_K": KQuant(_spec("int3", 16, "int6", has_minimum=False), 110, _read_q3_k),
    "Q4_K": KQuant(_spec("uint4", 32, "uint6", has_minimum=True), 144, _read_q4_k),
    "Q5_K": KQuant(_spec("uint5", 32, "uint6", has_minimum=True), 176, _read_q5_k),
    "Q6_K": KQuant(_spec("int6", 16, "int8", has_minimum=False), 210, _read_q6_k),
}
