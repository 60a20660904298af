"""Model directories and files that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from jaxq import io, models
from jaxq.cli._options import OWN_FORMAT

_GGUF = ".gguf"


def check_output(out: Path, overwrite: bool, format: str = OWN_FORMAT) -> None:
    """Raises before the work begins if a model cannot be written at the end."""
    if not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no directory {out.parent}.")
    if not os.access(out.parent, os.W_OK):
        raise click.UsageError(f"--out {out}: {out.parent} cannot be written.")
    if format == "gguf":
        _check_gguf(out, overwrite)
        return
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise click.UsageError(f"--out {out}: this is not a directory.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise click.UsageError(
            f"--out {out}: the directory is not empty. Pass --overwrite to replace it."
        )


def _check_gguf(out: Path, overwrite: bool) -> None:
    if out.suffix != _GGUF:
        raise click.UsageError(
            f"--out {out}: the name of the file must end in {_GGUF}."
        )
    if out.is_dir():
        raise click.UsageError(f"--out {out}: this is a directory.")
    if out.exists() and not overwrite:
        raise click.UsageError(
            f"--out {out}: the file exists. Pass --overwrite to replace it."
        )


def write_model(out: Path, model: Any, tokenizer: Any, format: str) -> None:
    """Writes a model in a format that `check_output` has accepted."""
    if format == "gguf":
        # A file takes its place when it is complete.
        io.export(model, out, format=format, tokenizer=tokenizer)
        return
    with new_directory(out) as folder:
        if format == OWN_FORMAT:
            models.save(folder, model, tokenizer=tokenizer)
        else:
            io.export(model, folder, format=format, tokenizer=tokenizer)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, which takes its place at the end.

    If the block raises, or the user presses Ctrl-C, the new directory is removed, and
    `out` stays as it was.
    """
    name = f".{out.name}.{secrets.token_hex(8)}"
    temporary, old = out.with_name(f"{name}.partial"), out.with_name(f"{name}.old")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(temporary, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
