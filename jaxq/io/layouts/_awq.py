"""The weights of AWQ checkpoints in the version "gemm" (AutoAWQ).

| array | dtype and shape | contents |
|---|---|---|
| `qweight` | int32 `[in, out / 8]` | codes, packed along the outputs |
| `qzeros` | int32 `[groups, out / 8]` | zero points, packed in the same way |
| `scales` | float16 `[groups, out]` | |

A number is `scales * (code - zero)`. A word has the codes of eight neighbouring
outputs. Its lowest four bits have output 0, the next ones output 2, then 4, 6, 1, 3, 5
and 7. A QTensor packs codes along the inputs, so codes are packed again.

References:
  Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
  Acceleration", 2024.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.formats import IntegerFormat, Packing
from jaxq.io.layouts._layout import Layout, Written
from jaxq.io.layouts._stored import StoredWeight, grouped, qtensor_of_codes
from jaxq.io.layouts._tensors import Settings, WeightTensors
from jaxq.io.layouts._words import int32_words, word_bytes
from jaxq.qtensor import QTensor, QuantSpec

# The output that each four bits of a word hold, lowest bits first, and the inverse.
_OUTPUT_OF_FIELD = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])
_FIELD_OF_OUTPUT = np.argsort(_OUTPUT_OF_FIELD)
_SCALES = ("float16", "bfloat16", "float32")


def _spec(settings: Settings) -> QuantSpec:
    _check(settings)
    return _spec_of(settings.optional_size("group_size"), "float16")


def _check(settings: Settings) -> None:
    settings.choice("bits", (4,), 4)
    settings.choice("version", ("gemm", "GEMM"), "gemm")
    settings.choice("zero_point", (True,), True)


def _spec_of(size: int | None, scale: str) -> QuantSpec:
    return QuantSpec("uint4", grouped(size), symmetric=False, scale=scale)


def _read(tensors: WeightTensors, settings: Settings) -> QTensor:
    _check(settings)
    num_in, num_words = tensors.shape("qweight", 2)
    num_out = num_words * 8
    size = settings.size("group_size", num_in)
    num_groups = -(-num_in // size)
    words = tensors.array("qweight", "int32", (num_in, num_words))
    zeros = tensors.array("qzeros", "int32", (num_groups, num_words))
    scale = tensors.scale("scales", _SCALES, (num_groups, num_out)).T
    spec = _spec_of(settings.optional_size("group_size"), scale.dtype.name)
    return qtensor_of_codes(
        spec, (num_in, num_out), _fields(words).T, scale, zero_point=_fields(zeros).T
    )


def _fields(words: jax.Array) -> jax.Array:
    """int32 `[n, words]` as uint8 `[n, words * 8]`, in the order of the outputs."""
    stored = formats.unpack(word_bytes(words), 4, Packing.LOW_FIRST)
    by_word = stored.reshape(*words.shape, 8)
    return by_word[..., _FIELD_OF_OUTPUT].reshape(words.shape[0], -1)


def _words(fields: jax.Array) -> jax.Array:
    """The inverse of `_fields`."""
    by_word = fields.reshape(fields.shape[0], -1, 8)[..., _OUTPUT_OF_FIELD]
    stored = by_word.reshape(fields.shape)
    return int32_words(formats.pack(stored, 4, Packing.LOW_FIRST))


def _write(weight: StoredWeight) -> Written:
    fmt = weight.spec.fmt
    right = isinstance(fmt, IntegerFormat) and fmt.bits == 4
    weight.refuse_unless(right, "expected integers of 4 bits")
    weight.refuse_unless(weight.qt.offset is None, "the layout has no offset")
    num_out = weight.num_out
    weight.refuse_unless(num_out % 8 == 0, f"{num_out} outputs fill no whole words")
    num_groups = weight.num_groups()
    codes, zero = weight.unsigned(1)
    zeros = jnp.broadcast_to(zero, (num_out, num_groups))
    scale = weight.array_scale("float16").reshape(num_out, num_groups)
    tensors = {
        "qweight": _words(codes.T),
        "qzeros": _words(zeros.T),
        "scales": scale.T,
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight.group_setting(),
        "zero_point": True,
        "version": "gemm",
    }
    return tensors, config


AWQ = Layout(
    name="awq",
    summary="AWQ checkpoints of 4 bits in the version gemm",
    tensors=("qweight", "qzeros", "scales"),
    make_spec=_spec,
    read=_read,
    write=_write,
)
