"""What named recipes cost a trained language model, on text outside its training data.

The model is examples/tiny_llama. Perplexity, KL divergence from the float model and
top-1 agreement are those on examples/heldout.txt (21,993 tokens), in windows of 256.
Recipes that need data get 8,192 tokens of other text, as in the benchmark of methods.
Heads and embeddings stay in floats.
"""

from __future__ import annotations

from typing import Any

import methods

import jaxq

TOKENS = 128 * methods.CONTEXT
# The largest loss of perplexity in per cent.
TARGETS = {"w8a8": 0.5, "fp8": 0.5, "fp8_dynamic": 0.5}
RECIPES = (
    "int8", "w8a8", "w8a8_static", "w8a8_smoothquant", "w8a8_rotated", "llm_int8",
    "fp8", "fp8_dynamic", "fp8_static", "mxfp8",
    "int4", "uint4", "nf4", "int4_gptq", "int4_awq", "mxfp4", "nvfp4",
    "w4a8", "w4a4", "w4a4_rotated",
)  # fmt: skip


def run() -> dict[str, Any]:
    """Quantizes the model with every recipe, and compares it with the float model."""
    text = methods.Text()
    data = text.calibration(0)
    tokens = text.encode(text.heldout)[:TOKENS]
    compare = methods.Comparer(text.model, tokens)
    base = compare(text.model)
    rows = []
    for name in RECIPES:
        recipe = jaxq.recipes.get(name)
        qmodel, report = jaxq.quantize_model(
            text.model,
            recipe,
            calibration=data if _needs_data(recipe) else None,
            progress=False,
        )
        figures = compare(qmodel)
        loss = 100 * (figures["perplexity"] / base["perplexity"] - 1)
        rows.append(
            {
                "recipe": name,
                "bits": report.bits_per_weight,
                "loss_percent": loss,
                **figures,
            }
        )
        print(f"{name}: {figures['perplexity']:.3f} ({loss:+.2f} %)", flush=True)
    return {
        "subject": "recipes",
        "tokens": len(tokens),
        "float": base,
        "rows": rows,
        "missing": [],
    }


def _needs_data(recipe: jaxq.Recipe) -> bool:
    """Whether a rule observes inputs, or has a method that reads them."""
    for rule in recipe.rules:
        method = jaxq.methods.get(rule.method)
        if rule.observer or method.needs_data(dict(rule.options)):
            return True
    return False


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    base = result["float"]["perplexity"]
    lines = [
        "| recipe | bits per weight | perplexity | change | target | KL | top-1 |",
        "|---|---|---|---|---|---|---|",
        f"| floats | - | {base:.3f} | - | - | - | - |",
    ]
    for row in result["rows"]:
        target = TARGETS.get(row["recipe"])
        cells = [
            row["recipe"],
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['loss_percent']:+.2f} %",
            "-" if target is None else f"at most {target} %",
            f"{row['kl']:.5f}",
            f"{100 * row['top1']:.2f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
