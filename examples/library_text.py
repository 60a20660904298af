"""Text to train on: source code of Python's standard library, which every machine has.

Files that share text with examples/heldout.txt are left out.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HELDOUT = Path(__file__).parent / "heldout.txt"
LIBRARY = Path(os.__file__).parent
PIECE = 100


def heldout_tokens(tokenizer, num_tokens: int) -> np.ndarray:
    """The first tokens of the held-out text, int32 [num_tokens]."""
    ids = tokenizer.encode(_heldout_text()).ids
    return np.asarray(ids[:num_tokens], np.int32)


def library_files() -> list[Path]:
    """The source files of the library, without its tests."""
    excluded = {"site-packages", "test", "tests", "idle_test"}
    return [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if not excluded & set(path.relative_to(LIBRARY).parts)
        # _sysconfigdata files differ from machine to machine.
        and not path.name.startswith("_sysconfig")
    ]


def training_text(path: Path) -> str:
    """The text of a file, or "" if the file shares text with the held-out text.

    The file is split into pieces of 100 characters. No piece, not even the shorter last
    one, may be in the held-out text. Shared text of 199 characters or more always
    contains a whole piece.
    """
    text = path.read_text(encoding="utf-8", errors="ignore")
    heldout = _heldout_text()
    starts = range(0, len(text), PIECE)
    is_shared = any(text[start : start + PIECE] in heldout for start in starts)
    return "" if is_shared else text


@functools.cache
def _heldout_text() -> str:
    return HELDOUT.read_text()


def training_tokens(tokenizer, num_tokens: int | None = None) -> np.ndarray:
    """Tokens of library files in random order, int32 [num_tokens].

    Without `num_tokens`, these are the tokens of all files.
    """
    files = library_files()
    tokens = []
    for i in np.random.default_rng(0).permutation(len(files)):
        if num_tokens is not None and len(tokens) >= num_tokens:
            break
        tokens += tokenizer.encode(training_text(files[i])).ids
    return np.asarray(tokens[:num_tokens], np.int32)


def windows(
    tokens: np.ndarray, num_batches: int, batch: int, context: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random windows of the text: inputs and the next tokens, both [batch, context]."""
    rng = np.random.default_rng(seed)
    for _ in range(num_batches):
        starts = rng.integers(0, len(tokens) - context, (batch, 1))
        window = tokens[starts + np.arange(context + 1)]  # [batch, context + 1]
        yield window[:, :-1], window[:, 1:]
