"""Regular expressions of a config, which a stranger may have written.

Some regular expressions take exponential time. A pattern is refused if it repeats a
group, or has more than a few unbounded repeats. Then the time is polynomial in the
length of a name.
"""

from __future__ import annotations

import functools
import re

_MOST_CHARACTERS = 512
_MOST_REPEATS = 6
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


@functools.cache
def compile_regex(text: str) -> re.Pattern[str]:
    """A compiled regular expression.

    Raises:
      ValueError: it is invalid, or could take very long.
    """
    is_slow = len(text) > _MOST_CHARACTERS or len(_REPEAT.findall(text)) > _MOST_REPEATS
    if is_slow or _REPEATED_GROUP.search(text):
        raise ValueError(
            f"the regular expression {text!r:.80} could take very long: it repeats a "
            f"group, or has more than {_MOST_REPEATS} repeats"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"the regular expression {text!r:.80} is invalid: {error}"
        ) from error
