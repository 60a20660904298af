"""Globs: the same matches as their definition, and no glob that takes long."""

import itertools
import random

import pytest

from jaxq.recipes import compile_pattern


def defined(pattern, path):
    """What the documentation says, for lists of components."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(defined(pattern[1:], path[k:]) for k in range(len(path) + 1))
    return (
        bool(path)
        and defined_component(pattern[0], path[0])
        and defined(pattern[1:], path[1:])
    )


def defined_component(glob, text):
    if not glob:
        return not text
    if glob[0] == "*":
        return any(defined_component(glob[1:], text[k:]) for k in range(len(text) + 1))
    return (
        bool(text)
        and glob[0] in ("?", text[0])
        and defined_component(glob[1:], text[1:])
    )


def test_globs_match_as_defined():
    generator = random.Random(0)
    components = ("**", "*", "a", "b", "a*", "*b", "?", "a?", "*a*b", "", "a**b")
    texts = ("a", "b", "ab", "aab", "ba", "", "*")
    matched = 0
    for _ in range(20_000):
        pattern = generator.choices(components, k=generator.randint(1, 5))
        path = generator.choices(texts, k=generator.randint(1, 5))
        expected = defined(pattern, path)
        matched += expected
        glob = compile_pattern("/".join(pattern))
        assert glob.matches("/".join(path)) == expected, (pattern, path)
    assert 1_000 < matched < 19_000


def test_every_short_component_matches_as_defined():
    globs = [
        "".join(g) for n in range(1, 5) for g in itertools.product("*?ab", repeat=n)
    ]
    texts = ["".join(t) for n in range(5) for t in itertools.product("ab", repeat=n)]
    for glob in globs:
        # A component "**" alone matches any number of components.
        if glob == "**":
            continue
        pattern = compile_pattern(glob)
        for text in texts:
            assert pattern.matches(text) == defined_component(glob, text), (glob, text)


class Counted(str):
    """A text that counts how often one of its characters is read."""

    reads = 0

    def __getitem__(self, index):
        Counted.reads += 1
        return super().__getitem__(index)

    def split(self, separator):
        return [Counted(part) for part in super().split(separator)]


@pytest.mark.parametrize(
    ("glob", "path"),
    [
        ("*a" * 8 + "b", "a" * 60),
        ("*a" * 30 + "b", "a" * 60),
        ("?*" * 30 + "b", "a" * 60),
        ("**/a/" * 8 + "b", "a/" * 60),
        ("**/*a*/" * 8 + "b", "aaa/" * 60),
        ("/".join(["**", "*a" * 4 + "b"] * 6), "/".join(["aaaaaaaa"] * 30)),
    ],
)
def test_no_glob_takes_long(glob, path):
    Counted.reads = 0
    assert not compile_pattern(glob).matches(Counted(path))
    # Backtracking over several stars reads characters millions of times.
    assert 0 < Counted.reads <= 4 * len(glob) * len(path)
