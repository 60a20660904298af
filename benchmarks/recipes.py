"""What named recipes cost a trained language model (examples/tiny_llama), on text it has not seen.

Perplexity, KL divergence from the float model and top-1 agreement on examples/heldout.txt (21,993 tokens), in
windows of 256. Recipes that need data get 8,192 tokens of other text, those of the methods benchmark. Heads and
embeddings stay in floats.
"""

from __future__ import annotations

from typing import Any

import methods

import jaxq

TOKENS = 128 * methods.CONTEXT
# Largest loss of perplexity in per cent that is wanted.
TARGETS = {"w8a8": 0.5, "fp8": 0.5, "fp8_dynamic": 0.5}
RECIPES = (
    "int8", "w8a8", "w8a8_static", "w8a8_smoothquant", "w8a8_rotated", "llm_int8", "fp8", "fp8_dynamic", "fp8_static",
    "mxfp8", "int4", "uint4", "nf4", "int4_gptq", "int4_awq", "mxfp4", "nvfp4", "w4a8", "w4a4", "w4a4_rotated",
)  # fmt: skip


def run() -> dict[str, Any]:
    text = methods.Text()
    data = text.calibration(0)
    tokens = text.encode(text.heldout)[:TOKENS]
    measure = methods.Measured(text.model, tokens)
    base = measure(text.model)
    rows = []
    for name in RECIPES:
        how = jaxq.recipes.get(name)
        needs = any(
            rule.observer
            or jaxq.methods.get(rule.method).needs_data(dict(rule.options))
            for rule in how.rules
        )
        qmodel, report = jaxq.quantize_model(
            text.model, how, calibration=data if needs else None, progress=False
        )
        found = measure(qmodel)
        loss = 100 * (found["perplexity"] / base["perplexity"] - 1)
        rows.append(
            {
                "recipe": name,
                "bits": report.bits_per_weight,
                "loss_percent": loss,
                **found,
            }
        )
        print(f"{name}: {found['perplexity']:.3f} ({loss:+.2f} %)", flush=True)
    return {
        "subject": "recipes",
        "tokens": len(tokens),
        "float": base,
        "rows": rows,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| recipe | bits per weight | perplexity | change | target | KL | top-1 |",
        "|---|---|---|---|---|---|---|",
        f"| floats | - | {result['float']['perplexity']:.3f} | - | - | - | - |",
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
