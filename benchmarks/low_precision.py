"""Low-precision training: errors of float4 operands, and loss against bfloat16.

First table: the mean squared error of 2048 x 2048 numbers from N(0, 1), times 1000,
beside the figures of Quartet II (2026, arXiv 2601.22813). All codes are float4_e2m1fn.
Scales are float8_e4m3fn with one float32 scale for the array.

- `nearest`: groups of 16. The largest magnitude becomes 6. Rounding to nearest.
- `four over six`: the same, but the largest magnitude of a group becomes 6 or 4,
  whichever has the smaller squared error.
- `tiles`: as `nearest`, with tiles of 16 x 16.
- `stochastic`: groups of 16 with stochastic rounding. The range is larger by 17/16, so
  that no number is clipped.

Second table: a Llama of 1.1 million parameters trained from scratch on source code of
Python's standard library, in bfloat16 and with each recipe. Seeds are paired: one seed
has the same initial weights and the same batches in all rows. The loss is the mean
cross entropy of examples/heldout.txt, computed with the products of the recipe. `over
bf16` is the mean over seeds of the relative difference of the loss from bfloat16, with
the 95 % confidence interval of Student's t distribution. All decoder products are
quantized. Embedding, head and attention scores are not.

The rows `nvfp4` differ in what is added to plain rounding to nearest: `rotated` rotates
the operands of the weight gradient, `stochastic` rounds gradients stochastically,
`tiles` has tiles of 16 x 16 for weights. The recipe "nvfp4" has all three.

    python benchmarks/low_precision.py --steps 400 --seeds 3   # trains, in parts
    python benchmarks/run.py low_precision --write             # writes the tables

Training keeps each finished row in results/low_precision-partial.json. A run with other
steps begins again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import library_text
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

import jaxq
from jaxq.models import Llama, LlamaConfig
from jaxq.training import LowPrecision, ProductSpec

HERE = Path(__file__).parent
PARTIAL = HERE / "results" / "low_precision-partial.json"
TOKENIZER = HERE.parent / "examples" / "tiny_llama" / "tokenizer.json"
STEPS, SEEDS = 400, 3
BATCH, CONTEXT, RATE, WARMUP = 8, 128, 3e-3, 20
HELDOUT_TOKENS = 16 * BATCH * CONTEXT
# The 97.5 % quantile of Student's t distribution, by the number of seeds.
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
PUBLISHED = {
    "nearest": 9.0,
    "four over six": 7.6,
    "tiles": 12.4,
    "stochastic": 23.5,
}
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=CONTEXT,
)
Row = dict[str, Any]


def recipes() -> dict[str, LowPrecision | None]:
    """The rows of the second table. None is bfloat16."""
    named = jaxq.training.low_precision_recipes()
    nvfp4 = named["nvfp4"]
    x, tiles = nvfp4.forward.lhs, nvfp4.forward.rhs
    dy = nvfp4.input_gradient.lhs

    def variant(w: Any, dy: Any, hadamard: int | None) -> LowPrecision:
        return LowPrecision(
            ProductSpec(x, w),
            ProductSpec(dy, w),
            ProductSpec(x, dy, hadamard=hadamard),
        )

    return {
        "bf16": None,
        "int8": named["int8"],
        "fp8": named["fp8"],
        "fp8_delayed": named["fp8_delayed"],
        "fp8_block": named["fp8_block"],
        "mxfp8": named["mxfp8"],
        "nvfp4 plain": variant(x, x, None),
        "nvfp4 rotated": variant(x, x, 16),
        "nvfp4 stochastic": variant(x, dy, None),
        "nvfp4 rotated, stochastic": variant(x, dy, 16),
        "nvfp4": variant(tiles, dy, 16),
        "nvfp4 four over six": dataclasses.replace(nvfp4, four_over_six=True),
    }


# Errors.


def errors() -> list[Row]:
    """The first table."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    recipe = jaxq.training.low_precision_recipes()["nvfp4"]
    floats = ProductSpec(None, None)
    group, tile = recipe.forward.lhs, recipe.forward.rhs
    stochastic = recipe.input_gradient.lhs
    operands = {
        "nearest": (group, False),
        "four over six": (group, True),
        "tiles": (tile, False),
        "stochastic": (stochastic, False),
    }
    rows = []
    for name, (spec, four_over_six) in operands.items():
        only_x = LowPrecision(
            ProductSpec(spec, None), floats, floats, four_over_six=four_over_six
        )
        key = jax.random.key(1) if only_x.needs_key else None
        dot = jaxq.training.dot_general(only_x, key=key)
        # The product with the identity has the quantized numbers.
        y = dot(x, jnp.eye(len(x)), (((1,), (0,)), ((), ())))
        error = float(jnp.mean((y - x) ** 2)) * 1000
        rows.append({"what": name, "error": error, "published": PUBLISHED[name]})
    return rows


# Training.


def train(recipe: LowPrecision | None, seed: int, num_steps: int) -> Row:
    """Trains a model, and measures the loss of the held-out text."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokens = library_text.training_tokens(tokenizer, 4 * num_steps * BATCH * CONTEXT)
    heldout = library_text.heldout_tokens(tokenizer, HELDOUT_TOKENS + 1)
    model = Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(seed))
    if recipe is not None:
        key = jax.random.key(seed)
        model = jaxq.training.low_precision(model, recipe, key=key)
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, num_steps, RATE / 10)
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
        wrt=nnx.Param,
    )

    def loss_of(model: Llama, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model(inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    @nnx.jit
    def step(model: Llama, optimizer: Any, inputs: Any, targets: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, inputs, targets)
        optimizer.update(model, grads)
        return loss

    start = time.process_time()
    curve = []
    batches = library_text.windows(tokens, num_steps, BATCH, CONTEXT, seed)
    for number, (inputs, targets) in enumerate(batches):
        loss = step(model, optimizer, inputs, targets)
        if number % 10 == 0:
            curve.append(float(loss))
    seconds = time.process_time() - start
    model.eval()
    measure = nnx.jit(loss_of)
    inputs = heldout[:-1].reshape(-1, BATCH, CONTEXT)
    targets = heldout[1:].reshape(-1, BATCH, CONTEXT)
    losses = [
        float(measure(model, *pair)) for pair in zip(inputs, targets, strict=True)
    ]
    num_parameters = sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    return {
        "loss": float(np.mean(losses)),
        "curve": curve,
        "seconds": seconds,
        "parameters": num_parameters,
    }


def train_all(num_steps: int, num_seeds: int, names: list[str]) -> None:
    """Trains every row that `PARTIAL` lacks, one seed after the other."""
    state = _partial()
    if state.get("steps") != num_steps:
        state = {"steps": num_steps, "runs": {}}
    for seed in range(num_seeds):
        for name, recipe in recipes().items():
            run = f"{name}/{seed}"
            if run in state["runs"] or (names and name not in names):
                continue
            state["runs"][run] = train(recipe, seed, num_steps)
            print(run, f"{state['runs'][run]['loss']:.4f}", flush=True)
            PARTIAL.write_text(json.dumps(state))


def _partial() -> dict[str, Any]:
    return json.loads(PARTIAL.read_text()) if PARTIAL.exists() else {}


# Tables.


def run() -> dict[str, Any]:
    """The figures of both tables. The second one needs `train_all` first."""
    state = _partial()
    rows = []
    for name in recipes():
        runs, differences = [], []
        for seed in range(max(T_QUANTILE)):
            own = state.get("runs", {}).get(f"{name}/{seed}")
            base = state.get("runs", {}).get(f"bf16/{seed}")
            if own and base:
                runs.append(own)
                differences.append(100 * (own["loss"] / base["loss"] - 1))
        if runs:
            rows.append(
                {
                    "what": name,
                    "losses": [run["loss"] for run in runs],
                    "differences": differences,
                    "curve": np.mean([run["curve"] for run in runs], 0).tolist(),
                    "seconds": sum(run["seconds"] for run in runs),
                    "parameters": runs[0]["parameters"],
                }
            )
    return {
        "errors": errors(),
        "steps": state.get("steps"),
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    """Both tables, as markdown."""
    lines = ["| operand | error | published |", "|---|---|---|"]
    for row in result["errors"]:
        lines.append(f"| {row['what']} | {row['error']:.2f} | {row['published']} |")
    if not result["rows"]:
        return "\n".join([*lines, "\nThe training table is not measured yet."])
    num_steps = result["steps"]
    tokens = f"{num_steps * BATCH * CONTEXT:,}"
    lines += [
        f"\n{num_steps} steps of {BATCH} x {CONTEXT} tokens, {tokens} in all:\n",
        "| recipe | seeds | loss | over bf16 | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['what']} | {len(row['losses'])} | {np.mean(row['losses']):.4f} | "
            f"{_interval(row['differences'])} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _interval(differences: list[float]) -> str:
    """The mean of paired differences in percent, with its confidence interval."""
    mean, number = np.mean(differences), len(differences)
    if not any(differences):
        return "-"
    if number not in T_QUANTILE:
        return f"{mean:+.2f} %"
    half = T_QUANTILE[number] * np.std(differences, ddof=1) / np.sqrt(number)
    return f"{mean:+.2f} % ± {half:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    arguments = parser.parse_args()
    train_all(arguments.steps, arguments.seeds, arguments.only)
    print(table(run()))
