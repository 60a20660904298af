"""What an accumulator costs: the same dot products, added up in narrower and narrower registers.

    python examples/02_accumulators.py                 # writes accumulators.png; needs pip install "jaxq[hf,plots]"

Matrix units multiply narrow numbers exactly and differ in where they add: float32 (bfloat16 units), about 14 bits with
a promotion to float32 every 128 terms (FP8 units), or the narrow type itself. First the error of one real dot product
of the small Llama in examples/tiny_llama as it grows longer, then the perplexity of the whole model, with every matrix
product emulated: the model is not edited, `jaxq.emulate` runs it in another arithmetic.
"""

# %% The model, and the arithmetics
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

FP8_UNIT = Precision(
    8, 13, rounding="toward_zero"
)  # DeepSeek-V3 (2024), section 3.5.2: about 14 bits, truncated
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
    """One line that the next overwrites on a terminal; in a log, a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


start = time.perf_counter()
progress("loading examples/tiny_llama")
model, tokenizer = jaxq.models.load(HERE / "tiny_llama")
tokens = np.asarray(tokenizer.encode((HERE / "heldout.txt").read_text()).ids, np.int32)[
    : (1 if args.fast else 8) * 256
]

# %% One real dot product: what the first MLP's down projection adds up, for more and more of its 512 terms
mlp = model.layers[0].mlp
hidden = model.layers[0].post_attention_layernorm(
    model.embed_tokens(jnp.asarray(tokens[:256]))
)
x = np.asarray(
    jax.nn.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
)  # [tokens, 512]
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
    # Against the exact sum of the same rounded operands, so that only the accumulator counts.
    a, b = (
        np.asarray(policy.operands.round(jnp.asarray(v)), np.float64) for v in (x, w)
    )
    dot, found = jax.jit(jaxq.emulate(jnp.dot, policy)), []
    for n in lengths:
        y = dot(
            x * (np.arange(512) < n).astype(np.float32), w
        )  # zeros at the end change no sum
        exact = a[:, :n] @ b[:n]
        found.append(float(np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))))
    errors[name] = found
    progress("")
    print(f"{name:32}" + "".join(f"{e:9.1e}" for e in found))

# %% The whole model, every matrix product in that arithmetic, everything else in float32
print(f"\n{'matrix products in':32}  perplexity   KL (nats)   top-1")
perplexities = {}
plain = jax.jit(lambda batch: model(batch))
some = (
    ("bf16, fp32 sum", "bf16, bf16 sum", "e4m3, bf16 sum")
    if args.fast
    else tuple(ARITHMETICS)
)
for name, policy in {
    "float32": Policy(),
    **{name: ARITHMETICS[name] for name in some},
}.items():
    progress(f"{name}: {len(tokens)} tokens")
    forward = jax.jit(
        jaxq.emulate(
            lambda batch: model(batch), Policy(primitives={"dot_general": policy})
        )
    )
    result = jaxq.evaluation.compare(plain, forward, tokens)
    perplexities[name] = result.perplexity
    progress("")
    print(
        f"{name:32}{result.perplexity:12.3f}{result.kl:12.5f}{100 * result.top1_agreement:8.2f} %"
    )

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, found in errors.items():
    left.loglog(lengths, found, marker="o", label=name, base=2)
left.set(xlabel="terms", ylabel="relative error", title="one dot product of the model")
left.set_yscale("log", base=10)
left.legend(fontsize=8)
right.barh(list(perplexities), list(perplexities.values()))
right.set(xlabel="held-out perplexity", title="the whole model")
right.set_xlim(0.95 * min(perplexities.values()))
right.invert_yaxis()
figure.savefig(args.out, dpi=120)
print(f"\nplot: {args.out} ({time.perf_counter() - start:.0f} s)")
