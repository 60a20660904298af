"""Train the bundled language model for weights of 2 and 3 bits and for ternary weights.

    pip install "jaxq[hf,plots]"
    python examples/04_qat.py                           # writes qat.png
    python examples/04_qat.py --data self               # needs no training text

The rows compare rounding to nearest, GPTQ and quantization-aware training (QAT) of the
small Llama in examples/tiny_llama. In QAT, the quantized model learns the probabilities
of the float model from which it was made. This is one line:

    step = make_step(prepare(model, recipe, ranges=lsq(), ...), model, optimizer, loss)

`--start` chooses the weights and scales with which training starts: those of GPTQ or
those of rounding to nearest. `--data library` trains on Python's standard library.
`--data self` trains on text that the float model writes, as in LLM-QAT (Liu et al.,
2023). GPTQ then reads this text too. No method reads the held-out text, on which all
rows are measured.
"""

# %% Options, model and held-out text
import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from library_text import heldout_tokens, training_tokens, windows

import jaxq
from jaxq.distillation import generate, kd_loss, make_step
from jaxq.training import convert, labels, lsq, prepare

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--weights",
    nargs="+",
    default=["int3", "int2", "ternary"],
    help="presets of the weights",
)
parser.add_argument("--start", choices=("gptq", "rtn"), default="gptq")
parser.add_argument("--data", choices=("library", "self"), default="library")
parser.add_argument("--steps", type=int, default=200, help="training steps")
parser.add_argument("--out", type=Path, default=Path("qat.png"), help="the plot")
parser.add_argument(
    "--fast", action="store_true", help="a few steps at int2: shows that it runs"
)
args = parser.parse_args()
if args.fast:
    args.weights, args.steps = ["int2"], 10
BATCH, CONTEXT = 4, 256
NUM_CALIBRATION = 2 if args.fast else 8


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


begin = time.perf_counter()
progress("loading examples/tiny_llama")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
heldout = heldout_tokens(tokenizer, (2 if args.fast else 32) * CONTEXT)


# %% Training text: from the library, or from the model itself
def own_text(num_batches: int) -> np.ndarray:
    """Text that the model writes, int32 [num_batches, BATCH, CONTEXT].

    The first token is random. The most probable tokens follow it, and then tokens that
    are drawn from the model's probabilities.
    """
    num_rows = 8 if args.fast else 64
    pieces = []
    for i in range(0, num_batches * BATCH, num_rows):
        progress(f"the model writes: window {i} of {num_batches * BATCH}")
        first_key, key = jax.random.split(jax.random.key(i))
        first = jax.random.randint(first_key, (num_rows, 1), 0, model.config.vocab_size)
        start, _ = generate(model, first, 4)
        text, _ = generate(model, start, CONTEXT - 5, key=key, temperature=1.0)
        pieces.append(np.asarray(text))
    rows = np.concatenate(pieces)[: num_batches * BATCH]
    return rows.reshape(num_batches, BATCH, CONTEXT)


def library_text(num_batches: int) -> np.ndarray:
    """Text of Python's standard library, int32 [num_batches, BATCH, CONTEXT]."""
    tokens = training_tokens(tokenizer, 20_000 if args.fast else 500_000)
    return np.stack(
        [inputs for inputs, _ in windows(tokens, num_batches, BATCH, CONTEXT, seed=0)]
    )


make_text = {"library": library_text, "self": own_text}[args.data]
progress(f"training text: {args.data}")
text = make_text(NUM_CALIBRATION + args.steps)
calibration, batches = list(text[:NUM_CALIBRATION]), text[NUM_CALIBRATION:]


# %% QAT with distillation from the float model
def recipe_of(weight: str, method: str) -> jaxq.Recipe:
    """A recipe for all matrices except the embedding and the output head."""
    return jaxq.Recipe(
        [
            jaxq.Rule(kinds="Embed", skip=True),
            jaxq.Rule("lm_head", skip=True),
            jaxq.Rule(weight=weight, method=method),
        ]
    )


# The student learns only the teacher's probabilities, no labels.
loss = functools.partial(kd_loss, temperature=1.0, alpha=1.0)


def adam(peak: float) -> optax.GradientTransformation:
    warmup = max(1, args.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps)
    return optax.adam(rate, b2=0.99)


# Trained scales ("step") are small numbers, so their learning rate is lower.
optimizer = optax.multi_transform({"weight": adam(1e-3), "step": adam(1e-4)}, labels)


def train(weight: str):
    """The quantized model after QAT, and its report."""
    recipe = recipe_of(weight, args.start)
    options = {"calibration": calibration} if args.start == "gptq" else {}
    # The one line: the student is the prepared model, the teacher is the float model.
    step = make_step(
        prepare(model, recipe, ranges=lsq(), **options), model, optimizer, loss
    )
    state = step.init()
    for i, batch in enumerate(batches):
        state, value = step(state, batch)
        if (i + 1) % 20 == 0:
            progress(
                f"{weight}: step {i + 1}/{args.steps}, KL {value:.4f}, "
                f"{time.perf_counter() - begin:.0f} s"
            )
    return convert(step.student(state))


# %% The table
results: dict[str, list[float]] = {}
print(f"{'weights':9}{'method':24}{'bits':>8}{'perplexity':>12}{'KL (nats)':>11}")


def print_row(weight: str, method: str, quantized_model, bits: float) -> None:
    comparison = jaxq.evaluation.compare(model, quantized_model, heldout)
    results.setdefault(weight, []).append(comparison.perplexity)
    print(
        f"{weight:9}{method:24}{bits:>8.3f}{comparison.perplexity:>12.3f}"
        f"{comparison.kl:>11.4f}",
        flush=True,
    )


METHODS = {"rtn": "round to nearest", "gptq": "GPTQ"}
QAT = f"QAT from {METHODS[args.start]}"
print_row("float32", "", model, 32.0)
for weight in args.weights:
    for method, title in METHODS.items():
        progress(f"{weight}: {title}")
        qmodel, report = jaxq.quantize_model(
            model,
            recipe_of(weight, method),
            calibration=calibration if method == "gptq" else None,
            progress=False,
        )
        print_row(weight, title, qmodel, report.bits_per_weight)
    qmodel, report = train(weight)
    print_row(weight, QAT, qmodel, report.bits_per_weight)
num_tokens = args.steps * BATCH * CONTEXT
print(f"\nQAT read {num_tokens:,} tokens, GPTQ {np.size(calibration):,}.")

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
places = np.arange(len(args.weights))
for i, title in enumerate([*METHODS.values(), QAT]):
    heights = [results[weight][i] for weight in args.weights]
    bars = axes.bar(places + 0.27 * (i - 1), heights, 0.25, label=title)
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
axes.axhline(results["float32"][0], color="black", linestyle=":", label="float32")
axes.set_yscale("log")
axes.set_xticks(places, args.weights)
axes.set(ylabel="held-out perplexity", title="the bundled model below 4 bits")
axes.legend()
figure.savefig(args.out, dpi=120)
print(f"plot: {args.out} ({time.perf_counter() - begin:.0f} s)")
