"""README and docs are true: Python blocks run; commands, links and tables are real."""

import doctest
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_COMMAND = "python -m pytest -n 2 --dist loadfile"
LANGUAGES = {"python", "bash", "text", "json", "toml", "bibtex"}
DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> list[tuple[str, int, str]]:
    """(language, first line, text) of every fenced block."""
    text = document.read_text()
    return [
        (match[1], text[: match.start()].count("\n") + 2, match[2])
        for match in FENCE.finditer(text)
    ]


def blocks_in(language: str):
    """Every block of a language, as parameters of a test."""
    return [
        pytest.param(document, line, text, id=f"{document.stem}-line{line}")
        for document in DOCUMENTS
        for own_language, line, text in blocks(document)
        if own_language == language
    ]


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def test_readme_has_examples():
    languages = [language for language, _, _ in blocks(ROOT / "README.md")]
    assert "python" in languages, "README.md shows no python"
    assert "bash" in languages, "README.md shows no command"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_fence_has_a_language_that_is_checked(document):
    languages = {language for language, _, _ in blocks(document)}
    assert languages <= LANGUAGES, f"unchecked fences: {sorted(languages - LANGUAGES)}"


@pytest.mark.parametrize(("document", "line", "text"), blocks_in("python"))
def test_python_block_runs(document, line, text, monkeypatch, request):
    monkeypatch.chdir(ROOT)
    if "optax" in text:
        request.getfixturevalue("standard_promotion")
    namespace = {"__name__": "__main__"}
    if text.lstrip().startswith(">>>"):
        name = document.name
        parser = doctest.DocTestParser()
        test = parser.get_doctest(text, namespace, name, name, line - 1)
        assert doctest.DocTestRunner(optionflags=DOCTEST_FLAGS).run(test).failed == 0
        return
    # The empty lines in front make a traceback name the document's own lines.
    exec(compile("\n" * (line - 1) + text, document.name, "exec"), namespace)


@pytest.mark.parametrize(("document", "line", "text"), blocks_in("bash"))
def test_commands_are_real(document, line, text):
    for command in text.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words:
            problem = command_problem(words)
            assert problem is None, f"{document.name}:{line}: {command!r}: {problem}"


def test_ci_runs_the_documented_test_command():
    commands = [
        line.strip()
        for language, _, text in blocks(ROOT / "README.md")
        for line in text.splitlines()
        if language == "bash"
    ]
    assert TEST_COMMAND in commands, f"README.md does not show {TEST_COMMAND!r}"
    assert TEST_COMMAND in text_of(".ci/run").splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = document.parent / name if name else document
        assert linked.exists(), f"{document.name}: {target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{document.name}: {target}: no heading"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def command_problem(words: list[str]) -> str | None:
    """Why a reader cannot type this command, or None."""
    match words:
        case ["pip", "install", *arguments]:
            problems = (install_problem(argument) for argument in arguments)
            return next(filter(None, problems), None)
        case ["python", "-m", "pytest", *arguments]:
            paths = [argument for argument in arguments if argument.startswith("tests")]
            missing = [path for path in paths if not exists(path)]
            return f"{missing} do not exist" if missing else None
        case ["jaxq", *arguments] | ["python", "-m", "jaxq", *arguments]:
            return jaxq_problem(arguments)
        case ["python", "-m", module, *_]:
            path = module.replace(".", "/")
            is_module = exists(f"{path}.py") or exists(f"{path}/__main__.py")
            return None if is_module else f"there is no module {module}"
        case ["python", script, *_] | ["bash", script, *_]:
            return None if exists(script) else f"{script} does not exist"
        case [script] if "/" in script:
            executable = os.access(ROOT / script, os.X_OK)
            return None if executable else f"{script} is not an executable file"
        case ["nox", *_]:
            return None if exists("noxfile.py") else "there is no noxfile.py"
        case ["ruff", *_] | ["pyright", "jaxq"] | ["git", "clone", *_] | ["cd", "jaxq"]:
            return None
    return "this test does not know how to check the command"


def jaxq_problem(arguments: list[str]) -> str | None:
    """A command or option that the command line of jaxq does not have, or None."""
    import click

    from jaxq.cli._main import commands

    command, words = commands, list(arguments)
    while isinstance(command, click.Group) and words and words[0][0] != "-":
        name = words.pop(0)
        command = command.get_command(click.Context(commands), name)
        if command is None:
            return f"jaxq has no command {name}"
    options = {"-h", "--help"}
    options |= {name for option in command.params for name in option.opts}
    unknown = [word for word in words if word[0] == "-" and word not in options]
    paths = [word for word in words if word.startswith("examples/")]
    missing = [path for path in paths if not exists(path)]
    return f"unknown or missing: {unknown + missing}" if unknown + missing else None


def install_problem(argument: str) -> str | None:
    """An extra that pyproject.toml does not have, or None."""
    match = re.fullmatch(r"(\.|jaxq)\[(.*)\]", argument)
    if not match:
        return None
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    unknown = [name for name in re.split(r",\s*", match[2]) if name not in extras]
    return f"no extra {unknown}" if unknown else None


def exists(path: str) -> bool:
    return (ROOT / path).exists()


# Tables.


def test_preset_table_is_true():
    import jax
    import jax.numpy as jnp

    import jaxq

    row = r"^\| `(\w+)` \| (\S+?)(?:,[^|]*)? \| ([^|]*) \| ([^|]*) \| ([\d.]+) \|$"
    rows = re.findall(row, text_of("docs/presets.md"), re.MULTILINE)
    assert [cells[0] for cells in rows] == list(jaxq.presets())
    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for name, fmt, granularity, scale, bits in rows:
        spec = jaxq.presets()[name]
        assert fmt == spec.fmt.name
        assert granularity.startswith(type(spec.granularity).__name__)
        nested = not isinstance(spec.scale, str)
        assert scale.startswith(spec.scale.fmt.name if nested else spec.scale)
        qt = jax.eval_shape(lambda w, name=name: jaxq.quantize(w, name), matrix)
        assert bits == f"{qt.bits_per_element:.4g}"


def float_formats() -> list[str]:
    """Names of the registered formats that count as floating point."""
    from jaxq import formats

    prefixes = ("float", "bfloat", "tfloat")
    return [name for name in formats.names() if name.startswith(prefixes)]


def test_table_of_floating_point_formats_is_true():
    from jaxq import formats

    cells = (
        r"\| `(\w+)` \| (\d+) \| (\d+)/(\d+) \| (\d+) \| (\S+) \| (\S+) \| (yes|no)"
        r" \| ([^|]+) \| (yes|no) \|"
    )
    rows = re.findall(f"^{cells}$", text_of("docs/formats.md"), re.MULTILINE)
    # The example of a docstring registers float7_e3m3fn.
    listed = {
        name
        for name in float_formats()
        if formats.get(name).kind == "float" and name != "float7_e3m3fn"
    }
    assert {row[0] for row in rows} == listed
    specials = {
        "ieee": ("yes", "yes", "yes"),
        "fn": ("no", "all ones", "yes"),
        "finite": ("no", "no", "yes"),
    }
    for row in rows:
        name, bits, exponent, mantissa, bias, largest, smallest, *flags = row
        fmt = formats.get(name)
        numbers = f"{fmt.max:.6g}", f"{fmt.smallest_positive:.4g}"
        assert (str(fmt.bits), largest, smallest) == (bits, *numbers), name
        if isinstance(fmt, formats.FloatFormat):
            layout = fmt.exponent_bits, fmt.num_mantissa_bits, fmt.bias
            assert layout == (int(exponent), int(mantissa), int(bias))
            without_minus_zero = ("no", "the code of -0", "no")
            assert tuple(flags) == specials.get(fmt.flavour, without_minus_zero)


def test_every_other_format_has_a_row():
    from jaxq import formats

    listed = {"af4", "binary", "ternary"}
    listed |= {"dynamic4", "dynamic8", "udynamic8", "ulinear4"}
    others = set(formats.names()) - set(float_formats()) - listed
    families = (
        r"(int[1-8]|uint[1-8]|int[2-8]_narrow|int[2-8]_sign_magnitude|nf[2-8]|log[2-7])"
    )
    # Examples and tests register formats that begin with "mine".
    unknown = [
        name
        for name in others
        if not re.fullmatch(families, name) and not name.startswith("mine")
    ]
    assert not unknown


def test_table_of_methods_is_that_of_the_results():
    results = text_of("benchmarks/results/methods-cpu.md").splitlines()
    rows = [line for line in results if line.startswith("| ")]
    assert len(rows) > 50
    text = text_of("docs/methods.md")
    assert [row for row in rows if row not in text] == []


def test_table_of_caches_is_that_of_the_results():
    results = text_of("benchmarks/results/kv_cache-cpu.md")
    row = r"^\| [^|]+ \| \d+ \| \d+ \| ([\d.]+) \| (\S+ %) \|[^|]*\| ([\d.]+) \|"
    measured = set(re.findall(row, results, re.MULTILINE))
    shown = r"^\| [^|]+ \| \d+, \d+ \| ([\d.]+) \| (\S+ %) \| ([\d.]+) \|$"
    rows = re.findall(shown, text_of("docs/kv_cache.md"), re.MULTILINE)
    assert len(rows) > 5
    assert set(rows) <= measured


# Heavy tests.


def test_every_heavy_test_is_listed_with_its_reason(request):
    section = text_of("docs/testing.md").partition("## Heavy tests")[2]
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \|", section, re.MULTILINE)
    listed = {(name, int(count)) for name, count in rows}
    # A run of all tests has collected the heavy ones. Other runs collect them here.
    roots = [(ROOT / argument).resolve() for argument in request.config.args]
    if roots == [ROOT / "tests"]:
        counts = request.config.stash[conftest.NUM_HEAVY]
        in_files = {
            (str(path.relative_to(ROOT / "tests")), count)
            for path, count in counts.items()
        }
    else:
        in_files = collected_heavy_tests()
    assert listed == in_files, (
        f"docs/testing.md has other numbers of heavy rows: it lists "
        f"{sorted(listed - in_files)}, and the files have {sorted(in_files - listed)}"
    )


def collected_heavy_tests() -> set[tuple[str, int]]:
    """The files with heavy tests and their numbers, collected in another process."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "heavy"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_")
    }
    collection = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-n", "0"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert collection.returncode == 0, collection.stdout[-2000:]
    rows = [line for line in collection.stdout.splitlines() if "::" in line]
    files = [row.removeprefix("tests/").partition("::")[0] for row in rows]
    return set(Counter(files).items())
