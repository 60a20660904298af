"""`jaxq generate`: text from a model, shown while it is made."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np

from jaxq import models
from jaxq.cli import _options, _output, _texts
from jaxq.cli._text_stream import TextStream

_EXAMPLE = """\b
Examples:
  jaxq generate tiny_llama_int4 --prompt "def read(self" --tokens 40
  jaxq generate tiny_llama_int4 --prompt "def " --temperature 0.8 --top-k 40
"""


@click.command(epilog=_EXAMPLE)
@click.argument("model_path", metavar="MODEL", type=_options.MODEL)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option(
    "--chat",
    is_flag=True,
    help="--prompt is the message of a user. The chat template of MODEL is applied, "
    "and only the answer is printed.",
)
@click.option(
    "--tokens",
    type=_options.COUNT,
    default=64,
    show_default=True,
    help="At most so many new tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most probable token.",
)
@click.option("--top-k", type=_options.COUNT, help="Draw among so many tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    help="Draw among the most probable tokens with this probability together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For sampling.")
@click.option(
    "--stop",
    "stops",
    multiple=True,
    help="End before this text. May be given several times.",
)
@click.option(
    "--cache", help="A preset for keys and values, such as int8. Floats without it."
)
@_options.common
def generate(
    model_path: Path,
    prompt: str,
    chat: bool,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stops: tuple[str, ...],
    cache: str | None,
    as_json: bool,
) -> None:
    """Continue a text with a model.

    The text is printed while it is made. It ends with the end token of the model, with
    a text of --stop, or after --tokens.
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise click.UsageError("--top-k and --top-p need a --temperature above 0.")
    text = _chat_text(model_path, prompt) if chat else prompt
    model, tokenizer = _texts.load_model(model_path)
    _texts.check_decoder(model_path, model)
    ids = tokenizer.encode(text, add_special_tokens=not chat).ids
    if not ids:
        raise click.UsageError("--prompt has no token. Pass a longer text.")
    stream = TextStream(tokenizer, ids, stops)
    printer = _Printer(stream, "" if chat else prompt, is_shown=not as_json)
    start = time.perf_counter()
    with printer, contextlib.suppress(_StopText):
        models.generate(
            model,
            jnp.asarray([ids], jnp.int32),
            tokens,
            key=seed if temperature > 0 else None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=models.load_stop_tokens(model_path),
            cache=cache,
            on_token=printer.add,
        )
    seconds = time.perf_counter() - start
    if as_json:
        _output.print_json(
            {
                "model": str(model_path),
                "prompt": prompt,
                "text": printer.text,
                "tokens": printer.tokens,
                "seconds": seconds,
            }
        )


def _chat_text(path: Path, message: str) -> str:
    """The text that a model reads for a message of a user.

    Raises:
        click.UsageError: the model has no chat template.
    """
    template = models.load_chat_template(path)
    if template is None:
        raise click.UsageError(f"{path} has no chat template. Leave out --chat.")
    messages = [{"role": "user", "content": message}]
    return template(messages, add_generation_prompt=True)


class _StopText(Exception):
    """Ends the loop of `models.generate` when a stop text has come."""


class _Printer:
    """Prints the text of new tokens, and keeps both.

    The end of a `with` block prints the rest of the text and ends the line.

    Args:
        stream: makes the text of the tokens.
        start: the text that is printed before the first token.
        is_shown: False prints nothing.

    Attributes:
        tokens: the new tokens.
        text: their text, without a stop text.
    """

    def __init__(self, stream: TextStream, start: str, *, is_shown: bool):
        self._stream, self._start, self._is_shown = stream, start, is_shown
        self.tokens: list[int] = []
        self.text = ""

    def __enter__(self) -> _Printer:
        return self

    def __exit__(self, *error: Any) -> None:
        # If an error came before the first token, only its message is printed.
        if self.tokens:
            self._give(self._stream.rest())
            self._show("\n")

    def add(self, row: np.ndarray) -> None:
        """Adds the next token, int32 [1].

        Raises:
            _StopText: the text ends here.
        """
        if not self.tokens:
            self._show(self._start)
        token = int(row[0])
        self.tokens.append(token)
        self._give(self._stream.add(token))
        if self._stream.has_ended:
            raise _StopText

    def _give(self, text: str) -> None:
        self.text += text
        self._show(text)

    def _show(self, text: str) -> None:
        """Prints a text. `click.echo` writes it out at once, also into a pipe."""
        if self._is_shown and text:
            click.echo(text, nl=False)
