"""The group of commands: help, exit codes, errors on one line, processes."""

import os
import signal
import subprocess
import sys
import time

import click
import pytest

from jaxq.cli import _main

COMMANDS = list(_main.COMMANDS)


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.code == 0
    for name, line in _main.COMMANDS.items():
        assert name in result.out
        assert line in result.out
    assert run().out == result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(run, name):
    command = _main.commands.get_command(click.Context(_main.commands), name)
    assert command.get_short_help_str(100) == _main.COMMANDS[name]
    commands = [[name]]
    if isinstance(command, click.Group):
        commands = [[name, inner] for inner in command.commands]
    for words in commands:
        result = run(*words, "--help")
        assert result.code == 0
        assert f"jaxq {' '.join(words)}" in result.out.partition("Example")[2]
        assert "--json" in result.out
        assert "--debug" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise"], "jaxq: No such command 'quantise'. Did you mean 'quantize'?"),
        (["formats", "--nope"], "jaxq formats: No such option"),
        (["evaluate", "no_such_dir", "--text", __file__], "'no_such_dir' does not"),
        (["evaluate"], "Missing argument 'MODEL'"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(run, words, message):
    result = run(*words)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "--help'." in result.err


def fail(error):
    """A command that raises an error."""

    @click.command()
    @click.option("--debug", is_flag=True)
    def formats(debug):
        raise error

    return formats


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 1, "jaxq: error: two lines\n"),
        (OSError("the disk is full"), 1, "jaxq: error: the disk is full\n"),
        (IndexError("7"), 1, "jaxq: error: IndexError: 7. Call the same command with"),
        (KeyboardInterrupt(), 130, "jaxq: interrupted\n"),
    ],
)
def test_errors_are_one_line_without_a_traceback(run, monkeypatch, error, code, line):
    monkeypatch.setattr("jaxq.cli._formats.formats", fail(error))
    result = run("formats")
    assert result.code == code
    assert result.err.strip().startswith(line.strip())
    assert "Traceback" not in result.err


def test_debug_raises_the_error(run, monkeypatch):
    monkeypatch.setattr("jaxq.cli._formats.formats", fail(ValueError("here")))
    with pytest.raises(ValueError, match="here"):
        run("formats", "--debug")


def test_python_m_jaxq_and_a_reader_that_leaves():
    command = [sys.executable, "-m", "jaxq", "formats"]
    first = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True
    )
    assert '"float8_e4m3fn"' in first.stdout
    assert first.stderr == ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1)


def test_ctrl_c_leaves_no_directory(model_dir, text, tmp_path):
    out = tmp_path / "out"
    words = ["quantize", model_dir, "--recipe", "int4_gptq", "--calibration", text]
    process = subprocess.Popen(
        [sys.executable, "-c", _WITH_SLOW_SAVE, *map(str, words), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"READY": str(tmp_path / "ready")},
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "jaxq: interrupted" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready"]


# The command line with a save that tells when half of its files are written.
_WITH_SLOW_SAVE = """
import os, pathlib, sys, time
from jaxq import models
from jaxq.cli import main
save = models.save
def slow(folder, *arguments, **settings):
    save(folder, *arguments, **settings)
    pathlib.Path(os.environ["READY"]).touch()
    time.sleep(600)
models.save = slow
sys.exit(main())
"""
