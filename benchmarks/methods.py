"""What each post-training method costs a trained language model.

The model is examples/tiny_llama. Perplexity, KL divergence from the float model and
top-1 agreement are those on examples/heldout.txt, which is not in its training data.
CPU seconds are the time to quantize the model, with compilation.

Methods that need data get 8,192 tokens of other text. At 4 and 3 bits they run three
times with other text (seeds). Then the figures are means, and the range of perplexity
is shown. No method falls back to rounding to nearest (`fallback="none"`), and nothing
is tuned on the held-out text. Heads and embeddings stay in floats.

Mixed precision chooses among int8, int4, int3 and int2 by sensitivities on the first of
these texts. The seconds include these sensitivities. A cross marks the seconds of rows
that a later run added (`run.py methods --keep`): such a run shares no compilation with
the others. Bias correction has no row, because the model has no biases. The report says
so for each layer (`no bias to correct`).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import library_text
import numpy as np
from flax import nnx

import jaxq
from jaxq import methods, models

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT, TOKENS, BATCHES, BATCH = 256, 64 * 256, 8, 4
SEEDS = (0, 1, 2)
# Rows of an interrupted run. The next run does not measure them again.
PARTIAL = Path(__file__).parent / "results" / "methods-partial.json"
BITS = (8, 4, 3, 2)
PER_CHANNEL = jaxq.QuantSpec("int4", jaxq.PerChannel())
# Name: method, options, whether it needs data. Names that begin with "rotated" are of
# models in rotated coordinates.
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rtn": ("rtn", {}, False),
    "rotated": ("rtn", {}, False),
    "equalize": ("equalize", {}, False),
    "clip (mse)": ("clip", {"rule": "mse"}, False),
    "clip (entropy)": ("clip", {"rule": "entropy"}, False),
    "clip (99.9 %)": ("clip", {"rule": "percentile"}, False),
    "hqq": ("hqq", {}, False),
    "k-means": ("kmeans", {"granularity": jaxq.PerChannel()}, False),
    "awq": ("awq", {}, True),
    "gptq": ("gptq", {}, True),
    "gptq, act-order": ("gptq", {"act_order": True}, True),
    "rotated, gptq": ("gptq", {}, True),
    "adaround": ("adaround", {}, True),
}
# Mixed precision: the presets to choose from, and mean bits per weight. int4, int3 and
# int2 take 4.12, 3.12 and 2.38 bits.
CHOICES, BUDGETS = ("int8", "int4", "int3", "int2"), (3.5, 2.75)
Row = dict[str, Any]


class Text:
    """The model, the text on which it is measured, and other text for calibration."""

    def __init__(self):
        self.model, self.tokenizer = models.load(EXAMPLES / "tiny_llama")
        self.heldout = library_text.HELDOUT.read_text()
        self.tokens = self.encode(self.heldout)[:TOKENS]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text).ids, np.int32)

    def calibration(self, seed: int) -> list[np.ndarray]:
        """Batches of windows from library sources that are not in the held-out text."""
        rng = np.random.default_rng(seed)
        files = [
            path
            for path in library_text.library_files()
            if path.parent == library_text.LIBRARY and path.stat().st_size > 20_000
        ]
        windows: list[np.ndarray] = []
        for i in rng.permutation(len(files)):
            text = library_text.training_text(files[i])
            if not text:
                continue
            ids = self.encode(text)
            start = int(rng.integers(0, max(1, len(ids) - 2 * CONTEXT)))
            if len(ids) >= 2 * CONTEXT:
                both = ids[start : start + 2 * CONTEXT]
                windows += list(both.reshape(-1, CONTEXT))
            if len(windows) >= BATCHES * BATCH:
                break
        stacked = np.stack(windows[: BATCHES * BATCH])
        return list(stacked.reshape(BATCHES, BATCH, CONTEXT))


class Comparer:
    """Compares quantized models with one reference, and keeps the logits of that."""

    def __init__(self, model: Any, tokens: np.ndarray):
        self._forward = nnx.jit(lambda model, batch: model(batch))
        self._logits: dict[bytes, jax.Array] = {}
        self._model = model
        self._tokens = tokens

    def _reference(self, batch: jax.Array) -> jax.Array:
        key = np.asarray(batch).tobytes()
        if key not in self._logits:
            self._logits[key] = self._forward(self._model, batch)
        return self._logits[key]

    def __call__(self, qmodel: Any) -> dict[str, float]:
        comparison = jaxq.evaluation.compare(
            self._reference, qmodel, self._tokens, context=CONTEXT
        )
        return {
            "perplexity": comparison.perplexity,
            "kl": comparison.kl,
            "top1": comparison.top1_agreement,
        }


def recipe_of(
    weight: Any, activation: Any = None, *, rotate: bool = False, **options: Any
) -> jaxq.Recipe:
    """A recipe of one rule for all layers except embeddings and the head."""
    rules = (
        jaxq.Rule(kinds="Embed", skip=True, optional=True),
        jaxq.Rule("lm_head", skip=True, optional=True),
        jaxq.Rule(weight=weight, activation=activation, **options),
    )
    return jaxq.Recipe(rules, rotate=rotate)


def quantized(
    model: Any, recipe: jaxq.Recipe, data: Any = None, seed: int = 0
) -> tuple[Any, Any, float]:
    """The quantized model, its report, and the CPU seconds that it took."""
    start = time.process_time()
    qmodel, report = jaxq.quantize_model(
        model,
        recipe,
        calibration=data,
        fallback="none",
        key=jax.random.key(seed),
        progress=False,
    )
    jax.block_until_ready(jax.tree.leaves(nnx.state(qmodel)))
    return qmodel, report, time.process_time() - start


# Cases of the table.


class Case(NamedTuple):
    """One row of the table before it is measured.

    Attributes:
        what: the weights, for example "int4".
        method: the method's name in the table.
        choose: returns the recipe, and the CPU seconds that the choice took.
        needs_data: whether the method reads calibration data.
    """

    what: str
    method: str
    choose: Callable[[], tuple[jaxq.Recipe, float]]
    needs_data: bool


def cases(model: Any, data: list[np.ndarray]) -> Iterator[Case]:
    """All rows of the table in its order.

    Args:
        model: the float model.
        data: calibration batches for the sensitivities of mixed precision.
    """
    yield from _cases_of_methods()
    yield from _cases_of_presets()
    yield from _cases_of_activations()
    yield from _cases_of_mixed_precision(model, data)


def _case(what: str, method: str, recipe: jaxq.Recipe, needs_data: bool) -> Case:
    return Case(what, method, lambda: (recipe, 0.0), needs_data)


def _cases_of_methods() -> Iterator[Case]:
    for bits in BITS:
        spec = f"int{bits}"
        for name, (method, options, needs_data) in METHODS.items():
            rotate = name.startswith("rotated")
            rule = recipe_of(spec, rotate=rotate, method=method, options=options)
            yield _case(spec, name, rule, needs_data)


def _cases_of_presets() -> Iterator[Case]:
    for preset in ("int4_absmax", "int3_absmax"):
        for name in ("rtn", "awq", "gptq"):
            method, options, needs_data = METHODS[name]
            rule = recipe_of(preset, method=method, options=options)
            yield _case(preset, name, rule, needs_data)
    yield _case("int4, per channel", "rtn", recipe_of(PER_CHANNEL), False)
    for name, (method, options, needs_data) in METHODS.items():
        if name.startswith("clip"):
            rule = recipe_of(PER_CHANNEL, method=method, options=options)
            yield _case("int4, per channel", name, rule, needs_data)
    yield _case("nf4", "rtn", recipe_of("nf4"), False)
    yield _case("nf4", "gptq", recipe_of("nf4", method="gptq"), True)
    for preset in ("log4", "ternary", "binary"):
        yield _case(preset, "rtn", recipe_of(preset), False)


def _cases_of_activations() -> Iterator[Case]:
    for bits in BITS:
        weight, what = f"int{bits}", f"w{bits}a8"
        smoothed = recipe_of(weight, "int8", method="smoothquant")
        yield _case(what, "rtn", recipe_of(weight, "int8"), False)
        yield _case(what, "smoothquant", smoothed, True)
        yield _case(what, "llm_int8", recipe_of(weight, method="llm_int8"), False)


def _cases_of_mixed_precision(model: Any, data: list[np.ndarray]) -> Iterator[Case]:
    @functools.cache
    def sensitivity() -> tuple[Any, float]:
        """The sensitivities, and the CPU seconds that they took."""
        start = time.process_time()
        scores = jaxq.nn.sensitivity(model, CHOICES, data, progress=False)
        return scores, time.process_time() - start

    def choose(budget: float, method: str) -> tuple[jaxq.Recipe, float]:
        scores, seconds = sensitivity()
        choice = jaxq.nn.assign(scores, budget)
        return jaxq.nn.mixed_recipe(choice, method=method), seconds

    for budget in BUDGETS:
        for method, needs_data in (("rtn", False), ("gptq", True)):
            choose_case = functools.partial(choose, budget, method)
            yield Case(f"mixed, {budget} bits", method, choose_case, needs_data)


# Measurement.


def run(last_result: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every method on the model, and then a model with outliers.

    Args:
        last_result: of an earlier run, whose rows are kept. Only its first row, the
            float model, is measured again, to check that the rows are of this model and
            text. Rows of an interrupted run are always kept.
    """
    text = Text()
    data = {seed: text.calibration(seed) for seed in SEEDS}
    compare = Comparer(text.model, text.tokens)
    float_row = {
        "what": "float32",
        "method": "-",
        "bits": 32.0,
        "seconds": 0.0,
        **compare(text.model),
    }
    if PARTIAL.exists():
        start = json.loads(PARTIAL.read_text())
    else:
        start = _start(last_result, float_row)
    rows = {(row["what"], row["method"]): row for row in start["rows"]}
    order = [("float32", "-")]
    for case in cases(text.model, data[0]):
        key = (case.what, case.method)
        order.append(key)
        if key in rows:
            continue
        row = _measure(case, text.model, data, compare)
        if last_result:
            row["added"] = True
        rows[key] = row
        PARTIAL.write_text(json.dumps({**start, "rows": list(rows.values())}))
        print(
            f"{case.what} {case.method}: {row['perplexity']:.3f} {row['kl']:.4f} "
            f"{row['seconds']:.1f} s",
            flush=True,
        )
    kept_outliers = {row["what"]: row for row in start["outliers"]}
    outlier_rows = outliers(text, data[0], kept_outliers)
    PARTIAL.unlink(missing_ok=True)
    result = {
        "subject": "methods",
        "rows": [rows[key] for key in order],
        "outliers": outlier_rows,
        "missing": [],
    }
    if last_result:
        result["kept from"] = last_result.get("kept from", last_result["device"])
    return result


def _start(last_result: dict[str, Any] | None, float_row: Row) -> dict[str, Any]:
    """The rows that are there before the first case.

    Raises:
        ValueError: the last result is of another model or text.
    """
    if last_result is None:
        return {"rows": [float_row], "outliers": []}
    last_row = last_result["rows"][0]
    if abs(last_row["perplexity"] - float_row["perplexity"]) > 1e-3:
        raise ValueError(
            "run: the rows to keep are of another model or text. The float model was "
            f"{last_row}, and is now {float_row}."
        )
    rows = [float_row, *last_result["rows"][1:]]
    return {"rows": rows, "outliers": last_result["outliers"]}


def _measure(
    case: Case, model: Any, data: dict[int, list[np.ndarray]], compare: Comparer
) -> Row:
    """The row of a case: means over the seeds."""
    has_seeds = case.needs_data and case.what.startswith(("int4", "int3"))
    figures = []
    for seed in SEEDS if has_seeds else SEEDS[:1]:
        chosen_recipe, choice_seconds = case.choose()
        batches = data[seed] if case.needs_data else None
        qmodel, report, seconds = quantized(model, chosen_recipe, batches, seed)
        figures.append(
            {
                "bits": report.bits_per_weight,
                "seconds": seconds + choice_seconds,
                **compare(qmodel),
            }
        )
    means = {
        name: float(np.mean([figure[name] for figure in figures]))
        for name in figures[0]
    }
    return {
        "what": case.what,
        "method": case.method,
        "perplexities": [figure["perplexity"] for figure in figures],
        **means,
    }


def outliers(text: Text, data: list[np.ndarray], kept: dict[str, Row]) -> list[Row]:
    """What activations with outlier channels cost, and which methods help.

    A transform makes the outliers without a change of the logits.

    Args:
        text: the model and its text.
        data: calibration batches.
        kept: rows that an earlier run has measured, by name.
    """
    model = models.with_outliers(
        text.model, channels=6, strength=64.0, key=jax.random.key(0)
    )
    signs = methods.random_hadamard(jax.random.key(1), model.config.hidden_size)
    rotation = methods.hadamard(jnp.diag(signs))
    rotated = models.rotate(model, rotation, online=methods.hadamard)
    per_token = PER_CHANNEL.replace(granularity=jaxq.PerToken())
    smoothquant: dict[str, Any] = {"method": "smoothquant"}
    w8a8 = recipe_of("int8", "int8")
    w4a4 = recipe_of(PER_CHANNEL, per_token)
    rows, compare = [], Comparer(model, text.tokens)
    for name, base, case_recipe in (
        ("float32", model, None),
        ("w8a8", model, w8a8),
        (
            "w8a8, smoothquant, alpha 0.5 (default)",
            model,
            recipe_of("int8", "int8", **smoothquant),
        ),
        (
            "w8a8, smoothquant, alpha 0.8",
            model,
            recipe_of("int8", "int8", **smoothquant, options={"alpha": 0.8}),
        ),
        ("llm_int8", model, recipe_of("int8", method="llm_int8")),
        ("w8a8, rotated", rotated, w8a8),
        ("w4a4", model, w4a4),
        ("w4a4, rotated", rotated, w4a4),
        (
            "w4a4, rotated, gptq",
            rotated,
            recipe_of(PER_CHANNEL, per_token, method="gptq"),
        ),
    ):
        if name not in kept:
            qmodel = base
            if case_recipe is not None:
                qmodel, _, _ = quantized(base, case_recipe, data)
            kept[name] = {"what": name, **compare(qmodel)}
        rows.append(kept[name])
        print(f"outliers, {name}: {rows[-1]['perplexity']:.3f}", flush=True)
    best, worst = rows[0]["perplexity"], rows[1]["perplexity"]
    for row in rows[1:6]:
        row["recovered"] = (worst - row["perplexity"]) / (worst - best)
    return rows


# Tables.


def table(result: dict[str, Any]) -> str:
    """The markdown tables of the figures that `run` returns."""
    lines = [
        "| weights | method | bits | perplexity | range | KL | top-1 | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    nearest = {row["what"]: row for row in result["rows"] if row["method"] == "rtn"}
    for row in result["rows"]:
        lines.append(_table_line(row, nearest.get(row["what"])))
    if "kept from" in result:
        kind = result["kept from"]["kind"]
        flags = ", ".join(result["kept from"].get("flags", []))
        lines += ["", f"Rows without a cross were measured on {kind}, {flags}."]
    lines += [
        "",
        "With outliers in 6 of 256 channels, 64 times as large:",
        "",
        "| model | perplexity | KL | top-1 | of the loss recovered |",
        "|---|---|---|---|---|",
    ]
    for row in result["outliers"]:
        recovered = "-"
        if "recovered" in row:
            recovered = f"{100 * row['recovered']:.1f} %"
        lines.append(
            f"| {row['what']} | {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {100 * row['top1']:.2f} % | {recovered} |"
        )
    return "\n".join(lines)


def _table_line(row: Row, nearest: Row | None) -> str:
    """One line of the table.

    Args:
        row: of the result.
        nearest: the row of rounding to nearest with the same weights, or None.
    """
    perplexities = row.get("perplexities", [])
    spread = "-"
    if len(perplexities) > 1:
        spread = f"{min(perplexities):.3f} to {max(perplexities):.3f}"
    notes = []
    if nearest is not None and row is not nearest:
        if max(perplexities) >= nearest["perplexity"]:
            notes.append("no better than rtn")
        more_bits = row["bits"] - nearest["bits"]
        if row["bits"] > nearest["bits"] + 0.05:
            notes.append(f"takes {more_bits:.1f} more bits")
    cross = " ✕" if row.get("added") else ""
    cells = [
        row["what"],
        row["method"],
        f"{row['bits']:.2f}",
        f"{row['perplexity']:.3f}",
        spread,
        f"{row['kl']:.5f}",
        f"{100 * row['top1']:.2f} %",
        f"{row['seconds']:.1f}{cross}",
        "; ".join(notes),
    ]
    return "| " + " | ".join(cells) + " |"
