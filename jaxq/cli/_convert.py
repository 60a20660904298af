"""`jaxq convert`: a model directory in another float dtype."""

from __future__ import annotations

from pathlib import Path

import click

from jaxq import models
from jaxq.cli import _options, _output
from jaxq.cli._directory import check_output, new_directory

_EXAMPLE = """\b
Example:
  jaxq convert examples/tiny_llama --dtype float16 --out tiny_llama_float16
"""
_DTYPES = ("float64", "float32", "bfloat16", "float16")


@click.command(epilog=_EXAMPLE)
@click.argument("source", type=_options.DIRECTORY)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    required=True,
    help="The dtype of the new files.",
)
@_options.output_options
@_options.common
def convert(
    source: Path, dtype: str, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Write a model in another dtype.

    SOURCE is a Hugging Face directory with float weights. They are read in float32, and
    rounded to nearest.
    """
    check_output(out, overwrite)
    model, tokenizer = models.load(source)
    if models.is_quantized(model):
        raise click.UsageError(
            f"{source} has quantized weights. Convert the float model, and quantize "
            "it again."
        )
    with new_directory(out) as folder:
        models.save(folder, model, tokenizer=tokenizer, dtype=dtype)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    if as_json:
        _output.print_json(
            {
                "source": str(source),
                "out": str(out),
                "dtype": dtype,
                "bytes": num_bytes,
            }
        )
    else:
        click.echo(f"wrote {out} in {dtype}: {_output.size_text(num_bytes)}")
