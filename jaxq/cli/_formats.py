"""`jaxq formats`: the table of number formats."""

from __future__ import annotations

from typing import Any

import click

from jaxq import formats as formats_room
from jaxq.cli import _options, _output


@click.command(epilog="\b\nExample:\n  jaxq formats --json")
@_options.common
def formats(as_json: bool) -> None:
    """List the number formats."""
    rows = [_row(name) for name in formats_room.names()]
    if as_json:
        _output.print_json({"formats": rows})
        return
    columns = ("format", "kind", "bits", "smallest", "largest", "smallest positive")
    cells = [
        (
            row["name"],
            row["kind"],
            row["bits"],
            f"{row['min']:.6g}",
            f"{row['max']:.6g}",
            f"{row['smallest_positive']:.4g}",
        )
        for row in rows
    ]
    _output.print_table(columns, cells, num_text_columns=2)


def _row(name: str) -> dict[str, Any]:
    fmt = formats_room.get(name)
    return {
        "name": name,
        "kind": fmt.kind,
        "bits": fmt.bits,
        "min": float(fmt.min),
        "max": float(fmt.max),
        "smallest_positive": float(fmt.smallest_positive),
    }
