"""What the README shows runs: python blocks are executed, commands are compared with what exists."""

import doctest
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST_COMMAND = "python -m pytest -n 2 --dist loadfile"


def blocks() -> list[tuple[str, int, str]]:
    """(language, first line, text) of every fenced block."""
    text = (ROOT / "README.md").read_text()
    found = re.finditer(
        r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL
    )
    return [(m[1], text[: m.start()].count("\n") + 2, m[2]) for m in found]


def of(language: str):
    return [
        pytest.param(line, text, id=f"line{line}")
        for lang, line, text in blocks()
        if lang == language
    ]


def test_readme_has_examples():
    languages = [language for language, _, _ in blocks()]
    assert "python" in languages, "README.md shows no python"
    assert "bash" in languages, "README.md shows no command"
    known = {"python", "bash", "text", "json", "toml", "bibtex"}
    assert set(languages) <= known, (
        f"unchecked fences: {sorted(set(languages) - known)}"
    )


@pytest.mark.parametrize(("line", "text"), of("python"))
def test_python_block_runs(line, text, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "__main__"}
    if text.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(
            text, namespace, "README.md", "README.md", line - 1
        )
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0
        return
    # Leading newlines make a traceback name the README's own lines.
    exec(compile("\n" * (line - 1) + text, "README.md", "exec"), namespace)


@pytest.mark.parametrize(("line", "text"), of("bash"))
def test_commands_are_real(line, text):
    for command in text.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words:
            problem = _problem(words)
            assert problem is None, f"README.md:{line}: {command!r}: {problem}"


def test_ci_runs_the_documented_test_command():
    commands = [
        line.strip()
        for language, _, text in blocks()
        if language == "bash"
        for line in text.splitlines()
    ]
    assert TEST_COMMAND in commands, f"README.md does not show {TEST_COMMAND!r}"
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text().splitlines()


def _problem(words: list[str]) -> str | None:
    """Why a command cannot be what a reader should type, or None."""
    match words:
        case ["pip", "install", *arguments] | [
            "python",
            "-m",
            "pip",
            "install",
            *arguments,
        ]:
            return next(filter(None, map(_install_problem, arguments)), None)
        case ["python", "-m", "pytest", *arguments]:
            return next(
                (
                    f"{a} does not exist"
                    for a in arguments
                    if a.startswith("tests") and not _exists(a)
                ),
                None,
            )
        case ["python", "-m", "jaxq", *_]:
            return None if _exists("jaxq/__main__.py") else "jaxq has no command line"
        case ["python", "-m", module, *_]:
            path = module.replace(".", "/")
            return (
                None
                if _exists(f"{path}.py") or _exists(f"{path}/__main__.py")
                else f"no module {module}"
            )
        case ["python", script, *_] | ["bash", script, *_]:
            return None if _exists(script) else f"{script} does not exist"
        case [script] if "/" in script:
            return (
                None
                if os.access(ROOT / script, os.X_OK)
                else f"{script} is no executable file"
            )
        case ["nox", *_]:
            return None if _exists("noxfile.py") else "there is no noxfile.py"
        case ["ruff", *_] | ["pyright", "jaxq"] | ["git", "clone", *_] | ["cd", "jaxq"]:
            return None
    return "not one of the commands this test knows how to check"


def _install_problem(argument: str) -> str | None:
    """An extra that pyproject.toml does not have, or a path that does not exist."""
    match = re.fullmatch(r"(\.|jaxq)\[(.*)\]", argument)
    if not match:
        return None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return next(
        (
            f"no extra {name!r}"
            for name in re.split(r",\s*", match[2])
            if name not in extras
        ),
        None,
    )


def _exists(path: str) -> bool:
    return (ROOT / path).exists()


def test_preset_table_is_true():
    import jax
    import jax.numpy as jnp

    import jaxq

    text = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+?)(?:,[^|]*)? \| ([^|]*) \| ([^|]*) \| ([\d.]+) \|$",
        text,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == list(jaxq.presets())
    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for name, fmt, granularity, scale, bits in rows:
        spec = jaxq.presets()[name]
        assert fmt == spec.fmt.name
        assert granularity.startswith(type(spec.granularity).__name__)
        assert scale.startswith(
            spec.scale if isinstance(spec.scale, str) else spec.scale.fmt.name
        )
        qt = jax.eval_shape(lambda w, name=name: jaxq.quantize(w, name), matrix)
        assert bits == f"{qt.bits_per_element:.4g}"


def test_format_table_is_true():
    from jaxq import formats

    text = (ROOT / "README.md").read_text()
    cells = r"\| `(\w+)` \| (\d+) \| (\d+)/(\d+) \| (\d+) \| (\S+) \| (\S+) \| (yes|no) \| ([^|]+) \| (yes|no) \|"
    rows = re.findall(f"^{cells}$", text, re.MULTILINE)
    floats = [
        name
        for name in formats.names()
        if name.startswith(("float", "bfloat", "tfloat"))
    ]
    known = {
        name
        for name in floats
        if formats.get(name).kind == "float" and name != "float7_e3m3fn"
    }  # a docstring's
    assert {row[0] for row in rows} == known
    for (
        name,
        bits,
        exponent,
        mantissa,
        bias,
        largest,
        smallest,
        infinities,
        nan,
        minus_zero,
    ) in rows:
        fmt = formats.get(name)
        assert (str(fmt.bits), largest, smallest) == (
            bits,
            f"{fmt.max:.6g}",
            f"{fmt.smallest_positive:.4g}",
        ), name
        if isinstance(fmt, formats.FloatFormat):
            assert (fmt.exponent_bits, fmt.num_mantissa_bits, fmt.bias) == (
                int(exponent),
                int(mantissa),
                int(bias),
            )
            of = {
                "ieee": ("yes", "yes", "yes"),
                "fn": ("no", "all ones", "yes"),
                "finite": ("no", "no", "yes"),
            }
            assert (infinities, nan, minus_zero) == of.get(
                fmt.flavour, ("no", "the code of -0", "no")
            )
    others = (
        set(formats.names())
        - set(floats)
        - {"af4", "binary", "ternary", "dynamic8", "udynamic8"}
    )
    families = (
        r"(int[1-8]|uint[1-8]|int[2-8]_narrow|int[2-8]_sign_magnitude|nf[2-8]|log[2-7])"
    )
    assert not {
        name
        for name in others
        if not re.fullmatch(families, name) and not name.startswith("mine")
    }


def test_measured_tables_are_those_of_the_results():
    text, found = (
        (ROOT / "README.md").read_text(),
        (ROOT / "benchmarks/results/methods-cpu.md").read_text(),
    )
    rows = [line for line in found.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    assert [row for row in rows if row not in text] == []
