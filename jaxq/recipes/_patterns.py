"""Patterns of layer paths: globs over components joined by "/", or regular expressions.

`*` matches within one component, `?` one character of a component, and `**` any number
of components, including none. A pattern that begins with "re:" is a regular expression.
Every pattern must match the whole path.

Matching a glob takes at most time in proportion to the length of the glob times the
length of the path. Some regular expressions take exponential time, so a recipe with
"re:" patterns must come from somebody whom you trust.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REGULAR_EXPRESSION = "re:"


class Pattern(Protocol):
    """A pattern that has been checked."""

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path."""
        ...


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> Pattern:
    """The pattern of a text.

    Raises:
      ValueError: the text after "re:" is not a regular expression.
    """
    if pattern.startswith(REGULAR_EXPRESSION):
        return _Expression(pattern.removeprefix(REGULAR_EXPRESSION))
    return _Glob(pattern)


class _Expression:
    """A regular expression."""

    def __init__(self, text: str):
        try:
            self._compiled = re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"the pattern is not a regular expression: {error}"
            ) from error

    def matches(self, path: str) -> bool:
        return self._compiled.fullmatch(path) is not None


class _Glob:
    """Components, each of which is matched with one component of a path."""

    def __init__(self, text: str):
        self._components = text.split("/")

    def matches(self, path: str) -> bool:
        return _matches(self._components, path.split("/"), "**", _component_matches)


def _component_matches(glob: str, component: str) -> bool:
    return _matches(glob, component, "*", _character_matches)


def _character_matches(glob: str, character: str) -> bool:
    return glob in ("?", character)


def _matches(
    pattern: Sequence[Any],
    items: Sequence[Any],
    star: Any,
    item_matches: Callable[[Any, Any], bool],
) -> bool:
    """Whether a pattern matches all items. `star` matches any number of them.

    If an item does not match, only the last star has to take one item more: what comes
    before that star matched as early as possible. So each part of the pattern is
    compared at most once with each item.
    """
    position = 0  # in the pattern
    after_star: int | None = None
    star_end = 0  # the first item that the last star does not take
    index = 0
    while index < len(items):
        if position < len(pattern) and pattern[position] == star:
            position += 1
            after_star, star_end = position, index
        elif position < len(pattern) and item_matches(pattern[position], items[index]):
            position += 1
            index += 1
        elif after_star is not None:
            star_end += 1
            position, index = after_star, star_end
        else:
            return False
    return all(part == star for part in pattern[position:])
