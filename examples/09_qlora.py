"""Adapt the bundled language model to another text, with 4-bit weights (QLoRA).

    pip install "jaxq[hf]"
    python examples/09_qlora.py

The small Llama in examples/tiny_llama has read Python's standard library. Here it
learns to predict the source code of NumPy. Its weights are frozen, and only low-rank
adapters are trained: on float weights (LoRA), on 4-bit weights (QLoRA), and on 4-bit
weights with adapters that start from the quantization error (LoftQ). All three train
the same number of steps on the same text.

The table has the bytes of the weights in the layers, of the whole model with its
adapters, and of the optimizer's states. Floats of the model count as bfloat16. The
embedding and the head stay in floats. They are a third of this small model. In a large
model they count less. Perplexity is that on files of NumPy that are not in the training
text.
"""

# %% Options, model and text
import argparse
import sys
import time
from pathlib import Path

import jax
import optax
from flax import nnx
from library_text import windows
from numpy_text import heldout_tokens, training_tokens

import jaxq
from jaxq.evaluation import perplexity

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=40, help="training steps")
parser.add_argument(
    "--fast", action="store_true", help="a few steps: shows that it runs"
)
args = parser.parse_args()
NUM_STEPS = 10 if args.fast else args.steps
BATCH, CONTEXT, PEAK_LR, RANK = 4, 128, 3e-3, 16
NUM_HELDOUT = (16 if args.fast else 64) * CONTEXT


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


begin = time.perf_counter()
progress("reading the model and the text")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
qmodel, report = jaxq.quantize_model(model, "nf4_dq", progress=False)
tokens = training_tokens(tokenizer, 20_000 if args.fast else 200_000)
heldout = heldout_tokens(tokenizer, NUM_HELDOUT)

# %% Three models with adapters
LORAS = {
    "LoRA": jaxq.training.add_lora(model, rank=RANK),
    "QLoRA": jaxq.training.add_lora(qmodel, rank=RANK),
    "QLoRA, LoftQ": jaxq.training.add_lora(
        qmodel, rank=RANK, initial=jaxq.training.loftq(model)
    ),
}


# %% One step: only the adapters have gradients and states of the optimizer
tx = optax.adam(optax.cosine_decay_schedule(PEAK_LR, NUM_STEPS))


@nnx.jit
def train_step(lora, optimizer, inputs, targets):
    def loss_of(lora):
        logits = lora(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_of, argnums=adapters)(lora)
    optimizer.update(lora, grads)
    return loss


def train(name: str, lora: nnx.Module) -> nnx.Optimizer:
    """Trains the adapters in place, and returns the optimizer with its states."""
    optimizer = nnx.Optimizer(lora, tx, wrt=nnx.LoRAParam)
    batches = windows(tokens, NUM_STEPS, BATCH, CONTEXT, seed=0)
    for i, (inputs, targets) in enumerate(batches):
        loss = train_step(lora, optimizer, inputs, targets)
        if (i + 1) % 10 == 0:
            progress(f"{name}: step {i + 1}/{NUM_STEPS}, loss {loss:.3f}")
    return optimizer


# %% Bytes: floats of the model count as bfloat16, as in its file
def num_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


float_bytes = sum(row.bytes_before for row in report.quantized) // 2
quantized_bytes = sum(row.bytes_after for row in report.quantized)
other_bytes = report.bytes_before // 2 - float_bytes

# %% The table
print(
    f"{NUM_STEPS * BATCH * CONTEXT:,} tokens of training text; quantized weights take "
    f"{quantized_bytes / float_bytes:.3f} of the bytes of bfloat16\n"
)
print(f"{'':14}{'layers':>10}{'model':>10}{'states':>10}{'perplexity':>20}")
print(f"{'':14}{'MB':>10}{'MB':>10}{'MB':>10}{'before':>10}{'after':>10}", flush=True)
after = {}
for name, lora in LORAS.items():
    before = perplexity(lora, heldout, context=CONTEXT)
    optimizer = train(name, lora)
    after[name] = perplexity(lora, heldout, context=CONTEXT)
    progress("")
    layers = float_bytes if name == "LoRA" else quantized_bytes
    adapters = num_bytes(nnx.state(lora, nnx.LoRAParam))
    megabytes = (
        layers / 1e6,
        (layers + other_bytes + adapters) / 1e6,
        num_bytes(nnx.state(optimizer)) / 1e6,
    )
    columns = "".join(f"{value:>10.2f}" for value in (*megabytes, before, after[name]))
    print(f"{name:14}{columns}", flush=True)
for name in ("QLoRA", "QLoRA, LoftQ"):
    change = 100 * (after[name] / after["LoRA"] - 1)
    print(f"\n{name}: perplexity {change:+.2f} % beside LoRA", end="")
print(f"\n\n{time.perf_counter() - begin:.0f} s")
