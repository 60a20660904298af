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
