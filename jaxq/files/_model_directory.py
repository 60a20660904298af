"""Reads a Hugging Face model directory: texts, JSON, and the files of weights.

The weights are in `model.safetensors`, or in several files (shards).
`model.safetensors.index.json` then names the file of each tensor. A directory of a
stranger is refused if a name leads outside it, or if its weights are pickles, which can
run code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxq.files._new_file import leftovers
from jaxq.files._paths import is_file, naming_errors
from jaxq.files._read_tensors import TensorFile, without_equal_names

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# An error names so many things of each kind.
_MOST_LINES = 20


def require_file(path: Path, name: str, caller: str) -> Path:
    """The path of a file in a model directory.

    Raises:
      FileNotFoundError: there is no such file. The error says what the directory has
        instead: the remains of an interrupted save, or pickles.
    """
    if is_file(path / name, caller):
        return path / name
    if name == CONFIG and _is_interrupted(path):
        raise FileNotFoundError(
            f"{caller}: {path} has no {name}, because a save was interrupted or still "
            f"runs. {_remaining(path)} Save the model again."
        )
    pickles = _pickles(path) if name == SINGLE else []
    if pickles:
        raise FileNotFoundError(
            f"{caller}: {path} has no {name}. It has {pickles[0]}, a pickle. Reading a "
            "pickle can run any code, so jaxq does not. Convert it to safetensors."
        )
    raise FileNotFoundError(
        f"{caller}: {path} has no {name}; expected a Hugging Face model directory. "
        "Check the path, or download the directory again."
    )


def read_text(path: Path, caller: str) -> str:
    """The text of a file.

    Raises:
      ValueError: the file is not UTF-8.
      OSError: the file cannot be read. The error names it.
    """
    try:
        with naming_errors(path, caller, "the file cannot be read"):
            data = path.read_bytes()
        return data.decode()
    except ValueError as error:
        raise ValueError(
            f"{caller}: {path} is damaged: {error}. Download it again."
        ) from error


def parse_json(path: Path, text: str) -> Any:
    """The value of a JSON text. An object may not have two equal keys.

    Raises:
      ValueError: the text is not JSON. The error names the path.
    """
    try:
        return json.loads(text, object_pairs_hook=without_equal_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from error


def open_weights(
    path: Path, stack: contextlib.ExitStack, caller: str, *, verify: bool = True
) -> dict[str, TensorFile]:
    """Opens the weight files of a directory, and returns the file of each tensor.

    Args:
      path: the directory.
      stack: closes the files.
      caller: the name that error messages begin with.
      verify: as in `TensorFile`.

    Raises:
      FileNotFoundError: a weight file is missing.
      ValueError: the index or a weight file is damaged; a tensor is not in the file
        that the index names, or is in two files.
    """
    index_path = path / INDEX
    index = _read_index(index_path, caller) if is_file(index_path, caller) else None
    names = [SINGLE] if index is None else sorted(set(index.values()))
    tensors: dict[str, TensorFile] = {}
    for file_name in names:
        file_path = require_file(path, file_name, caller)
        file = TensorFile(file_path, caller, verify=verify)
        stack.enter_context(file)
        for name in file.headers:
            if name in tensors:
                raise ValueError(
                    f"{caller}: {path}: {name} is both in "
                    f"{tensors[name].path.name} and in {file_name}. Remove it from one "
                    "of the files."
                )
            tensors[name] = file
    lost = [
        f"{name} is not in {file_name}"
        for name, file_name in sorted((index or {}).items())
        if name not in tensors or tensors[name].path.name != file_name
    ]
    if lost:
        raise ValueError(
            f"{caller}: {index_path} is damaged: {listed(lost)}. Download it again."
        )
    return tensors


def listed(lines: list[str]) -> str:
    """The first lines of a list that can be very long."""
    more = len(lines) - _MOST_LINES
    end = f" and {more} more" if more > 0 else ""
    return ", ".join(lines[:_MOST_LINES]) + end


def _read_index(path: Path, caller: str) -> dict[str, str]:
    """The file name of each tensor, by the tensor's name."""
    text = read_text(path, caller)
    try:
        index = parse_json(path, text)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not _are_names(files.values()):
        raise ValueError(
            f"{caller}: {path} is damaged: it has no weight_map that names the file "
            "of each tensor. Download it again."
        )
    for name, file_name in files.items():
        # An index of a stranger must not reach files outside its directory.
        is_plain = file_name == Path(file_name).name and "\\" not in file_name
        if not is_plain or "\0" in file_name or file_name in ("", ".."):
            raise ValueError(
                f"{caller}: {path} names the file {file_name!r} for {name}. "
                "Weight files must be in the directory of the index. Move the file "
                "there, and correct the index."
            )
    return files


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_interrupted(path: Path) -> bool:
    """Whether a directory has the temporary files of a save that did not end."""
    try:
        return bool(leftovers(path))
    except OSError:  # the directory does not exist, or cannot be listed
        return False


def _remaining(path: Path) -> str:
    """What an interrupted save has left in a directory."""
    names = sorted(file.name for file in path.iterdir() if file.name[0] != ".")
    if not names:
        return "The directory has no other file."
    return (
        f"The files that remain are {', '.join(names)}. They may be those of the old "
        "model or those of the new one."
    )


def _pickles(path: Path) -> list[str]:
    """The names of weight files in torch's own format."""
    try:
        return sorted(file.name for kind in _PICKLES for file in path.glob(kind))
    except OSError:
        return []
