"""`tree_to_numpy` and `tree_from_numpy`: a tree as a flat dict of numpy arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxq.files import RefusedFile
from jaxq.processes import to_numpy
from jaxq.serialization._entries import EntryReader, EntryWriter
from jaxq.serialization._files import FORMAT_VERSION
from jaxq.serialization._read_shards import Index

# `EntryWriter` gives no tensor this name.
METADATA = "__metadata__"


def tree_to_numpy(tree: Any, *, caller: str) -> dict[str, np.ndarray]:
    """The arrays that `write_tree` writes, and its JSON text as the last array.

    Args:
      tree: as in `write_tree`.
      caller: the name that error messages begin with.
    """
    writer = EntryWriter(caller, to_numpy)
    try:
        structure = writer.describe(tree, "")
    except RecursionError as error:
        raise ValueError(f"{caller}: the tree is nested too deeply.") from error
    header = {"version": FORMAT_VERSION, "structure": structure}
    return {**writer.tensors, METADATA: np.asarray(json.dumps(header))}


def tree_from_numpy(arrays: Mapping[str, Any], *, caller: str) -> Any:
    """The tree whose arrays `tree_to_numpy` returned.

    Args:
      arrays: numpy arrays by name. They are not changed.
      caller: the name that error messages begin with.
    """
    source = _Arrays(arrays, caller)
    reader = EntryReader(source)
    try:
        tree = reader.rebuild(source.structure, "")
    except RecursionError as error:
        raise source.damaged("the tree is nested too deeply") from error
    unused = sorted(set(source.headers) - reader.used)
    if unused:
        raise source.damaged(f"the metadata do not name the arrays {unused[:20]}")
    return tree


class _Header(NamedTuple):
    shape: tuple[int, ...]


class _Arrays:
    """Arrays in memory, as `EntryReader` reads the tensors of a file."""

    def __init__(self, arrays: Mapping[str, Any], caller: str):
        self._caller = caller
        if not isinstance(arrays, Mapping):
            raise TypeError(
                f"{caller}: expected a dict of numpy arrays, got "
                f"{type(arrays).__name__}."
            )
        if METADATA not in arrays:
            raise ValueError(
                f"{caller}: the dict has no {METADATA!r}, so jaxq.io.to_numpy did not "
                "make it. Pass all of its entries."
            )
        self._arrays = {k: np.asarray(v) for k, v in arrays.items() if k != METADATA}
        self.headers = {name: _Header(a.shape) for name, a in self._arrays.items()}
        self.structure = self._structure(str(arrays[METADATA]))

    def _structure(self, text: str) -> Any:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"the metadata cannot be parsed: {error}") from error
        if not isinstance(header, dict) or "structure" not in header:
            raise self.damaged("the metadata have no structure")
        if header.get("version") != FORMAT_VERSION:
            raise self.refused(
                f"the metadata have version {header.get('version')!r:.80}. This "
                f"version of jaxq reads version {FORMAT_VERSION}"
            )
        return header["structure"]

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def read_parts(
        self, name: str, indices: Sequence[Index]
    ) -> Iterable[tuple[int, np.ndarray]]:
        parts = (self._arrays[name][index] for index in indices)
        return enumerate(parts)

    def damaged(self, reason: str) -> RefusedFile:
        return RefusedFile(f"{self._caller}: the arrays do not fit together: {reason}.")

    def refused(self, reason: str) -> RefusedFile:
        return RefusedFile(f"{self._caller}: {reason}.")
