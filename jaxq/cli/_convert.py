"""`jaxq convert`: a model in another dtype or format."""

from __future__ import annotations

from pathlib import Path

import click

from jaxq import models
from jaxq.cli import _options, _output
from jaxq.cli._new_output import check_output, write_model

_EXAMPLE = """\b
Examples:
  jaxq convert examples/tiny_llama --dtype float16 --out tiny_llama_float16
  jaxq convert tiny_llama_int4 --format gptq --out tiny_llama_gptq
"""
_DTYPES = ("float64", "float32", "bfloat16", "float16")


@click.command(epilog=_EXAMPLE)
@click.argument("source", type=_options.MODEL)
@click.option(
    "--dtype", type=click.Choice(_DTYPES), help="Write float weights in this dtype."
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(_options.FORMATS),
    help="Write for this library. hf means floats.",
)
@_options.output_options
@_options.common
def convert(
    source: Path,
    dtype: str | None,
    format_name: str | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a model in another dtype or format.

    With --dtype, SOURCE has float weights. They are read in float32, and rounded to
    nearest. With --format, codes and scales keep their values, and weights that the
    library cannot hold are an error.
    """
    if (dtype is None) == (format_name is None):
        raise click.UsageError("Pass --dtype or --format.")
    check_output(out, overwrite, format_name or _options.OWN_FORMAT)
    model, tokenizer = models.load(source)
    if dtype is not None and models.is_quantized(model):
        raise click.UsageError(
            f"{source} has quantized weights. --dtype is for floats."
        )
    write_model(
        out, model, tokenizer, format_name or _options.OWN_FORMAT, source, dtype
    )
    files = [out] if out.is_file() else out.iterdir()
    num_bytes = sum(file.stat().st_size for file in files)
    if as_json:
        _output.print_json(
            {
                "source": str(source),
                "out": str(out),
                "dtype": dtype,
                "format": format_name,
                "bytes": num_bytes,
            }
        )
    else:
        click.echo(f"wrote {out}: {_output.size_text(num_bytes)}")
