"""The group of commands, exit codes and errors."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

OK, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 130

# The first line of each command's help. The command itself is in the file
# `_<name>.py`, and is imported when it is called, so that `jaxq --help` is quick.
COMMANDS = {
    "quantize": "Quantize a model.",
    "statistics": "Collect, merge and show calibration statistics.",
    "evaluate": "Measure a model on a text.",
    "generate": "Continue a text with a model.",
    "inspect": "Show what a file, a directory or a number holds.",
    "convert": "Write a model in another dtype or format.",
    "bench": "Time quantized products or models beside float ones.",
    "formats": "List the number formats.",
    "recipes": "List the named recipes.",
}
# Errors that functions raise on purpose. Their messages say what to do.
_EXPECTED = (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class _Commands(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"jaxq.cli._{cmd_name}")
        return getattr(module, cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has --help with an example, and --json.",
)
@click.version_option(package_name="jaxq")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Quantize models for JAX, and measure what it costs."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words after the name of the program. None takes those of the
            process.

    Returns:
        The exit code: 0 if all went well, 1 after an error, 2 if the arguments are
        wrong, 130 after Ctrl-C.

    Example:
        >>> main(["recipes", "--json"])  # doctest: +ELLIPSIS
        {"recipes": [...]}
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--debug" in words
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = commands.main(args=words, prog_name="jaxq", standalone_mode=False)
            sys.stdout.flush()
        except click.UsageError as error:
            return _usage_error(error)
        except (click.Abort, KeyboardInterrupt):
            _say("interrupted")
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                return _closed_pipe()
            if show_traceback:
                raise
            _say(f"error: {_message(error)}")
            return ERROR
    return code if isinstance(code, int) else OK


def _usage_error(error: click.UsageError) -> int:
    path = error.ctx.command_path if error.ctx else "jaxq"
    message = _one_line(error.format_message())
    _say(f"{message} Try '{path} --help'.", path)
    return USAGE


def _closed_pipe() -> int:
    """The reader of stdout has gone, for example `head`. Nothing more can be said."""
    # Python flushes stdout at exit, and would raise the error again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ERROR


def _message(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message())
    text = _one_line(str(error))
    if isinstance(error, _EXPECTED) and text:
        return text
    return (
        f"{type(error).__name__}: {text}. Call the same command with --debug to see "
        "where."
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(text: str, name: str = "jaxq") -> None:
    """Prints one line to stderr."""
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    _say(f"warning: {_one_line(str(message))}")
