"""Time of `[m, 4096] @ [4096, n]` in bfloat16 with quantized weights, over the dense bfloat16 product in the same run.

A loop inside one program multiplies by enough different weights that no cache holds them. Fractions are of what the
same run reached in copying memory and in a large dense product; decode is bound by the one, prefill by the other.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq

K = 4096
ACCELERATOR = {
    "n": (4096, 14336),
    "m": (1, 16, 64, 128, 256, 2048),
    "cache_bytes": 256 * 2**20,
    "loops": 8,
}
# A CPU has no kernels: what it runs shows that the benchmark itself is right.
CPU = {"n": (1024,), "m": (1, 16), "cache_bytes": 2**20, "loops": 1}
PRESETS = {"int8": "int8", "int4": "int4", "nf4": "nf4", "w8a8": "int8"}
TARGETS = {(name, m): 2.5 for name in ("int4", "nf4") for m in (1, 16)}
TARGETS |= {(name, 64): 1.8 for name in ("int4", "nf4")} | {("w8a8", 2048): 1.5}
TARGETS |= {(name, m): 0.85 for name in ("int4", "nf4") for m in (256, 2048)}


def run() -> dict[str, Any]:
    """Times each case beside the dense product, and checks it against dequantize-then-multiply in float64."""
    platform = jax.default_backend()
    sizes = CPU if platform == "cpu" else ACCELERATOR
    rows, peaks = [], _peaks(platform)
    for n in sizes["n"]:
        count = max(2, sizes["cache_bytes"] // (K * n // 2))
        weights, dense = _weights(n, count, platform)
        for m in sizes["m"]:
            x = jax.random.normal(jax.random.key(m), (m, K), jnp.bfloat16)
            calls = {"bfloat16": _loop(lambda x, w: x @ w, x, dense, sizes["loops"])}
            about = {"bfloat16": (2 * K * n, "dense", None)}
            for name, stack in weights.items():
                error = _error(x, stack[0])
                assert error < (0.02 if name == "w8a8" else 5e-3), (name, m, n, error)
                calls[name] = _loop(lambda x, qt: x @ qt, x, stack, sizes["loops"])
                plan = jaxq.explain(x, stack[0])
                about[name] = (stack[0].nbytes, plan.kernel, error)
            calls |= _others(m, n, count, sizes["loops"])
            products = count * sizes["loops"]
            for name, figures in summary(
                interleaved(calls, rounds=21, seconds=30.0), "bfloat16"
            ).items():
                weight_bytes, kernel, error = about.get(name, (None, name, None))
                seconds = figures["median_ms"] / 1e3 / products
                row = {
                    "what": name,
                    "m": m,
                    "n": n,
                    "kernel": kernel,
                    "error": error,
                    "us": 1e6 * seconds,
                }
                row["speedup"] = 1 / figures["time_over_base"]
                row["tflops"] = 2 * m * n * K / seconds / 1e12
                if weight_bytes is not None:
                    row["gb_per_s"] = (weight_bytes + 2 * m * (K + n)) / seconds / 1e9
                    fractions = (
                        row["gb_per_s"] / peaks["gb_per_s"],
                        row["tflops"] / peaks["tflops"],
                    )
                    row["roofline"] = max(fractions)
                rows.append(
                    row
                    | (
                        {"target": TARGETS[name, m]}
                        if (name, m) in TARGETS and platform != "cpu"
                        else {}
                    )
                )
    missing = (
        [] if platform == "cpu" or _torch() else ["torch with CUDA and bitsandbytes"]
    )
    return {"subject": "kernels", "peaks": peaks, "rows": rows, "missing": missing}


def _weights(
    n: int, count: int, platform: str
) -> tuple[dict[str, list[jaxq.QTensor]], list[jax.Array]]:
    """`count` weights of every kind, and dense ones."""
    keys = jax.random.split(jax.random.key(0), count)
    dense = [jax.random.normal(key, (K, n), jnp.bfloat16) / 64 for key in keys]
    found = {}
    for name, preset in PRESETS.items():
        stack = [jaxq.quantize(w, preset) for w in dense]
        if platform == "tpu":
            stack = [jaxq.relayout(qt, "columns") for qt in stack]
        found[name] = (
            [qt.with_activation("int8") for qt in stack] if name == "w8a8" else stack
        )
    return found, dense


def _loop(
    product: Callable, x: jax.Array, weights: list[Any], loops: int
) -> Callable[[], Any]:
    """All weights, `loops` times, in one program; x changes a little, so that no product is the same as one before."""

    @jax.jit
    def program(x, weights):
        def body(_, x):
            for w in weights:
                y = product(x, w)
                y = jnp.pad(y, ((0, 0), (0, max(0, K - y.shape[1]))))[:, :K]
                x = x + y * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, loops, body, x)

    return lambda: jax.block_until_ready(program(x, weights))


def _error(x: jax.Array, qt: jaxq.QTensor) -> float:
    exact = np.asarray(x, np.float64) @ np.asarray(
        jaxq.dequantize(qt, dtype=jnp.float32), np.float64
    )
    found = np.asarray(jax.jit(lambda x, qt: x @ qt)(x, qt), np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _peaks(platform: str) -> dict[str, float]:
    """What this device reaches: bytes a second of a copy, operations a second of a large dense product."""
    size, side = (2**22, 512) if platform == "cpu" else (2**29, 8192)
    big, square = (
        jnp.zeros((size,), jnp.bfloat16),
        jnp.zeros((side, side), jnp.bfloat16),
    )
    copy, dense = jax.jit(lambda v: v + jnp.bfloat16(1)), jax.jit(jnp.matmul)
    calls = {
        "copy": lambda: jax.block_until_ready(copy(big)),
        "dense": lambda: jax.block_until_ready(dense(square, square)),
    }
    found = summary(interleaved(calls, rounds=11, seconds=10.0), "copy")
    seconds = {name: figures["min_ms"] / 1e3 for name, figures in found.items()}
    return {
        "gb_per_s": 4 * size / seconds["copy"] / 1e9,
        "tflops": 2 * side**3 / seconds["dense"] / 1e12,
    }


def _torch() -> Any:
    """torch with CUDA where it and bitsandbytes are installed, else None."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "bitsandbytes")):
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def _others(m: int, n: int, count: int, loops: int) -> dict[str, Callable[[], Any]]:
    """What people would use instead, on the same device: bitsandbytes' NF4 and torch's own int4, in CUDA graphs."""
    torch = _torch()
    if torch is None:
        return {}
    from bitsandbytes import functional

    x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
    dense = [
        torch.randn(n, K, device="cuda", dtype=torch.bfloat16) / 64
        for _ in range(count)
    ]
    products: dict[str, Callable] = {"torch bfloat16": torch.nn.functional.linear}
    weights: dict[str, list] = {"torch bfloat16": dense}

    import bitsandbytes

    weights["bitsandbytes nf4"] = [
        functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in dense
    ]
    products["bitsandbytes nf4"] = lambda x, w: bitsandbytes.matmul_4bit(
        x, w[0].t(), quant_state=w[1]
    )
    if hasattr(torch, "_weight_int4pack_mm"):
        packed = [
            torch.randint(0, 256, (n, K // 2), device="cuda", dtype=torch.uint8)
            for _ in dense
        ]
        scales = torch.ones(K // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        weights["torch int4"] = [
            (torch._convert_weight_to_int4pack(w, 8), scales) for w in packed
        ]
        products["torch int4"] = lambda x, w: torch._weight_int4pack_mm(
            x, w[0], 128, w[1]
        )
    calls = {}
    for name, product in products.items():
        try:
            calls[name] = _graph(torch, product, x, weights[name], loops)
        except (RuntimeError, NotImplementedError) as error:
            warnings.warn(f"{name} does not run here: {error}", stacklevel=1)
    return calls


def _graph(
    torch: Any, product: Callable, x: Any, weights: list, loops: int
) -> Callable[[], Any]:
    def body():
        for _ in range(loops):
            for w in weights:
                product(x, w)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()

    def call():
        graph.replay()
        torch.cuda.synchronize()

    return call


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    peaks = result["peaks"]
    lines = [
        f"Copy: {peaks['gb_per_s']:.0f} GB/s. Dense bfloat16: {peaks['tflops']:.1f} TFLOP/s.",
        "",
    ]
    lines.append(
        "| weight | runs as | m | n | us | GB/s | TFLOP/s | roofline | times bfloat16 | target | error |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        bandwidth = f"{r['gb_per_s']:.0f}" if "gb_per_s" in r else "-"
        roofline = f"{r['roofline']:.2f}" if "roofline" in r else "-"
        target = f">= {r['target']}" if "target" in r else "-"
        error = "-" if r["error"] is None else f"{r['error']:.1e}"
        cells = [
            r["what"],
            r["kernel"],
            r["m"],
            r["n"],
            f"{r['us']:.1f}",
            bandwidth,
            f"{r['tflops']:.2f}",
            roofline,
        ]
        lines.append(
            "| "
            + " | ".join(map(str, [*cells, f"{r['speedup']:.2f}", target, error]))
            + " |"
        )
    return "\n".join(lines)
