"""The time that `import jaxq` adds to `import jax`, from new processes in turns."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

from timing import interleaved, summary

LIMIT_SECONDS = 0.3


def run() -> dict[str, Any]:
    """Times both imports as whole processes."""

    def start(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    functions = {name: functools.partial(start, name) for name in ("jax", "jaxq")}
    times = interleaved(functions, rounds=11, seconds=120.0)
    extra = sorted(
        with_jaxq - with_jax
        for with_jax, with_jaxq in zip(times["jax"], times["jaxq"], strict=True)
    )
    rows = [
        {"what": name, **figures} for name, figures in summary(times, "jax").items()
    ]
    return {
        "subject": "import_time",
        "rows": rows,
        "extra_seconds": extra[len(extra) // 2],
        "limit_seconds": LIMIT_SECONDS,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the figures that `run` returns."""
    lines = ["| import | median ms | least ms |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['what']} | {row['median_ms']:.0f} | {row['min_ms']:.0f} |"
        )
    extra = (
        f"jaxq adds {result['extra_seconds']:.2f} s "
        f"(median of pairs; limit {result['limit_seconds']} s)."
    )
    return "\n".join([*lines, "", extra])
