"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
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
# The packages and modules that users import: no part of the name is private.
PUBLIC = [name for name in MODULES if "._" not in name]
# Raise it when modules are added.
LEAST_EXAMPLES = 60
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    module = importlib.import_module(name)
    if "optax" in inspect.getsource(module):
        request.getfixturevalue("standard_promotion")
    result = doctest.testmod(module, optionflags=FLAGS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed"


def docstring_tests():
    finder = doctest.DocTestFinder()
    for name in MODULES:
        yield from finder.find(importlib.import_module(name))


def test_examples_use_public_names():
    private = re.compile(r"(from|import) +jaxq[.\w]*\._")
    for test in docstring_tests():
        for example in test.examples:
            assert not private.match(example.source), f"{test.name}: {example.source}"


def test_examples_are_found():
    # Otherwise the tests above could pass without finding anything.
    count = sum(len(test.examples) for test in docstring_tests())
    assert count >= LEAST_EXAMPLES


def public_objects():
    """(name, function or class) of everything that users import from jaxq."""
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            own = getattr(value, "__module__", "").startswith("jaxq")
            if own and (inspect.isfunction(value) or inspect.isclass(value)):
                yield f"{module_name}.{name}", value


def test_every_public_function_and_class_has_an_example():
    missing = [
        name
        for name, value in public_objects()
        if ">>>" not in (inspect.getdoc(value) or "")
    ]
    assert not missing, f"without an Example: {missing}"
