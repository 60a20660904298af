"""Quantize a trained language model several ways, and see what each costs.

    python examples/01_quickstart.py

Loads the small Llama in examples/tiny_llama, quantizes its matrices with each recipe, and measures it on text it was
not trained on: perplexity (lower is better), the Kullback-Leibler divergence of its predictions from the original's,
and how often both rank the same token first. Then saves one, reloads it, and continues a prompt with both.
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
FAST = (
    "--fast" in sys.argv
)  # a few recipes on a little text: shows that it runs, not what it costs
RECIPES = (
    ("int8", "w8a8", "nf4", "int4", "int3")
    if FAST
    else ("int8", "w8a8", "fp8", "nf4", "nvfp4", "mxfp4", "int4", "int3")
)
PROMPT = "def read(self, size=-1):\n"


def progress(text: str) -> None:
    """One line that the next overwrites on a terminal; in a log, a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


start = time.perf_counter()
progress("loading examples/tiny_llama")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
tokens = np.asarray(tokenizer.encode((HERE / "heldout.txt").read_text()).ids, np.int32)
tokens = tokens[: (4 if FAST else 32) * 256]

forward, seen = nnx.jit(lambda model, batch: model(batch)), {}


def original(batch):
    """Logits of the float model, computed once for all recipes."""
    key = np.asarray(batch).tobytes()
    if key not in seen:
        seen[key] = forward(model, batch)
    return seen[key]


# %% Quantize and measure
qmodels, lines = {}, []
for i, recipe in enumerate(RECIPES):
    progress(f"[{i + 1}/{len(RECIPES)}] {recipe}: quantizing")
    qmodel, report = jaxq.quantize_model(model, recipe)
    progress(f"[{i + 1}/{len(RECIPES)}] {recipe}: measuring {len(tokens)} tokens")
    found = jaxq.evaluation.compare(original, qmodel, tokens)
    worst = report.worst
    qmodels[recipe] = qmodel
    lines.append(
        f"{recipe:8}  {report.bits_per_weight:6.3f}  {report.bytes_after / 1e6:6.2f}  {found.perplexity:10.3f}  "
        f"{found.kl:9.5f}  {100 * found.top1_agreement:6.2f} %  {worst.path} ({worst.sqnr:.1f} dB)"
    )
progress("")

print(
    f"{'recipe':8}  {'bits':>6}  {'MB':>6}  {'perplexity':>10}  {'KL (nats)':>9}  {'top-1':>8}  worst layer (SQNR)"
)
print(f"{'float32':8}  {32:6.3f}  {report.bytes_before / 1e6:6.2f}  {found.reference_perplexity:10.3f}  "
      f"{0:9.5f}  {100:6.2f} %  -")  # fmt: skip
print("\n".join(lines))
skipped = [
    f"{row.path} ({row.note})"
    for row in report.rows
    if len(row.shape) > 1 and row.format is None
]
print(
    f"\nbits: per quantized weight, scales included. MB: all parameters. Left in floats: {', '.join(skipped)}."
)

# %% Save, reload, compare
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tiny_llama_nf4.safetensors"
    jaxq.save(path, qmodels["nf4"])
    reloaded = jaxq.load(path, into=model)
    size = path.stat().st_size / 1e6
probe = jnp.asarray(tokens[None, :64])
same = bool((forward(qmodels["nf4"], probe) == forward(reloaded, probe)).all())
print(
    f"\nsaved nf4 as {size:.2f} MB, reloaded: logits {'identical' if same else 'DIFFER'}"
)
if not same:
    raise SystemExit("the reloaded model differs from the saved one")

# %% Continue a prompt with both
prompt = jnp.asarray([tokenizer.encode(PROMPT).ids], jnp.int32)
for name, m in (("float32", model), ("nf4", reloaded)):
    continued = jaxq.models.generate(m, prompt, 40)
    text = tokenizer.decode(np.asarray(continued[0]).tolist())
    print(f"\n--- {name}\n{text}")
print(f"\n{time.perf_counter() - start:.0f} s")
