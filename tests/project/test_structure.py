"""The source keeps to the rules of the house: see `structure.py`."""

import ast

import pytest

from tests.project import structure


@pytest.fixture(scope="module")
def known():
    return structure.modules()


@pytest.mark.parametrize("title", list(structure.report()))
def test_the_source_has_no_problem(title):
    problems = structure.report()[title]
    assert not problems, f"{title}:\n" + "\n".join(problems)


def test_no_file_lies_outside_a_room():
    files = {path.stem for path in structure.PACKAGE.glob("*.py")}
    loose = files - set(structure.ROOMS) - {"__init__", "__main__"}
    assert not loose, f"move these into a room: {sorted(loose)}"


def test_every_method_and_scale_rule_is_known(known):
    # Otherwise the search for conditions on their names could not find any.
    import jaxq
    from jaxq.qtensor._scale_rules import SCALE_RULES

    # Examples in docstrings may have registered more in this process.
    own = set(structure.method_names(known))
    assert own <= set(jaxq.methods.names())
    assert len(own) >= 10
    assert set(structure.scale_rule_names(known)) == set(SCALE_RULES)


# The checks find what they look for.


def module(text: str, name: str = "jaxq.nn._example") -> structure.Module:
    path = structure.PACKAGE / "nn" / "_example.py"
    return structure.Module(name, path, text, ast.parse(text))


def test_lazy_and_type_imports_count():
    lazy = "def f():\n    from jaxq import io\n"
    typed = "if TYPE_CHECKING:\n    from jaxq.models import Llama\n"
    for text in (lazy, typed):
        known = {"jaxq.nn._example": module(text), "jaxq.io": module("", "jaxq.io")}
        assert len(structure.upward_imports(known)) == 1


def test_a_circle_of_three_files_is_one_problem():
    names = [f"jaxq.nn._{letter}" for letter in "abc"]
    known = {
        name: module(f"from {target} import x", name)
        for name, target in zip(names, [*names[1:], names[0]], strict=True)
    }
    assert structure.circles(known) == [" <-> ".join(names)]


@pytest.mark.parametrize(
    "condition",
    [
        'rule.method == "gptq"',
        'method in ("awq", "gptq")',
        'spec.scale_rule != "ttq"',
    ],
)
def test_conditions_on_names_are_found(known, condition):
    extended = {**known, "jaxq.nn._example": module(f"if {condition}:\n    pass")}
    problems = structure.name_conditions(extended)
    assert [line for line in problems if "_example.py" in line]


def test_docstrings_and_comments_are_not_code():
    text = 'def f():\n    """Two\n    lines."""\n    # Why.\n\n    return 1\n'
    example = module(text)
    ((_, function),) = structure.functions(example)
    assert structure.code_lines(example, function) == 2
