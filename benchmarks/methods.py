"""What each post-training method costs a trained language model (examples/tiny_llama), on text it has not seen.

Perplexity, KL divergence from the float model and top-1 agreement on examples/heldout.txt; CPU seconds to quantize,
compilation (by jax 0.10's older, quicker code generator) included. Methods that need data get 8,192 tokens of other
text, at 4 and 3 bits three times with other text (seeds); figures there are means, with the range of perplexity.
Nothing falls back (`fallback="none"`), and nothing is tuned on the held-out text. Heads and embeddings stay in floats.
The model has no biases, so there is nothing for bias correction to do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxq
from jaxq import methods, models

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT, TOKENS, BATCHES, BATCH = 256, 64 * 256, 8, 4
SEEDS = (0, 1, 2)
# Rows of a run that was cut short, which the next one does not measure again.
PARTIAL = Path(__file__).parent / "results" / "methods-partial.json"
BITS = (4, 3, 8, 2)
PER_CHANNEL = jaxq.QuantSpec("int4", jaxq.PerChannel())
# name: (method, options, needs data); in rotated coordinates where the name says so
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rtn": ("rtn", {}, False),
    "rotated": ("rtn", {}, False),
    "equalize": ("equalize", {}, False),
    "clip (mse)": ("clip", {"rule": "mse"}, False),
    "hqq": ("hqq", {}, False),
    "k-means": ("kmeans", {"granularity": jaxq.PerChannel()}, False),
    "awq": ("awq", {}, True),
    "gptq": ("gptq", {}, True),
    "gptq, act-order": ("gptq", {"act_order": True}, True),
    "rotated, gptq": ("gptq", {}, True),
    "adaround": ("adaround", {}, True),
}
CLIPPING: dict[str, dict[str, Any]] = {
    "clip (mse)": {"rule": "mse"},
    "clip (entropy)": {"rule": "entropy"},
    "clip (99.9 %)": {"rule": "percentile"},
}


class Text:
    """The model, the text it is measured on, and other text to calibrate on."""

    def __init__(self):
        self.model, tokenizer = models.load(EXAMPLES / "tiny_llama")
        self.encode = lambda text: np.asarray(tokenizer.encode(text).ids, np.int32)
        self.heldout = (EXAMPLES / "heldout.txt").read_text()
        self.tokens = self.encode(self.heldout)[:TOKENS]

    def calibration(self, seed: int) -> list[np.ndarray]:
        """Windows of standard library sources that are not in the held-out text."""
        rng, found = np.random.default_rng(seed), []
        files = [p for p in sorted(Path(os.__file__).parent.glob("*.py")) if p.stat().st_size > 20_000]
        files = [p for p in files if not p.name.startswith("_sysconfig")]  # which are the machine's
        for i in rng.permutation(len(files)):
            text = files[i].read_text(encoding="utf-8", errors="ignore")
            if any(text[at : at + 100] in self.heldout for at in range(0, len(text), 100)):
                continue
            ids = self.encode(text)
            start = int(rng.integers(0, max(1, len(ids) - 2 * CONTEXT)))
            found += list(ids[start : start + 2 * CONTEXT].reshape(-1, CONTEXT)) if len(ids) >= 2 * CONTEXT else []
            if len(found) >= BATCHES * BATCH:
                break
        return list(np.stack(found[: BATCHES * BATCH]).reshape(BATCHES, BATCH, CONTEXT))


def recipe(weight: Any, activation: Any = None, *, rotate: bool = False, **how: Any) -> jaxq.Recipe:
    rules = [jaxq.Rule(kinds="Embed", skip=True, optional=True), jaxq.Rule("lm_head", skip=True, optional=True)]
    return jaxq.Recipe((*rules, jaxq.Rule(weight=weight, activation=activation, **how)), rotate=rotate)


class Measured:
    """Compares quantized models with one reference, whose logits are kept."""

    def __init__(self, model: Any, tokens: np.ndarray):
        self._forward, self._seen, self._model, self._tokens = nnx.jit(lambda m, t: m(t)), {}, model, tokens

    def _reference(self, batch: jax.Array) -> jax.Array:
        key = np.asarray(batch).tobytes()
        if key not in self._seen:
            self._seen[key] = self._forward(self._model, batch)
        return self._seen[key]

    def __call__(self, qmodel: Any) -> dict[str, float]:
        found = jaxq.evaluation.compare(self._reference, qmodel, self._tokens, context=CONTEXT)
        return {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1_agreement}


def quantized(model: Any, how: jaxq.Recipe, data: Any = None, seed: int = 0) -> tuple[Any, Any, float]:
    start = time.process_time()
    key = jax.random.key(seed)
    qmodel, report = jaxq.quantize_model(model, how, calibration=data, fallback="none", key=key, progress=False)
    jax.block_until_ready(jax.tree.leaves(nnx.state(qmodel)))
    return qmodel, report, time.process_time() - start


def cases() -> Iterator[tuple[str, str, jaxq.Recipe, bool]]:
    """(weights, method, recipe, needs data) on the model as it is."""
    for bits in BITS:
        spec = f"int{bits}"
        for name, (method, options, needs) in METHODS.items():
            rotate = name.startswith("rotated")
            yield spec, name, recipe(spec, rotate=rotate, method=method, options=options), needs
    yield "int4, per channel", "rtn", recipe(PER_CHANNEL), False
    for name, options in CLIPPING.items():
        yield "int4, per channel", name, recipe(PER_CHANNEL, method="clip", options=options), False
    for preset in ("nf4", "log4", "ternary", "binary"):
        yield preset, "rtn", recipe(preset), False
    yield "nf4", "gptq", recipe("nf4", method="gptq"), True
    yield "w8a8", "rtn", recipe("int8", "int8"), False
    yield "w8a8", "smoothquant", recipe("int8", "int8", method="smoothquant"), True
    yield "w8a8", "llm_int8", recipe("int8", method="llm_int8"), False


def run() -> dict[str, Any]:
    """Every method on the model, then what outliers do and what helps."""
    text = Text()
    data = {seed: text.calibration(seed) for seed in SEEDS}
    measure = Measured(text.model, text.tokens)
    rows = json.loads(PARTIAL.read_text()) if PARTIAL.exists() else []
    rows = rows or [{"what": "float32", "method": "-", "bits": 32.0, "seconds": 0.0, **measure(text.model)}]
    for spec, name, how, needs in cases():
        if any((row["what"], row["method"]) == (spec, name) for row in rows):
            continue
        figures = []
        for seed in SEEDS if needs and spec in ("int4", "int3") else SEEDS[:1]:
            qmodel, report, seconds = quantized(text.model, how, data[seed] if needs else None, seed)
            figures.append({"bits": report.bits_per_weight, "seconds": seconds, **measure(qmodel)})
        row = {key: float(np.mean([f[key] for f in figures])) for key in figures[0]}
        rows.append({"what": spec, "method": name, "perplexities": [f["perplexity"] for f in figures], **row})
        PARTIAL.write_text(json.dumps(rows))
        print(f"{spec} {name}: {row['perplexity']:.3f} {row['kl']:.4f} {row['seconds']:.1f} s", flush=True)
    apart = PARTIAL.with_name("methods-outliers-partial.json")
    if not apart.exists():
        apart.write_text(json.dumps(outliers(text, data[0])))
    result = {"subject": "methods", "rows": rows, "outliers": json.loads(apart.read_text()), "missing": []}
    PARTIAL.unlink(missing_ok=True)
    apart.unlink()
    return result


def outliers(text: Text, data: list[np.ndarray]) -> list[dict[str, Any]]:
    """Activations with outlier channels, made by a transform that keeps the logits: what breaks, and what helps."""
    model = models.with_outliers(text.model, channels=6, strength=64.0, key=jax.random.key(0))
    signs = methods.random_hadamard(jax.random.key(1), model.config.hidden_size)
    rotation = methods.hadamard(jnp.diag(signs))
    rotated = models.rotate(model, rotation, online=methods.hadamard)
    w8a8, w4a4 = recipe("int8", "int8"), recipe(PER_CHANNEL, PER_CHANNEL.replace(granularity=jaxq.PerToken()))
    rows, measure = [], Measured(model, text.tokens)
    for name, base, how in (
        ("float32", model, None),
        ("w8a8", model, w8a8),
        ("w8a8, smoothquant", model, recipe("int8", "int8", method="smoothquant", options={"alpha": 0.8})),
        ("llm_int8", model, recipe("int8", method="llm_int8")),
        ("w8a8, rotated", rotated, w8a8),
        ("w4a4", model, w4a4),
        ("w4a4, rotated", rotated, w4a4),
        ("w4a4, rotated, gptq", rotated, recipe(w4a4.rules[-1].weight, w4a4.rules[-1].activation, method="gptq")),
    ):
        qmodel = base if how is None else quantized(base, how, data)[0]
        rows.append({"what": name, **measure(qmodel)})
        print(f"outliers, {name}: {rows[-1]['perplexity']:.3f}", flush=True)
    best, worst = rows[0]["perplexity"], rows[1]["perplexity"]
    for row in rows[1:5]:
        row["recovered"] = (worst - row["perplexity"]) / (worst - best)
    return rows


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = [
        "| weights | method | bits | perplexity | range | KL | top-1 | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    nearest = {row["what"]: row for row in result["rows"] if row["method"] == "rtn"}
    for r in result["rows"]:
        found = r.get("perplexities", [])
        span = f"{min(found):.3f} to {max(found):.3f}" if len(found) > 1 else "-"
        base = nearest.get(r["what"], r)
        worse = "no better than rtn" if base is not r and max(found) >= base["perplexity"] else ""
        cells = (r["what"], r["method"], f"{r['bits']:.2f}", f"{r['perplexity']:.3f}", span, f"{r['kl']:.5f}")
        lines.append("| " + " | ".join((*cells, f"{100 * r['top1']:.2f} %", f"{r['seconds']:.1f}", worse)) + " |")
    lines += ["", "With outliers in 6 of 256 channels, 64 times as large:", ""]
    lines += ["| model | perplexity | KL | top-1 | of the loss recovered |", "|---|---|---|---|---|"]
    for r in result["outliers"]:
        back = f"{100 * r['recovered']:.1f} %" if "recovered" in r else "-"
        lines.append(f"| {r['what']} | {r['perplexity']:.3f} | {r['kl']:.5f} | {100 * r['top1']:.2f} % | {back} |")
    return "\n".join(lines)
