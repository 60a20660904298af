"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
# A model: a directory, or a file of GGUF.
MODEL = click.Path(exists=True, path_type=Path)
ANY_PATH = click.Path(exists=True, path_type=Path)
NEW_PATH = click.Path(path_type=Path)
# The format of `jaxq.models.save`. The others are those of `jaxq.io.export`.
OWN_FORMAT = "jaxq"
FORMATS = (
    OWN_FORMAT,
    *("awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "hf"),
    "modelopt",
)
COUNT = click.IntRange(min=1)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json and --debug. The function gets `as_json`."""
    # `main` reads --debug itself, because it also holds for errors of arguments.
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."
    )
    json = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object."
    )
    return json(debug(function))


def context_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --context. The function gets `context`, an int or None."""
    return click.option(
        "--context",
        type=click.IntRange(min=2),
        help="Tokens of a window. The default is the model's own context, at most "
        "2048.",
    )(function)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --out and --overwrite for a model, as `out` and `overwrite`."""
    return _output("The directory to write, or the file of GGUF.", function)


def file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --out and --overwrite for a file, as `out` and `overwrite`."""
    return _output("The new file.", function)


def _output(help: str, function: Callable[..., Any]) -> Callable[..., Any]:
    out = click.option("--out", type=NEW_PATH, required=True, help=help)
    overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")
    return out(overwrite(function))


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --context, --samples and --batch-size, which say how a text is cut."""
    samples = click.option(
        "--samples",
        type=COUNT,
        default=128,
        show_default=True,
        help="At most so many windows of the text.",
    )
    batch_size = click.option(
        "--batch-size",
        type=COUNT,
        default=8,
        show_default=True,
        help="Windows that run at once.",
    )
    return context_option(samples(batch_size(function)))
