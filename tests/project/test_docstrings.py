"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import jaxq

ROOT = Path(jaxq.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )
    for path in ROOT.rglob("*.py")
    if path.stem != "__main__"
)
# Raise it as modules are added.
FLOOR = 60
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0, (
        f"{result.failed} of {result.attempted} examples of {name} failed: see the output"
    )


def test_examples_use_public_names():
    private = re.compile(r"(from|import) +jaxq[.\w]*\._")
    finder = doctest.DocTestFinder()
    for name in MODULES:
        for test in finder.find(importlib.import_module(name)):
            shown = [
                example.source
                for example in test.examples
                if private.match(example.source)
            ]
            assert not shown, (
                f"{test.name}: an example imports what is private: {shown[0]}"
            )


def test_examples_are_found():
    # A floor, so that the test above cannot pass by finding nothing.
    finder = doctest.DocTestFinder()
    found = sum(
        len(test.examples)
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
    )
    assert found >= FLOOR
