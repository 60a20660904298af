"""The progress line of long runs, on stderr."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def with_progress(
    items: Iterable[Any], label: str, progress: bool | None, *, start: int = 0
) -> Iterator[Any]:
    """Yields the items, and writes a progress line to stderr.

    Args:
      items: what to iterate over.
      label: the start of the line.
      progress: write the line. None writes the line if stderr is a terminal.
      start: number of items that an earlier run finished. `items` does not have them.
    """
    is_shown = sys.stderr.isatty() if progress is None else progress
    if not is_shown:
        yield from items
        return
    size = operator.length_hint(items, -1)
    total = f"/{start + size}" if size >= 0 else ""
    number = start
    try:
        for number, item in enumerate(items, start):
            print(f"\r{label}: {number}{total}", end="", file=sys.stderr, flush=True)
            yield item
            number += 1
    finally:
        # The spaces overwrite the end of an earlier line that was longer.
        print(f"\r{label}: {number}{total}{' ' * 8}", file=sys.stderr, flush=True)
