"""Rows of a report as text, as a markdown table, and as a table of `rich`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxq.nn.report._row import COLUMNS, Row

# Columns that are left out if they have no values.
_MEASURED = ("SQNR dB", "worst block", "clipped", "output dB")
# Columns that are aligned to the right.
_NUMBERS = ("bits", "kB before", "kB after", *_MEASURED)


def as_text(rows: Sequence[Row], totals: str) -> str:
    """A table with aligned columns, and the totals below it."""
    cells = _table(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, totals])


def as_markdown(rows: Sequence[Row], totals: str) -> str:
    """A markdown table, and the totals below it."""
    header, *cells = _table(rows)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in cells:
        escaped = [cell.replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join([*lines, "", totals])


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """The header and the rows, without measured columns that have no values."""
    cells = [row.cells() for row in rows]
    columns = [
        i
        for i, name in enumerate(COLUMNS)
        if name not in _MEASURED or any(row[i] != "-" for row in cells)
    ]
    return [[row[i] for i in columns] for row in (COLUMNS, *cells)]


def as_rich_table(rows: Sequence[Row], totals: str) -> Any:
    """A table of the package `rich`, without columns that have no values."""
    # Flax depends on rich.
    from rich import box, table

    rich_table = table.Table(
        box=box.SIMPLE,
        caption=totals,
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    cells = [row.cells() for row in rows]
    columns = [
        i
        for i, name in enumerate(COLUMNS)
        if name == "path" or any(row[i] not in ("", "-") for row in cells)
    ]
    for i in columns:
        justify = "right" if COLUMNS[i] in _NUMBERS else "left"
        rich_table.add_column(COLUMNS[i], justify=justify, overflow="fold")
    for row, texts in zip(rows, cells, strict=True):
        escaped = [texts[i].replace("[", "\\[") for i in columns]  # else it is markup
        rich_table.add_row(*escaped, style=None if row.format else "dim")
    return rich_table
