"""The weights of compressed-tensors (llm-compressor, vLLM).

The setting `format` says which arrays there are, and the dict `weights` how the weight
was quantized. Both are those of `quantization_config`.

| format | arrays |
|---|---|
| `pack-quantized` | `weight_packed` int32 `[out, words]`, `weight_shape` `[2]` |
| `int-quantized` | `weight` int8 `[out, in]` |
| `float-quantized` | `weight` float8_e4m3fn `[out, in]` |
| `nvfp4-pack-quantized` | `weight_packed` uint8 `[out, in/2]`, `weight_global_scale` |
| `mxfp4-pack-quantized` | `weight_packed` uint8 `[out, in/2]` |

All have `weight_scale`: `[1]` for the strategy tensor, `[out, 1]` for channel,
`[out, groups]` for group, and one number for each block for block. Weights that are not
symmetric have `weight_zero_point`. In `pack-quantized` it is int32
`[out * bits / 32, groups]`, packed along the outputs. Packed codes and zero points are
moved by 2^(bits-1), so that they have no sign.

The format name is the same for two ways to pack 3, 5, 6 and 7 bits. Versions from 2026
on pack a dense stream and earlier ones do not. So only 4 and 8 bits are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.formats import IntegerFormat, Packing
from jaxq.io.layouts._floats import (
    FP8,
    MX_GROUP,
    MXFP4_SPEC,
    NVFP4_GROUP,
    NVFP4_SPEC,
    codes_of_fp8,
    fp8_of_codes,
    nvfp4_scale,
    read_e8m0,
    require_fp4,
    written_e8m0,
    written_nvfp4,
)
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, pad_last, qtensor
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.io.layouts._words import flip_signs, int32_words, word_bytes
from jaxq.qtensor import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    QuantSpec,
    is_traced,
)

_SCALES = ("bfloat16", "float16", "float32")
_PACKINGS = {4: Packing.LOW_FIRST, 8: Packing.NONE}


class _Kind(NamedTuple):
    """One format.

    Attributes:
      spec: of the settings.
      read: a QTensor from arrays and settings.
      names: the arrays that it has.
    """

    spec: Callable[[Settings], QuantSpec]
    read: Callable[[WeightTensors, Settings], QTensor]
    names: tuple[str, ...]


def _kind(settings: Settings) -> _Kind:
    return _KINDS[settings.choice("format", tuple(_KINDS))]


def _spec(settings: Settings) -> QuantSpec:
    return _kind(settings).spec(settings)


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    kind = _kind(settings)
    for name in _NAMES:
        if name in tensors and name not in kind.names:
            raise tensors.problem(
                name,
                f"does not belong to the format {settings.values['format']}, which has "
                f"{', '.join(kind.names)}",
            )
    return kind.read(tensors, settings)


# Settings of weights.


def _granularity(weights: Settings, *, has_blocks: bool = False) -> Granularity:
    """Where scales vary, from the strategy."""
    strategies = ("tensor", "channel", "group", *(("block",) if has_blocks else ()))
    strategy = weights.choice("strategy", strategies)
    if strategy == "tensor":
        return PerTensor()
    if strategy == "channel":
        return PerChannel()
    if strategy == "group":
        return PerGroup(weights.size("group_size"), pad=True)
    out_block, in_block = weights.pair("block_structure")
    return PerBlock((in_block, out_block), pad=True)


def _integer_spec(weights: Settings, bits: tuple[int, ...]) -> QuantSpec:
    """The spec of integers; a weight with zero points has unsigned codes if packed."""
    weights.choice("type", ("int",), "int")
    num_bits = weights.choice("num_bits", bits)
    symmetric = weights.choice("symmetric", (True, False), True)
    granularity = _granularity(weights)
    if not symmetric and isinstance(granularity, PerTensor):
        raise weights.problem(
            "strategy", "is 'tensor', which has no zero points; got symmetric=False"
        )
    return QuantSpec(
        f"int{num_bits}",
        granularity,
        symmetric=symmetric,
        scale="bfloat16",
        packing=_PACKINGS[num_bits],
    )


def _scale(
    tensors: WeightTensors, spec: QuantSpec, num_out: int, num_in: int
) -> jax.Array:
    """The scales, `[out blocks, in blocks]`."""
    granularity = spec.granularity
    if isinstance(granularity, PerTensor):
        shape = tuple(tensors.raw("weight_scale").shape)
        shape = shape if shape == () else (1,)
        return tensors.scale("weight_scale", _SCALES, shape).reshape(1, 1)
    sizes = (1, num_in)
    if isinstance(granularity, PerGroup):
        sizes = (1, granularity.size)
    if isinstance(granularity, PerBlock):
        sizes = granularity.shape[::-1]
    shape = (-(-num_out // sizes[0]), -(-num_in // sizes[1]))
    return tensors.scale("weight_scale", _SCALES, shape)


# pack-quantized.


def _packed_spec(settings: Settings) -> QuantSpec:
    spec = _integer_spec(settings.inner("weights"), tuple(_PACKINGS))
    if spec.symmetric:
        return spec
    # Codes and zero points without a sign have the bytes of the file.
    return spec.replace(format=f"u{spec.fmt.name}", packing=spec.order)


def _read_packed(tensors: WeightTensors, settings: Settings) -> QTensor:
    spec = _packed_spec(settings)
    num_out, num_in = _packed_shape(tensors)
    _check_order(tensors, num_in, spec)
    data, scale, zero = _packed_leaves(tensors, spec, num_out, num_in)
    spec = spec.replace(scale=scale.dtype.name)
    return qtensor(spec, (num_in, num_out), data, scale, zero_point=zero)


def _read_for_floats(tensors: WeightTensors, settings: Settings) -> QTensor:
    """As `_read`, but groups may be in any order (`weight_g_idx`)."""
    if "weight_g_idx" not in tensors or _kind(settings).read is not _read_packed:
        return _read(tensors, settings)
    spec = _packed_spec(settings)
    num_out, num_in = _packed_shape(tensors)
    group = _groups(tensors, num_in, spec)
    data, scale, zero = _packed_leaves(tensors, spec, num_out, num_in)
    # One group for each input: the scale of input k is that of its group.
    spec = spec.replace(scale=scale.dtype.name, granularity=PerGroup(1))
    zero = None if zero is None else zero[:, group]
    return qtensor(spec, (num_in, num_out), data, scale[:, group], zero_point=zero)


def _packed_shape(tensors: WeightTensors) -> tuple[int, int]:
    """(out, in), from the array `weight_shape`."""
    shape = tensors.constant("weight_shape")
    numbers = shape.tolist()
    is_shape = shape.dtype.kind in "iu" and shape.shape == (2,)
    if not is_shape or min(numbers) < 1:
        raise tensors.problem(
            "weight_shape",
            f"is {shape.dtype}{list(shape.shape)} {numbers!r:.60}, expected two sizes "
            "above 0",
        )
    return numbers[0], numbers[1]


def _packed_leaves(
    tensors: WeightTensors, spec: QuantSpec, num_out: int, num_in: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The data, scale and zero point in storage order."""
    bits, packing = spec.fmt.bits, spec.order
    num_words = -(-num_in * bits // 32)
    words = tensors.array("weight_packed", "int32", (num_out, num_words))
    scale = _scale(tensors, spec, num_out, num_in)
    data = word_bytes(words)[:, : -(-num_in * bits // 8)]
    if spec.symmetric:
        if "weight_zero_point" in tensors:
            raise tensors.problem(
                "weight_zero_point", "is there, but the settings say symmetric=True"
            )
        data = flip_signs(data, bits, packing)
        return data if bits < 8 else _signed(data), scale, None
    shape = (-(-num_out * bits // 32), scale.shape[1])
    fields = tensors.array("weight_zero_point", "int32", shape)
    zero = formats.unpack(word_bytes(fields.T), bits, packing)  # [groups, >= out]
    return data, scale, zero[:, :num_out].T


def _signed(data: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(data, jnp.int8)


def _groups(tensors: WeightTensors, num_in: int, spec: QuantSpec) -> jax.Array:
    group = tensors.array("weight_g_idx", ("int32", "int64"), (num_in,))
    size = getattr(spec.granularity, "size", num_in)
    num_groups = -(-num_in // size)
    if not is_traced(group):
        numbers = np.asarray(group)
        if numbers.min() < 0 or numbers.max() >= num_groups:
            raise tensors.problem(
                "weight_g_idx",
                f"holds groups from {numbers.min()} to {numbers.max()}, expected 0 to "
                f"{num_groups - 1}",
            )
    return group.astype(jnp.int32)


def _check_order(tensors: WeightTensors, num_in: int, spec: QuantSpec) -> None:
    """Raises unless the inputs are in the order of their groups."""
    if "weight_g_idx" not in tensors:
        return
    group = _groups(tensors, num_in, spec)
    size = getattr(spec.granularity, "size", num_in)
    in_order = False
    if not is_traced(group):
        in_order = bool((np.asarray(group) == np.arange(num_in) // size).all())
    if not in_order:
        raise tensors.problem(
            "weight_g_idx",
            "assigns neighbouring inputs to different groups (actorder). A QTensor "
            "cannot hold such groups. Use dequantize=True",
        )


# int-quantized and float-quantized.


def _int_spec(settings: Settings) -> QuantSpec:
    return _integer_spec(settings.inner("weights"), (8,))


def _read_int(tensors: WeightTensors, settings: Settings) -> QTensor:
    spec = _int_spec(settings)
    num_out, num_in = tensors.shape("weight", 2)
    data = tensors.array("weight", "int8", (num_out, num_in))
    scale = _scale(tensors, spec, num_out, num_in)
    zero = None
    if not spec.symmetric:
        zero = tensors.array("weight_zero_point", "int8", scale.shape)
    elif "weight_zero_point" in tensors:
        raise tensors.problem(
            "weight_zero_point", "is there, but the settings say symmetric=True"
        )
    spec = spec.replace(scale=scale.dtype.name)
    return qtensor(spec, (num_in, num_out), data, scale, zero_point=zero)


def _float_spec(settings: Settings) -> QuantSpec:
    weights = settings.inner("weights")
    weights.choice("type", ("float",))
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,), True)
    granularity = _granularity(weights, has_blocks=True)
    return QuantSpec(FP8, granularity, scale="bfloat16")


def _read_float(tensors: WeightTensors, settings: Settings) -> QTensor:
    spec = _float_spec(settings)
    num_out, num_in = tensors.shape("weight", 2)
    weight = tensors.array("weight", FP8, (num_out, num_in))
    scale = _scale(tensors, spec, num_out, num_in)
    spec = spec.replace(scale=scale.dtype.name)
    return qtensor(spec, (num_in, num_out), codes_of_fp8(weight), scale)


# nvfp4-pack-quantized and mxfp4-pack-quantized.


def _fp4_shape(tensors: WeightTensors, group: int) -> tuple[int, int]:
    """(out, in), from the packed codes."""
    num_out, num_bytes = tensors.shape("weight_packed", 2)
    if 2 * num_bytes % group:
        raise tensors.problem(
            "weight_packed",
            f"has rows of {2 * num_bytes} codes, no multiple of {group}",
        )
    return num_out, 2 * num_bytes


def _nvfp4_spec(settings: Settings) -> QuantSpec:
    del settings
    return NVFP4_SPEC


def _read_nvfp4(tensors: WeightTensors, settings: Settings) -> QTensor:
    del settings
    num_out, num_in = _fp4_shape(tensors, NVFP4_GROUP)
    data = tensors.array("weight_packed", "uint8", (num_out, num_in // 2))
    groups = (num_out, num_in // NVFP4_GROUP)
    codes = codes_of_fp8(tensors.scale("weight_scale", FP8, groups))
    # The file has the inverse: fp8 scales are divided by it.
    divisor = tensors.scale("weight_global_scale", "float32", (1,))
    if not is_traced(divisor) and float(divisor[0]) == 0:
        raise tensors.problem(
            "weight_global_scale", "is 0, and scales are divided by it"
        )
    scale = nvfp4_scale(codes, 1 / divisor[0])
    return qtensor(NVFP4_SPEC, (num_in, num_out), data, scale, dtype="bfloat16")


def _mxfp4_spec(settings: Settings) -> QuantSpec:
    del settings
    return MXFP4_SPEC


def _read_mxfp4(tensors: WeightTensors, settings: Settings) -> QTensor:
    del settings
    num_out, num_in = _fp4_shape(tensors, MX_GROUP)
    data = tensors.array("weight_packed", "uint8", (num_out, num_in // 2))
    scale = read_e8m0(tensors, "weight_scale", (num_out, num_in // MX_GROUP))
    return qtensor(MXFP4_SPEC, (num_in, num_out), data, scale, dtype="bfloat16")


_KINDS = {
    "pack-quantized": _Kind(
        _packed_spec,
        _read_packed,
        (
            *("weight_packed", "weight_shape", "weight_scale"),
            *("weight_zero_point", "weight_g_idx"),
        ),
    ),
    "int-quantized": _Kind(
        _int_spec, _read_int, ("weight", "weight_scale", "weight_zero_point")
    ),
    "float-quantized": _Kind(_float_spec, _read_float, ("weight", "weight_scale")),
    "nvfp4-pack-quantized": _Kind(
        _nvfp4_spec,
        _read_nvfp4,
        ("weight_packed", "weight_scale", "weight_global_scale"),
    ),
    "mxfp4-pack-quantized": _Kind(
        _mxfp4_spec, _read_mxfp4, ("weight_packed", "weight_scale")
    ),
}
_NAMES = tuple(dict.fromkeys(name for kind in _KINDS.values() for name in kind.names))


# Writing.


def _write(weight: StoredWeight) -> Written:
    fmt = weight.spec.fmt
    if fmt.name == FP8:
        return _write_float(weight)
    if isinstance(fmt, IntegerFormat) and fmt.bits in _PACKINGS:
        weight.refuse_unless(weight.qt.offset is None, "the layout has no offset")
        # vLLM expects bytes for w8a8, and words where only the weight is quantized.
        is_w8a8 = fmt.bits == 8 and weight.qt.meta.activation is not None
        return _write_int(weight) if is_w8a8 else _write_packed(weight)
    require_fp4(weight, MX_GROUP if isinstance(weight.spec.scale, str) else NVFP4_GROUP)
    if isinstance(weight.spec.scale, str):
        return _write_mxfp4(weight)
    return _write_nvfp4(weight)


def _written_scale(weight: StoredWeight) -> tuple[jax.Array, dict[str, Any]]:
    """The scales, and the settings that say where they vary."""
    scale = weight.qt.scale
    keeps = not isinstance(scale, QTensor) and scale.dtype.name in _SCALES
    scale = scale if keeps else weight.array_scale("float32")
    assert not isinstance(scale, QTensor)
    geometry = weight.qt.meta.geometry
    weight.refuse_unless(not geometry.flat, "its blocks cross rows")
    out_block, in_block = geometry.block_shape
    if out_block is None and in_block is None and weight.num_out > 1:
        return scale.reshape(1), {"strategy": "tensor", "group_size": None}
    if out_block == 1 or weight.num_out == 1:
        size = weight.group_setting()
        if size == -1:
            return scale, {"strategy": "channel", "group_size": None}
        return scale, {"strategy": "group", "group_size": size}
    is_float = weight.spec.fmt.name == FP8
    weight.refuse_unless(is_float, "integers have no blocks of several outputs")
    block = list(weight.block_setting())
    return scale, {"strategy": "block", "group_size": None, "block_structure": block}


def _settings(fmt: str, kind: str, bits: int, symmetric: bool, **where: Any) -> dict:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "dynamic": False,
        **where,
    }
    return {"quant_method": "compressed-tensors", "format": fmt, "weights": weights}


def _write_packed(weight: StoredWeight) -> Written:
    bits = weight.spec.fmt.bits
    packing = _PACKINGS[bits]
    per_word = 32 // bits
    scale, where = _written_scale(weight)
    codes, zero = weight.unsigned(per_word)
    symmetric = weight.qt.zero_point is None
    tensors = {
        "weight_packed": int32_words(formats.pack(codes, bits, packing)),
        "weight_shape": np.asarray([weight.num_out, weight.num_in], np.int64),
        "weight_scale": scale,
    }
    if not symmetric:
        weight.refuse_unless(
            where["strategy"] != "tensor", "one scale has no zero point in this layout"
        )
        fields = formats.pack(pad_last(zero.T, per_word), bits, packing)
        tensors["weight_zero_point"] = int32_words(fields).T
    return tensors, _settings("pack-quantized", "int", bits, symmetric, **where)


def _write_int(weight: StoredWeight) -> Written:
    weight.refuse_unless(weight.spec.fmt.min < 0, "expected signed integers")
    scale, where = _written_scale(weight)
    tensors = {"weight": weight.codes(), "weight_scale": scale}
    zero = weight.qt.zero_point
    if zero is not None:
        weight.refuse_unless(
            where["strategy"] != "tensor", "one scale has no zero point in this layout"
        )
        tensors["weight_zero_point"] = zero
    return tensors, _settings("int-quantized", "int", 8, zero is None, **where)


def _write_float(weight: StoredWeight) -> Written:
    weight.plain()
    scale, where = _written_scale(weight)
    tensors = {"weight": fp8_of_codes(weight.codes()), "weight_scale": scale}
    return tensors, _settings("float-quantized", "float", 8, True, **where)


def _write_nvfp4(weight: StoredWeight) -> Written:
    data, scale, global_scale = written_nvfp4(weight)
    tensors = {
        "weight_packed": data,
        "weight_scale": scale,
        "weight_global_scale": (1 / global_scale).reshape(1),
    }
    where = {"strategy": "tensor_group", "group_size": NVFP4_GROUP}
    return tensors, _settings("nvfp4-pack-quantized", "float", 4, True, **where)


def _write_mxfp4(weight: StoredWeight) -> Written:
    tensors = {
        "weight_packed": weight.packed(Packing.LOW_FIRST, MX_GROUP),
        "weight_scale": written_e8m0(weight),
    }
    where = {"strategy": "group", "group_size": MX_GROUP}
    return tensors, _settings("mxfp4-pack-quantized", "float", 4, True, **where)


COMPRESSED_TENSORS = Layout(
    name="compressed_tensors",
    summary="integers of 4 and 8 bits, fp8, NVFP4 and MXFP4 of compressed-tensors",
    tensors=_NAMES,
    static=("weight_shape",),
    make_spec=_spec,
    read=_read,
    write=_write,
    read_for_floats=_read_for_floats,
)
