"""What each post-training method costs a trained language model (examples/tiny_llama), on text it has not seen.

Perplexity, KL divergence from the float model and top-1 agreement on examples/heldout.txt; CPU seconds to quantize,
compilation (by jax 0.10's older, quicker code generator) included. Methods that need data get 8,192 tokens of other
text, at 4 and 3 bits three times with other text (seeds); figures there are means, with the range of perplexity.
Nothing falls back (`fallback="none"`), and nothing is tuned on the held-out text. Heads and embeddings stay in floats.
Mixed precision chooses among int8, int4, int3 and int2 by sensitivities on the first such text, whose seconds count.
A cross marks seconds of rows that a later run added (`run.py methods --keep`), which shares no compilation with others.
Bias correction has no row: the model has no biases, and the report says so of each layer (`no bias to correct`).
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
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
BITS = (8, 4, 3, 2)
PER_CHANNEL = jaxq.QuantSpec("int4", jaxq.PerChannel())
# name: (method, options, needs data); in rotated coordinates where the name says so
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
# Mixed precision: what layers choose from, and bits per weight on average. int4, int3, int2 take 4.12, 3.12, 2.38.
CHOICES, BUDGETS = ("int8", "int4", "int3", "int2"), (3.5, 2.75)


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
        files = [
            p
            for p in sorted(Path(os.__file__).parent.glob("*.py"))
            if p.stat().st_size > 20_000
        ]
        files = [
            p for p in files if not p.name.startswith("_sysconfig")
        ]  # which are the machine's
        for i in rng.permutation(len(files)):
            text = files[i].read_text(encoding="utf-8", errors="ignore")
            if any(
                text[at : at + 100] in self.heldout for at in range(0, len(text), 100)
            ):
                continue
            ids = self.encode(text)
            start = int(rng.integers(0, max(1, len(ids) - 2 * CONTEXT)))
            found += (
                list(ids[start : start + 2 * CONTEXT].reshape(-1, CONTEXT))
                if len(ids) >= 2 * CONTEXT
                else []
            )
            if len(found) >= BATCHES * BATCH:
                break
        return list(np.stack(found[: BATCHES * BATCH]).reshape(BATCHES, BATCH, CONTEXT))


def recipe(
    weight: Any, activation: Any = None, *, rotate: bool = False, **how: Any
) -> jaxq.Recipe:
    rules = [
        jaxq.Rule(kinds="Embed", skip=True, optional=True),
        jaxq.Rule("lm_head", skip=True, optional=True),
    ]
    return jaxq.Recipe(
        (*rules, jaxq.Rule(weight=weight, activation=activation, **how)), rotate=rotate
    )


class Measured:
    """Compares quantized models with one reference, whose logits are kept."""

    def __init__(self, model: Any, tokens: np.ndarray):
        self._forward, self._seen, self._model, self._tokens = (
            nnx.jit(lambda m, t: m(t)),
            {},
            model,
            tokens,
        )

    def _reference(self, batch: jax.Array) -> jax.Array:
        key = np.asarray(batch).tobytes()
        if key not in self._seen:
            self._seen[key] = self._forward(self._model, batch)
        return self._seen[key]

    def __call__(self, qmodel: Any) -> dict[str, float]:
        found = jaxq.evaluation.compare(
            self._reference, qmodel, self._tokens, context=CONTEXT
        )
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1": found.top1_agreement,
        }


def quantized(
    model: Any, how: jaxq.Recipe, data: Any = None, seed: int = 0
) -> tuple[Any, Any, float]:
    start = time.process_time()
    key = jax.random.key(seed)
    qmodel, report = jaxq.quantize_model(
        model, how, calibration=data, fallback="none", key=key, progress=False
    )
    jax.block_until_ready(jax.tree.leaves(nnx.state(qmodel)))
    return qmodel, report, time.process_time() - start


# (weights, method, recipe or what makes one and says in how many seconds, needs data)
Case = tuple[str, str, jaxq.Recipe | Callable[[], tuple[jaxq.Recipe, float]], bool]


def cases(model: Any, data: list[np.ndarray]) -> Iterator[Case]:
    """All rows of the table, in its order; the model is as it is, and the data are for sensitivities."""
    for bits in BITS:
        spec = f"int{bits}"
        for name, (method, options, needs) in METHODS.items():
            rotate = name.startswith("rotated")
            yield (
                spec,
                name,
                recipe(spec, rotate=rotate, method=method, options=options),
                needs,
            )
    yield "int4, per channel", "rtn", recipe(PER_CHANNEL), False
    for name in (name for name in METHODS if name.startswith("clip")):
        yield (
            "int4, per channel",
            name,
            recipe(PER_CHANNEL, method="clip", options=METHODS[name][1]),
            False,
        )
    for preset in ("nf4", "log4", "ternary", "binary"):
        yield preset, "rtn", recipe(preset), False
        if preset == "nf4":
            yield preset, "gptq", recipe(preset, method="gptq"), True
    for bits in BITS:
        weights, inputs = f"int{bits}", f"w{bits}a8"
        yield inputs, "rtn", recipe(weights, "int8"), False
        yield inputs, "smoothquant", recipe(weights, "int8", method="smoothquant"), True
        yield inputs, "llm_int8", recipe(weights, method="llm_int8"), False

    @functools.cache
    def measured() -> tuple[Any, float]:
        start = time.process_time()
        return jaxq.nn.sensitivity(
            model, CHOICES, data, progress=False
        ), time.process_time() - start

    def mixed(budget: float, method: str) -> tuple[jaxq.Recipe, float]:
        found, seconds = measured()
        return jaxq.nn.mixed_recipe(
            jaxq.nn.assign(found, budget), method=method
        ), seconds

    for budget in BUDGETS:
        for method in ("rtn", "gptq"):
            yield (
                f"mixed, {budget} bits",
                method,
                functools.partial(mixed, budget, method),
                method == "gptq",
            )


def run(keep: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every method on the model, then what outliers do and what helps.

    Args:
      keep: what an earlier run gave: of its rows only the first, the float model, is measured anew, to see that they
        are still of this model and text. Rows of a run that was cut short are kept anyhow.
    """
    text = Text()
    data = {seed: text.calibration(seed) for seed in SEEDS}
    measure = Measured(text.model, text.tokens)
    floats = {
        "what": "float32",
        "method": "-",
        "bits": 32.0,
        "seconds": 0.0,
        **measure(text.model),
    }
    begun = json.loads(PARTIAL.read_text()) if PARTIAL.exists() else begin(keep, floats)
    rows = {(row["what"], row["method"]): row for row in begun["rows"]}
    order = [("float32", "-")]
    for spec, name, how, needs in cases(text.model, data[0]):
        order.append((spec, name))
        if order[-1] in rows:
            continue
        figures = []
        for seed in SEEDS if needs and spec in ("int4", "int3") else SEEDS[:1]:
            chosen, choosing = (how, 0.0) if isinstance(how, jaxq.Recipe) else how()
            qmodel, report, seconds = quantized(
                text.model, chosen, data[seed] if needs else None, seed
            )
            figures.append(
                {
                    "bits": report.bits_per_weight,
                    "seconds": seconds + choosing,
                    **measure(qmodel),
                }
            )
        row = {key: float(np.mean([f[key] for f in figures])) for key in figures[0]}
        about = {
            "what": spec,
            "method": name,
            "perplexities": [f["perplexity"] for f in figures],
        }
        rows[order[-1]] = {**about, **row, **({"added": True} if keep else {})}
        PARTIAL.write_text(json.dumps({**begun, "rows": list(rows.values())}))
        print(
            f"{spec} {name}: {row['perplexity']:.3f} {row['kl']:.4f} {row['seconds']:.1f} s",
            flush=True,
        )
    found = outliers(text, data[0], {row["what"]: row for row in begun["outliers"]})
    PARTIAL.unlink(missing_ok=True)
    result = {
        "subject": "methods",
        "rows": [rows[key] for key in order],
        "outliers": found,
        "missing": [],
    }
    return (
        {**result, "kept from": keep.get("kept from", keep["device"])}
        if keep
        else result
    )


def begin(keep: dict[str, Any] | None, floats: dict[str, Any]) -> dict[str, Any]:
    """The rows to go on from: the float model's, and those of an earlier run if it had the same."""
    if keep is None:
        return {"rows": [floats], "outliers": []}
    if abs(keep["rows"][0]["perplexity"] - floats["perplexity"]) > 1e-3:
        raise ValueError(
            f"run: kept rows are of another model or text: {keep['rows'][0]} is now {floats}."
        )
    return {"rows": [floats, *keep["rows"][1:]], "outliers": keep["outliers"]}


def outliers(
    text: Text, data: list[np.ndarray], kept: dict[str, Any]
) -> list[dict[str, Any]]:
    """Activations with outlier channels, made by a transform that keeps the logits: what breaks, and what helps."""
    model = models.with_outliers(
        text.model, channels=6, strength=64.0, key=jax.random.key(0)
    )
    signs = methods.random_hadamard(jax.random.key(1), model.config.hidden_size)
    rotation = methods.hadamard(jnp.diag(signs))
    rotated = models.rotate(model, rotation, online=methods.hadamard)
    w8a8, w4a4 = (
        recipe("int8", "int8"),
        recipe(PER_CHANNEL, PER_CHANNEL.replace(granularity=jaxq.PerToken())),
    )
    smoothed = recipe("int8", "int8", method="smoothquant")
    rows, measure = [], Measured(model, text.tokens)
    for name, base, how in (
        ("float32", model, None),
        ("w8a8", model, w8a8),
        ("w8a8, smoothquant, alpha 0.5 (default)", model, smoothed),
        (
            "w8a8, smoothquant, alpha 0.8",
            model,
            recipe("int8", "int8", method="smoothquant", options={"alpha": 0.8}),
        ),
        ("llm_int8", model, recipe("int8", method="llm_int8")),
        ("w8a8, rotated", rotated, w8a8),
        ("w4a4", model, w4a4),
        ("w4a4, rotated", rotated, w4a4),
        (
            "w4a4, rotated, gptq",
            rotated,
            recipe(w4a4.rules[-1].weight, w4a4.rules[-1].activation, method="gptq"),
        ),
    ):
        if name not in kept:
            kept[name] = {
                "what": name,
                **measure(base if how is None else quantized(base, how, data)[0]),
            }
        rows.append(kept[name])
        print(f"outliers, {name}: {rows[-1]['perplexity']:.3f}", flush=True)
    best, worst = rows[0]["perplexity"], rows[1]["perplexity"]
    for row in rows[1:6]:
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
        said = (
            ["no better than rtn"]
            if base is not r and max(found) >= base["perplexity"]
            else []
        )
        said += (
            [f"takes {r['bits'] - base['bits']:.1f} more bits"]
            if r["bits"] > base["bits"] + 0.05
            else []
        )
        cells = (
            r["what"],
            r["method"],
            f"{r['bits']:.2f}",
            f"{r['perplexity']:.3f}",
            span,
            f"{r['kl']:.5f}",
        )
        cells += (
            f"{100 * r['top1']:.2f} %",
            f"{r['seconds']:.1f}{' ✕' if r.get('added') else ''}",
            "; ".join(said),
        )
        lines.append("| " + " | ".join(cells) + " |")
    if "kept from" in result:
        flags = ", ".join(result["kept from"].get("flags", []))
        lines += [
            "",
            f"Rows without a cross were measured on {result['kept from']['kind']}, {flags}.",
        ]
    lines += ["", "With outliers in 6 of 256 channels, 64 times as large:", ""]
    lines += [
        "| model | perplexity | KL | top-1 | of the loss recovered |",
        "|---|---|---|---|---|",
    ]
    for r in result["outliers"]:
        back = f"{100 * r['recovered']:.1f} %" if "recovered" in r else "-"
        lines.append(
            f"| {r['what']} | {r['perplexity']:.3f} | {r['kl']:.5f} | {100 * r['top1']:.2f} % | {back} |"
        )
    return "\n".join(lines)
