"""`jaxq statistics`: calibration statistics in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from jaxq import nn, observers
from jaxq.cli import _options, _output, _statistics_file, _texts
from jaxq.cli._new_output import check_file
from jaxq.observers import LayerStats

_COLLECT_EXAMPLE = """\b
Example:
  jaxq statistics collect examples/tiny_llama \\
      --text examples/train_tiny_llama.py --out a.safetensors
"""
_MERGE_EXAMPLE = """\b
Example:
  jaxq statistics merge a.safetensors b.safetensors --out both.safetensors
"""
_SHOW_EXAMPLE = """\b
Example:
  jaxq statistics show both.safetensors
"""


@click.group()
def statistics() -> None:
    """Collect, merge and show calibration statistics.

    `jaxq quantize --statistics FILE` quantizes with the statistics of a file.
    """


@statistics.command(epilog=_COLLECT_EXAMPLE)
@click.argument("source", type=_options.DIRECTORY)
@click.option(
    "--text",
    type=_options.FILE,
    multiple=True,
    required=True,
    help="A text file. May be given several times.",
)
@_options.file_options
@click.option(
    "--observer",
    type=click.Choice(observers.names()),
    help="Also observe the static ranges of the inputs.",
)
@_options.calibration_options
@_options.common
def collect(
    source: Path,
    text: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    observer: str | None,
    context: int | None,
    samples: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Collect statistics of the inputs of a model's layers."""
    check_file(out, overwrite)
    model, tokenizer = _texts.load_model(source)
    window = _texts.default_context(model, context)
    tokens = _texts.read_tokens(tokenizer, text)
    batches = _texts.calibration_batches(tokens, window, samples, batch_size)
    watcher = None if observer is None else observers.from_dict({"type": observer})
    result = _statistics_file.Statistics(
        model=_statistics_file.digest(model),
        sources=tuple(map(str, text)),
        num_tokens=sum(batch.size for batch in batches),
        observer=watcher,
        layers=nn.calibrate(model, batches, observer=watcher),
    )
    _statistics_file.write(out, result)
    _print(out, result, as_json)


@statistics.command(epilog=_MERGE_EXAMPLE)
@click.argument("paths", metavar="FILE...", nargs=-1, type=_options.FILE, required=True)
@_options.file_options
@_options.common
def merge(paths: tuple[Path, ...], out: Path, overwrite: bool, as_json: bool) -> None:
    """Merge statistics of one model on several texts."""
    check_file(out, overwrite)
    parts = [_statistics_file.read(path) for path in paths]
    result = _statistics_file.merge(parts, paths)
    _statistics_file.write(out, result)
    _print(out, result, as_json)


@statistics.command(epilog=_SHOW_EXAMPLE)
@click.argument("path", metavar="FILE", type=_options.FILE)
@_options.common
def show(path: Path, as_json: bool) -> None:
    """Show the statistics of a file, one row for each layer."""
    _print(path, _statistics_file.read(path), as_json)


def _print(path: Path, result: _statistics_file.Statistics, as_json: bool) -> None:
    rows = [_row(name, stats) for name, stats in result.layers.items()]
    observer = None if result.observer is None else result.observer.kind
    if as_json:
        _output.print_json(
            {
                "path": str(path),
                "sources": list(result.sources),
                "tokens": result.num_tokens,
                "observer": observer,
                "layers": rows,
            }
        )
        return
    columns = ("layer", "channels", "rows", "calls", "mean |x|", "max |x|", "ratio")
    cells = [
        (
            row["layer"] or "the model itself",
            row["channels"],
            f"{row['rows']:.0f}",
            row["calls"],
            f"{row['mean_magnitude']:.4g}",
            f"{row['largest_magnitude']:.4g}",
            f"{row['largest_ratio']:.1f}",
        )
        for row in rows
    ]
    _output.print_table(columns, cells)
    ranges = f", static ranges by {observer}" if observer else ""
    click.echo(
        f"\n{path}: {len(rows)} layers, {result.num_tokens} tokens of "
        f"{', '.join(result.sources)}{ranges}\n"
        "ratio: the largest mean magnitude of a channel, divided by the median"
    )


def _row(name: str, stats: LayerStats) -> dict[str, Any]:
    """Totals of one layer. A stack of layers counts as one."""
    channels = np.asarray(stats.absmean, np.float64)
    median = float(np.median(channels))
    return {
        "layer": name,
        "channels": int(channels.shape[-1]),
        "rows": float(np.sum(stats.count)),
        "calls": int(np.max(stats.num_calls)),
        "mean_magnitude": float(channels.mean()),
        "largest_magnitude": float(np.max(stats.absmax)),
        "largest_ratio": float(channels.max()) / median if median else float("nan"),
    }
