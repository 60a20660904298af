"""Peak memory of quantizing a model leaf by leaf, beside its weights before and after.

The peak is the largest resident set of the process while the call runs (VmHWM of /proc,
reset before the call), less what was resident before the weights were made. A model of
one layer is quantized first, so that compilation does not count.

Without donation the target is the model before and after, and two of its largest layer.
With donation each weight is freed when it is quantized. Then the target is the larger
of the model before and the model after, and two of its largest layer. No program can
need less than the donated model itself, because it is there at the start.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
        # eval_shape and numpy, so that no initializer is compiled.
        layers = [
            nnx.eval_shape(
                lambda: nnx.Linear(SIZE, SIZE, use_bias=False, rngs=nnx.Rngs(0))
            )
            for _ in range(num_layers)
        ]
        for layer in layers:
            kernel = rng.standard_normal((SIZE, SIZE), np.float32)
            layer.kernel.set_value(jnp.asarray(kernel))
        self.layers = nnx.List(layers)


class Dense(linen.Module):
    """The same layers in linen."""

    num_layers: int

    @linen.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x = linen.Dense(SIZE, use_bias=False, name=str(i))(x)
        return x


class Way(NamedTuple):
    """A way to quantize a model: a function of the model and a recipe's name."""

    quantize: Callable[[Model, str], Any]
    donates: bool


def _model(model: Model, recipe: str, **options: Any) -> Any:
    return nnx.state(jaxq.quantize_model(model, recipe, **options)[0])


def _params(model: Model, recipe: str, **options: Any) -> Any:
    return jaxq.quantize_params(_kernels(model), recipe, **options)[0]


def _linen(model: Model, recipe: str, **options: Any) -> Any:
    kernels = _kernels(model)
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return jaxq.nn.linen.quantize_model(
        Dense(len(model.layers)),
        {"params": params},
        recipe,
        example=jax.ShapeDtypeStruct((1, SIZE), jnp.float32),
        **options,
    )[1]


def _kernels(model: Model) -> dict[str, jax.Array]:
    return {str(i): layer.kernel.get_value() for i, layer in enumerate(model.layers)}


WAYS = {
    "quantize_model": Way(_model, False),
    "quantize_params": Way(_params, False),
    "nn.linen.quantize_model": Way(_linen, False),
    "quantize_model, donate": Way(functools.partial(_model, donate=True), True),
    "quantize_params, donate": Way(functools.partial(_params, donate=True), True),
    "nn.linen.quantize_model, donate": Way(
        functools.partial(_linen, donate=True), True
    ),
}


def run() -> dict[str, Any]:
    """Measures every way to quantize with every recipe."""
    rows = []
    for recipe in RECIPES:
        for name, way in WAYS.items():
            figures = _figures(way, recipe)
            megabytes = {key: value / MB for key, value in figures.items()}
            rows.append({"way": name, "recipe": recipe, **megabytes})
    return {
        "subject": "memory",
        "layers": LAYERS,
        "shape": [SIZE, SIZE],
        "rows": rows,
        "missing": [],
    }


def _figures(way: Way, recipe: str) -> dict[str, float]:
    """Bytes of the model before and after, of its largest layer, and of the peak."""
    jax.block_until_ready(way.quantize(Model(1), recipe))
    gc.collect()
    resident_before = _resident("VmRSS")
    model = Model(LAYERS)
    result, peak = _peak(functools.partial(way.quantize, model, recipe))
    largest = SIZE * SIZE * 4
    before = LAYERS * largest
    after = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    needed = max(before, after) if way.donates else before + after
    return {
        "input": before,
        "output": after,
        "peak": peak - resident_before,
        "target": needed + 2 * largest,
        "largest": largest,
    }


def _peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a function, and the largest resident set while it ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    result = jax.block_until_ready(function())
    return result, _resident("VmHWM")


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM is the largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    header = (
        "| way | recipe | input MB | output MB | largest layer MB | peak MB "
        "| target MB |"
    )
    lines = [header, "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        sizes = (
            f"{row['input']:.1f} | {row['output']:.1f} | {row['largest']:.1f} "
            f"| {row['peak']:.1f} | <= {row['target']:.1f}"
        )
        lines.append(f"| {row['way']} | {row['recipe']} | {sizes} |")
    return "\n".join(lines)
