"""Distill the bundled language model into a student with half of its layers.

    pip install "jaxq[hf,plots]"
    python examples/05_small_student.py                 # writes small_student.png

The teacher is the small Llama in examples/tiny_llama. Two students start with the
teacher's first and last layer, its embedding and its head. They read the same tokens of
Python's standard library. One learns only the next tokens. The other learns the
probabilities that the teacher gives to all tokens. The table has the perplexity of both
on held-out text, for three seeds. A seed chooses the text.
"""

# %% Options, teacher and text
import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from library_text import heldout_tokens, training_tokens, windows

import jaxq
from jaxq.distillation import kd_loss, make_step
from jaxq.evaluation import perplexity
from jaxq.models import Llama

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=150, help="training steps")
parser.add_argument(
    "--out", type=Path, default=Path("small_student.png"), help="where the plot goes"
)
parser.add_argument(
    "--fast", action="store_true", help="a few steps: shows that it runs"
)
args = parser.parse_args()
NUM_STEPS = 20 if args.fast else args.steps
SEEDS = (0, 1) if args.fast else (0, 1, 2)
BATCH, CONTEXT, PEAK_LR = 4, 256, 1e-3
# How many times the held-out perplexity is measured during a training.
NUM_POINTS = 2 if args.fast else 5


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


begin = time.perf_counter()
progress("reading the teacher and the text")
teacher, tokenizer = jaxq.models.load(HERE / "tiny_llama")
tokens = training_tokens(tokenizer, 20_000 if args.fast else 500_000)
heldout = heldout_tokens(tokenizer, (4 if args.fast else 32) * CONTEXT)


# %% The student: two of the teacher's four layers
KEPT_LAYERS = (0, 3)
config = dataclasses.replace(teacher.config, num_hidden_layers=len(KEPT_LAYERS))


def half_of_the_teacher() -> Llama:
    student = Llama(config, rngs=nnx.Rngs(0))
    state = nnx.state(teacher)
    layers = {i: state["layers"][kept] for i, kept in enumerate(KEPT_LAYERS)}
    nnx.update(student, {**state, "layers": layers})
    return student


def num_parameters(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


# %% Two losses for the same batches (inputs, next tokens)
def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOSSES = {
    "alone": (None, label_loss),
    "distilled": (teacher, functools.partial(kd_loss, temperature=1.0, alpha=1.0)),
}


def train(name: str) -> np.ndarray:
    """Trains a student from each seed.

    Returns:
        Held-out perplexities during the training, [seeds, points].
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LR, NUM_STEPS // 10, NUM_STEPS
    )
    own_teacher, loss = LOSSES[name]
    student = half_of_the_teacher()
    step = make_step(student, own_teacher, optax.adamw(schedule), loss)
    curves = []
    for seed in SEEDS:
        state = step.init()
        curve = []
        for i, batch in enumerate(windows(tokens, NUM_STEPS, BATCH, CONTEXT, seed)):
            state, value = step(state, batch)
            if (i + 1) % (NUM_STEPS // NUM_POINTS) == 0:
                curve.append(perplexity(step.student(state), heldout, context=CONTEXT))
                progress(
                    f"{name}, seed {seed}: step {i + 1}/{NUM_STEPS}, loss {value:.3f}, "
                    f"perplexity {curve[-1]:.2f}, {time.perf_counter() - begin:.0f} s"
                )
        curves.append(curve)
    return np.array(curves)


# %% The table
teacher_perplexity = perplexity(teacher, heldout, context=CONTEXT)
num_student = num_parameters(half_of_the_teacher())
num_tokens = NUM_STEPS * BATCH * CONTEXT
print(
    f"student: {num_student:,} parameters, {num_student / num_parameters(teacher):.0%} "
    f"of the teacher's; {num_tokens:,} tokens of training text\n",
    flush=True,
)
seed_titles = "".join(f"{f'seed {seed}':>10}" for seed in SEEDS)
print(f"{'held-out perplexity':20}{seed_titles}{'mean':>10}{'spread':>10}")
print(f"{'teacher':20}{'':{10 * len(SEEDS)}}{teacher_perplexity:>10.2f}", flush=True)
curves = {}
for name in LOSSES:
    curves[name] = train(name)
    progress("")
    last = curves[name][:, -1]
    columns = [*last, last.mean(), np.ptp(last)]
    row = "".join(f"{value:>10.2f}" for value in columns)
    print(f"{name:20}{row}", flush=True)
alone, distilled = curves["alone"][:, -1], curves["distilled"][:, -1]
spread = max(np.ptp(alone), np.ptp(distilled))
gain = alone.mean() - distilled.mean()
print(
    f"\nDistillation lowers the perplexity by {gain:.2f}. The spread of the seeds "
    f"(largest minus smallest) is at most {spread:.2f}."
)

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
points = np.arange(1, NUM_POINTS + 1) * num_tokens / NUM_POINTS / 1e3
for color, (name, curve) in zip(("tab:gray", "tab:blue"), curves.items(), strict=True):
    axes.plot(points, curve.mean(0), color=color, marker="o", label=name)
    axes.fill_between(points, curve.min(0), curve.max(0), color=color, alpha=0.3)
axes.axhline(teacher_perplexity, color="black", linestyle=":", label="teacher")
axes.set_yscale("log")
axes.set(xlabel="thousand tokens", ylabel="held-out perplexity")
axes.set_title(
    f"a student of {num_student:,} parameters, mean and range of seeds: {len(SEEDS)}"
)
axes.legend()
figure.savefig(args.out, dpi=120)
print(f"\nplot: {args.out} ({time.perf_counter() - begin:.0f} s)")
