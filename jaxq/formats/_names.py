"""Error messages for unknown names, with the closest known names as suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str) -> str:
    """Returns the error message for a name that is not in `known`.

    Args:
      kind: the kind of object that has such a name, for example "format".
      name: the unknown name.
      known: all known names. The message suggests up to three similar ones.
      listing: the call that lists all known names, such as "jaxq.formats.names()".
    """
    hint = _suggestion(name, known, most=3)
    hint = f"{hint} " if hint else ""
    return f"unknown {kind} {name!r}. {hint}{listing} lists them all."


def check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    """Checks that `value` is one of `allowed`.

    Args:
      what: the caller and the argument, such as "QuantSpec: rounding".
      value: the argument's value.
      allowed: the values that the argument may have.

    Raises:
      ValueError: `value` is not in `allowed`. The message suggests similar values.
    """
    if value in allowed:
        return
    hint = _suggestion(value, allowed, most=2)
    hint = f" {hint}" if hint else ""
    raise ValueError(
        f"{what} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
    )


def normalize(name: str) -> str:
    """Returns the spelling under which a name is stored: lower case, underscores."""
    return name.strip().lower().replace("-", "_")


def _suggestion(name: Any, known: Iterable[str], most: int) -> str:
    """The question "Did you mean ...?", or an empty text if no name is similar."""
    close = difflib.get_close_matches(
        normalize(str(name)), list(known), n=most, cutoff=0.5
    )
    if not close:
        return ""
    return f"Did you mean {' or '.join(repr(c) for c in close)}?"
