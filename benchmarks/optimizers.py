"""Quantized optimizer states compared with float32 states: loss, memory and time.

A small transformer is trained on bytes of Python's standard library. For each seed, all
optimizers start from the same weights and get the same batches. The loss is measured on
held-out text after the last step. `change` compares it with the loss of the optax
optimizer with float32 states, and is a mean over the seeds. `spread` is the standard
deviation of this change. `bytes` are the bytes of the optimizer state for each
parameter, without the small arrays that stay in floats. The states of embeddings are
quantized too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import library_text
import numpy as np
import optax
from optax import contrib

import jaxq

STEPS, SEEDS = 400, 5
WARMUP = 40
BATCH, CONTEXT = 8, 64
WIDTH, HEADS, LAYERS = 128, 4, 2
HELDOUT_WINDOWS = 128
# The largest mean change of the loss in percent, and the most bytes for each parameter.
TARGETS = {"adamw8bit": (0.5, 2.1), "adamw4bit": (1.0, 1.1)}
Params = dict[str, Any]


class Pair(NamedTuple):
    """An optax optimizer, and the same optimizer with quantized states.

    Attributes:
      name: the name of the optax function.
      peak: the largest learning rate.
      wide: makes the optax optimizer from a schedule.
      narrow: functions that make the optimizers with quantized states from a schedule,
        by name.
    """

    name: str
    peak: float
    wide: Callable[[Any], Any]
    narrow: dict[str, Callable[[Any], Any]]


def _fp8(schedule: Any) -> Any:
    return jaxq.optim.quantize_state(optax.adamw(schedule), "fp8")


PAIRS = (
    Pair(
        "adamw",
        3e-3,
        optax.adamw,
        {
            "adamw8bit": jaxq.optim.adamw8bit,
            "adamw4bit": jaxq.optim.adamw4bit,
            "adamw, fp8": _fp8,
        },
    ),
    Pair("lion", 3e-4, optax.lion, {"lion8bit": jaxq.optim.lion8bit}),
    Pair(
        "sgd",
        0.03,
        functools.partial(optax.sgd, momentum=0.9),
        {"momentum8bit": jaxq.optim.momentum8bit},
    ),
    Pair("muon", 0.01, contrib.muon, {"muon8bit": jaxq.optim.muon8bit}),
)


def run(
    num_steps: int = STEPS, num_seeds: int = SEEDS, pairs: tuple[Pair, ...] = PAIRS
) -> dict[str, Any]:
    """Trains with each optimizer from each seed."""
    rows = []
    for pair in pairs:
        schedule = optax.warmup_cosine_decay_schedule(0.0, pair.peak, WARMUP, num_steps)
        wide, row = _losses(pair.wide(schedule), num_steps, num_seeds)
        rows.append({"who": pair.name, "loss": float(np.mean(wide)), **row})
        for name, make in pair.narrow.items():
            narrow, row = _losses(make(schedule), num_steps, num_seeds)
            change = 100 * (np.asarray(narrow) / np.asarray(wide) - 1)
            rows.append(
                {
                    "who": name,
                    "loss": float(np.mean(narrow)),
                    "change": float(np.mean(change)),
                    "spread": float(np.std(change)),
                    **row,
                }
            )
    return {
        "subject": "optimizers",
        "steps": num_steps,
        "seeds": num_seeds,
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['steps']} steps, {result['seeds']} seeds.",
        "",
        "| optimizer | loss | change % | spread % | target % | bytes | target | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        change = f"{row['change']:+.2f}" if "change" in row else "-"
        spread = f"{row['spread']:.2f}" if "spread" in row else "-"
        target = target_bytes = "-"
        if row["who"] in TARGETS:
            largest_change, most_bytes = TARGETS[row["who"]]
            target = f"<= {largest_change}"
            target_bytes = f"<= {most_bytes}"
        lines.append(
            f"| {row['who']} | {row['loss']:.4f} | {change} | {spread} | "
            f"{target} | {row['bytes']:.3f} | {target_bytes} | {row['ms']:.1f} |"
        )
    return "\n".join(lines)


def _losses(
    tx: Any, num_steps: int, num_seeds: int
) -> tuple[list[float], dict[str, float]]:
    """The held-out loss of each seed; bytes for each parameter; time of one step."""
    train = jax.jit(functools.partial(_train, tx))
    losses, seconds = [], []
    for seed in range(num_seeds):
        params, batches = _start(seed), _batches(seed, num_steps)
        begin = time.perf_counter()
        params = jax.block_until_ready(train(params, batches))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(_heldout_loss(params)))
    state = jax.eval_shape(tx.init, params)
    row = {"bytes": _bytes(state, params), "ms": 1e3 * min(seconds) / num_steps}
    return losses, row


def _train(tx: Any, params: Params, batches: jax.Array) -> Params:
    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params


def _bytes(state: Any, params: Params) -> float:
    """Bytes of the moments for each parameter, counted over large arrays only."""
    size = sum(p.size for p in jax.tree.leaves(params) if p.size >= 4096)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, jaxq.QTensor))
    large = [x for x in leaves if x.size >= 4096]
    nbytes = sum(
        x.nbytes if isinstance(x, jaxq.QTensor) else x.size * x.dtype.itemsize
        for x in large
    )
    return nbytes / size


@functools.cache
def _text() -> np.ndarray:
    """Bytes of the library's source code, without held-out text: uint8 `[bytes]`."""
    texts = map(library_text.training_text, library_text.library_files())
    return np.frombuffer("\n".join(texts).encode(), np.uint8)


def _batches(seed: int, num_steps: int) -> np.ndarray:
    """Random windows of the text: int32 `[steps, batch, context + 1]`."""
    text = _text()
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(text) - CONTEXT, (num_steps, BATCH, 1))
    return text[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def _start(seed: int) -> Params:
    """Initial weights, from numpy so that nothing is compiled."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int, scale: float | None = None) -> jax.Array:
        scale = shape[0] ** -0.5 if scale is None else scale
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

    layers = [
        {
            "qkv": weight(WIDTH, 3 * WIDTH),
            "out": weight(WIDTH, WIDTH),
            "up": weight(WIDTH, 4 * WIDTH),
            "down": weight(4 * WIDTH, WIDTH),
            "norm_1": jnp.ones(WIDTH),
            "norm_2": jnp.ones(WIDTH),
        }
        for _ in range(LAYERS)
    ]
    return {
        "embedding": weight(256, WIDTH, scale=0.1),
        "position": weight(CONTEXT, WIDTH, scale=0.1),
        "layers": layers,
        "head": weight(WIDTH, 256),
    }


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _logits(params: Params, tokens: jax.Array) -> jax.Array:
    """`[batch, context] -> [batch, context, 256]`."""
    h = params["embedding"][tokens] + params["position"]
    for layer in params["layers"]:
        qkv = _norm(h, layer["norm_1"]) @ layer["qkv"]
        heads = qkv.reshape(*tokens.shape, 3, HEADS, WIDTH // HEADS)
        q, k, v = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + mixed.reshape(h.shape) @ layer["out"]
        up = jax.nn.gelu(_norm(h, layer["norm_2"]) @ layer["up"])
        h = h + up @ layer["down"]
    return h @ params["head"]


def _loss(params: Params, windows: jax.Array) -> jax.Array:
    logits = _logits(params, windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean()


def _heldout_loss(params: Params) -> jax.Array:
    text = np.frombuffer(library_text.HELDOUT.read_bytes(), np.uint8)
    length = CONTEXT + 1
    windows = text[: HELDOUT_WINDOWS * length].reshape(HELDOUT_WINDOWS, length)
    return jax.jit(_loss)(params, jnp.asarray(windows.astype(np.int32)))
