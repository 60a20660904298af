"""The tables of device.py, from its rows."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
TITLES = {
    "A": "Results compared with float64",
    "B": "What the device reaches",
    "C": "Speed relative to bfloat16",
    "D": "PyTorch on the same device",
    "E": "Other tiles, relative to the kernel's own",
    "F": "Counters of the hardware",
}
# The columns of each stage's table.
COLUMNS = {
    "A": ("task", "error", "is_right", "runs", "has_same_bits", "is_poisoned"),
    "B": ("task", "gb_per_s", "tflops", "us"),
    "C": ("what", "kernel", "m", "n", "us", "speedup", "gb_per_s", "tflops", "error"),
    "D": ("what", "m", "n", "us", "speedup", "tflops"),
    "E": ("task", "tiles", "ms", "time_over_own"),
}


def page(rows: list[Row], rehearse: bool) -> str:
    """Markdown with one table for each stage, and the tasks that failed."""
    parts = ["# Rehearsed: the times mean nothing" if rehearse else "# Measured"]
    for stage, title in TITLES.items():
        own = [row for row in rows if row["stage"] == stage and not row.get("started")]
        if own:
            parts.append(f"## {stage}. {title}")
            parts.append(_table(stage, [row for row in own if "failure" not in row]))
            parts += _failures(own)
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(stage: str, rows: list[Row]) -> str:
    if not rows:
        return ""
    columns = COLUMNS.get(stage)
    if columns is None:
        names = dict.fromkeys(name for row in rows for name in row)
        columns = tuple(name for name in names if name != "stage")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [_text(row.get(name)) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _failures(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if "failure" in row]
    if not failed:
        return []
    lines = [f"- {row['task']}: {_text(row['failure'])}" for row in failed]
    return ["Failed:", "\n".join(lines)]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/")
