"""Patterns of layer paths: globs over components joined by "/", or regular expressions.

`*` matches within one component, `?` one character of a component, and `**` any number
of components, including none. A pattern that begins with "re:" is a regular expression.
Every pattern must match the whole path.
"""

from __future__ import annotations

import re

REGULAR_EXPRESSION = "re:"


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern.

    Raises:
      re.error: the text after "re:" is not a regular expression.
    """
    if pattern.startswith(REGULAR_EXPRESSION):
        return re.compile(pattern.removeprefix(REGULAR_EXPRESSION))
    components: list[str] = []
    for component in pattern.split("/"):
        # "**/**" means the same as "**".
        if component == "**" and components[-1:] == ["**"]:
            continue
        components.append(_component(component))
    text = "/".join(components)
    # "**" may match no component at all, and then its "/" disappears with it.
    text = text.replace("/**/", "/(?:.*/)?")
    text = re.sub(r"^\*\*/", "(?:.*/)?", text)
    text = re.sub(r"/\*\*$", "(?:/.*)?", text)
    return re.compile(text.replace("**", ".*"))


def _component(glob: str) -> str:
    """The regular expression of one component; "**" is left for `compile_pattern`."""
    if glob == "**":
        return glob
    wildcards = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wildcards.get(character, re.escape(character)) for character in glob)
