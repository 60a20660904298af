"""`jaxq quantize`: a float model in, a directory with the quantized model out."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from jaxq import io, models, nn, recipes
from jaxq.cli import _options, _output, _recipe, _statistics_file, _texts
from jaxq.cli._new_output import check_output, write_model
from jaxq.recipes import Recipe

_EXAMPLE = """\b
Example:
  jaxq quantize examples/tiny_llama --recipe int4_gptq \\
      --calibration examples/train_tiny_llama.py --out tiny_llama_int4
"""
# Formats whose files cannot be written parameter by parameter.
_NOT_STREAMED = (_options.OWN_FORMAT, "gguf", "hf")
# The choices of --target-bits, from few bits to many.
_CHOICES = "int3,int4,mxfp6_e2m3,int8"


@click.command(epilog=_EXAMPLE)
@click.argument("source", type=_options.MODEL)
@click.option(
    "--recipe",
    "recipe_text",
    required=True,
    help="A name of `jaxq recipes`, or a JSON file.",
)
@_options.output_options
@click.option(
    "--format",
    "format_name",
    type=click.Choice(_options.FORMATS),
    default=_options.OWN_FORMAT,
    show_default=True,
    help="The library that reads the result. hf means floats.",
)
@click.option(
    "--calibration",
    type=_options.FILE,
    multiple=True,
    help="A text file. May be given several times.",
)
@click.option(
    "--statistics",
    "statistics_path",
    type=_options.FILE,
    help="A file of `jaxq statistics`, in the place of a text.",
)
@click.option(
    "--target-bits",
    type=click.FloatRange(min=0, min_open=True),
    help="Choose a preset for each layer, with so many bits per weight on average.",
)
@click.option(
    "--choices",
    default=_CHOICES,
    show_default=True,
    help="The presets that --target-bits chooses from.",
)
@_options.calibration_options
@click.option(
    "--stream",
    is_flag=True,
    help="Quantize parameter by parameter, for models larger than the memory. An "
    "interrupted command can be repeated, and goes on.",
)
@click.option("--report", is_flag=True, help="Show one row for each parameter.")
@_options.common
def quantize(
    source: Path,
    recipe_text: str,
    out: Path,
    overwrite: bool,
    format_name: str,
    calibration: tuple[Path, ...],
    statistics_path: Path | None,
    target_bits: float | None,
    choices: str,
    context: int | None,
    samples: int,
    batch_size: int,
    stream: bool,
    report: bool,
    as_json: bool,
) -> None:
    """Quantize a model.

    SOURCE is a Hugging Face directory with float weights. The result is a directory
    that `jaxq.models.load` and the other commands read. With --format another library
    reads it. The recipe must then be one whose codes and scales that library has.
    """
    start = time.perf_counter()
    recipe = _recipe.read_recipe(recipe_text)
    if stream:
        if calibration or target_bits is not None or overwrite or report:
            raise click.UsageError(
                "--stream reads no text, replaces nothing and measures nothing. Leave "
                "out --calibration, --target-bits, --overwrite and --report."
            )
        _stream(source, recipe, out, format_name, statistics_path, as_json)
        return
    check_output(out, overwrite, format_name)
    _check_data(recipe, recipe_text, calibration, statistics_path, target_bits)
    model, tokenizer = models.load(source)
    if models.is_quantized(model):
        raise click.UsageError(f"{source} is quantized already. Pass the float model.")
    batches: Any = None
    if statistics_path is not None:
        read = _statistics_file.read(statistics_path)
        _statistics_file.check_model(read, statistics_path, model)
        batches = read.layers
    if calibration:
        _texts.check_tokenizer(source, tokenizer)
        window = _texts.default_context(model, context)
        tokens = _texts.read_tokens(tokenizer, calibration)
        batches = _texts.calibration_batches(tokens, window, samples, batch_size)
    chosen = None
    names = [name.strip() for name in choices.split(",")] if target_bits else []
    tried = [recipes.get(name) for name in names] or [recipe]
    _check_format(model, source, tried, out, format_name)
    if target_bits is not None:
        recipe, chosen = _recipe.with_budget(recipe, model, target_bits, names, batches)
    qmodel, result = nn.quantize_model(model, recipe, calibration=batches)
    write_model(out, qmodel, tokenizer, format_name, source)
    seconds = time.perf_counter() - start
    if as_json:
        entries = {"source": str(source), "recipe": recipe_text, "out": str(out)}
        _output.print_json(
            entries | {"seconds": seconds, "choices": chosen} | result.to_dict()
        )
        return
    _print_report(result, report, chosen)
    click.echo(f"\nwrote {out} in {seconds:.0f} s")


def _check_format(
    model: Any, source: Path, tried: list[Recipe], out: Path, format_name: str
) -> None:
    """Raises before the long work if the library cannot hold the result.

    The weights are rounded to nearest, and written to a temporary folder beside `out`.

    Args:
        model: the float model.
        source: the path of the model.
        tried: the recipe, or the recipes of all choices of --target-bits.
        out: the directory or the file of the result.
        format_name: one of `FORMATS`.

    Raises:
        click.UsageError: a recipe has static ranges, which only jaxq's format has.
        ValueError: the format cannot hold a weight.
    """
    if format_name in (_options.OWN_FORMAT, "hf"):
        return
    for recipe in tried:
        if any(rule.observer is not None for rule in recipe.rules):
            raise click.UsageError(
                f"--format {format_name} has no static ranges of inputs. Use a recipe "
                "without observer=, such as w8a8, or leave --format out."
            )
        if not _recipe.has_methods(recipe) and len(tried) == 1:
            continue  # the real work is as fast as this check
        rounded, _ = nn.quantize_model(model, _recipe.rounding_to_nearest(recipe))
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".trial") as folder:
            write_model(Path(folder) / out.name, rounded, None, format_name, source)


def _stream(
    source: Path,
    recipe: Recipe,
    out: Path,
    format_name: str,
    statistics_path: Path | None,
    as_json: bool,
) -> None:
    """Quantizes parameter by parameter, into a directory that can be completed."""
    if format_name in _NOT_STREAMED:
        raise click.UsageError(
            f"--stream cannot write --format {format_name}. Pass a --format other than "
            f"{', '.join(_NOT_STREAMED)}."
        )
    if not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no directory {out.parent}.")
    if statistics_path is not None:
        _statistics_file.check_source(statistics_path, source)
    start = time.perf_counter()
    formats = io.quantize_checkpoint(
        source, out, recipe, format=format_name, statistics=statistics_path
    )
    seconds = time.perf_counter() - start
    if as_json:
        _output.print_json(
            {
                "source": str(source),
                "out": str(out),
                "seconds": seconds,
                "parameters": formats,
            }
        )
        return
    rows = [(note, number) for note, number in Counter(formats.values()).items()]
    _output.print_table(["format, or why not", "parameters"], rows)
    click.echo(f"\nwrote {out} in {seconds:.0f} s")


def _check_data(
    recipe: Recipe,
    recipe_text: str,
    calibration: tuple[Path, ...],
    statistics_path: Path | None,
    target_bits: float | None,
) -> None:
    """Raises before the model is loaded if the data are not those that are needed."""
    if calibration and statistics_path is not None:
        raise click.UsageError("Pass --calibration or --statistics, not both.")
    if target_bits is not None and not calibration:
        raise click.UsageError("--target-bits needs --calibration TEXT.")
    has_data = bool(calibration) or statistics_path is not None
    if _recipe.needs_data(recipe) and not has_data:
        raise click.UsageError(
            f"--recipe {recipe_text} needs data. Pass --calibration TEXT."
        )


def _print_report(
    report: nn.Report, all_rows: bool, chosen: dict[str, str] | None
) -> None:
    if all_rows:
        click.echo(str(report))
    else:
        # The totals are the lines after the table.
        click.echo(report.totals)
        for note, paths in _float_rows(report).items():
            click.echo(f"in floats: {', '.join(paths)} ({note})")
    if chosen is not None:
        rows = [(path, name) for path, name in chosen.items()]
        _output.print_table(["layer", "preset"], rows, num_text_columns=2)


def _float_rows(report: nn.Report) -> dict[str, list[str]]:
    """The matrices that stay in floats, by the reason."""
    paths: dict[str, list[str]] = {}
    for row in report.rows:
        if row.format is None and len(row.shape) > 1:
            paths.setdefault(row.note, []).append(row.path)
    return paths
