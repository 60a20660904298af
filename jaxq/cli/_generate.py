"""`jaxq generate`: text from a model."""

from __future__ import annotations

import time
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np

from jaxq import models
from jaxq.cli import _options, _output, _texts

_EXAMPLE = """\b
Example:
  jaxq generate tiny_llama_int4 --prompt "def read(self" --tokens 40
"""


@click.command(epilog=_EXAMPLE)
@click.argument("model_path", metavar="MODEL", type=_options.MODEL)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option(
    "--tokens",
    type=_options.COUNT,
    default=64,
    show_default=True,
    help="How many tokens to add.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most probable token.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For sampling.")
@click.option(
    "--cache", help="A preset for keys and values, such as int8. Floats without it."
)
@_options.common
def generate(
    model_path: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    cache: str | None,
    as_json: bool,
) -> None:
    """Continue a text with a model."""
    model, tokenizer = _texts.load_model(model_path)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise click.UsageError("--prompt has no token. Pass a longer text.")
    start = time.perf_counter()
    key = jax.random.key(seed) if temperature > 0 else None
    result = models.generate(
        model,
        jnp.asarray([ids], jnp.int32),
        tokens,
        key=key,
        temperature=temperature,
        cache=cache,
    )
    new_ids = np.asarray(result[0, len(ids) :]).tolist()
    seconds = time.perf_counter() - start
    text = tokenizer.decode(new_ids)
    if as_json:
        _output.print_json(
            {
                "model": str(model_path),
                "prompt": prompt,
                "text": text,
                "tokens": new_ids,
                "seconds": seconds,
            }
        )
    else:
        click.echo(prompt + text)
