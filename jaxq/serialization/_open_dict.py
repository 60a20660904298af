"""A dict in a file of `write_tree`, whose values are read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxq.files import TensorFile
from jaxq.serialization._contents import TREE
from jaxq.serialization._entries import EntryReader
from jaxq.serialization._files import open_file, read_header


class OpenDict(Mapping[str, Any]):
    """A dict in an open file. `open_dict` returns it.

    A value is read when it is asked for, and not kept.
    """

    def __init__(self, file: TensorFile, entries: Mapping[str, Any]):
        self._file, self._entries = file, entries

    def __enter__(self) -> OpenDict:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getitem__(self, name: str) -> Any:
        return EntryReader(self._file).rebuild(self._entries[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def inner(self, name: str) -> OpenDict | None:
        """The dict that this dict has under a name. Its values are not read.

        None if there is no such entry, or if it is not a dict.
        """
        entries = _items(self._entries.get(name))
        return None if entries is None else OpenDict(self._file, entries)


def open_dict(path: str | os.PathLike[str], caller: str) -> OpenDict:
    """Opens a file of `write_tree` that holds a dict.

    Args:
      path: of the file.
      caller: the name that error messages begin with.

    Raises:
      FileNotFoundError: the file does not exist.
      OSError: the file cannot be read. The error names the file.
      ValueError: the file was not written by jaxq, is damaged, or holds something else.
    """
    path = Path(path)
    file = open_file(path, caller, verify=True)
    try:
        header = read_header(file, caller)
        entries = _items(header.get("structure"))
        if header.get("kind") != TREE or entries is None:
            raise ValueError(f"{caller}: {path} does not hold a dict of arrays.")
        return OpenDict(file, entries)
    except BaseException:
        file.__exit__()
        raise


def _items(entry: Any) -> Mapping[str, Any] | None:
    """The JSON entries of a dict by name; None for another value."""
    is_dict = isinstance(entry, Mapping) and entry.get("is") == "dict"
    items = entry.get("items") if is_dict else None
    return items if isinstance(items, Mapping) else None
