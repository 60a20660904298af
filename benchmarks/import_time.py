"""What `import jaxq` adds to `import jax`, from interleaved fresh processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from timing import interleaved, summary

LIMIT_SECONDS = 0.3


def run() -> dict[str, Any]:
    """Times both imports as whole processes."""

    def start(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    times = interleaved(
        {m: lambda m=m: start(m) for m in ("jax", "jaxq")}, rounds=11, seconds=120.0
    )
    extra = sorted(b - a for a, b in zip(times["jax"], times["jaxq"], strict=True))
    rows = [
        {"what": name, **figures} for name, figures in summary(times, "jax").items()
    ]
    median = extra[len(extra) // 2]
    return {
        "subject": "import_time",
        "rows": rows,
        "extra_seconds": median,
        "limit_seconds": LIMIT_SECONDS,
        "missing": [],
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of `run`'s figures."""
    lines = ["| import | median ms | least ms |", "|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['median_ms']:.0f} | {r['min_ms']:.0f} |"
        for r in result["rows"]
    ]
    extra = f"jaxq adds {result['extra_seconds']:.2f} s (median of pairs; limit {result['limit_seconds']} s)."
    return "\n".join([*lines, "", extra])
