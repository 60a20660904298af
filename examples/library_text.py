"""Text that the examples train on: source code of Python's standard library.

Every machine has it. Files that share text with examples/heldout.txt are left out.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HELDOUT = Path(__file__).parent / "heldout.txt"
PIECE = 100


def heldout_tokens(tokenizer, num_tokens: int) -> np.ndarray:
    """The first tokens of the held-out text, int32 [num_tokens]."""
    ids = tokenizer.encode(HELDOUT.read_text()).ids
    return np.asarray(ids[:num_tokens], np.int32)


def training_tokens(tokenizer, num_tokens: int) -> np.ndarray:
    """Tokens of library files in random order, int32 [num_tokens].

    Each file is split into pieces of 100 characters. The file is left out if one piece
    is in the held-out text. Held-out text of 199 characters or more in a row always
    contains a whole piece.
    """
    heldout = HELDOUT.read_text()
    heldout_pieces = {heldout[i : i + PIECE] for i in range(len(heldout) - PIECE + 1)}
    files = sorted(Path(os.__file__).parent.rglob("*.py"))
    tokens = []
    for i in np.random.default_rng(0).permutation(len(files)):
        if len(tokens) >= num_tokens:
            break
        excluded = {"site-packages", "test", "tests", "idle_test"}
        # _sysconfigdata files differ from machine to machine.
        if excluded & set(files[i].parts) or files[i].name.startswith("_sysconfig"):
            continue
        text = files[i].read_text(encoding="utf-8", errors="ignore")
        pieces = {text[at : at + PIECE] for at in range(0, len(text), PIECE)}
        if not pieces & heldout_pieces:
            tokens += tokenizer.encode(text).ids
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
