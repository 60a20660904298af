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
# The end of the name of a weight whose codes lie along columns. Only TPUs read these.
COLUMNS = ", columns"
# The speed relative to bfloat16 that is aimed at, by weight and rows of x.
TARGETS = {(name, m): 2.5 for name in ("int4", "nf4") for m in (1, 16)}
TARGETS |= {(name, 64): 1.8 for name in ("int4", "nf4")} | {("w8a8", 2048): 1.5}
TARGETS |= {(name, m): 0.85 for name in ("int4", "nf4") for m in (256, 2048)}
# The largest relative error: of a product with a bfloat16 result, and with inputs that
# are rounded to int8 before.
LARGEST_ERROR = {"w8a8": 0.02}
LARGEST_ERROR |= dict.fromkeys(("int8", "int4", "nf4"), 5e-3)
HEADER = (
    "| weight | runs as | m | n | us | GB/s | TFLOP/s | roofline | times bfloat16 "
    "| target | error |"
)


def run() -> dict[str, Any]:
    """Times each case next to the dense product, and checks its result in float64."""
    platform = jax.default_backend()
    sizes = CPU if platform == "cpu" else ACCELERATOR
    rows, peaks = [], find_peaks(platform)
    for n in sizes["n"]:
        count = max(2, sizes["cache_bytes"] // (K * n // 2))
        weights, dense = make_weights(n, count, platform)
        for m in sizes["m"]:
            rows += _rows_of_size(m, n, weights, dense, sizes["loops"], peaks)
    if platform == "cpu":
        for row in rows:
            row.pop("target", None)
    missing = []
    if platform != "cpu" and not _torch():
        missing.append("torch with CUDA")
    if platform != "cpu" and not importlib.util.find_spec("bitsandbytes"):
        missing.append("bitsandbytes")
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
    products = Products(m, n, weights, dense, loops)
    products.calls |= others(m, n, len(dense), loops)
    rows = products.measure(rounds=21, seconds=30.0)
    for row in rows:
        name = row["what"]
        if "gb_per_s" in row:
            memory = row["gb_per_s"] / peaks["gb_per_s"]
            row["roofline"] = max(memory, row["tflops"] / peaks["tflops"])
        target = TARGETS.get((name.removesuffix(COLUMNS), m))
        if target is not None:
            row["target"] = target
    return rows


class Products:
    """Products of one m and n, compiled: dense ones, and one for each kind of weight.

    Attributes:
        calls: functions that run all products of a kind, by kind.
    """

    def __init__(
        self,
        m: int,
        n: int,
        weights: dict[str, list[jaxq.QTensor]],
        dense: list[jax.Array],
        loops: int,
    ):
        """Compiles the programs.

        Args:
            m: rows of x.
            n: columns of the results.
            weights: quantized weights `[K, n]` by kind, as many as dense ones.
            dense: bfloat16 weights `[K, n]`.
            loops: how often a call multiplies by all weights.
        """
        self._m, self._n = m, n
        self._per_call = len(dense) * loops
        self._x = x = jax.random.normal(jax.random.key(m), (m, K), jnp.bfloat16)
        self._first = {name: stack[0] for name, stack in weights.items()}
        self.calls = {"bfloat16": loop(lambda x, w: x @ w, x, dense, loops)}
        for name, stack in weights.items():
            self.calls[name] = loop(lambda x, qt: x @ qt, x, stack, loops)

    def measure(self, rounds: int, seconds: float) -> list[dict[str, Any]]:
        """A row for each kind: times, speed relative to bfloat16, and the error."""
        m, n = self._m, self._n
        times_of = interleaved(self.calls, rounds=rounds, seconds=seconds)
        rows = []
        for name, times in summary(times_of, "bfloat16").items():
            seconds_each = times["median_ms"] / 1e3 / self._per_call
            row = {
                "what": name,
                "m": m,
                "n": n,
                "kernel": name,
                "error": None,
                "us": 1e6 * seconds_each,
                "speedup": 1 / times["time_over_base"],
                "tflops": 2 * m * n * K / seconds_each / 1e12,
            }
            weight_bytes = 2 * K * n if name == "bfloat16" else None
            if name == "bfloat16":
                row["kernel"] = "dense"
            if name in self._first:
                qt = self._first[name]
                weight_bytes = qt.nbytes
                row["kernel"] = jaxq.explain(self._x, qt).kernel
                row["error"] = _error(self._x, qt)
            if weight_bytes is not None:
                num_bytes = weight_bytes + 2 * m * (K + n)
                row["gb_per_s"] = num_bytes / seconds_each / 1e9
            rows.append(row)
        return rows


def make_weights(
    n: int, count: int, platform: str
) -> tuple[dict[str, list[jaxq.QTensor]], list[jax.Array]]:
    """`count` weights of every kind, and dense ones."""
    keys = jax.random.split(jax.random.key(0), count)
    dense = [jax.random.normal(key, (K, n), jnp.bfloat16) / 64 for key in keys]
    weights = {}
    for name, preset in PRESETS.items():
        stack = [jaxq.quantize(w, preset) for w in dense]
        if name == "w8a8":
            stack = [qt.with_activation("int8") for qt in stack]
        weights[name] = stack
        if platform == "tpu":
            columns = [jaxq.relayout(qt, "columns") for qt in stack]
            weights[f"{name}{COLUMNS}"] = columns
    return weights, dense


def loop(
    product: Callable, x: jax.Array, weights: list[Any], loops: int
) -> Callable[[], Any]:
    """A compiled call that multiplies by all weights, `loops` times, in one program.

    Args:
        product: from x `[..., k]` and a weight to `[..., n]`.
        x: the same for all products.
        weights: arrays, QTensors or tuples of arrays.
        loops: how often.
    """

    @jax.jit
    def program(x, weights):
        def body(_, x):
            # Without the barrier, XLA would move work on weights, such as a transpose
            # of scales, out of the loop. A model does this work for each product.
            x, inner = jax.lax.optimization_barrier((x, weights))
            for w in inner:
                y = product(x, w)
                k = x.shape[-1]
                missing = [(0, 0)] * (y.ndim - 1) + [(0, max(0, k - y.shape[-1]))]
                y = jnp.pad(y, missing)[..., :k]
                # x changes a little, so that XLA cannot drop or share a product.
                x = x + y * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, loops, body, x)

    compiled = program.lower(x, weights).compile()
    return lambda: jax.block_until_ready(compiled(x, weights))


def _error(x: jax.Array, qt: jaxq.QTensor) -> float:
    """The relative error of `x @ qt` against the dequantized weight in float64."""
    w = np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)
    exact = np.asarray(x, np.float64) @ w
    y = np.asarray(jax.jit(lambda x, qt: x @ qt)(x, qt), np.float64)
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def find_peaks(platform: str) -> dict[str, float]:
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
    """torch with CUDA, or None if it is not installed."""
    if not importlib.util.find_spec("torch"):
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def others(m: int, n: int, count: int, loops: int) -> dict[str, Callable[[], Any]]:
    """Other libraries on the same device, in CUDA graphs.

    These are torch's bfloat16 and int4 products, and bitsandbytes' NF4 if it is
    installed.
    """
    torch = _torch()
    if torch is None:
        return {}
    x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
    dense = [
        torch.randn(n, K, device="cuda", dtype=torch.bfloat16) / 64
        for _ in range(count)
    ]
    products: dict[str, Callable] = {"torch bfloat16": torch.nn.functional.linear}
    weights: dict[str, list] = {"torch bfloat16": dense}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes
        from bitsandbytes import functional

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
            _error_text(row),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _error_text(row: dict[str, Any]) -> str:
    error = row["error"]
    if error is None:
        return "-"
    # NaN is wrong too.
    is_right = error <= LARGEST_ERROR[row["what"].removesuffix(COLUMNS)]
    return f"{error:.1e}" if is_right else f"{error:.1e} WRONG"
