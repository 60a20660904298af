"""One safetensors file of tensors and a JSON header.

A write replaces the whole file, or leaves it as it was. A read raises an error if bytes
of the file are missing or left over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.files import (
    NewFile,
    TensorFile,
    is_file,
    naming_errors,
    remove_leftovers,
    write_tensors,
)

FORMAT_VERSION = 1


def write_file(
    path: Path, tensors: dict[str, np.ndarray], header: dict[str, Any], caller: str
) -> None:
    """Writes tensors and header to a temporary file. This file then replaces `path`.

    If the write fails at any moment, the old file stays as it was.
    """
    metadata = metadata_of(header)
    with naming_errors(path, caller, "the file cannot be written"):
        remove_leftovers(path.parent, path.name)
    with NewFile(path, caller) as file:
        write_tensors(file, tensors, metadata)


def metadata_of(header: dict[str, Any]) -> dict[str, str]:
    """The metadata of the safetensors file that has this JSON header."""
    return {"format": "jaxq", "jaxq": json.dumps(header)}


def open_file(path: Path, caller: str, *, verify: bool) -> TensorFile:
    """Opens a file that `write_file` wrote.

    Raises:
      FileNotFoundError: nothing has this path.
      OSError: a folder or a pipe has this path, or the file cannot be read. The error
        names the path.
      RefusedFile: the file is not a whole safetensors file.
    """
    if not is_file(path, caller):
        raise FileNotFoundError(f"{caller}: there is no file {path}. Check the path.")
    return TensorFile(path, caller, verify=verify)


def read_header(file: TensorFile, caller: str) -> dict[str, Any]:
    """The JSON header of an open file.

    Raises:
      ValueError: the file has no jaxq header, or its header is damaged or of another
        version. The error names the file.
    """
    if "jaxq" not in file.metadata:
        raise ValueError(
            f"{caller}: {file.path} was not written by jaxq.save. To read a Hugging "
            "Face directory, use jaxq.models.load."
        )
    try:
        header = json.loads(file.metadata["jaxq"])
    except (ValueError, RecursionError) as error:
        raise file.damaged(f"its metadata cannot be parsed: {error}") from error
    if not isinstance(header, dict):
        kind = type(header).__name__
        raise file.damaged(f"its metadata must be a JSON object, got a {kind}")
    version = header.get("version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{caller}: {file.path} has format version {version!r:.80}. This version "
            f"of jaxq reads format version {FORMAT_VERSION}. Use the jaxq that wrote "
            "the file."
        )
    return header
