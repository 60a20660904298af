"""Quantize a trained language model several ways, and see what each costs.

    pip install "jaxq[hf]"
    python examples/01_quickstart.py

The script loads the small Llama in examples/tiny_llama and quantizes its matrices with
each recipe. It measures every model on text that is not in the training data:
perplexity (lower is better), the Kullback-Leibler divergence of its predictions from
those of the float model, and how often both models rank the same token first. Then it
saves one quantized model, loads it again, and continues a prompt with it and with the
float model.
"""

# %% The model
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxq

HERE = Path(__file__).parent
# A few recipes on little text. This shows that the example runs, not what recipes cost.
FAST = "--fast" in sys.argv
if FAST:
    RECIPES = ("w8a8", "nf4", "int3")
else:
    RECIPES = ("int8", "w8a8", "fp8", "nf4", "nvfp4", "mxfp4", "int4", "int3")
PROMPT = "def read(self, size=-1):\n"


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


start = time.perf_counter()
progress("loading examples/tiny_llama")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
tokens = np.asarray(tokenizer.encode((HERE / "heldout.txt").read_text()).ids, np.int32)
tokens = tokens[: (2 if FAST else 32) * 256]

forward = nnx.jit(lambda model, batch: model(batch))
float_logits = {}


def float_model(batch):
    """Logits of the float model. Each batch is computed once for all recipes."""
    key = np.asarray(batch).tobytes()
    if key not in float_logits:
        float_logits[key] = forward(model, batch)
    return float_logits[key]


# %% Quantize and measure
COLUMNS = "{:8}  {:>6}  {:>6}  {:>10}  {:>9}  {:>8}  {}"


def print_row(name, bits, size, perplexity, kl, agreement, worst):
    """Prints one row of the table."""
    numbers = f"{bits:.3f}", f"{size / 1e6:.2f}", f"{perplexity:.3f}", f"{kl:.5f}"
    print(COLUMNS.format(name, *numbers, f"{100 * agreement:.2f} %", worst), flush=True)


progress(f"measuring the float model on {len(tokens)} tokens")
float_perplexity = jaxq.evaluation.perplexity(float_model, tokens)
progress("")
header = "recipe", "bits", "MB", "perplexity", "KL (nats)", "top-1"
print(COLUMNS.format(*header, "worst layer (SQNR)"))
# The checkpoint holds bfloat16, so quantized models are compared with its size.
checkpoint_size = (HERE / "tiny_llama" / "model.safetensors").stat().st_size
print_row("bfloat16", 16, checkpoint_size, float_perplexity, 0, 1, "-")
qmodels = {}
for i, recipe in enumerate(RECIPES):
    progress(f"[{i + 1}/{len(RECIPES)}] {recipe}: quantizing")
    qmodel, report = jaxq.quantize_model(model, recipe)
    progress(f"[{i + 1}/{len(RECIPES)}] {recipe}: measuring {len(tokens)} tokens")
    result = jaxq.evaluation.compare(float_model, qmodel, tokens)
    worst = report.worst
    qmodels[recipe] = qmodel
    progress("")
    print_row(
        recipe,
        report.bits_per_weight,
        report.bytes_after,
        result.perplexity,
        result.kl,
        result.top1_agreement,
        f"{worst.path} ({worst.sqnr:.1f} dB)",
    )
float_matrices = [
    f"{row.path} ({row.note})"
    for row in report.rows
    if len(row.shape) > 1 and row.format is None
]
print(
    "\nbits: per quantized weight, scales included. MB: all parameters; the first row "
    "is the file of the checkpoint, which holds bfloat16. "
    f"Left in floats, which are float32 here: {', '.join(float_matrices)}."
)

# %% Save, reload, compare
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tiny_llama_nf4.safetensors"
    jaxq.save(path, qmodels["nf4"])
    reloaded = jaxq.load(path, into=model)
    size = path.stat().st_size / 1e6
batch = jnp.asarray(tokens[None, :64])
is_same = bool((forward(qmodels["nf4"], batch) == forward(reloaded, batch)).all())
print(
    f"\nsaved nf4 as {size:.2f} MB, reloaded: "
    f"logits {'identical' if is_same else 'DIFFER'}"
)
if not is_same:
    raise SystemExit("the reloaded model differs from the saved one")

# %% Continue a prompt with both
prompt = jnp.asarray([tokenizer.encode(PROMPT).ids], jnp.int32)
for name, network in (("float32", model), ("nf4", reloaded)):
    longer = jaxq.models.generate(network, prompt, 10 if FAST else 40)
    text = tokenizer.decode(np.asarray(longer[0, prompt.shape[1] :]).tolist())
    # The prompt is between the marks.
    print(f"\n--- {name}\n[{PROMPT}]{text}")
print(f"\n{time.perf_counter() - start:.0f} s")
