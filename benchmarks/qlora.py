"""QLoRA compared with LoRA on floats: a trained language model learns another text.

The model is examples/tiny_llama, which has read Python's standard library. It learns
source code of NumPy. Perplexity is measured on files of numpy.linalg, which are not in
the training text. Heads and embeddings stay in floats. They are not trained.

All rows train adapters of the same rank with the same number of steps and the same
learning rate: the better one of 2e-3 and 6e-3 for LoRA on floats. A seed chooses the
training text and the first adapters. For each seed, all rows read the same text.
`after` is the mean perplexity over the seeds. `change` compares it with the row of LoRA
on floats: its mean, its lowest and its highest value over the seeds.

- `before`: the perplexity before the first step, on numpy.linalg and on
  examples/heldout.txt, which is text of the kind that the model has read. `KL` is the
  divergence from the float model on numpy.linalg, in nats per token.
- `kernels`: the bytes of the quantized weights, as a share of their bytes in bfloat16.
- `model`: the bytes of the whole model, with other floats in bfloat16 and adapters in
  float32.

Seconds are CPU seconds of the training of one seed, with compilation in the first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import library_text
import numpy as np
import numpy_text
import optax
from flax import nnx

import jaxq
from jaxq.evaluation import compare, perplexity

MODEL = Path(__file__).parents[1] / "examples" / "tiny_llama"
PRESET = "nf4_dq"
STEPS, SEEDS = 60, 3
BATCH, CONTEXT, WARMUP, RATE = 4, 128, 10, 6e-3
RANK = 16
HELDOUT_TOKENS = 64 * CONTEXT
# The largest share of the bytes of bfloat16, and the largest change in percent.
MOST_BYTES, MOST_CHANGE = 0.27, 1.0
FLOATS, PLAIN, LOFTQ = "LoRA on floats", f"QLoRA, {PRESET}", f"QLoRA, {PRESET}, LoftQ"
Row = dict[str, Any]


class Models(NamedTuple):
    """The bundled model in floats and quantized, of one dtype."""

    floats: nnx.Module
    quantized: nnx.Module

    @classmethod
    def load(cls, dtype: Any) -> Models:
        model, _ = jaxq.models.load(MODEL, dtype=dtype)
        return cls(model, jaxq.quantize_model(model, PRESET, progress=False)[0])

    def with_adapters(self, name: str, seed: int) -> nnx.Module:
        """The model of a row before training."""
        return jaxq.training.add_lora(
            self.floats if name == FLOATS else self.quantized,
            rank=RANK,
            alpha=2 * RANK,
            initial=jaxq.training.loftq(self.floats) if name == LOFTQ else "zero",
            key=jax.random.key(seed),
        )


def run(num_steps: int = STEPS, num_seeds: int = SEEDS) -> dict[str, Any]:
    """Trains each row from each seed."""
    _, tokenizer = jaxq.models.load(MODEL)
    tokens = numpy_text.training_tokens(tokenizer)
    heldout = numpy_text.heldout_tokens(tokenizer, HELDOUT_TOKENS)
    library = library_text.heldout_tokens(tokenizer, HELDOUT_TOKENS)
    models, small = Models.load(jnp.float32), Models.load(jnp.bfloat16)
    warmup = min(WARMUP, num_steps // 2)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATE, warmup, num_steps))
    rows = []
    for name in (FLOATS, PLAIN, LOFTQ):
        lora = models.with_adapters(name, 0)
        start = compare(models.floats, lora, heldout, context=CONTEXT)
        row: Row = {
            "what": name,
            "before": start.perplexity,
            "before_library": perplexity(lora, library, context=CONTEXT),
            "kl": start.kl,
            **num_bytes(small.with_adapters(name, 0)),
            "perplexities": [],
            "seconds": [],
        }
        for seed in range(num_seeds):
            lora = models.with_adapters(name, seed)
            begin = time.process_time()
            batches = library_text.windows(tokens, num_steps, BATCH, CONTEXT, seed)
            train(lora, tx, batches)
            row["seconds"].append(time.process_time() - begin)
            row["perplexities"].append(perplexity(lora, heldout, context=CONTEXT))
            print(f"{name}, seed {seed}: {row['perplexities'][-1]:.3f}", flush=True)
        rows.append(row)
    return {
        "subject": "qlora",
        "steps": num_steps,
        "tokens": num_steps * BATCH * CONTEXT,
        "seeds": num_seeds,
        "rank": RANK,
        "rows": rows,
        "missing": [],
    }


def train(lora: nnx.Module, tx: optax.GradientTransformation, batches: Any) -> None:
    """Trains the adapters of a model, in place."""
    optimizer = nnx.Optimizer(lora, tx, wrt=nnx.LoRAParam)
    loss = jnp.zeros(())
    for inputs, targets in batches:
        loss = _step(lora, optimizer, inputs, targets)
    loss.block_until_ready()


@nnx.jit
def _step(lora: Any, optimizer: Any, inputs: jax.Array, targets: jax.Array):
    def loss_of(lora: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(lora(inputs), targets)
        return losses.mean()

    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_of, argnums=adapters)(lora)
    optimizer.update(lora, grads)
    return loss


def num_bytes(lora: nnx.Module) -> Row:
    """The share of the kernels' bytes in bfloat16, and the bytes of the whole model."""
    leaves = jax.tree.leaves(nnx.state(lora), is_leaf=_is_qtensor)
    kernels = [leaf for leaf in leaves if _is_qtensor(leaf)]
    share = 1.0
    if kernels:
        share = sum(qt.nbytes for qt in kernels) / sum(2 * qt.size for qt in kernels)
    adapters = jax.tree.leaves(nnx.state(lora, nnx.LoRAParam))
    return {
        "kernel_share": share,
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "adapter_bytes": sum(leaf.nbytes for leaf in adapters),
    }


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, jaxq.QTensor)


def changes(row: Row, base: Row) -> np.ndarray:
    """The change of perplexity from the row `base` in percent, for each seed."""
    return 100 * (np.divide(row["perplexities"], base["perplexities"]) - 1)


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    base = result["rows"][0]
    title = (
        f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seeds']} "
        f"seeds, adapters of rank {result['rank']} "
        f"({base['adapter_bytes'] / 1e6:.2f} MB)."
    )
    head = (
        "| what | before: NumPy | before: library | KL | after | change | range "
        "| target | kernels | target | model | seconds |"
    )
    lines = [title, "", head, "|" + "---|" * 12]
    for row in result["rows"]:
        change = changes(row, base)
        is_base = row is base
        cells = [
            row["what"],
            f"{row['before']:.3f}",
            f"{row['before_library']:.3f}",
            f"{row['kl']:.4f}",
            f"{np.mean(row['perplexities']):.3f}",
            "-" if is_base else f"{change.mean():+.2f} %",
            "-" if is_base else f"{change.min():+.2f} to {change.max():+.2f} %",
            "-" if is_base else _verdict(change.mean(), MOST_CHANGE, " %"),
            f"{row['kernel_share']:.4f}",
            "-" if is_base else _verdict(row["kernel_share"], MOST_BYTES, ""),
            f"{row['model_bytes'] / 1e6:.2f} MB",
            f"{np.mean(row['seconds']):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_starts(*result["rows"][1:])])


def _starts(plain: Row, loftq: Row) -> list[str]:
    """Says whether LoftQ starts lower than the plain quantized model."""
    figures = {
        "KL": (plain["kl"], loftq["kl"]),
        "loss on NumPy": (np.log(plain["before"]), np.log(loftq["before"])),
        "loss on the library": (
            np.log(plain["before_library"]),
            np.log(loftq["before_library"]),
        ),
    }
    lines = []
    for name, (without, with_loftq) in figures.items():
        relation = "below" if with_loftq < without else "NOT below"
        lines.append(
            f"- {name}: LoftQ starts at {with_loftq:.4f}, which is {relation} "
            f"{without:.4f} without it."
        )
    return lines


def _verdict(value: float, most: float, unit: str) -> str:
    """The target, and whether it is missed."""
    return f"{'at most' if value <= most else 'MISSES'} {most}{unit}"
