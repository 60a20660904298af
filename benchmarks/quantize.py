"""Speed of quantizing one float32 weight of 4096 x 4096, beside other libraries on CPU.

jaxq runs under jit with two layouts. `[in, out]` is a Flax kernel: scales are shared
along the first axis, so there is a transpose. `[out, in]` is the layout of the other
libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq

SIZE = 4096
# By preset: the peer, and the least speed relative to it.
TARGETS = {
    "nf4": ("bitsandbytes", 15.0),
    "int4": ("gguf Q4_0", 5.0),
    "int8": ("numpy", 3.0),
}
# By preset: the largest error, relative to the weight.
MOST_ERROR = {"int8": 0.01, "int4": 0.13, "nf4": 0.1}
Functions = dict[str, Callable[[], Any]]


def numpy_int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of per-channel int8, in plain numpy."""
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(w * (1 / scale)), -127, 127).astype(np.int8), scale


def peers(w: np.ndarray) -> tuple[Functions, list[str]]:
    """The other libraries that are installed, and those that are missing."""
    functions: Functions = {"numpy": lambda: numpy_int8(w)}
    missing = []
    try:
        import bitsandbytes.functional as bnb
        import torch

        tensor = torch.from_numpy(w)
        functions["bitsandbytes"] = lambda: bnb.quantize_4bit(
            tensor, blocksize=64, quant_type="nf4"
        )
    except ImportError as error:
        missing.append(f"bitsandbytes ({error})")
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        functions["gguf Q4_0"] = lambda: quantize(w, GGMLQuantizationType.Q4_0)
    except ImportError as error:
        missing.append(f"gguf ({error})")
    return functions, missing


def run() -> dict[str, Any]:
    """Times every preset and its peer, and checks the codes against numpy."""
    w = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    peer_functions, missing = peers(w)
    rows = []
    for preset, (peer, target) in TARGETS.items():
        functions = _jaxq_functions(w, preset)
        if peer in peer_functions:
            functions[peer] = peer_functions[peer]
        times = interleaved(functions, rounds=9, seconds=15.0)
        preset_rows = [
            {"preset": preset, "what": name, **figures}
            for name, figures in summary(times, "jaxq [in, out]").items()
        ]
        if peer in peer_functions:
            times = interleaved(functions, rounds=7, seconds=15.0)
            figures = summary(times, peer)
            for row in preset_rows:
                row["speed_over_peer"] = 1 / figures[row["what"]]["time_over_base"]
                row["peer"], row["target"] = peer, target
        rows += preset_rows
    return {
        "subject": "quantize",
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": missing,
    }


def _jaxq_functions(w: np.ndarray, preset: str) -> Functions:
    """Quantizes `w` as an [in, out] and as an [out, in] matrix."""
    x = jnp.asarray(w)
    in_out = jax.jit(lambda x: jaxq.quantize(x, preset, contracting=-2))
    out_in = jax.jit(lambda x: jaxq.quantize(x, preset, contracting=-1))
    _check(w, out_in(x), preset)
    return {
        "jaxq [in, out]": lambda: jax.block_until_ready(in_out(x)),
        "jaxq [out, in]": lambda: jax.block_until_ready(out_in(x)),
    }


def _check(w: np.ndarray, qt: jaxq.QTensor, preset: str) -> None:
    """Raises if the error is large, or if int8 codes differ from those of numpy."""
    error = np.asarray(jaxq.dequantize(qt)) - w
    relative_error = np.linalg.norm(error) / np.linalg.norm(w)
    assert relative_error < MOST_ERROR[preset], (preset, relative_error)
    if preset == "int8":
        codes, _ = numpy_int8(w)
        # numpy divides by 127, and jaxq multiplies by 1/127. So the last bit of a few
        # scales differs, and with it a few codes.
        assert (np.asarray(qt.codes()) == codes).mean() > 0.9999


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    header = (
        "| preset | who | median ms | least ms | GB/s of float32 "
        "| times the peer's speed | target |"
    )
    lines = [header, "|---|---|---|---|---|---|---|"]
    gigabytes = 4e-9 * SIZE * SIZE
    for row in result["rows"]:
        ratio, target = "-", "-"
        if "speed_over_peer" in row:
            ratio = f"{row['speed_over_peer']:.1f}"
        if row["what"].startswith("jaxq") and "target" in row:
            target = f">= {row['target']:.0f} x {row['peer']}"
        speed = gigabytes / (row["median_ms"] / 1e3)
        lines.append(
            f"| {row['preset']} | {row['what']} | {row['median_ms']:.1f} "
            f"| {row['min_ms']:.1f} | {speed:.2f} | {ratio} | {target} |"
        )
    return "\n".join(lines)
