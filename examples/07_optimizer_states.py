"""Train a small language model with optimizer states of 32, 8 and 4 bits.

    pip install "jaxq[hf,plots]"
    python examples/07_optimizer_states.py              # writes optimizer_states.png

AdamW keeps two moments of each parameter: 8 bytes in float32. `jaxq.optim` keeps them
in 2 bytes or in 1 byte. All runs start from the same weights and read the same tokens
of Python's standard library. The table has the bytes of the state for each parameter,
the loss on held-out text, and the change of this loss from float32 states. The plot has
the losses during training.

Each optimizer runs only once here. `python benchmarks/run.py optimizers` compares the
optimizers over several seeds.
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
BATCH, CONTEXT, PEAK_LR = 4, 128, 3e-3
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


def train(name: str) -> tuple[float, list[float], float]:
    """Bytes of state for each parameter, training losses, held-out loss."""
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
    model = Llama(config, rngs=nnx.Rngs(0))
    # A step without a teacher calls the loss with the outputs and the labels.
    step = make_step(model, None, OPTIMIZERS[name], loss)
    state = step.init()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    bytes_per_parameter = num_bytes(state.opt_state) / num_parameters
    losses = []
    for i, batch in enumerate(windows(tokens, NUM_STEPS, BATCH, CONTEXT, seed=0)):
        state, value = step(state, batch)
        losses.append(float(value))
        if (i + 1) % 10 == 0:
            progress(f"{name}: step {i + 1}/{NUM_STEPS}, loss {value:.3f}")
    heldout_loss = np.log(perplexity(step.student(state), heldout, context=CONTEXT))
    return bytes_per_parameter, losses, heldout_loss


# %% The table
curves = {}
lines = []
for name in OPTIMIZERS:
    bytes_per_parameter, curves[name], heldout_loss = train(name)
    if not lines:
        float_loss = heldout_loss
    change = 100 * (heldout_loss / float_loss - 1)
    lines.append(
        f"{name:18}{bytes_per_parameter:>20.2f}{heldout_loss:>16.4f}{change:>+10.2f} %"
    )
progress("")
print(f"{'optimizer':18}{'bytes a parameter':>20}{'held-out loss':>16}{'change':>12}")
print("\n".join(lines))

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
