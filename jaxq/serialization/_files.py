"""One safetensors file of tensors and a JSON header.

A write replaces the whole file, or leaves it as it was. A read raises an error if bytes
of the file are missing or left over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxq.files import NewFile, remove_leftovers, write_tensors

FORMAT_VERSION = 1


def write_file(
    path: Path, tensors: dict[str, np.ndarray], header: dict[str, Any], caller: str
) -> None:
    """Writes tensors and header to a temporary file. This file then replaces `path`.

    If the write fails at any moment, the old file stays as it was.
    """
    metadata = {"format": "jaxq", "jaxq": json.dumps(header)}
    remove_leftovers(path.parent, path.name)
    with NewFile(path, caller) as file:
        write_tensors(file, tensors, metadata)


def read_file(path: Path, caller: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the tensors of a file that `write_file` wrote.

    Raises:
      FileNotFoundError: `path` is not a file.
      ValueError: the file is truncated, or has no jaxq header, or its header is damaged
        or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: there is no file {path}. Check the path.")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _read_header(path, file.metadata(), caller)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{caller}: {path} is not a whole safetensors file: {error}. "
            "Save or download it again."
        ) from error
    return header, tensors


def _read_header(
    path: Path, metadata: dict[str, str] | None, caller: str
) -> dict[str, Any]:
    if not metadata or "jaxq" not in metadata:
        raise ValueError(
            f"{caller}: {path} was not written by jaxq.save. To read a Hugging Face "
            "directory, use jaxq.models.load."
        )
    damaged = f"{caller}: the metadata of {path} is damaged"
    try:
        header = json.loads(metadata["jaxq"])
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}. Save the file again.") from error
    if not isinstance(header, dict):
        kind = type(header).__name__
        raise ValueError(
            f"{damaged}: it must be a JSON object, got a {kind}. Save the file again."
        )
    version = header.get("version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{caller}: {path} has format version {version}. This version of jaxq "
            f"reads format version {FORMAT_VERSION}. Use the jaxq that wrote the file."
        )
    return header
