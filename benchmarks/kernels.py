"""Time of `[m, 4096] @ [4096, n]` in bfloat16 with quantized weights.

Each time is compared with the dense bfloat16 product in the same run. A loop inside one
program multiplies by enough different weights that no cache holds them. Fractions of
the roofline are relative to what the same run reached when it copied memory and
multiplied large dense matrices. Memory limits decode (few rows of x), and computing
limits prefill (many rows). No accelerator has been measured yet.
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
# A CPU has no kernels. A run there only shows that the benchmark itself works.
CPU = {"n": (1024,), "m": (1, 16), "cache_bytes": 2**20, "loops": 1}
PRESETS = {"int8": "int8", "int4": "int4", "nf4": "nf4", "w8a8": "int8"}
# The speed relative to bfloat16 that is aimed at, by weight and rows of x.
TARGETS = {(name, m): 2.5 for name in ("int4", "nf4") for m in (1, 16)}
TARGETS |= {(name, 64): 1.8 for name in ("int4", "nf4")} | {("w8a8", 2048): 1.5}
TARGETS |= {(name, m): 0.85 for name in ("int4", "nf4") for m in (256, 2048)}
HEADER = (
    "| weight | runs as | m | n | us | GB/s | TFLOP/s | roofline | times bfloat16 "
    "| target | error |"
)


def run() -> dict[str, Any]:
    """Times each case next to the dense product, and checks its result in float64."""
    platform = jax.default_backend()
    sizes = CPU if platform == "cpu" else ACCELERATOR
    rows, peaks = [], _peaks(platform)
    for n in sizes["n"]:
        count = max(2, sizes["cache_bytes"] // (K * n // 2))
        weights, dense = _weights(n, count, platform)
        for m in sizes["m"]:
            rows += _rows_of_size(m, n, weights, dense, sizes["loops"], peaks)
    if platform == "cpu":
        for row in rows:
            row.pop("target", None)
    has_torch = platform == "cpu" or _torch()
    missing = [] if has_torch else ["torch with CUDA and bitsandbytes"]
    return {"subject": "kernels", "peaks": peaks, "rows": rows, "missing": missing}


def _rows_of_size(
    m: int,
    n: int,
    weights: dict[str, list[jaxq.QTensor]],
    dense: list[jax.Array],
    loops: int,
    peaks: dict[str, float],
) -> list[dict[str, Any]]:
    """The rows of the result for one m and n: one for each kind of weight."""
    x = jax.random.normal(jax.random.key(m), (m, K), jnp.bfloat16)
    calls = {"bfloat16": _loop(lambda x, w: x @ w, x, dense, loops)}
    # For each kind: bytes of a weight, what runs, and the relative error.
    facts: dict[str, tuple] = {"bfloat16": (2 * K * n, "dense", None)}
    for name, stack in weights.items():
        error = _error(x, stack[0])
        assert error < (0.02 if name == "w8a8" else 5e-3), (name, m, n, error)
        calls[name] = _loop(lambda x, qt: x @ qt, x, stack, loops)
        facts[name] = (stack[0].nbytes, jaxq.explain(x, stack[0]).kernel, error)
    calls |= _others(m, n, len(dense), loops)
    figures = summary(interleaved(calls, rounds=21, seconds=30.0), "bfloat16")
    rows = []
    for name, times in figures.items():
        weight_bytes, kernel, error = facts.get(name, (None, name, None))
        seconds = times["median_ms"] / 1e3 / (len(dense) * loops)
        row = {
            "what": name,
            "m": m,
            "n": n,
            "kernel": kernel,
            "error": error,
            "us": 1e6 * seconds,
            "speedup": 1 / times["time_over_base"],
            "tflops": 2 * m * n * K / seconds / 1e12,
        }
        if weight_bytes is not None:
            row["gb_per_s"] = (weight_bytes + 2 * m * (K + n)) / seconds / 1e9
            memory = row["gb_per_s"] / peaks["gb_per_s"]
            compute = row["tflops"] / peaks["tflops"]
            row["roofline"] = max(memory, compute)
        if (name, m) in TARGETS:
            row["target"] = TARGETS[name, m]
        rows.append(row)
    return rows


def _weights(
    n: int, count: int, platform: str
) -> tuple[dict[str, list[jaxq.QTensor]], list[jax.Array]]:
    """`count` weights of every kind, and dense ones."""
    keys = jax.random.split(jax.random.key(0), count)
    dense = [jax.random.normal(key, (K, n), jnp.bfloat16) / 64 for key in keys]
    weights = {}
    for name, preset in PRESETS.items():
        stack = [jaxq.quantize(w, preset) for w in dense]
        if platform == "tpu":
            stack = [jaxq.relayout(qt, "columns") for qt in stack]
        if name == "w8a8":
            stack = [qt.with_activation("int8") for qt in stack]
        weights[name] = stack
    return weights, dense


def _loop(
    product: Callable, x: jax.Array, weights: list[Any], loops: int
) -> Callable[[], Any]:
    """A call that multiplies by all weights, `loops` times, in one program."""

    @jax.jit
    def program(x, weights):
        def body(_, x):
            for w in weights:
                y = product(x, w)
                y = jnp.pad(y, ((0, 0), (0, max(0, K - y.shape[1]))))[:, :K]
                # x changes a little, so that XLA cannot drop or share a product.
                x = x + y * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, loops, body, x)

    return lambda: jax.block_until_ready(program(x, weights))


def _error(x: jax.Array, qt: jaxq.QTensor) -> float:
    """The relative error of `x @ qt` against the dequantized weight in float64."""
    w = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)
    exact = np.asarray(x, np.float64) @ w
    y = np.asarray(jax.jit(lambda x, qt: x @ qt)(x, qt), np.float64)
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def _peaks(platform: str) -> dict[str, float]:
    """What this device reaches: bytes per second of a copy, operations of a product."""
    size, side = (2**22, 512) if platform == "cpu" else (2**29, 8192)
    vector = jnp.zeros((size,), jnp.bfloat16)
    square = jnp.zeros((side, side), jnp.bfloat16)
    copy, dense = jax.jit(lambda v: v + jnp.bfloat16(1)), jax.jit(jnp.matmul)
    calls = {
        "copy": lambda: jax.block_until_ready(copy(vector)),
        "dense": lambda: jax.block_until_ready(dense(square, square)),
    }
    figures = summary(interleaved(calls, rounds=11, seconds=10.0), "copy")
    seconds = {name: times["min_ms"] / 1e3 for name, times in figures.items()}
    return {
        "gb_per_s": 4 * size / seconds["copy"] / 1e9,
        "tflops": 2 * side**3 / seconds["dense"] / 1e12,
    }


def _torch() -> Any:
    """torch with CUDA, or None if it or bitsandbytes is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "bitsandbytes")):
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def _others(m: int, n: int, count: int, loops: int) -> dict[str, Callable[[], Any]]:
    """Other libraries on the same device, in CUDA graphs.

    These are torch's bfloat16 and int4 products and bitsandbytes' NF4.
    """
    torch = _torch()
    if torch is None:
        return {}
    import bitsandbytes
    from bitsandbytes import functional

    x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
    dense = [
        torch.randn(n, K, device="cuda", dtype=torch.bfloat16) / 64
        for _ in range(count)
    ]
    products: dict[str, Callable] = {"torch bfloat16": torch.nn.functional.linear}
    weights: dict[str, list] = {"torch bfloat16": dense}
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
    """A call that replays all products in one CUDA graph."""

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
    """Returns a markdown table of the figures of `run`."""
    peaks = result["peaks"]
    copy = f"Copy: {peaks['gb_per_s']:.0f} GB/s."
    dense = f"Dense bfloat16: {peaks['tflops']:.1f} TFLOP/s."
    lines = [
        f"{copy} {dense}",
        "",
        HEADER,
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            row["what"],
            row["kernel"],
            row["m"],
            row["n"],
            f"{row['us']:.1f}",
            f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "-",
            f"{row['tflops']:.2f}",
            f"{row['roofline']:.2f}" if "roofline" in row else "-",
            f"{row['speedup']:.2f}",
            f">= {row['target']}" if "target" in row else "-",
            "-" if row["error"] is None else f"{row['error']:.1e}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
