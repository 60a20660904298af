"""Train a small language model with optimizer states of 32, 8 and 4 bits.

    pip install "jaxq[hf,plots]"
    python examples/07_optimizer_states.py              # writes optimizer_states.png

AdamW keeps two moments of each parameter: 8 bytes in float32. `jaxq.optim` keeps them
in 2 bytes or in 1 byte. A seed chooses the first weights and the tokens of Python's
standard library. All optimizers train with the same three seeds. The table has the
bytes of the state for each parameter, the mean loss on held-out text, and the change of
this loss from float32 states: its mean, its lowest and its highest value. The plot has
the mean losses during training.
"""

# %% Options and text
import argparse
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from library_text import heldout_tokens, training_tokens, windows
from tokenizers import Tokenizer

import jaxq
from jaxq.distillation import make_step
from jaxq.evaluation import perplexity
from jaxq.models import Llama, LlamaConfig

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=300, help="training steps")
parser.add_argument(
    "--out", type=Path, default=Path("optimizer_states.png"), help="where the plot goes"
)
parser.add_argument(
    "--fast", action="store_true", help="a few steps: shows that it runs"
)
args = parser.parse_args()
NUM_STEPS = 20 if args.fast else args.steps
SEEDS = (0, 1) if args.fast else (0, 1, 2)
BATCH, CONTEXT, PEAK_LR = 4, 128, 1e-3
schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, NUM_STEPS // 10, NUM_STEPS)
OPTIMIZERS = {
    "adamw, float32": optax.adamw(schedule),
    "adamw8bit": jaxq.optim.adamw8bit(schedule),
    "adamw4bit": jaxq.optim.adamw4bit(schedule),
}


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


begin = time.perf_counter()
progress("reading the text")
tokenizer = Tokenizer.from_file(str(HERE / "tiny_llama" / "tokenizer.json"))
tokens = training_tokens(tokenizer, 20_000 if args.fast else 500_000)
heldout = heldout_tokens(tokenizer, (8 if args.fast else 64) * CONTEXT)


# %% One loop for all optimizers
def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def num_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def make_model(seed: int) -> Llama:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
    )
    return Llama(config, rngs=nnx.Rngs(seed))


def train(name: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Trains with an optimizer from each seed.

    Returns:
        Bytes of state for each parameter; training losses [seeds, steps]; held-out
        losses [seeds].
    """
    # A step without a teacher calls the loss with the outputs and the labels.
    step = make_step(make_model(0), None, OPTIMIZERS[name], loss)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(step.init().params))
    bytes_per_parameter = num_bytes(step.init().opt_state) / num_parameters
    losses = np.zeros((len(SEEDS), NUM_STEPS))
    heldout_losses = []
    for row, seed in enumerate(SEEDS):
        # The step is compiled once. Each seed starts it from other weights.
        state = step.init()._replace(params=nnx.state(make_model(seed), nnx.Param))
        for i, batch in enumerate(windows(tokens, NUM_STEPS, BATCH, CONTEXT, seed)):
            state, value = step(state, batch)
            losses[row, i] = value
            if (i + 1) % 50 == 0:
                progress(f"{name}, seed {seed}: step {i + 1}, loss {value:.3f}")
        student = step.student(state)
        heldout_losses.append(np.log(perplexity(student, heldout, context=CONTEXT)))
    return bytes_per_parameter, losses, np.array(heldout_losses)


# %% The table
print(
    f"{'optimizer':18}{'bytes a parameter':>18}{'held-out loss':>15}{'change':>12}"
    f"{'lowest':>12}{'highest':>12}",
    flush=True,
)
curves = {}
for name in OPTIMIZERS:
    bytes_per_parameter, losses, heldout_losses = train(name)
    progress("")
    if not curves:
        float_losses = heldout_losses
    change = 100 * (heldout_losses / float_losses - 1)
    print(
        f"{name:18}{bytes_per_parameter:>18.2f}{heldout_losses.mean():>15.4f}"
        f"{change.mean():>+10.2f} %{change.min():>+10.2f} %{change.max():>+10.2f} %",
        flush=True,
    )
    curves[name] = losses.mean(0)

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
width = min(20, NUM_STEPS)
styles = ("-", "--", ":")
for (name, losses), style in zip(curves.items(), styles, strict=True):
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    steps = np.arange(width, NUM_STEPS + 1)
    axes.plot(steps, mean, style, label=name)
axes.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
axes.set_title("the same training with narrower optimizer states")
axes.legend()
figure.savefig(args.out, dpi=120)
print(f"\nplot: {args.out} ({time.perf_counter() - begin:.0f} s)")
