"""The layouts with settings: one row for every kind of weight that jaxq writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.io import layouts


class Case(NamedTuple):
    """One kind of weight.

    Attributes:
      layout: its name.
      config: the settings for `spec`.
      scales: the names of the arrays whose numbers must be finite.
      bits: storage of the arrays without tables and JSON, per weight of `SHAPE`.
      optional: arrays that a weight can do without.
      traced_write: whether `from_qtensor` works under jit.
    """

    layout: str
    config: dict[str, Any]
    scales: tuple[str, ...]
    bits: float
    optional: tuple[str, ...] = ()
    traced_write: bool = True


SHAPE = (256, 64)  # [in, out]


def _weights(bits, kind="int", strategy="group", size: int | None = 128, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy}
    return weights | {"group_size": size, "symmetric": True} | more


SCALE = ("weight_scale",)
COMPRESSED = {
    "pack 4": ({"format": "pack-quantized", "weights": _weights(4)}, SCALE, 4.125),
    "pack 4 asymmetric": (
        {"format": "pack-quantized", "weights": _weights(4, symmetric=False, size=64)},
        SCALE,
        4.3125,
    ),
    "pack 8": (
        {
            "format": "pack-quantized",
            "weights": _weights(8, strategy="channel", size=None),
        },
        SCALE,
        8.0625,
    ),
    "float": (
        {
            "format": "float-quantized",
            "weights": _weights(8, "float", "channel", None),
        },
        SCALE,
        8.0625,
    ),
    "float block": (
        {
            "format": "float-quantized",
            "weights": _weights(8, "float", "block", None, block_structure=[128, 128]),
        },
        SCALE,
        8.001,
    ),
    "float tensor": (
        {
            "format": "float-quantized",
            "weights": _weights(8, "float", "tensor", None),
        },
        SCALE,
        8.001,
    ),
    "nvfp4": (
        {"format": "nvfp4-pack-quantized", "weights": {}},
        (*SCALE, "weight_global_scale"),
        4.502,
    ),
    "mxfp4": ({"format": "mxfp4-pack-quantized", "weights": {}}, SCALE, 4.25),
}

GGUF_BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q8_0": 8.5,
    "MXFP4": 4.25,
}

CASES = {
    "nf4": Case(
        "bitsandbytes_4bit",
        {"bnb_4bit_quant_type": "nf4"},
        ("weight.absmax",),
        4.5,
    ),
    "fp4": Case(
        "bitsandbytes_4bit",
        {"bnb_4bit_quant_type": "fp4", "blocksize": 128},
        ("weight.absmax",),
        4.25,
    ),
    "nf4 nested": Case(
        "bitsandbytes_4bit",
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ("weight.nested_absmax",),
        4.127,
        traced_write=False,
    ),
    "gptq 4": Case(
        "gptq", {"bits": 4, "group_size": 128}, ("scales",), 4.15625, ("g_idx",)
    ),
    "gptq 4 asymmetric": Case(
        "gptq",
        {"bits": 4, "group_size": 64, "sym": False},
        ("scales",),
        4.3125,
        ("g_idx",),
    ),
    "gptq 3": Case(
        "gptq",
        {"bits": 3, "group_size": 32, "sym": False},
        ("scales",),
        3.59375,
        ("g_idx",),
    ),
    "gptq 2": Case(
        "gptq",
        {"bits": 2, "group_size": 64, "sym": False},
        ("scales",),
        2.28125,
        ("g_idx",),
    ),
    "gptq 8": Case(
        "gptq", {"bits": 8, "group_size": -1}, ("scales",), 8.09375, ("g_idx",)
    ),
    "awq": Case("awq", {"bits": 4, "group_size": 128}, ("scales",), 4.15625),
    **{
        f"compressed-tensors {name}": Case("compressed_tensors", config, scales, bits)
        for name, (config, scales, bits) in COMPRESSED.items()
    },
    "mxfp4": Case("mxfp4", {}, ("scales",), 4.25),
    "fp8 block": Case("fp8_block", {}, ("weight_scale_inv",), 8.002),
    "modelopt nvfp4": Case(
        "modelopt_nvfp4", {}, ("weight_scale", "weight_scale_2"), 4.502
    ),
    **{
        f"gguf {name}": Case("gguf", {"type": name}, ("weight",), bits)
        for name, bits in GGUF_BITS.items()
    },
    "llm_int8": Case("bitsandbytes_int8", {}, ("SCB",), 8.125, ("weight_format",)),
}


def kernel(seed=0, shape=SHAPE) -> np.ndarray:
    """A kernel whose channels have different magnitudes and means."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.standard_normal((1, shape[-1])) / 2)
    mean = random.standard_normal((1, shape[-1])) / 4
    return ((random.standard_normal(shape) + mean) * spread).astype(np.float32)


def weight_of(case: Case, w=None) -> jaxq.QTensor:
    """A QTensor that the layout of a case holds."""
    layout = layouts.get(case.layout)
    w = jnp.asarray(kernel() if w is None else w)
    return jaxq.quantize(w, layout.spec(case.config))


def split(layout, tensors):
    """The arrays that may be traced, and those that must be constant."""
    static = {name: tensors[name] for name in layout.static if name in tensors}
    traced = {name: a for name, a in tensors.items() if name not in static}
    return jax.tree.map(jnp.asarray, traced), jax.tree.map(np.asarray, static)
