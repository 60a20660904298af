"""Writes model directories and files that are complete or not there."""

from __future__ import annotations

import contextlib
import fnmatch
import json
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
_TOKENIZER = "tokenizer.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The names that a model directory has. `--overwrite` deletes no other file.
_MODEL_FILES = (
    *("*.json", "model*.safetensors", "*.jinja", "*.model"),
    *("merges.txt", "vocab.txt", "README.md", "LICENSE*", ".gitattributes"),
)
_MODEL_FOLDERS = ("1_Pooling", "2_Normalize")


def check_output(out: Path, overwrite: bool, format: str = OWN_FORMAT) -> None:
    """Raises click.UsageError, before the work, if a model cannot be written."""
    if format == "gguf":
        if out.suffix != _GGUF:
            raise click.UsageError(
                f"--out {out}: the name of the file must end in {_GGUF}."
            )
        check_file(out, overwrite)
        return
    if not out.name:
        raise click.UsageError(f"--out {out}: this path has no name. Give it one.")
    _check_parent(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise click.UsageError(f"--out {out}: this is not a directory.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise click.UsageError(
            f"--out {out}: the directory is not empty. Pass --overwrite to replace it."
        )
    if out.is_dir():
        _check_only_model(out)


def _check_only_model(out: Path) -> None:
    """Raises click.UsageError if a directory holds more than one model."""
    for entry in sorted(out.iterdir()):
        if entry.is_dir():
            is_known = entry.name in _MODEL_FOLDERS
        else:
            is_known = any(fnmatch.fnmatch(entry.name, name) for name in _MODEL_FILES)
        if not is_known:
            raise click.UsageError(
                f"--out {out}: --overwrite would delete {entry.name}, which does not "
                "belong to a model. Choose another directory."
            )


def check_file(out: Path, overwrite: bool) -> None:
    """Raises click.UsageError, before the work, if a file cannot be written."""
    _check_parent(out)
    if out.is_dir():
        raise click.UsageError(f"--out {out}: this is a directory.")
    if out.exists() and not overwrite:
        raise click.UsageError(
            f"--out {out}: the file exists. Pass --overwrite to replace it."
        )


def _check_parent(out: Path) -> None:
    if not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no directory {out.parent}.")
    if not os.access(out.parent, os.W_OK):
        raise click.UsageError(f"--out {out}: {out.parent} cannot be written.")


def write_model(
    out: Path, model: Any, tokenizer: Any, format: str, source: Path, dtype: Any = None
) -> None:
    """Writes a model in a format that `check_output` has accepted.

    Args:
        out: the directory or the file.
        model: the model.
        tokenizer: of the model, or None.
        format: one of `FORMATS`.
        source: the path of the source. Its chat template, the other files of its
            tokenizer and its special tokens are copied.
        dtype: of the weights, for a float model in the format of jaxq.
    """
    tokens = _special_tokens(source)
    if format == "gguf":
        # A file takes its place when it is complete.
        io.export(model, out, format=format, tokenizer=tokenizer, **tokens)
        return
    with new_directory(out) as folder:
        if format == OWN_FORMAT:
            own = {} if dtype is None else {"dtype": dtype}
            models.save(folder, model, tokenizer=tokenizer, **own, **tokens)
        else:
            io.export(model, folder, format=format, tokenizer=tokenizer, **tokens)
        for name, data in io.companion_files(source).items():
            if name != _TOKENIZER:  # it was written from `tokenizer`
                (folder / name).write_bytes(data)


def _special_tokens(source: Path) -> dict[str, Any]:
    """The token ids in the config of a model."""
    if not source.is_dir():
        ends = models.load_stop_tokens(source)
        return {"eos_token_id": ends[0]} if ends else {}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in _TOKEN_IDS if name in config}


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
        os.replace(temporary, out)
    finally:
        # An error or Ctrl-C can come between the two calls of os.replace above.
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
