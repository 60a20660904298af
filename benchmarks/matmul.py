"""Time of `[m, 4096] @ [4096, 4096]` with quantized weights, beside float32.

Both products run in the same process, in turns. Cases named `bf16` have bfloat16
activations, and weights that were quantized from bfloat16, as in most language models.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq

SIZE = 4096
# By case and m: the largest time, relative to float32.
TARGETS = {
    "w8a8": {1: 0.8, 16: 0.6, 128: 0.85},
    "int8": {1: 1.7},
    "int4": {16: 1.0, 128: 0.75},
    "int4 bf16": {128: 0.75},
    "nf4": {16: 2.0, 128: 1.5},
}
# By case: the largest error, relative to the largest result.
MOST_ERROR = {"w8a8": 0.02, "int4 bf16": 0.01}

_dense = jax.jit(jnp.matmul)
_product = jax.jit(lambda x, qt: x @ qt)


def run() -> dict[str, Any]:
    """Times each case, and checks it against dequantize-then-multiply."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((SIZE, SIZE), np.float32))
    weights = {name: jaxq.quantize(w, name) for name in ("int8", "int4", "nf4")}
    weights["w8a8"] = weights["int8"].with_activation("int8")
    weights["int4 bf16"] = jaxq.quantize(w.astype(jnp.bfloat16), "int4")
    rows = []
    for m in (1, 16, 128):
        inputs = jnp.asarray(rng.standard_normal((m, SIZE), np.float32))
        rows += _rows_of_inputs(inputs, w, weights)
    return {"subject": "matmul", "shape": [SIZE, SIZE], "rows": rows, "missing": []}


def _rows_of_inputs(
    inputs: jax.Array, w: jax.Array, weights: dict[str, jaxq.QTensor]
) -> list[dict[str, Any]]:
    """One row for float32 and one for each quantized weight."""
    m = len(inputs)
    functions = {"float32": lambda: jax.block_until_ready(_dense(inputs, w))}
    temporary = {"float32": _temporary_bytes(_dense, inputs, w)}
    for name, qt in weights.items():
        x = inputs.astype(qt.dtype)
        _check(name, x, qt)
        functions[name] = lambda x=x, qt=qt: jax.block_until_ready(_product(x, qt))
        temporary[name] = _temporary_bytes(_product, x, qt)
    times = interleaved(functions, rounds=31, seconds=20.0)
    rows = []
    for name, figures in summary(times, "float32").items():
        row = {"what": name, "m": m, **figures, "temporary_bytes": temporary[name]}
        target = TARGETS.get(name, {}).get(m)
        if target is not None:
            row["target"] = target
        rows.append(row)
    return rows


def _temporary_bytes(function: Any, *arguments: Any) -> int:
    """The memory of a compiled function besides its arguments and results."""
    compiled = function.lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _check(name: str, x: jax.Array, qt: jaxq.QTensor) -> None:
    """Raises if a product is far from that of the dequantized weight in float64."""
    weight = np.asarray(jaxq.dequantize(qt), np.float64)
    exact = np.asarray(x, np.float64) @ weight
    difference = np.asarray(_product(x, qt), np.float64) - exact
    error = np.abs(difference).max() / np.abs(exact).max()
    assert error < MOST_ERROR.get(name, 1e-5), (name, len(x), error)


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    header = (
        "| weight | m | median ms | least ms | time over float32 | target "
        "| temporary MB |"
    )
    lines = [header, "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        target = f"<= {row['target']}" if "target" in row else "-"
        times = (
            f"{row['median_ms']:.2f} | {row['min_ms']:.2f} "
            f"| {row['time_over_base']:.2f}"
        )
        megabytes = row["temporary_bytes"] / 2**20
        lines.append(
            f"| {row['what']} | {row['m']} | {times} | {target} | {megabytes:.1f} |"
        )
    return "\n".join(lines)
