"""Peak memory of quantizing a model leaf by leaf, beside its weights before and after.

The peak is the process's largest resident set while the call runs (VmHWM of /proc, reset before it), less what was
resident before the weights were made; compilation is done before, on a model of one layer. The first target is what two
copies of the model and two of its largest layer take; with donated weights, where each is freed once it is quantized,
the model as it comes, or its quantized form if that is larger, and two of its largest layer. (What a donated model
itself takes is there at the start, so no way can stay below it.)
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxq

LAYERS, SIZE = 16, 2048
RECIPES = ("int8", "int4", "nf4")
MB = 1e6


class Model(nnx.Module):
    """Linear layers, one after another."""

    def __init__(self, num_layers: int):
        rng = np.random.default_rng(0)
        layers = [
            nnx.eval_shape(
                lambda: nnx.Linear(SIZE, SIZE, use_bias=False, rngs=nnx.Rngs(0))
            )
            for _ in range(num_layers)
        ]
        for layer in layers:
            layer.kernel.set_value(
                jnp.asarray(rng.standard_normal((SIZE, SIZE), np.float32))
            )
        self.layers = nnx.List(layers)


class Dense(linen.Module):
    """The same of linen."""

    num_layers: int

    @linen.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x = linen.Dense(SIZE, use_bias=False, name=str(i))(x)
        return x


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def _peak(fn: Any) -> tuple[Any, int]:
    """The result of `fn()` and the largest resident set while it ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    out = jax.block_until_ready(fn())
    return out, _resident("VmHWM")


def _params(model: Model) -> dict[str, jax.Array]:
    return {str(i): layer.kernel.get_value() for i, layer in enumerate(model.layers)}


def _linen(model: Model, recipe: str, **how: Any) -> Any:
    variables = {
        "params": {name: {"kernel": kernel} for name, kernel in _params(model).items()}
    }
    example = jax.ShapeDtypeStruct((1, SIZE), jnp.float32)
    return jaxq.nn.linen.quantize_model(
        Dense(len(model.layers)), variables, recipe, example=example, **how
    )[1]


def run() -> dict[str, Any]:
    """Measures every way to quantize with every recipe."""
    ways: dict[str, tuple[Any, bool]] = {
        "quantize_model": (lambda m, r: nnx.state(jaxq.quantize_model(m, r)[0]), False),
        "quantize_params": (lambda m, r: jaxq.quantize_params(_params(m), r)[0], False),
        "nn.linen.quantize_model": (_linen, False),
        "quantize_model, donate": (
            lambda m, r: nnx.state(jaxq.quantize_model(m, r, donate=True)[0]),
            True,
        ),
        "quantize_params, donate": (
            lambda m, r: jaxq.quantize_params(_params(m), r, donate=True)[0],
            True,
        ),
        "nn.linen.quantize_model, donate": (
            functools.partial(_linen, donate=True),
            True,
        ),
    }
    rows = []
    for recipe in RECIPES:
        for name, (way, donated) in ways.items():
            jax.block_until_ready(way(Model(1), recipe))
            gc.collect()
            before = _resident("VmRSS")
            model = Model(LAYERS)
            out, peak = _peak(functools.partial(way, model, recipe))
            given, made = (
                LAYERS * SIZE * SIZE * 4,
                sum(leaf.nbytes for leaf in jax.tree.leaves(out)),
            )
            largest = SIZE * SIZE * 4
            target = (max(given, made) if donated else given + made) + 2 * largest
            figures = {
                "input": given,
                "output": made,
                "peak": peak - before,
                "target": target,
                "largest": largest,
            }
            rows.append(
                {
                    "way": name,
                    "recipe": recipe,
                    **{k: v / MB for k, v in figures.items()},
                }
            )
            del model, out
    return {
        "subject": "memory",
        "layers": LAYERS,
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| way | recipe | input MB | output MB | largest layer MB | peak MB | target MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        sizes = f"{r['input']:.1f} | {r['output']:.1f} | {r['largest']:.1f} | {r['peak']:.1f} | <= {r['target']:.1f}"
        lines.append(f"| {r['way']} | {r['recipe']} | {sizes} |")
    return "\n".join(lines)
