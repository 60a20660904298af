"""Time of GPTQ on one 4096 x 4096 float32 weight, int4 in groups of 128, beside the published algorithm in torch.

The torch code is the paper's: blocks of 128 columns, a Python loop over columns, the hessian's inverse and its Cholesky
factor. Both are given the hessian and keep codes and scales; damping 0.01.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, summary

import jaxq
from jaxq import methods

SIZE, GROUP, BLOCK = 4096, 128, 128
TARGET = 0.6


def torch_gptq(w: Any, hessian: Any) -> tuple[Any, Any]:
    """(rounded weight, scales) of a weight `[out, in]`: Frantar et al., 2022, algorithm 1, float32 torch tensors."""
    import torch

    w, n = w.clone(), w.shape[1]
    index = torch.arange(n)
    h = hessian.clone()
    h[index, index] += 0.01 * torch.mean(torch.diag(h))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    inverse = torch.linalg.cholesky(h, upper=True)
    q, scales = torch.zeros_like(w), []
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        block, local = w[:, first:last].clone(), inverse[first:last, first:last]
        errors = torch.zeros_like(block)
        for i in range(last - first):
            if (first + i) % GROUP == 0:
                scale = block[:, i : i + GROUP].abs().amax(1).clamp(min=1e-12) / 7
                scales.append(scale)
            column = block[:, i]
            rounded = torch.clamp(torch.round(column / scale), -7, 7) * scale
            q[:, first + i] = rounded
            error = (column - rounded) / local[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(local[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, last:] -= errors.matmul(inverse[first:last, last:])
    return q, torch.stack(scales, 1)


def problem() -> tuple[np.ndarray, np.ndarray]:
    """(weight [in, out], hessian) with correlated inputs of different sizes."""
    rng = np.random.default_rng(0)
    mix = np.eye(SIZE, dtype=np.float32) + np.float32(
        0.3 / SIZE**0.5
    ) * rng.standard_normal((SIZE, SIZE), np.float32)
    x = (
        rng.standard_normal((2 * SIZE, SIZE), np.float32)
        @ mix
        * np.exp(rng.standard_normal(SIZE, np.float32) / 2)
    )
    return rng.standard_normal((SIZE, SIZE), np.float32), 2 * x.T @ x / np.float32(
        len(x)
    )


def run() -> dict[str, Any]:
    """Times both in turns, and checks that they reach the same loss."""
    w, hessian = problem()
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(GROUP))
    weight, moments = jnp.asarray(w), jnp.asarray(hessian)
    functions: dict[str, Any] = {
        "jaxq": lambda: jax.block_until_ready(methods.gptq(weight, moments, spec)),
        "jaxq, act order": lambda: jax.block_until_ready(
            methods.gptq(weight, moments, spec, act_order=True)
        ),
    }
    values = {
        "jaxq": jaxq.dequantize(functions["jaxq"]()[0]),
        "nearest": jaxq.dequantize(jaxq.quantize(weight, spec)),
    }
    missing = []
    try:
        import torch

        turned, theirs = torch.from_numpy(w.T.copy()), torch.from_numpy(hessian)
        functions["torch"] = lambda: torch_gptq(turned, theirs)
        values["torch"] = jnp.asarray(torch_gptq(turned, theirs)[0].numpy().T)
    except ImportError as error:
        missing.append(f"torch ({error})")
    loss = {
        name: float(jnp.sum((weight - q) * (moments @ (weight - q))))
        for name, q in values.items()
    }
    assert loss["jaxq"] < loss["nearest"]
    base = "torch" if "torch" in functions else "jaxq"
    rows = []
    for name, figures in summary(
        interleaved(functions, rounds=9, seconds=60.0), base
    ).items():
        row = {
            "what": name,
            **figures,
            "loss_over_nearest": loss.get(name, float("nan")) / loss["nearest"],
        }
        rows.append(
            row | ({"target": TARGET} if name == "jaxq" and base == "torch" else {})
        )
    if "torch" in loss:
        assert abs(loss["jaxq"] / loss["torch"] - 1) < 0.01, loss
    return {"subject": "gptq", "shape": [SIZE, SIZE], "rows": rows, "missing": missing}


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| who | median ms | least ms | time over torch | target | loss over nearest |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        target = f"<= {r['target']}" if "target" in r else "-"
        loss = (
            "-" if np.isnan(r["loss_over_nearest"]) else f"{r['loss_over_nearest']:.4f}"
        )
        times = f"{r['median_ms']:.0f} | {r['min_ms']:.0f} | {r['time_over_base']:.2f}"
        lines.append(f"| {r['what']} | {times} | {target} | {loss} |")
    return "\n".join(lines)
