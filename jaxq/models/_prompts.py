"""Prompts of unequal lengths as one array, and texts of unequal lengths as lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The length to which a length is padded: 16, 32, 64 and so on.

    One program is compiled for each bucket.
    """
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def padded_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of tokens as one array, padded on the right, and their lengths.

    Raises:
        ValueError: there is no row, a row has no token, or a token is not an integer.
    """
    arrays = [np.asarray(row) for row in rows]
    for number, row in enumerate(arrays):
        is_list = row.ndim == 1 and row.size
        if not is_list or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"generate: tokens[{number}] is {list(rows[number])!r}; expected a "
                "list of at least one integer."
            )
    if not arrays:
        raise ValueError("generate: tokens is an empty list; expected prompts.")
    lengths = np.array([row.size for row in arrays], np.int32)
    padded = np.zeros((len(arrays), int(lengths.max())), np.int32)
    for number, row in enumerate(arrays):
        padded[number, : row.size] = row
    return padded, lengths


def shifted_right(tokens: jax.Array, lengths: jax.Array, width: int) -> jax.Array:
    """Rows that begin with their tokens, as rows that end with them.

    Args:
        tokens: int32 [b, t].
        lengths: int32 [b], the number of tokens of each row.
        width: of the result, at least t.
    """
    place = jnp.arange(width)[None] - (width - lengths)[:, None]  # [b, width]
    index = jnp.clip(place, 0, tokens.shape[1] - 1)
    rows = jnp.take_along_axis(tokens, index, axis=1)
    return jnp.where(place >= 0, rows, 0)


def joined(
    tokens: jax.Array, lengths: jax.Array, new_tokens: jax.Array, pad_token: int
) -> jax.Array:
    """Each prompt with its new tokens behind it: `[b, t], [b, n] -> [b, t + n]`."""
    t, n = tokens.shape[1], new_tokens.shape[1]
    place = jnp.arange(t + n)[None]  # [1, t + n]
    prompt = jnp.pad(tokens, ((0, 0), (0, n)), constant_values=pad_token)
    step = place - lengths[:, None]  # [b, t + n]
    new = jnp.take_along_axis(new_tokens, jnp.clip(step, 0, n - 1), axis=1)
    is_new = (step >= 0) & (step < n)
    is_prompt = place < lengths[:, None]
    return jnp.where(is_prompt, prompt, jnp.where(is_new, new, pad_token))


def text_lists(
    prompts: Sequence[Sequence[int]], new_tokens: Any, stop_tokens: Iterable[int]
) -> list[list[int]]:
    """Each prompt with its new tokens, up to its first stop token."""
    stops, texts = set(stop_tokens), []
    for prompt, row in zip(prompts, np.asarray(new_tokens).tolist(), strict=True):
        ends = [place for place, token in enumerate(row) if token in stops]
        end = ends[0] + 1 if ends else len(row)
        texts.append([*map(int, prompt), *row[:end]])
    return texts
