"""`jaxq bench`: how long a product or a model takes, quantized and in floats."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from flax import nnx

from jaxq import evaluation, models, nn, ops, qtensor
from jaxq.cli import _options, _output, _recipe
from jaxq.evaluation import Timing

_EXAMPLE = """\b
Examples:
  jaxq bench examples/tiny_llama --recipe int4
  jaxq bench --shape 16x4096x4096 --preset int8
"""
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")


@click.command(epilog=_EXAMPLE)
@click.argument("source", required=False, type=_options.MODEL)
@click.option("--recipe", "recipe_text", help="Quantizes SOURCE. It needs no data.")
@click.option(
    "--shape", metavar="MxKxN", help="Time a product [m, k] @ [k, n] of random numbers."
)
@click.option("--preset", default="int4", show_default=True, help="For --shape.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="The dtype of the floats of --shape.",
)
@click.option(
    "--calls",
    type=_options.COUNT,
    default=20,
    show_default=True,
    help="Timed calls of each function.",
)
@click.option(
    "--batch-size", type=_options.COUNT, default=1, show_default=True, help="Of SOURCE."
)
@click.option(
    "--context", type=_options.COUNT, default=64, show_default=True, help="Of SOURCE."
)
@_options.common
def bench(
    source: Path | None,
    recipe_text: str | None,
    shape: str | None,
    preset: str,
    dtype: str,
    calls: int,
    batch_size: int,
    context: int,
    as_json: bool,
) -> None:
    """Time quantized products or models beside float ones.

    SOURCE is a model directory. The forward pass of the float model and of the
    quantized one are timed in turns. With --shape one product is timed instead. The
    weights may stay in the cache of the processor between two calls.
    """
    if (source is None) == (shape is None):
        raise click.UsageError("Pass SOURCE with --recipe, or --shape.")
    if shape is not None:
        functions, facts = _product(shape, preset, dtype)
    else:
        if recipe_text is None:
            raise click.UsageError("SOURCE needs --recipe.")
        recipe = _recipe.read_recipe(recipe_text)
        if _recipe.needs_data(recipe):
            raise click.UsageError(
                f"--recipe {recipe_text} needs data. Take one that does not: see "
                "`jaxq recipes`."
            )
        functions, facts = _forward(source, recipe, batch_size, context)
        facts["recipe"] = recipe_text
    times = evaluation.time_calls(functions, num_calls=calls, progress=None)
    result = facts | {
        "device": jax.devices()[0].device_kind,
        "seconds": {name: timing._asdict() for name, timing in times.items()},
        "ratio": times["quantized"].median / times["float"].median,
    }
    if as_json:
        _output.print_json(result)
    else:
        _print(result, times)


def _product(
    shape: str, preset: str, dtype: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The functions to time for one product, and what they compute."""
    match = _SHAPE.fullmatch(shape)
    if not match or 0 in map(int, match.groups()):
        raise click.UsageError(f"--shape {shape}: expected MxKxN, such as 16x256x256.")
    m, k, n = map(int, match.groups())
    x = jax.random.normal(jax.random.key(0), (m, k), dtype)
    w = jax.random.normal(jax.random.key(1), (k, n), dtype) / k**0.5
    qt = qtensor.quantize(w, preset)
    product, quantized = jax.jit(jnp.matmul), jax.jit(ops.matmul)
    functions = {
        "float": lambda: product(x, w),
        "quantized": lambda: quantized(x, qt),
    }
    facts = {
        "shape": [m, k, n],
        "preset": preset,
        "dtype": dtype,
        "bits_per_weight": qt.bits_per_element,
        "explain": str(ops.explain(x, qt)),
    }
    return functions, facts


def _forward(
    source: Any, recipe: Any, batch_size: int, context: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The functions to time for a forward pass, and what they compute."""
    model, _ = models.load(source)
    if models.is_quantized(model):
        raise click.UsageError(f"{source} is quantized already. Pass the float model.")
    qmodel, report = nn.quantize_model(model, recipe)
    vocabulary = model.config.vocab_size
    tokens = jax.random.randint(
        jax.random.key(0), (batch_size, context), 0, vocabulary, jnp.int32
    )
    forward = nnx.jit(lambda network, tokens: network(tokens))
    functions = {
        "float": lambda: forward(model, tokens),
        "quantized": lambda: forward(qmodel, tokens),
    }
    facts = {
        "source": str(source),
        "tokens": [batch_size, context],
        "bits_per_weight": report.bits_per_weight,
    }
    return functions, facts


def _print(result: dict[str, Any], times: dict[str, Timing]) -> None:
    rows = [
        (name, *(f"{1000 * value:.3f}" for value in timing[:3]))
        for name, timing in times.items()
    ]
    columns = ("ms", "median", "fastest", "slowest")
    _output.print_table(columns, rows)
    click.echo(
        f"\nquantized takes {result['ratio']:.3f} of the time of float, "
        f"{result['bits_per_weight']:.3f} bits per weight, on {result['device']}"
    )
    if "explain" in result:
        click.echo(f"\n{result['explain']}")
