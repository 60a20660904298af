"""Time of `[m, 4096] @ [4096, 4096]` with quantized weights, beside float32.

All products run in the same process, in turns. Each call has the next of several equal
weights. Before a weight is used again, more bytes are read than the last-level cache
holds. So weights come from memory, as in a model. Cases named `bf16` have bfloat16
activations, and weights that were quantized from bfloat16, as in most language models.

A second shape has many rows and a small weight, `[6400, 384] @ [384, 1536]`, as in a
vision transformer. `gradient` is the product of its backward pass, `dy @ w.T`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
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
    "w4a8": {1: 1.0, 16: 0.7, 128: 1.1},
    "int8": {1: 1.7},
    "int4": {16: 1.0, 128: 1.15},
    "int4 bf16": {1: 1.0, 16: 0.7},
    "nf4": {16: 2.0, 128: 1.3},
}
# (m, k, n) of the shape with many rows.
MANY_ROWS = (6400, 384, 1536)
MANY_ROWS_TARGET = 1.1
ROUNDS = 7
# By case: the largest error, relative to the largest result.
MOST_ERROR = {"w8a8": 0.02, "w4a8": 0.02, "int4 bf16": 0.01}
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

_product = jax.jit(lambda x, weight: x @ weight)
# x is the cotangent of y, [m, n], and weight is [k, n] in the caller's order.
_gradient = jax.jit(
    lambda x, weight: jaxq.dot_general(x, weight, (((1,), (1,)), ((), ())))
)


def run() -> dict[str, Any]:
    """Times each case, and checks it against dequantize-then-multiply."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((SIZE, SIZE), np.float32))
    weights: dict[str, Any] = {"float32": w}
    weights |= {name: jaxq.quantize(w, name) for name in ("int8", "int4", "nf4")}
    weights["w8a8"] = weights["int8"].with_activation("int8")
    weights["w4a8"] = weights["int4"].with_activation("int8")
    weights["int4 bf16"] = jaxq.quantize(w.astype(jnp.bfloat16), "int4")
    copies = _copies(weights)
    rows = []
    for m in (1, 16, 128):
        inputs = jnp.asarray(rng.standard_normal((m, SIZE), np.float32))
        rows += _rows_of_inputs(inputs, copies)
    rows += _many_rows(rng)
    return {"subject": "matmul", "shape": [SIZE, SIZE], "rows": rows, "missing": []}


def _many_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of the second shape: products, and those of the backward pass."""
    m, k, n = MANY_ROWS
    w = jnp.asarray(rng.standard_normal((k, n), np.float32))
    weights: dict[str, Any] = {"float32": w}
    weights |= {name: jaxq.quantize(w, name) for name in ("int8", "int4", "nf4")}
    rows = []
    for product, columns in ((_product, k), (_gradient, n)):
        x = jnp.asarray(rng.standard_normal((m, columns), np.float32))
        functions = {
            name: functools.partial(_call, product, x, weight)
            for name, weight in weights.items()
        }
        times = interleaved(functions, rounds=ROUNDS, seconds=20.0)
        for name, figures in summary(times, "float32").items():
            row = {"what": name, "m": m, "k": k, "n": n, **figures}
            row["temporary_bytes"] = _temporary_bytes(product, x, weights[name])
            if product is _gradient:
                row["what"] = f"{name} gradient"
            if name != "float32":
                row["target"] = MANY_ROWS_TARGET
            rows.append(row)
    return rows


def _call(product: Any, x: jax.Array, weight: Any) -> jax.Array:
    """Computes a product, and waits for it."""
    return jax.block_until_ready(product(x, weight))


def _copies(weights: dict[str, Any]) -> dict[str, list[Any]]:
    """Several copies of each weight, which together are twice as large as the cache."""
    bytes_of_round = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    num_copies = max(2, -(-2 * _cache_bytes() // bytes_of_round))
    return {
        name: [jax.tree.map(jnp.copy, weight) for _ in range(num_copies)]
        for name, weight in weights.items()
    }


def _cache_bytes() -> int:
    """The size of the last-level cache, or 64 MB if it is not known."""
    if not CACHE.exists():
        return 64 * 2**20
    return int(CACHE.read_text().strip().removesuffix("K")) * 2**10


def _rows_of_inputs(
    inputs: jax.Array, copies: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """One row for float32 and one for each quantized weight."""
    m = len(inputs)
    functions, temporary = {}, {}
    for name, weights in copies.items():
        x = inputs.astype(weights[0].dtype)
        if name != "float32":
            _check(name, x, weights[0])
        functions[name] = _next_product(x, weights)
        temporary[name] = _temporary_bytes(_product, x, weights[0])
    times = interleaved(functions, rounds=ROUNDS, seconds=20.0)
    rows = []
    for name, figures in summary(times, "float32").items():
        row = {"what": name, "m": m, **figures, "temporary_bytes": temporary[name]}
        target = TARGETS.get(name, {}).get(m)
        if target is not None:
            row["target"] = target
        rows.append(row)
    return rows


def _next_product(x: jax.Array, weights: list[Any]) -> Callable[[], Any]:
    """A function that multiplies x by the next weight of a cycle."""
    cycle = itertools.cycle(weights)
    return lambda: jax.block_until_ready(_product(x, next(cycle)))


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
        "| weight | m | k x n | median ms | least ms | time over float32 | target "
        "| temporary MB |"
    )
    lines = [header, "|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        target = f"<= {row['target']}" if "target" in row else "-"
        times = (
            f"{row['median_ms']:.2f} | {row['min_ms']:.2f} "
            f"| {row['time_over_base']:.2f}"
        )
        shape = f"{row.get('k', SIZE)} x {row.get('n', SIZE)}"
        megabytes = row["temporary_bytes"] / 2**20
        lines.append(
            f"| {row['what']} | {row['m']} | {shape} | {times} | {target} "
            f"| {megabytes:.1f} |"
        )
    return "\n".join(lines)
