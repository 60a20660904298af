"""Writes a Hugging Face model directory, so that readers see all of it or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxq.files._model_directory import CONFIG, INDEX, SINGLE
from jaxq.files._new_file import (
    NewFile,
    locked_folder,
    remove_leftovers,
    sync_folder,
)
from jaxq.files._write_tensors import write_tensors

# The tensors of a weight file. They are computed only when the file is written.
Weights = Callable[[], Mapping[str, np.ndarray]]
# Other libraries expect this text.
_METADATA = MappingProxyType({"format": "pt"})


def write_directory(
    path: Path,
    weights: Mapping[str, Weights],
    texts: Mapping[str, str | bytes],
    caller: str,
    metadata: Mapping[str, str] = _METADATA,
) -> None:
    """Writes all files of a directory, so that a reader sees all of them or none.

    The files are written beside their targets first. This is where a disk can be full.
    Then they take their places, which needs a few renames. A directory is read by its
    config, so the old config goes first and the new one comes last. If the process is
    killed between the two, the directory has no config.

    Args:
      path: the directory, which exists.
      weights: the tensors of each weight file by its name.
      texts: the other files by name, as text or bytes, among them `config.json`. If
        there are several weight files, `model.safetensors.index.json` is one of them.
      caller: the name that error messages begin with.
      metadata: texts by name, for each weight file.
    """
    for name in (*weights, *texts):
        remove_leftovers(path, name)
    with contextlib.ExitStack() as stack:
        new_files = {}
        for name, tensors in weights.items():
            new_files[name] = stack.enter_context(NewFile(path / name, caller))
            write_tensors(new_files[name], tensors(), dict(metadata))
            new_files[name].sync()
        for name, text in texts.items():
            new_files[name] = stack.enter_context(NewFile(path / name, caller))
            new_files[name].write(text if isinstance(text, bytes) else text.encode())
            new_files[name].sync()
        new_config = new_files.pop(CONFIG)
        with locked_folder(path):
            (path / CONFIG).unlink(missing_ok=True)
            sync_folder(path)
            # Those of an earlier model would name or be other weights.
            for name in (INDEX, SINGLE):
                if name not in new_files:
                    (path / name).unlink(missing_ok=True)
            for new_file in new_files.values():
                new_file.replace()
            sync_folder(path)
            new_config.replace()
