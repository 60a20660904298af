"""Time of `[m, 4096] @ [4096, 4096]` with quantized weights, over the time of the float32 product in the same run.

Cases named `bf16` have bfloat16 activations, and weights quantized from bfloat16, as most language models are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq

SIZE = 4096
TARGETS = {
    "w8a8": {1: 0.8, 16: 0.6, 128: 0.85},
    "int8": {1: 1.7},
    "int4": {16: 1.0, 128: 0.75},
    "int4 bf16": {128: 0.75},
    "nf4": {16: 2.0, 128: 1.5},
}


def run() -> dict[str, Any]:
    """Times each case beside the dense product, and checks it against dequantize-then-multiply."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((SIZE, SIZE), np.float32))
    weights = {name: jaxq.quantize(w, name) for name in ("int8", "int4", "nf4")}
    weights["w8a8"] = weights["int8"].with_activation("int8")
    weights["int4 bf16"] = jaxq.quantize(w.astype(jnp.bfloat16), "int4")
    error_of = {"w8a8": 0.02, "int4 bf16": 0.01}
    dense = jax.jit(jnp.matmul)
    product = jax.jit(lambda x, qt: x @ qt)
    rows = []
    for m in (1, 16, 128):
        inputs = jnp.asarray(rng.standard_normal((m, SIZE), np.float32))
        functions = {"float32": lambda x=inputs: jax.block_until_ready(dense(x, w))}
        temporary = {
            "float32": dense.lower(inputs, w)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        }
        for name, qt in weights.items():
            x = inputs.astype(qt.dtype)
            exact = np.asarray(x, np.float64) @ np.asarray(
                jaxq.dequantize(qt), np.float64
            )
            error = (
                np.abs(np.asarray(product(x, qt), np.float64) - exact).max()
                / np.abs(exact).max()
            )
            assert error < error_of.get(name, 1e-5), (name, m, error)
            functions[name] = lambda x=x, qt=qt: jax.block_until_ready(product(x, qt))
            temporary[name] = (
                product.lower(x, qt).compile().memory_analysis().temp_size_in_bytes
            )
        for name, figures in summary(
            interleaved(functions, rounds=31, seconds=20.0), "float32"
        ).items():
            row = {"what": name, "m": m, **figures, "temporary_bytes": temporary[name]}
            rows.append(
                row
                | ({"target": TARGETS[name][m]} if m in TARGETS.get(name, {}) else {})
            )
    return {"subject": "matmul", "shape": [SIZE, SIZE], "rows": rows, "missing": []}


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| weight | m | median ms | least ms | time over float32 | target | temporary MB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        target = f"<= {r['target']}" if "target" in r else "-"
        times = f"{r['median_ms']:.2f} | {r['min_ms']:.2f} | {r['time_over_base']:.2f}"
        lines.append(
            f"| {r['what']} | {r['m']} | {times} | {target} | {r['temporary_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)
