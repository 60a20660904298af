"""Train the tiny Llama in examples/tiny_llama on Python's own standard library.

    python examples/train_tiny_llama.py --minutes 40
    python examples/train_tiny_llama.py --minutes 40 --resume    # after an interruption

The text is the source code and documentation of CPython, which every machine has. Its
license is that of the Python Software Foundation. The script writes a Hugging Face
directory with bfloat16 weights and a byte-level BPE tokenizer. It also writes
examples/heldout.txt, whose files are not in the training text.

On CPU with glibc, a step is about a third faster if the process keeps freed memory:

    export MALLOC_ARENA_MAX=1
    export MALLOC_MMAP_THRESHOLD_=4294967296
    export MALLOC_TRIM_THRESHOLD_=17179869184
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
    help="training time; the learning rate follows the time",
)
parser.add_argument(
    "--steps",
    type=int,
    help="train this many steps instead; the run can then be repeated",
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

# %% Text: the sources of the standard library, except its character tables
# A hash of the name decides which files are held out: one in 50.
root = Path(sysconfig.get_path("stdlib"))
excluded = {"site-packages", "encodings"}
files = [path for path in sorted(root.rglob("*.py")) if excluded.isdisjoint(path.parts)]
train, heldout = [], []
for path in files:
    name = path.relative_to(root).as_posix()
    digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    text = path.read_text(encoding="utf-8", errors="replace")
    if name == "pydoc_data/topics.py":
        # This file holds the language reference in string literals.
        scope: dict = {}
        exec(text, scope)
        text = "\n".join(scope["topics"].values())
    if digest % 50:
        train.append(text)
    elif 4_000 < len(text) < 25_000 and "test" not in name:
        heldout.append((digest, text))
evaluation = ""
for _, text in sorted(heldout):
    if len(evaluation) >= 60_000:
        break
    evaluation += text
args.heldout.write_text(evaluation, encoding="utf-8")

# %% Tokenizer: byte-level BPE, which can encode any text
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
# Each file begins with token 0, END.
order = np.random.default_rng(SEED).permutation(len(train))
file_tokens = [[0, *tokenizer.encode(train[i]).ids] for i in order]
stream = np.concatenate(file_tokens).astype(np.int32)
heldout_tokens = np.asarray(tokenizer.encode(evaluation).ids, np.int32)
num_windows = (len(stream) - 1) // CONTEXT
print(
    f"{len(train)} files, {len(stream):,} tokens; "
    f"held out {len(heldout_tokens):,} tokens",
    file=sys.stderr,
)


@functools.cache
def epoch_order(epoch: int) -> np.ndarray:
    """The order of the windows in an epoch."""
    return np.random.default_rng((SEED, epoch)).permutation(num_windows)


def windows(step: int) -> np.ndarray:
    """The batch of a step, [b, t + 1].

    It depends on the number of the step only, so a resumed run reads the same data.
    """
    starts = []
    for i in range(step * BATCH, (step + 1) * BATCH):
        epoch, position = divmod(i, num_windows)
        starts.append(epoch_order(epoch)[position] * CONTEXT)
    return np.stack([stream[start : start + CONTEXT + 1] for start in starts])


# %% One jitted step: cross entropy, and a clipped gradient
# Muon updates the matrices of the layers, and Adam the other parameters.
graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(SEED)))


def muon_axes(
    path: tuple, leaf: jax.Array
) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of an [in, out] kernel of a layer; None gives the parameter to Adam."""
    in_layer = any("layers" in str(key) for key in path)
    if in_layer and leaf.ndim == 2:
        return optax.contrib.MuonDimensionNumbers()
    return None


optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    # Muon: Jordan et al., 2024. Updates scaled to the size of Adam's: Liu et al., 2025.
    optax.contrib.muon(
        # train_step multiplies the updates by the learning rate of the moment.
        -1.0,
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
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return optax.apply_updates(params, updates), opt_state, loss


def learning_rate(progress: float) -> float:
    """A short linear warm-up, then half a cosine. `progress` goes from 0 to 1."""
    warm_up = progress / 0.02
    decay = 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
    return PEAK_LR * min(warm_up, decay)


# %% The loop, with a checkpoint every two minutes
checkpoint = args.work / "checkpoint.npz"
leaves, structure = jax.tree.flatten((params, opt_state))
step, spent, losses = 0, 0.0, []
if args.resume:
    with np.load(checkpoint) as file:
        arrays = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
        params, opt_state = jax.tree.unflatten(structure, arrays)
        step, spent = int(file["step"]), float(file["spent"])
        losses = list(file["losses"])


def save_all() -> float:
    """Writes the checkpoint and the model, and returns the held-out perplexity."""
    leaves = jax.tree.leaves((params, opt_state))
    arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    arrays |= {"step": step, "spent": spent, "losses": losses[-200:]}
    # Write a new file and rename it, so that an interruption keeps the old checkpoint.
    np.savez(args.work / "new.npz", **arrays)
    os.replace(args.work / "new.npz", checkpoint)
    model = nnx.merge(graphdef, params)
    save(args.out, model, tokenizer=tokenizer, bos_token_id=None, eos_token_id=0)
    return perplexity(model, heldout_tokens, context=CONTEXT)


def progress() -> float:
    """How much of the training is done, 0 to 1."""
    if args.steps:
        return step / args.steps
    return spent / (60 * args.minutes)


last_save = spent
while progress() < 1:
    begin = time.perf_counter()
    rate = learning_rate(progress())
    params, opt_state, loss = train_step(
        params, opt_state, jnp.asarray(windows(step)), rate
    )
    losses.append(float(loss))
    step, spent = step + 1, spent + time.perf_counter() - begin
    num_tokens = step * BATCH * CONTEXT
    bar = "#" * int(30 * min(progress(), 1))
    print(
        f"\r[{bar:30}] step {step} loss {np.mean(losses[-100:]):.3f} "
        f"{num_tokens / spent:,.0f} tokens/s {spent / 60:.1f} min",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if spent - last_save > 120 or progress() >= 1:
        print(
            f"\n{num_tokens:,} tokens; held-out perplexity {save_all():.3f}",
            file=sys.stderr,
            flush=True,
        )
        last_save = spent
