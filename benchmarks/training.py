"""Quantization-aware training of a language model below 4 bits, compared with GPTQ.

The model is examples/tiny_llama. The first row is the float model. Training reads
source code of Python's standard library that is not in examples/heldout.txt.
Perplexity, KL divergence from the float model and top-1 agreement are measured on
examples/heldout.txt. Heads and embeddings stay in floats in all rows, but they are
trained. Figures are means over three seeds, which choose the training text and the
calibration text. `range` has the lowest and the highest perplexity. `remark` says
whether the row with the lowest perplexity of a format reaches the target of the format.

- `trained on`: `labels` are the next tokens, `distillation` uses the logits of the
  float model.
- `steps`: the scales. `computed` scales are computed from the weights, and `learned`
  scales are trained (LSQ).
- `from`: the weights and scales with which training starts. They are those of rounding
  to nearest, or those of GPTQ.

All rows of the first table train the same number of steps, except the rows `long`. In
the second table, training gets the text that GPTQ reads (8,192 tokens), the time that
GPTQ takes, or both. Seconds are CPU seconds of the process without compilation. Compare
them only with seconds of the same machine.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import library_text
import numpy as np
import optax
from flax import nnx
from methods import BATCHES, CONTEXT, SEEDS, Comparer, Text, recipe_of

import jaxq

# Rows of an interrupted run. The next run does not measure them again.
PARTIAL = Path(__file__).parent / "results" / "training-partial.json"
BATCH, WARMUP = 4, 20
# Training steps of all rows, and of the rows "long". Only int2 needs more steps to come
# near its target.
STEPS, LONG = 100, {"int2": 2000}
# The largest learning rates of weights and of trained scales.
WEIGHT_RATE, STEP_RATE = 5e-4, 1e-4
FORMATS = {"int2": "int2", "int3": "int3", "ternary": "ternary"}
# The largest perplexity that each format should reach.
TARGETS = {"int2": 17.0, "int3": 15.9, "ternary": 25.0}
GPTQ_TOKENS = BATCHES * 4 * CONTEXT
Row = dict[str, Any]


class Case(NamedTuple):
    """One row of a table before it is measured.

    Attributes:
        table: 1 or 2.
        what: the format of the weights.
        loss: "labels", "distillation", or "-" without training.
        steps: how scales are determined: "computed", "learned", or "-" without
            training.
        start: "nearest" or "gptq".
        budget: "steps", "long", "text" (GPTQ's text once), "time" (GPTQ's time on new
            text) or "text and time" (GPTQ's text again and again for GPTQ's time).
    """

    table: int
    what: str
    loss: str
    steps: str
    start: str
    budget: str = "steps"

    @property
    def name(self) -> str:
        return " ".join(map(str, self))


def cases() -> Iterator[Case]:
    """All rows in their order."""
    for what in FORMATS:
        yield Case(1, what, "-", "-", "nearest", "-")
        yield Case(1, what, "-", "-", "gptq", "-")
        yield Case(1, what, "labels", "computed", "nearest")
        yield Case(1, what, "distillation", "computed", "nearest")
        yield Case(1, what, "distillation", "learned", "nearest")
        yield Case(1, what, "distillation", "learned", "gptq")
        if what in LONG:
            yield Case(1, what, "distillation", "learned", "gptq", "long")
    for budget in ("text", "time", "text and time"):
        for what in ("int2", "int3"):
            yield Case(2, what, "distillation", "learned", "nearest", budget)


class Stream:
    """Windows of training text, which never overlap the held-out text."""

    def __init__(self, text: Text, seed: int):
        self._rng = np.random.default_rng(1000 + seed)
        self._tokens = _training_tokens(text)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields batches `[BATCH, CONTEXT]` without end."""
        while True:
            starts = self._rng.integers(0, len(self._tokens) - CONTEXT, BATCH)
            yield np.stack([self._tokens[s : s + CONTEXT] for s in starts])


@functools.cache
def _training_tokens(text: Text) -> np.ndarray:
    return library_text.training_tokens(text.tokenizer)


class Trained(NamedTuple):
    """A trained model, and what training took."""

    model: Any
    tokens: int
    seconds: float


def quantize(case: Case, text: Text, data: list[np.ndarray], seed: int) -> Trained:
    """The quantized model of a case without training."""
    calibration = data if case.start == "gptq" else None
    start = time.process_time()
    model, _ = jaxq.quantize_model(
        text.model,
        _recipe(case),
        calibration=calibration,
        fallback="none",
        key=jax.random.key(seed),
        progress=False,
    )
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    tokens = GPTQ_TOKENS if calibration else 0
    return Trained(model, tokens, time.process_time() - start)


def train(
    case: Case, text: Text, data: list[np.ndarray], seed: int, num_steps: int
) -> Trained:
    """The quantized model of a case after training.

    Args:
        case: the row.
        text: the model and the text.
        data: GPTQ's calibration batches.
        seed: chooses the training text.
        num_steps: training steps.
    """
    start = time.process_time()
    student = jaxq.training.prepare(
        text.model,
        _recipe(case),
        ranges=jaxq.training.lsq() if case.steps == "learned" else "dynamic",
        calibration=data if case.start == "gptq" else None,
        fallback="none",
        key=jax.random.key(seed),
        progress=False,
    )
    teacher = text.model if case.loss == "distillation" else None
    loss = _distillation if teacher is not None else _labels
    step = jaxq.distillation.make_step(student, teacher, optimizer(num_steps), loss)
    start_of_compilation = time.process_time()
    jax.block_until_ready(step(step.init(), _with_targets(data[0], teacher)))
    start += time.process_time() - start_of_compilation
    state = step.init()
    batches = _batches(case, text, data, seed)
    for batch in itertools.islice(batches, num_steps):
        state, _ = step(state, _with_targets(batch, teacher))
    jax.block_until_ready(state.params)
    seconds = time.process_time() - start
    model, _ = jaxq.training.convert(step.student(state))
    return Trained(model, num_steps * BATCH * CONTEXT, seconds)


def _recipe(case: Case) -> jaxq.Recipe:
    method = "gptq" if case.start == "gptq" else "rtn"
    return recipe_of(FORMATS[case.what], method=method)


def _batches(
    case: Case, text: Text, data: list[np.ndarray], seed: int
) -> Iterator[np.ndarray]:
    """The training batches of a case, without end."""
    if not case.budget.startswith("text"):
        yield from Stream(text, seed)
    windows = np.concatenate(data).reshape(-1, BATCH, CONTEXT)
    while True:
        yield from windows


def optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam without weight decay, with a lower learning rate for trained scales."""

    def rate(peak: float) -> optax.Schedule:
        warmup = min(WARMUP, num_steps // 4)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)

    return optax.multi_transform(
        {
            "weight": optax.adam(rate(WEIGHT_RATE), b2=0.99),
            "step": optax.adam(rate(STEP_RATE), b2=0.99),
        },
        jaxq.training.labels,
    )


def _with_targets(batch: np.ndarray, teacher: Any) -> Any:
    return (batch,) if teacher is not None else (batch, batch)


def _distillation(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    return jaxq.distillation.kd_loss(logits, teacher_logits, temperature=1.0, alpha=1.0)


def _labels(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


# Measurement.


def run() -> dict[str, Any]:
    """Measures every case with every seed. The next run continues a stopped run."""
    text = Text()
    compare = Comparer(text.model, text.tokens)
    measured: dict[str, Row] = {}
    if PARTIAL.exists():
        measured = json.loads(PARTIAL.read_text())
    # The longest runs are last, so a stopped run has most rows.
    for case in sorted(cases(), key=lambda case: case.budget == "long"):
        for seed in _seeds(case):
            key = _key(case, seed)
            if key not in measured:
                measured[key] = _measure(case, text, seed, compare, measured)
                PARTIAL.write_text(json.dumps(measured))
                print(f"{key}: {measured[key]}", flush=True)
    rows = [
        _mean(case, [measured[_key(case, seed)] for seed in _seeds(case)])
        for case in cases()
    ]
    float_row = {"what": "float32", "bits": 32.0, **compare(text.model)}
    PARTIAL.unlink(missing_ok=True)
    return {"subject": "training", "float": float_row, "rows": rows, "missing": []}


def _key(case: Case, seed: int) -> str:
    return f"{case.name}, seed {seed}"


def _seeds(case: Case) -> tuple[int, ...]:
    """The seeds of a case. Rounding to nearest does not depend on the seed."""
    is_random = case.loss != "-" or case.start == "gptq"
    return SEEDS if is_random else SEEDS[:1]


def _measure(
    case: Case, text: Text, seed: int, compare: Comparer, measured: dict[str, Row]
) -> Row:
    data = text.calibration(seed)
    if case.loss == "-":
        _compile_gptq(case, text)
        result = quantize(case, text, data, seed)
    else:
        num_steps = _num_steps(case, seed, measured)
        result = train(case, text, data, seed, num_steps)
    codes = [
        leaf
        for leaf in jax.tree.leaves(nnx.state(result.model), is_leaf=_is_qtensor)
        if _is_qtensor(leaf)
    ]
    bits = 8 * sum(qt.nbytes for qt in codes) / sum(qt.size for qt in codes)
    return {
        "bits": bits,
        "tokens": result.tokens,
        "seconds": result.seconds,
        **compare(result.model),
    }


@functools.cache
def _compile_gptq(case: Case, text: Text) -> None:
    """Compiles what `quantize` runs, once in a process."""
    quantize(case, text, text.calibration(0), 0)


def _num_steps(case: Case, seed: int, measured: dict[str, Row]) -> int:
    """The training steps that the budget of a case allows."""
    if case.budget == "steps":
        return STEPS
    if case.budget == "long":
        return LONG[case.what]
    if case.budget == "text":
        return GPTQ_TOKENS // (BATCH * CONTEXT)
    gptq = Case(1, case.what, "-", "-", "gptq", "-")
    same = case._replace(table=1, budget="steps")
    seconds = measured[_key(gptq, seed)]["seconds"]
    seconds_of_step = measured[_key(same, seed)]["seconds"] / STEPS
    return max(1, round(seconds / seconds_of_step))


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, jaxq.QTensor)


def _mean(case: Case, seed_rows: list[Row]) -> Row:
    """The row of a case: means over the seeds, and all perplexities."""
    means = {
        name: float(np.mean([row[name] for row in seed_rows])) for name in seed_rows[0]
    }
    perplexities = [row["perplexity"] for row in seed_rows]
    return {**case._asdict(), **means, "perplexities": perplexities}


def table(result: dict[str, Any]) -> str:
    """Two markdown tables of the figures that `run` returns."""
    head = (
        "| weights | trained on | steps | from | budget | bits | perplexity | range | "
        "KL | top-1 | tokens | seconds | remark |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    float_row = result["float"]
    perplexity = f"{float_row['perplexity']:.2f}"
    lowest = {}
    for row in sorted(result["rows"], key=lambda row: row["perplexity"]):
        lowest.setdefault(row["what"], row)
    parts = [
        head,
        f"| float32 | - | - | - | - | 32 | {perplexity} | - | 0 | 100 % | - | - |  |",
    ]
    for number in (1, 2):
        if number == 2:
            parts += ["\nThe text or the time of GPTQ:\n", head]
        rows = [row for row in result["rows"] if row["table"] == number]
        parts += [
            _line(row, _remark(row) if row is lowest[row["what"]] else "")
            for row in rows
        ]
    return "\n".join(parts)


def _remark(row: Row) -> str:
    """Says whether the best row of a format reaches the target of the format."""
    target = TARGETS[row["what"]]
    is_reached = row["perplexity"] <= target
    return f"{'at most' if is_reached else 'MISSES'} {target}"


def _line(row: Row, remark: str) -> str:
    low, high = min(row["perplexities"]), max(row["perplexities"])
    spread = f"{low:.2f} to {high:.2f}" if len(row["perplexities"]) > 1 else "-"
    return (
        f"| {row['what']} | {row['loss']} | {row['steps']} | {row['start']} | "
        f"{row['budget']} | {row['bits']:.2f} | {row['perplexity']:.2f} | {spread} | "
        f"{row['kl']:.4f} | {100 * row['top1']:.1f} % | {row['tokens']:,.0f} | "
        f"{row['seconds']:.0f} | {remark} |"
    )
