"""`describe_contents` and `shapes_of`: a tree without its numbers, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxq.files import RefusedFile
from jaxq.serialization._contents import Contents, describe_with, rebuild_with
from jaxq.serialization._entries import EntryReader, EntryWriter
from jaxq.serialization._files import FORMAT_VERSION
from jaxq.serialization._read_shards import Index

_FIELDS = ("version", "kind", "structure", "shapes", "notes")


def describe_contents(contents: Contents, *, caller: str) -> dict[str, Any]:
    """The structure of a tree or a model, the specs of its QTensors, and all shapes.

    No number is read, so arrays may also be `jax.ShapeDtypeStruct`s.

    Returns:
      A dict that JSON can store.
    """
    writer = EntryWriter(caller, None)
    structure = describe_with(writer, contents)
    return {
        "version": FORMAT_VERSION,
        "kind": contents.kind,
        "structure": structure,
        "shapes": {name: list(shape) for name, shape in writer.shapes.items()},
        "notes": contents.notes,
    }


def shapes_of(
    description: Mapping[str, Any],
    *,
    caller: str,
    plan: Callable[[Any], Any] | None = None,
) -> Contents:
    """The contents that were described, with `jax.ShapeDtypeStruct`s for arrays.

    Args:
      description: from `describe_contents`.
      caller: the name that error messages begin with.
      plan: as in `read_contents`. The shapes have these shardings.
    """
    source = _Shapes(description, caller)
    kind, structure = description["kind"], description["structure"]
    reader = EntryReader(source, shapes_only=True)
    value = rebuild_with(reader, source, kind, structure, None)
    if plan is not None:
        again = EntryReader(source, shapes_only=True)
        value = rebuild_with(again, source, kind, structure, plan(value))
    return Contents(kind, value, dict(description["notes"]))


class _Header(NamedTuple):
    shape: tuple[int, ...]


class _Shapes:
    """Shapes by name, as `EntryReader` reads the headers of a file."""

    def __init__(self, description: Any, caller: str):
        self._caller = caller
        missing = _FIELDS
        if isinstance(description, Mapping):
            missing = [name for name in _FIELDS if name not in description]
        if missing:
            raise self.damaged(
                f"it must be a dict with the fields {', '.join(_FIELDS)}, got "
                f"{description!r:.80}"
            )
        if description["version"] != FORMAT_VERSION:
            raise self.refused(
                f"the description has version {description['version']!r:.80}. This "
                f"version of jaxq reads version {FORMAT_VERSION}"
            )
        self.headers = {
            name: _Header(tuple(shape)) for name, shape in description["shapes"].items()
        }

    def read(self, name: str) -> np.ndarray:
        raise self.refused(f"a description has no numbers, also not of {name}")

    def read_parts(
        self, name: str, indices: Sequence[Index]
    ) -> Iterable[tuple[int, np.ndarray]]:
        return [(place, self.read(name)) for place, _ in enumerate(indices)]

    def damaged(self, reason: str) -> RefusedFile:
        return RefusedFile(f"{self._caller}: the description is damaged: {reason}.")

    def refused(self, reason: str) -> RefusedFile:
        return RefusedFile(f"{self._caller}: {reason}.")
