"""What is said to a name that is not known: the closest ones that are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str) -> str:
    """An error message for `name`, with the closest of `known`, or where all of them are listed."""
    close = difflib.get_close_matches(
        normalize(str(name)), list(known), n=3, cutoff=0.5
    )
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"unknown {kind} {name!r}. {hint}{listing} lists them all."


def check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises a ValueError unless `value` is one of `allowed`; suggests the closest."""
    if value in allowed:
        return
    close = difflib.get_close_matches(normalize(str(value)), allowed, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    raise ValueError(
        f"{what} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
    )


def normalize(name: str) -> str:
    """The spelling names are kept in."""
    return name.strip().lower().replace("-", "_")
