"""What commands print: tables, or one JSON object."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

# Width of a table that goes into a file or a pipe. No terminal wraps it there.
_FILE_WIDTH = 200


def print_json(result: dict[str, Any]) -> None:
    """Prints one JSON object. JSON has no NaN and no infinity: they become null."""
    click.echo(json.dumps(_json_ready(result), allow_nan=False))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str = "",
    num_text_columns: int = 1,
) -> None:
    """Prints a table.

    Args:
        columns: the headings.
        rows: the cells, in the order of the columns.
        title: a line above the table.
        num_text_columns: the first columns are text, and the others numbers, which are
            aligned on the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        justify = "left" if index < num_text_columns else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    if title:
        click.echo(title)
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    # `sys.stdout` is named, because a test or a caller can have replaced it.
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    console.print(table)


def size_text(num_bytes: float | None) -> str:
    """A number of bytes in words: "1.21 MB"."""
    if num_bytes is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _json_ready(value: Any) -> Any:
    """A value that `json.dumps(allow_nan=False)` accepts."""
    if isinstance(value, dict):
        return {str(name): _json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
