"""`jaxq inspect`: the tensors of a file or directory, or the bits of one number."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from jaxq import formats, metrics
from jaxq.cli import _options, _output, _stored

_EXAMPLE = """\b
Examples:
  jaxq inspect tiny_llama_int4 --reference examples/tiny_llama
  jaxq inspect --number 0.1 --format float8_e4m3fn
"""
# The histogram of SQNR has one line for so many decibels.
_BIN = 2
_BAR = 40


@click.command(epilog=_EXAMPLE)
@click.argument("path", required=False, type=_options.ANY_PATH)
@click.option(
    "--reference",
    type=_options.ANY_PATH,
    help="The float original. Adds the SQNR of each tensor.",
)
@click.option("--number", type=float, help="Show the bits of this number.")
@click.option("--format", "format_name", help="The format of --number.")
@_options.common
def inspect(
    path: Path | None,
    reference: Path | None,
    number: float | None,
    format_name: str | None,
    as_json: bool,
) -> None:
    """Show what a file, a directory or a number holds.

    PATH is a safetensors file, a directory with such files, or a file of GGUF.
    """
    is_number = number is not None or format_name is not None
    if (path is None) != is_number:
        raise click.UsageError("Pass PATH, or --number with --format.")
    if path is not None:
        _inspect_path(path, reference, as_json)
        return
    if number is None or format_name is None:
        raise click.UsageError("--number and --format belong together.")
    result = formats.inspect(number, format_name)
    if as_json:
        names = ("number", "format", "code", "bits", "value", "error", "below", "above")
        _output.print_json({name: getattr(result, name) for name in names})
    else:
        click.echo(str(result))


def _inspect_path(path: Path, reference: Path | None, as_json: bool) -> None:
    stored = _stored.read_stored(path)
    ratios = None if reference is None else _sqnr_of(stored, reference)
    size = sum(tensor.size for tensor in stored)
    num_bytes = sum(tensor.num_bytes for tensor in stored)
    result: dict[str, Any] = {
        "path": str(path),
        "quantized_by": _stored.quantization_of(path),
        "tensors": [_row(tensor, ratios) for tensor in stored],
        "elements": size,
        "bytes": num_bytes,
        "bits_per_element": 8 * num_bytes / size if size else math.nan,
    }
    if ratios is not None:
        result["reference"] = str(reference)
        result["histogram"] = _histogram(ratios)
    if as_json:
        _output.print_json(result)
    else:
        _print(result)


def _row(tensor: _stored.Stored, ratios: dict[str, float] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "format": tensor.format,
        "granularity": tensor.granularity,
        "bits": tensor.bits,
        "bytes": tensor.num_bytes,
    }
    if ratios is not None:
        # JSON has no infinity: an exact tensor has no SQNR and says so.
        row["sqnr"] = ratios.get(tensor.name)
        row["exact"] = ratios.get(tensor.name) == math.inf
    return row


def _sqnr_of(stored: list[_stored.Stored], reference: Path) -> dict[str, float]:
    """The SQNR of each tensor that the reference has too, in dB."""
    originals = _stored.read_reference(reference, stored)
    ratios = {}
    for tensor in stored:
        original = originals.get(tensor.name)
        if original is not None and original.shape == tensor.shape:
            ratios[tensor.name] = float(metrics.sqnr(original.read(), tensor.read()))
    return ratios


def _histogram(ratios: dict[str, float]) -> list[dict[str, float]]:
    """How many tensors have an SQNR in each bin of 2 dB. Exact tensors are left out."""
    finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
    counts = Counter(math.floor(ratio / _BIN) for ratio in finite)
    if not counts:
        return []
    return [
        {"low": _BIN * bin, "high": _BIN * (bin + 1), "tensors": counts[bin]}
        for bin in range(min(counts), max(counts) + 1)
    ]


def _print(result: dict[str, Any]) -> None:
    columns = ["tensor", "shape", "format", "granularity", "bits", "bytes"]
    has_reference = "histogram" in result
    if has_reference:
        columns.append("SQNR dB")
    rows = []
    for row in result["tensors"]:
        cells = [row["name"], "x".join(map(str, row["shape"])), row["format"]]
        cells += [row["granularity"] or "-", f"{row['bits']:.3f}", f"{row['bytes']:,}"]
        if has_reference:
            ratio = "-" if row["sqnr"] is None else f"{row['sqnr']:.1f}"
            cells.append("exact" if row["exact"] else ratio)
        rows.append(cells)
    _output.print_table(columns, rows, num_text_columns=4)
    by = result["quantized_by"]
    click.echo(
        f"\n{len(rows)} tensors, {result['elements']:,} elements, "
        f"{_output.size_text(result['bytes'])}, "
        f"{result['bits_per_element']:.3f} bits per element"
        + (f", quantized by {by}" if by else "")
    )
    if not has_reference:
        return
    num_exact = sum(row["exact"] for row in result["tensors"])
    click.echo(f"\nSQNR against {result['reference']}; {num_exact} tensors are exact")
    most = max((entry["tensors"] for entry in result["histogram"]), default=1)
    for entry in result["histogram"]:
        bar = "#" * math.ceil(_BAR * entry["tensors"] / most)
        label = f"{entry['low']:4d} to {entry['high']:4d} dB"
        click.echo(f"{label}  {entry['tensors']:4d} {bar}")
