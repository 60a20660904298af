"""The source keeps to the rules of the house: see `structure.py`."""

import ast

import pytest

from tests.project import structure


@pytest.fixture(scope="module")
def known():
    return structure.modules()


REPORT = structure.report()


@pytest.mark.parametrize("title", list(REPORT))
def test_the_source_has_no_problem(title):
    problems = REPORT[title]
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
    dynamic = 'importlib.import_module("jaxq.models")\n'
    for text in (lazy, typed, dynamic):
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
        'record.name == "gptq"',
        'record.name.startswith("gptq")',
        '{"gptq": 1, "rtn": 2}[record.name]',
        '{"gptq": 1}.get(record.name)',
        "TABLE[record.name]",
        "record.name in NAMES",
        "record.name in _constants.NAMES",
        "record is _gptq.METHOD",
        'record is methods.get("gptq")',
        'spec.rule.name == "twn"',
    ],
)
def test_conditions_on_names_are_found(known, condition):
    assert len(conditions(known, condition)) == 1


@pytest.mark.parametrize(
    "condition",
    [
        'fallback == "rtn"',
        'clipping in ("absmax", "mse")',
        'methods.get("gptq")',
        'TABLE["gptq"]',
        "record.name in methods.names()",
        "record is method",
        'name == "int4_gptq"',
    ],
)
def test_other_conditions_are_no_problem(known, condition):
    assert not conditions(known, condition)


def conditions(known, condition: str) -> list[str]:
    """The problems of a condition in a file with constants that hold names."""
    constants = 'NAMES = frozenset({"gptq", "awq"})\nTABLE = {"gptq": 1}\n'
    text = f"{constants}if {condition}:\n    pass"
    owners = {**structure.method_names(known), **structure.scale_rule_names(known)}
    records = {name: known[name] for name in owners.values()}
    problems = structure.name_conditions({**records, "jaxq.nn._example": module(text)})
    return [line for line in problems if "_example.py" in line]


def test_drivers_have_a_lower_limit():
    lines = "".join(f"    x{i} = {i}\n" for i in range(70))
    text = f"def f():\n{lines}"
    driver = module(text, "jaxq.nn.transform._example")
    assert len(structure.long_functions({driver.name: driver})) == 1
    assert not structure.long_functions({"jaxq.nn._example": module(text)})


def test_tables_output_and_urls_may_be_wide():
    wide = "word " * 20
    text = f"| {wide}\nhttps://x.y {wide}\n```\n{wide}\n```\n```text\n{wide}\n```\n"
    checked = [line for _, line in structure.prose_and_code(text)]
    assert wide not in "".join(checked)
    text = f"```python\n>>> x\n{wide}\n```\n"
    assert wide not in "".join(line for _, line in structure.prose_and_code(text))
    text = f"{wide}\n```python\n{wide}\n```\n{wide}"
    numbers = [n for n, line in structure.prose_and_code(text) if line == wide]
    assert numbers == [1, 3, 5]


def test_docstrings_and_comments_are_not_code():
    text = 'def f():\n    """Two\n    lines."""\n    # Why.\n\n    return 1\n'
    example = module(text)
    ((_, function),) = structure.functions(example)
    assert structure.code_lines(example, function) == 2
