"""Train the tiny Llama in examples/tiny_llama on Python's own standard library: real text that every machine has.

    python examples/train_tiny_llama.py --minutes 40       # continue an interrupted run with --resume

Writes a Hugging Face directory (bfloat16 weights, byte-level BPE tokenizer) and examples/heldout.txt, real text from
files the model never saw. Sources and documentation of CPython: Python Software Foundation License.

On CPU, keeping freed memory in the process makes a step about a third faster with glibc:
    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
"""

# %% Options
import argparse
import functools
import hashlib
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxq.evaluation import perplexity
from jaxq.models import Llama, LlamaConfig, save

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--minutes",
    type=float,
    default=40,
    help="training time; the learning rate follows the clock",
)
parser.add_argument(
    "--steps",
    type=int,
    help="train this many steps instead, whatever the time (repeatable)",
)
parser.add_argument(
    "--out",
    type=Path,
    default=HERE / "tiny_llama",
    help="where the Hugging Face directory goes",
)
parser.add_argument(
    "--heldout",
    type=Path,
    default=HERE / "heldout.txt",
    help="where the evaluation text goes",
)
parser.add_argument(
    "--work", type=Path, default=Path(tempfile.gettempdir()) / "train_tiny_llama"
)
parser.add_argument(
    "--resume", action="store_true", help="continue from the checkpoint in --work"
)
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)

SEED, BATCH, CONTEXT, PEAK_LR = 0, 8, 256, 2.5e-3
config = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
)

# %% Text: every standard library source but character tables, one file in 50 held out by a hash of its name
root = Path(sysconfig.get_path("stdlib"))
files = [
    p
    for p in sorted(root.rglob("*.py"))
    if not {"site-packages", "encodings"} & set(p.parts)
]
train, heldout = [], []
for path in files:
    name = path.relative_to(root).as_posix()
    digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    text = path.read_text(encoding="utf-8", errors="replace")
    if (
        name == "pydoc_data/topics.py"
    ):  # the language reference, out of its string literals
        scope: dict = {}
        exec(text, scope)
        text = "\n".join(scope["topics"].values())
    if digest % 50:
        train.append(text)
    elif 4_000 < len(text) < 25_000 and "test" not in name:
        heldout.append((digest, text))
evaluation, chosen = "", sorted(heldout)
while chosen and len(evaluation) < 60_000:
    evaluation += chosen.pop(0)[1]
args.heldout.write_text(evaluation, encoding="utf-8")

# %% Tokenizer: byte-level BPE, so any text can be written in it
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
END = "<|endoftext|>"
if args.resume:
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
else:
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    tokenizer.save(str(args.work / "tokenizer.json"))
order = np.random.default_rng(SEED).permutation(len(train))
stream = np.concatenate([[0, *tokenizer.encode(train[i]).ids] for i in order]).astype(
    np.int32
)
heldout_tokens = np.asarray(tokenizer.encode(evaluation).ids, np.int32)
num_windows = (len(stream) - 1) // CONTEXT
print(
    f"{len(train)} files, {len(stream):,} tokens; held out {len(heldout_tokens):,} tokens",
    file=sys.stderr,
)


@functools.cache
def epoch_order(epoch: int) -> np.ndarray:
    return np.random.default_rng((SEED, epoch)).permutation(num_windows)


def windows(step: int) -> np.ndarray:
    """The batch of a step, a function of its number only, so that a resumed run sees the same data."""
    index = np.arange(step * BATCH, (step + 1) * BATCH)
    starts = [epoch_order(i // num_windows)[i % num_windows] * CONTEXT for i in index]
    return np.stack([stream[s : s + CONTEXT + 1] for s in starts])  # [b, t + 1]


# %% One jitted step: cross entropy, clipped gradient, Muon for the blocks' matrices and Adam for everything else
graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(SEED)))


def muon_axes(
    path: tuple, leaf: jax.Array
) -> optax.contrib.MuonDimensionNumbers | None:
    in_block = any("layers" in str(key) for key in path)
    return (
        optax.contrib.MuonDimensionNumbers() if in_block and leaf.ndim == 2 else None
    )  # [in, out] kernels


optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(  # Jordan et al. 2024; updates scaled to Adam's size as in Liu et al. 2025
        -1.0,  # the step below multiplies by the clock's learning rate
        consistent_rms=0.2,
        adam_b2=0.95,
        weight_decay=0.05,
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(
            muon_axes, tree
        ),
    ),
)
opt_state = optimizer.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, batch, rate):
    def loss_fn(params):
        logits = nnx.merge(graphdef, params)(batch[:, :-1])  # [b, t, vocab]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (
        optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)),
        opt_state,
        loss,
    )


def learning_rate(progress: float) -> float:
    return PEAK_LR * min(
        progress / 0.02, 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
    )


# %% The loop, with a checkpoint every two minutes that a kill cannot tear
checkpoint = args.work / "checkpoint.npz"
leaves, structure = jax.tree.flatten((params, opt_state))
step, spent, losses = 0, 0.0, []
if args.resume:
    with np.load(checkpoint) as file:
        params, opt_state = jax.tree.unflatten(
            structure, [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
        )
        step, spent, losses = (
            int(file["step"]),
            float(file["spent"]),
            list(file["losses"]),
        )


def save_all() -> float:
    arrays = {
        f"leaf{i}": np.asarray(leaf)
        for i, leaf in enumerate(jax.tree.leaves((params, opt_state)))
    }
    np.savez(
        args.work / "new.npz", step=step, spent=spent, losses=losses[-200:], **arrays
    )
    os.replace(args.work / "new.npz", checkpoint)
    model = nnx.merge(graphdef, params)
    save(args.out, model, tokenizer=tokenizer, bos_token_id=None, eos_token_id=0)
    return perplexity(model, heldout_tokens, context=CONTEXT)


def progress() -> float:
    return step / args.steps if args.steps else spent / (60 * args.minutes)


last_save = spent
while progress() < 1:
    begin = time.perf_counter()
    rate = learning_rate(progress())
    params, opt_state, loss = train_step(
        params, opt_state, jnp.asarray(windows(step)), rate
    )
    losses.append(float(loss))
    step, spent = step + 1, spent + time.perf_counter() - begin
    bar, speed = "#" * int(30 * min(progress(), 1)), step * BATCH * CONTEXT / spent
    line = f"[{bar:30}] step {step} loss {np.mean(losses[-100:]):.3f} {speed:,.0f} tokens/s {spent / 60:.1f} min"
    print(f"\r{line}", end="", file=sys.stderr, flush=True)
    if spent - last_save > 120 or progress() >= 1:
        print(
            f"\n{step * BATCH * CONTEXT:,} tokens; held-out perplexity {save_all():.3f}",
            file=sys.stderr,
            flush=True,
        )
        last_save = spent
