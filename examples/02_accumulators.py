"""What a narrow accumulator costs: the same dot products, added in fewer bits.

    pip install "jaxq[hf,plots]"
    python examples/02_accumulators.py                 # writes accumulators.png

Matrix units multiply narrow numbers exactly. They differ in how they add. Units for
bfloat16 add in float32. Units for FP8 add in about 14 bits, and promote the sum to
float32 every 128 terms. Other units add in the narrow type itself.

The first table is the error of one dot product of the small Llama in
examples/tiny_llama, for more and more terms. The second table is the perplexity of the
whole model when every matrix product is emulated. The model is not edited:
`jaxq.emulate` runs it in another arithmetic.
"""

# %% The model and the arithmetics
import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxq
from jaxq.emulation import Policy, Precision

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("accumulators.png"), help="where the plot goes"
)
parser.add_argument(
    "--fast",
    action="store_true",
    help="little text: shows that it runs, not what it costs",
)
args = parser.parse_args()

# DeepSeek-V3 (2024), section 3.5.2: about 14 bits, truncated.
FP8_UNIT = Precision(8, 13, rounding="toward_zero")
ARITHMETICS = {
    "bf16, fp32 sum": Policy("bfloat16", "float32"),
    "bf16, bf16 sum": Policy("bfloat16", "bfloat16"),
    "bf16, bf16 sum, chunks of 32": Policy("bfloat16", "bfloat16", chunk=32),
    "e4m3, fp32 sum": Policy("float8_e4m3fn", "float32"),
    "e4m3, 14-bit sum": Policy("float8_e4m3fn", FP8_UNIT),
    "e4m3, 14-bit sum, chunks of 128": Policy("float8_e4m3fn", FP8_UNIT, chunk=128),
    "e4m3, bf16 sum": Policy("float8_e4m3fn", "bfloat16"),
}


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


start = time.perf_counter()
progress("loading examples/tiny_llama")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
text = (HERE / "heldout.txt").read_text()
tokens = np.asarray(tokenizer.encode(text).ids, np.int32)
tokens = tokens[: (1 if args.fast else 8) * 256]

# %% One dot product: the first down projection of an MLP, for more and more terms
layer = model.layers[0]
mlp = layer.mlp
hidden = layer.post_attention_layernorm(model.embed_tokens(jnp.asarray(tokens[:256])))
x = jax.nn.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
x = np.asarray(x)  # [tokens, 512]
w = np.asarray(mlp.down_proj.kernel[...])  # [512, 256]
lengths = [2**i for i in range(2, 10)]
print(
    f"{'error of a sum of':32}"
    + "".join(f"{n:>9}" for n in lengths)
    + "   terms (relative, root mean square)"
)
errors = {}
for name, policy in ARITHMETICS.items():
    progress(f"{name}: one dot product")
    # The exact sum is of the same rounded operands. So the error is that of the
    # accumulator only.
    rounded_x = np.asarray(policy.operands.round(jnp.asarray(x)), np.float64)
    rounded_w = np.asarray(policy.operands.round(jnp.asarray(w)), np.float64)
    dot = jax.jit(jaxq.emulate(jnp.dot, policy))
    errors[name] = []
    for n in lengths:
        # Zeros after the first n terms change no sum, and keep the shape.
        y = dot(x * (np.arange(512) < n).astype(np.float32), w)
        exact = rounded_x[:, :n] @ rounded_w[:n]
        error = np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))
        errors[name].append(float(error))
    progress("")
    row = "".join(f"{error:9.1e}" for error in errors[name])
    print(f"{name:32}{row}", flush=True)

# %% The whole model: matrix products in that arithmetic, the rest in float32
print(f"\n{'matrix products in':32}  perplexity   KL (nats)   top-1")
perplexities = {}
plain = jax.jit(lambda batch: model(batch))
names = list(ARITHMETICS)
if args.fast:
    names = ["bf16, fp32 sum", "bf16, bf16 sum", "e4m3, bf16 sum"]
policies = {"float32": Policy()} | {name: ARITHMETICS[name] for name in names}
for name, policy in policies.items():
    progress(f"{name}: {len(tokens)} tokens")
    model_policy = Policy(primitives={"dot_general": policy})
    forward = jax.jit(jaxq.emulate(lambda batch: model(batch), model_policy))
    result = jaxq.evaluation.compare(plain, forward, tokens)
    perplexities[name] = result.perplexity
    progress("")
    print(
        f"{name:32}{result.perplexity:12.3f}{result.kl:12.5f}"
        f"{100 * result.top1_agreement:8.2f} %",
        flush=True,
    )

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, values in errors.items():
    left.loglog(lengths, values, marker="o", label=name, base=2)
left.set(xlabel="terms", ylabel="relative error", title="one dot product of the model")
left.set_yscale("log", base=10)
left.legend(fontsize=8)
right.barh(list(perplexities), list(perplexities.values()))
right.set(xlabel="held-out perplexity", title="the whole model")
right.set_xlim(0.95 * min(perplexities.values()))
right.invert_yaxis()
figure.savefig(args.out, dpi=120)
print(f"\nplot: {args.out} ({time.perf_counter() - start:.0f} s)")
