"""The text of new tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A tokenizer writes this for bytes that are not a whole character.
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Gives the text of new tokens as soon as it is certain.

    The bytes of a character can be in several tokens. The character comes with the last
    one. Text that may be the start of a stop text waits for the next tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: the tokens before the new ones.
        stops: the text ends before the first of these texts that comes.

    Attributes:
        has_ended: whether a stop text has come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens = list(prompt)
        # `add` has returned the text of the tokens before `_end`. The tokens from
        # `_start` to `_end` are decoded again with the new ones, because the first
        # token of a text is decoded in another way: some tokenizers drop its space.
        self._start, self._end = 0, len(self._tokens)
        self._waiting = ""
        self.has_ended = False

    def add(self, token: int) -> str:
        """Adds a token. Returns the text that is certain now, which can be empty."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(_NO_CHARACTER):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._until_stop(text)

    def rest(self) -> str:
        """The text that still waits, after the last token."""
        if self.has_ended:
            return ""
        text = self._until_stop(self._new_text()) + self._waiting
        self._end = len(self._tokens)
        self._waiting = ""
        return text

    def _new_text(self) -> str:
        """The text of the tokens from `_end` on."""
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        text = self._tokenizer.decode(self._tokens[self._start :])
        return text[len(before) :]

    def _until_stop(self, text: str) -> str:
        """The text that waited, and a new text, up to a stop text or its start."""
        text = self._waiting + text
        places = [text.find(stop) for stop in self._stops if stop in text]
        if places:
            self.has_ended = True
            self._waiting = ""
            return text[: min(places)]
        size = len(text) - self._num_undecided(text)
        self._waiting = text[size:]
        return text[:size]

    def _num_undecided(self, text: str) -> int:
        """The length of the longest end of a text that is a start of a stop text."""
        sizes = [
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ]
        return max(sizes, default=0)
