"""Speed of quantizing one 4096 x 4096 float32 weight, beside what else one would use on a CPU.

jaxq runs under jit, once on a Flax kernel `[in, out]` (scales shared along the first axis, which means a transpose)
and once on `[out, in]`, the layout the others take.
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
TARGETS = {
    "nf4": ("bitsandbytes", 15.0),
    "int4": ("gguf Q4_0", 5.0),
    "int8": ("numpy", 3.0),
}


def numpy_int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel int8 as one writes it in numpy."""
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(w * (1 / scale)), -127, 127).astype(np.int8), scale


def peers(w: np.ndarray) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """The alternatives that are installed, and what is missing."""
    found: dict[str, Callable[[], Any]] = {"numpy": lambda: numpy_int8(w)}
    missing = []
    try:
        import bitsandbytes.functional as bnb
        import torch

        tensor = torch.from_numpy(w)
        found["bitsandbytes"] = lambda: bnb.quantize_4bit(
            tensor, blocksize=64, quant_type="nf4"
        )
    except ImportError as error:
        missing.append(f"bitsandbytes ({error})")
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        found["gguf Q4_0"] = lambda: quantize(w, GGMLQuantizationType.Q4_0)
    except ImportError as error:
        missing.append(f"gguf ({error})")
    return found, missing


def run() -> dict[str, Any]:
    """Times everything, checks the codes against numpy, and returns the figures."""
    w = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    x = jnp.asarray(w)
    others, missing = peers(w)
    rows = []
    for preset, (peer, target) in TARGETS.items():
        flax = jax.jit(
            lambda x, preset=preset: jaxq.quantize(x, preset, contracting=-2)
        )
        last = jax.jit(
            lambda x, preset=preset: jaxq.quantize(x, preset, contracting=-1)
        )
        _check(w, last(x), preset)
        functions: dict[str, Callable[[], Any]] = {
            "jaxq [in, out]": lambda flax=flax: jax.block_until_ready(flax(x)),
            "jaxq [out, in]": lambda last=last: jax.block_until_ready(last(x)),
        }
        if peer in others:
            functions[peer] = others[peer]
        times = summary(
            interleaved(functions, rounds=9, seconds=15.0), "jaxq [in, out]"
        )
        for name, figures in times.items():
            rows.append({"preset": preset, "what": name, **figures})
        if peer in others:
            against = summary(
                interleaved(
                    {k: functions[k] for k in (peer, *times)}, rounds=7, seconds=15.0
                ),
                peer,
            )
            for row in rows[-len(times) :]:
                row["speed_over_peer"] = 1 / against[row["what"]]["time_over_base"]
                row["peer"], row["target"] = peer, target
    return {
        "subject": "quantize",
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": missing,
    }


def _check(w: np.ndarray, qt: jaxq.QTensor, preset: str) -> None:
    back = np.asarray(jaxq.dequantize(qt))
    noise = np.linalg.norm(back - w) / np.linalg.norm(w)
    assert noise < {"int8": 0.01, "int4": 0.13, "nf4": 0.1}[preset], (preset, noise)
    if preset == "int8":
        codes, _ = numpy_int8(w)
        assert (np.asarray(qt.codes()) == codes).mean() > 0.9999


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| preset | who | median ms | least ms | GB/s of float32 | times the peer's speed | target |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    size = 4e-9 * SIZE * SIZE
    for r in result["rows"]:
        ratio = f"{r['speed_over_peer']:.1f}" if "speed_over_peer" in r else "-"
        target = (
            f">= {r['target']:.0f} x {r['peer']}"
            if r["what"].startswith("jaxq") and "target" in r
            else "-"
        )
        lines.append(
            f"| {r['preset']} | {r['what']} | {r['median_ms']:.1f} | {r['min_ms']:.1f} | "
            f"{size / (r['median_ms'] / 1e3):.2f} | {ratio} | {target} |"
        )
    return "\n".join(lines)
