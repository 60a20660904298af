"""Models and texts of the command line: directories, tokens, windows, batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from flax import nnx

from jaxq import models

_LONGEST_CONTEXT = 2048


def load_model(path: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a directory.

    Raises:
        click.UsageError: the directory has no tokenizer.
    """
    model, tokenizer = models.load(path)
    check_tokenizer(path, tokenizer)
    return model, tokenizer


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Raises if a directory has no tokenizer."""
    if tokenizer is None:
        raise click.UsageError(
            f"{path} has no tokenizer.json, so it cannot read a text."
        )


def check_decoder(path: Path, model: Any) -> None:
    """Raises click.UsageError if a model does not predict tokens."""
    if not isinstance(model, models.Decoder):
        raise click.UsageError(
            f"{path} is an encoder, which does not predict the next token. Pass a "
            "language model."
        )


def load_reference(path: Path, tokenizer: Any) -> Any:
    """The reference model, which must read the same tokens.

    Raises:
        click.UsageError: its directory has another tokenizer.
    """
    model, other = models.load(path)
    if other is not None and other.to_str() != tokenizer.to_str():
        raise click.UsageError(
            f"{path} has another tokenizer than the model. Both must read the same "
            "tokens."
        )
    return model


def default_context(model: Any, context: int | None) -> int:
    """The tokens of a window: as given, or the context of the model."""
    if context is not None:
        return context
    return min(model.config.max_position_embeddings, _LONGEST_CONTEXT)


def read_tokens(tokenizer: Any, paths: Sequence[Path]) -> np.ndarray:
    """The tokens of text files, one after the other: int32 [n]."""
    ids: list[int] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"{path} is not a text file in UTF-8: {error}."
            ) from error
        ids += tokenizer.encode(text).ids
    return np.asarray(ids, np.int32)


def calibration_batches(
    tokens: np.ndarray, context: int, num_samples: int, batch_size: int
) -> list[np.ndarray]:
    """Windows of a text in batches of one size, so that one program is compiled.

    Args:
        tokens: int32 [n].
        context: tokens of a window.
        num_samples: at most so many windows, evenly spread over the text. A few less
            are used if batches of one size need it.
        batch_size: at most so many windows in a batch.

    Returns:
        A list of int32 [<= batch_size, context].

    Raises:
        click.UsageError: the text is shorter than one window.
    """
    num_windows = len(tokens) // context
    if num_windows == 0:
        raise click.UsageError(
            f"the calibration text has {len(tokens)} tokens, and a window has "
            f"{context}. Pass a longer text, or a smaller --context."
        )
    windows = tokens[: num_windows * context].reshape(num_windows, context)
    num_used = min(num_windows, num_samples)
    num_batches = -(-num_used // batch_size)
    size = num_used // num_batches
    chosen = np.linspace(0, num_windows - 1, num_batches * size).round().astype(int)
    return list(windows[chosen].reshape(num_batches, size, context))


def parameter_bytes(model: Any) -> int:
    """Bytes of all arrays of a model."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
