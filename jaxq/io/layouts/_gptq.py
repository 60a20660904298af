"""The weights of GPTQ checkpoints (AutoGPTQ, GPTQModel).

| array | dtype and shape | contents |
|---|---|---|
| `qweight` | int32 `[in * bits / 32, out]` | codes, packed along the inputs |
| `qzeros` | int32 `[groups, out * bits / 32]` | zero points, packed along the outputs |
| `scales` | float16 `[groups, out]` | |
| `g_idx` | int32 `[in]` | the group of each input; optional |

A number is `scales[g] * (code - zero)`. Codes are a little-endian stream of `bits`
bits, also for 3 bits. `checkpoint_format="gptq"`, the first version, stores `zero - 1`
on whole words, see `_zeros_of_version_1`. "gptq_v2" stores the zero point itself.

With `sym`, all zero points are 2^(bits-1), and the QTensor has signed codes without a
zero point. Otherwise it has unsigned codes and zero points.

With `desc_act` the inputs are not in the order of their groups. No QTensor holds such a
weight. `sort_inputs` sorts the inputs by groups and returns their order.

References:
  Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
  Transformers", 2023.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.formats import IntegerFormat, Packing
from jaxq.io.layouts._layout import Layout, Tensors, Written
from jaxq.io.layouts._stored import StoredWeight, grouped, qtensor
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.io.layouts._words import flip_signs, int32_words, word_bytes
from jaxq.qtensor import QTensor, QuantSpec, is_traced

_NAMES = ("qweight", "qzeros", "scales", "g_idx")
_PACKINGS = {
    2: Packing.LOW_FIRST,
    3: Packing.BITSTREAM,
    4: Packing.LOW_FIRST,
    8: Packing.NONE,
}
_SCALES = ("float16", "bfloat16", "float32")


def _spec(settings: Settings) -> QuantSpec:
    bits = settings.choice("bits", tuple(_PACKINGS))
    symmetric = settings.choice("sym", (True, False), True)
    size = settings.optional_size("group_size")
    return _spec_of(bits, symmetric, size, "float16")


def _spec_of(bits: int, symmetric: bool, size: int | None, scale: str) -> QuantSpec:
    kind = "int" if symmetric else "uint"
    return QuantSpec(
        f"{kind}{bits}",
        grouped(size),
        symmetric=symmetric,
        scale=scale,
        packing=_PACKINGS[bits],
    )


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    num_in, num_out = _sizes(tensors, settings)
    size = settings.size("group_size", num_in)
    if "g_idx" in tensors:
        _check_order(tensors, settings, num_in, size)
    data, scale, zero_point = _leaves(tensors, settings, num_in, num_out, size)
    spec = _spec_of(
        settings.choice("bits", tuple(_PACKINGS)),
        zero_point is None,
        settings.optional_size("group_size"),
        scale.dtype.name,
    )
    shape = (num_in, num_out)
    return qtensor(spec, shape, data, scale, zero_point=zero_point)


def _read_for_floats(tensors: WeightTensors, settings: Settings) -> QTensor:
    """A weight whose groups may be in any order, with one scale for each input."""
    if "g_idx" not in tensors:
        return _read(tensors, settings)
    num_in, num_out = _sizes(tensors, settings)
    size = settings.size("group_size", num_in)
    group = _groups(tensors, num_in, size)
    data, scale, zero_point = _leaves(tensors, settings, num_in, num_out, size)
    # One group for each input: the scale of input k is that of its group.
    spec = _spec_of(
        settings.choice("bits", tuple(_PACKINGS)),
        zero_point is None,
        1,
        scale.dtype.name,
    )
    zeros = None if zero_point is None else zero_point[:, group]
    shape = (num_in, num_out)
    return qtensor(spec, shape, data, scale[:, group], zero_point=zeros)


def _sizes(tensors: WeightTensors, settings: Settings) -> tuple[int, int]:
    """The number of inputs and outputs."""
    bits = settings.choice("bits", tuple(_PACKINGS))
    num_words, num_out = tensors.shape("qweight", 2)
    if num_words * 32 % bits:
        raise tensors.problem(
            "qweight",
            f"has {num_words} rows of words, which are no whole number of codes of "
            f"{bits} bits",
        )
    return num_words * 32 // bits, num_out


def _leaves(
    tensors: WeightTensors, settings: Settings, num_in: int, num_out: int, size: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The data, scale and zero point in storage order; no zero point if symmetric."""
    bits = settings.choice("bits", tuple(_PACKINGS))
    symmetric = settings.choice("sym", (True, False), True)
    num_groups = -(-num_in // size)
    words = tensors.array("qweight", "int32", (num_in * bits // 32, num_out))
    scale = tensors.scale("scales", _SCALES, (num_groups, num_out)).T
    if num_out * bits % 32:
        raise tensors.problem(
            "qweight",
            f"has {num_out} columns, whose zero points of {bits} bits fill no whole "
            "number of words",
        )
    zeros = tensors.array("qzeros", "int32", (num_groups, num_out * bits // 32))
    data = word_bytes(words.T)  # [out, bytes]
    stored = formats.unpack(word_bytes(zeros), bits, _PACKINGS[bits])
    if symmetric:
        _check_symmetric(tensors, settings, stored, bits)
        signed = flip_signs(data, bits, _PACKINGS[bits])
        if bits == 8:
            signed = jax.lax.bitcast_convert_type(signed, jnp.int8)
        return signed, scale, None
    version = settings.choice("checkpoint_format", _VERSIONS, "gptq")
    zero_point = stored if version == "gptq_v2" else _zeros_of_version_1(zeros, bits)
    return data, scale, zero_point.T


def _zeros_of_version_1(words: jax.Array, bits: int) -> jax.Array:
    """The zero points of the first version, uint8 `[groups, out]`.

    GPTQModel subtracts 1 from all fields of a word at once, so a zero point of 0
    borrows from the next field. Adding to whole words undoes this. It packs 3 bits
    field by field.
    """
    if bits == 3:
        stored = formats.unpack(word_bytes(words), bits, _PACKINGS[bits])
        return (stored + np.uint8(1)) & np.uint8((1 << bits) - 1)
    ones = sum(1 << shift for shift in range(0, 32, bits))  # 0x11111111 for 4 bits
    moved = jax.lax.bitcast_convert_type(words, jnp.uint32) + np.uint32(ones)
    return formats.unpack(word_bytes(moved), bits, _PACKINGS[bits])


_VERSIONS = ("gptq", "gptq_v2")


def _check_symmetric(
    tensors: WeightTensors, settings: Settings, stored: jax.Array, bits: int
) -> None:
    """Raises unless all zero points are the middle of the codes.

    Some files say "gptq" and hold zero points of the second version. A symmetric weight
    shows this, because its zero points are known.
    """
    version = settings.choice("checkpoint_format", _VERSIONS, "gptq")
    if is_traced(stored):
        return
    fields = np.asarray(stored)
    middle = 1 << (bits - 1)
    expected = middle - 1 if version == "gptq" else middle
    if (fields == expected).all():
        return
    if version == "gptq" and (fields == middle).all():
        warnings.warn(
            f"{tensors.layout}: checkpoint_format is 'gptq', but qzeros holds "
            f"{middle} everywhere, the zero point of a symmetric weight in 'gptq_v2'. "
            "It is read as 'gptq_v2'. Set checkpoint_format='gptq_v2' to read it "
            f"without this warning, or sym=False to read {middle + 1} as zero point.",
            stacklevel=5,
        )
        return
    raise tensors.problem(
        "qzeros",
        f"holds numbers from {fields.min()} to {fields.max()}, but with sym=True all "
        f"are {expected} in {version!r}. Set sym=False to read zero points",
    )


def _groups(tensors: WeightTensors, num_in: int, size: int) -> jax.Array:
    """`g_idx`, after a check of its numbers (outside jit)."""
    group = tensors.array("g_idx", ("int32", "int64"), (num_in,))
    num_groups = -(-num_in // size)
    if not is_traced(group):
        numbers = np.asarray(group)
        if numbers.min() < 0 or numbers.max() >= num_groups:
            raise tensors.problem(
                "g_idx",
                f"holds groups from {numbers.min()} to {numbers.max()}, expected "
                f"0 to {num_groups - 1}",
            )
    return group.astype(jnp.int32)


def _check_order(
    tensors: WeightTensors, settings: Settings, num_in: int, size: int
) -> None:
    """Raises unless the inputs are in the order of their groups."""
    group = _groups(tensors, num_in, size)
    desc_act = settings.choice("desc_act", (True, False), False)
    if is_traced(group):
        in_order = not desc_act
    else:
        in_order = bool((np.asarray(group) == np.arange(num_in) // size).all())
    if not in_order:
        raise tensors.problem(
            "g_idx",
            "assigns neighbouring inputs to different groups (desc_act). A QTensor "
            "cannot hold such groups. Use jaxq.io.layouts.sort_inputs, or "
            "dequantize=True",
        )


def _write(weight: StoredWeight) -> Written:
    fmt = weight.spec.fmt
    right = isinstance(fmt, IntegerFormat) and fmt.bits in _PACKINGS
    weight.refuse_unless(
        right, f"expected integers of {', '.join(map(str, _PACKINGS))} bits"
    )
    weight.refuse_unless(weight.qt.offset is None, "the layout has no offset")
    bits, packing = fmt.bits, _PACKINGS[fmt.bits]
    num_in, num_out = weight.num_in, weight.num_out
    weight.refuse_unless(
        num_in % 32 == 0 and num_out % 32 == 0,
        f"its sizes {num_in} and {num_out} are not multiples of 32",
    )
    size, num_groups = weight.group_size(), weight.num_groups()
    scale = weight.array_scale("float16").reshape(num_out, num_groups)
    codes, zero = weight.unsigned(32)
    data = formats.pack(codes, bits, packing)
    fields = jnp.broadcast_to(zero, (num_out, num_groups)).T
    tensors = {
        "qweight": int32_words(data).T,
        "qzeros": int32_words(formats.pack(fields, bits, packing)),
        "scales": scale.T,
        "g_idx": jnp.arange(num_in, dtype=jnp.int32) // size,
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": weight.group_setting(),
        "desc_act": False,
        "sym": weight.qt.zero_point is None,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    }
    return tensors, config


def sort_inputs(
    tensors: Tensors, config: Mapping[str, Any]
) -> tuple[dict[str, Any], jax.Array]:
    """Sorts the inputs of a GPTQ weight with `desc_act` by their groups.

    The QTensor of the sorted weight takes sorted inputs:
    `x[..., order] @ qt == x @ w`. If the layer before is linear, its outputs can be
    sorted instead.

    Args:
      tensors: the arrays of a weight in the layout "gptq", with `g_idx`.
      config: its settings.

    Returns:
      (arrays of the sorted weight, order), with order int32 `[in]`: input k of the
      sorted weight is input `order[k]` of the weight.

    Raises:
      ValueError: as `Layout.to_qtensor`; or (outside jit) a group before the last one
        has more or fewer inputs than `group_size`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> layout = jaxq.io.layouts.get("gptq")
      >>> qt = jaxq.quantize(jnp.ones((64, 32)), layout.spec({"bits": 4}))
      >>> tensors, config = layout.from_qtensor(qt)
      >>> tensors["g_idx"].max().item()
      0
      >>> tensors, order = jaxq.io.layouts.sort_inputs(tensors, config)
      >>> order[:3].tolist()
      [0, 1, 2]
    """
    source = WeightTensors("gptq", tensors, _NAMES)
    settings = Settings("gptq", config)
    num_in, _ = _sizes(source, settings)
    size = settings.size("group_size", num_in)
    group = _groups(source, num_in, size)
    if not is_traced(group):
        counts = np.bincount(np.asarray(group), minlength=-(-num_in // size))
        expected = np.minimum(size, num_in - size * np.arange(counts.size))
        if not (counts == expected).all():
            first = int(np.argmax(counts != expected))
            raise source.problem(
                "g_idx",
                f"has {counts[first]} inputs in group {first}, expected "
                f"{expected[first]}. Use dequantize=True",
            )
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    return _with_order(source, settings, order, group[order]), order


def restore_inputs(
    tensors: Tensors, config: Mapping[str, Any], order: jax.Array
) -> Written:
    """The inverse of `sort_inputs`: a GPTQ weight with `desc_act`.

    Args:
      tensors: the arrays of a sorted weight in the layout "gptq".
      config: its settings.
      order: int32 `[in]`, as `sort_inputs` returned it.

    Returns:
      (arrays, settings) of the weight in the order of its inputs.

    Raises:
      ValueError: as `Layout.to_qtensor`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> layout = jaxq.io.layouts.get("gptq")
      >>> spec = layout.spec({"bits": 4, "group_size": 32})
      >>> tensors, config = layout.from_qtensor(jaxq.quantize(jnp.ones((64, 32)), spec))
      >>> order = jnp.arange(64)[::-1]
      >>> tensors, config = jaxq.io.layouts.restore_inputs(tensors, config, order)
      >>> tensors["g_idx"][0].item(), config["desc_act"]
      (1, True)
    """
    source = WeightTensors("gptq", tensors, _NAMES)
    settings = Settings("gptq", config)
    num_in, _ = _sizes(source, settings)
    if order.shape != (num_in,):
        raise ValueError(
            f"gptq: order has shape {list(order.shape)}, expected [{num_in}]."
        )
    size = settings.size("group_size", num_in)
    inverse = jnp.argsort(order)
    group = (inverse // size).astype(jnp.int32)
    arrays = _with_order(source, settings, inverse, group)
    return arrays, dict(config, desc_act=True)


def _with_order(
    tensors: WeightTensors, settings: Settings, order: jax.Array, group: jax.Array
) -> dict[str, Any]:
    """The arrays with the inputs in another order, and their groups."""
    bits = settings.choice("bits", tuple(_PACKINGS))
    num_in, num_out = _sizes(tensors, settings)
    words = tensors.array("qweight", "int32", (num_in * bits // 32, num_out))
    codes = formats.unpack(word_bytes(words.T), bits, _PACKINGS[bits])
    data = formats.pack(codes[:, order], bits, _PACKINGS[bits])
    return {
        "qweight": int32_words(data).T,
        "qzeros": tensors.raw("qzeros"),
        "scales": tensors.raw("scales"),
        "g_idx": group,
    }


GPTQ = Layout(
    name="gptq",
    summary="GPTQ checkpoints of 2, 3, 4 and 8 bits, reads both versions, writes v2",
    tensors=_NAMES,
    make_spec=_spec,
    read=_read,
    write=_write,
    read_for_floats=_read_for_floats,
)
