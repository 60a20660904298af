"""Time of GPTQ on one float32 weight of 4096 x 4096, beside the published algorithm.

Codes are int4 in groups of 128, and damping is 0.01. The torch code is that of the
paper: blocks of 128 columns, a Python loop over columns, the inverse of the Hessian and
its Cholesky factor. Both programs get the Hessian, and both keep codes and scales.
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
    """The rounded weight and the scales of a weight, in torch.

    Args:
        w: float32[out, in].
        hessian: float32[in, in].

    References:
        Frantar et al., GPTQ, 2022, algorithm 1.
    """
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
                absmax = block[:, i : i + GROUP].abs().amax(1)  # [out]
                scale = absmax.clamp(min=1e-12) / 7
                scales.append(scale)
            column = block[:, i]
            rounded = torch.clamp(torch.round(column / scale), -7, 7) * scale
            q[:, first + i] = rounded
            error = (column - rounded) / local[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(local[i, i:].unsqueeze(0))
            errors[:, i] = error
        # The columns after the block get its errors in one product.
        w[:, last:] -= errors.matmul(inverse[first:last, last:])
    return q, torch.stack(scales, 1)


def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight [in, out] and the Hessian of correlated inputs of different sizes."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((SIZE, SIZE), np.float32)
    mix = np.eye(SIZE, dtype=np.float32) + np.float32(0.3 / SIZE**0.5) * noise
    x = rng.standard_normal((2 * SIZE, SIZE), np.float32) @ mix
    x = x * np.exp(rng.standard_normal(SIZE, np.float32) / 2)
    weight = rng.standard_normal((SIZE, SIZE), np.float32)
    return weight, 2 * x.T @ x / np.float32(len(x))


def run() -> dict[str, Any]:
    """Times both programs in turns, and checks that they reach the same loss."""
    w, hessian = problem()
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(GROUP))
    weight, moments = jnp.asarray(w), jnp.asarray(hessian)

    def solve(**options: Any) -> Any:
        return jax.block_until_ready(methods.gptq(weight, moments, spec, **options))

    functions: dict[str, Any] = {
        "jaxq": solve,
        "jaxq, act order": lambda: solve(act_order=True),
    }
    values = {
        "jaxq": jaxq.dequantize(solve()[0]),
        "nearest": jaxq.dequantize(jaxq.quantize(weight, spec)),
    }
    missing = []
    try:
        import torch

        torch_weight = torch.from_numpy(w.T.copy())
        torch_hessian = torch.from_numpy(hessian)
        functions["torch"] = lambda: torch_gptq(torch_weight, torch_hessian)
        values["torch"] = jnp.asarray(functions["torch"]()[0].numpy().T)
    except ImportError as error:
        missing.append(f"torch ({error})")
    loss = {}
    for name, value in values.items():
        error = weight - value
        loss[name] = float(jnp.sum(error * (moments @ error)))
    assert loss["jaxq"] < loss["nearest"]
    if "torch" in loss:
        assert abs(loss["jaxq"] / loss["torch"] - 1) < 0.01, loss
    base = "torch" if "torch" in functions else "jaxq"
    times = interleaved(functions, rounds=9, seconds=60.0)
    rows = []
    for name, figures in summary(times, base).items():
        relative_loss = loss.get(name, float("nan")) / loss["nearest"]
        row = {"what": name, **figures, "loss_over_nearest": relative_loss}
        if name == "jaxq" and base == "torch":
            row["target"] = TARGET
        rows.append(row)
    return {"subject": "gptq", "shape": [SIZE, SIZE], "rows": rows, "missing": missing}


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = [
        "| who | median ms | least ms | time over torch | target | loss over nearest |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        target = f"<= {row['target']}" if "target" in row else "-"
        loss = row["loss_over_nearest"]
        loss_text = "-" if np.isnan(loss) else f"{loss:.4f}"
        times = (
            f"{row['median_ms']:.0f} | {row['min_ms']:.0f} "
            f"| {row['time_over_base']:.2f}"
        )
        lines.append(f"| {row['what']} | {times} | {target} | {loss_text} |")
    return "\n".join(lines)
