"""What one file holds: a tree, or a flat dict of named values with a kind and notes.

`write_tree` and `read_tree` are for trees. `write_contents` and `read_contents` also
carry the named values of a model, for `jaxq.io`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxq.files import TensorFile, check_folder
from jaxq.processes import Agreement
from jaxq.serialization._entries import EntryReader, EntryWriter, TensorSource
from jaxq.serialization._files import (
    FORMAT_VERSION,
    metadata_of,
    open_file,
    read_header,
    write_file,
)
from jaxq.serialization._turn import Turn

TREE = "tree"


class Contents(NamedTuple):
    """What one file holds.

    Attributes:
      kind: "tree" if `value` is a tree. Another kind, such as "model", is a flat dict
        from names to values.
      value: the tree, or the dict.
      notes: further fields of the header, as JSON values by name.
    """

    kind: str
    value: Any
    notes: dict[str, Any]


def write_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree to one safetensors file.

    If the write fails, an old file of this name stays as it was.

    Args:
      path: the file to write. Its folder must exist.
      tree: dicts with string keys, lists and tuples of arrays, QTensors, Python
        numbers, strings and None. `read_tree` returns a named tuple as a dict.

    Raises:
      TypeError: the tree holds a value that cannot be saved. The error names its path.
      FileNotFoundError: the folder does not exist.
      OSError: the file cannot be written: the disk is full, the name is too long, or
        a folder or a pipe has this name. The error names the file.

    Example:
      >>> import os, tempfile, jax.numpy as jnp
      >>> from jaxq import serialization
      >>> path = os.path.join(tempfile.mkdtemp(), "tree.safetensors")
      >>> serialization.write_tree(path, {"step": 3, "x": [jnp.zeros(2)]})
      >>> serialization.read_tree(path)["step"]
      3
    """
    write_contents(path, Contents(TREE, tree, {}), caller="write_tree")


def read_tree(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Reads a tree that `write_tree` wrote.

    Args:
      path: the file to read.
      verify: compare the checksums of the file. False reads what can be read of a
        damaged file.

    Returns:
      The tree. Arrays are jax arrays. A numpy array of 64 bits stays a numpy array
      unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: the file does not exist.
      OSError: the file cannot be read. The error names the file.
      ValueError: the file was not written by jaxq, or has another format version, or is
        damaged, or holds a model.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxq
      >>> from jaxq import serialization
      >>> path = os.path.join(tempfile.mkdtemp(), "tree.safetensors")
      >>> serialization.write_tree(path, jaxq.quantize(jnp.eye(64), "int8"))
      >>> serialization.read_tree(path).codes().dtype
      dtype('int8')
    """
    contents = read_contents(path, caller="read_tree", verify=verify)
    if contents.kind != TREE:
        raise ValueError(
            f"read_tree: {path} holds a {contents.kind}, not a tree. Use jaxq.load."
        )
    return contents.value


def write_contents(
    path: str | os.PathLike[str], contents: Contents, *, caller: str
) -> None:
    """Writes contents of any kind, as `write_tree` writes a tree.

    Args:
      path: the file to write.
      contents: what to write.
      caller: the name that error messages begin with.
    """
    path = Path(path)
    turn = Turn(contents.value, path, caller)
    writer = EntryWriter(caller, turn.fetch)
    with turn.agreement:
        if turn.is_mine:
            check_folder(path, caller)
        try:
            header = _header(writer, contents)
            if turn.is_mine:
                write_file(path, writer.tensors, header, caller)
        except RecursionError as error:
            raise ValueError(
                f"{caller}: {path} cannot be written: the tree is nested too deeply. "
                "Save its parts by name, in one dict."
            ) from error


def as_file(
    contents: Contents, *, caller: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of the file that `write_contents` writes.

    All arrays must be in this process.
    """
    writer = EntryWriter(caller, np.asarray)
    header = _header(writer, contents)
    return writer.tensors, metadata_of(header)


def _header(writer: EntryWriter, contents: Contents) -> dict[str, Any]:
    """The JSON header of a file. The writer gets the tensors."""
    return {
        "version": FORMAT_VERSION,
        "kind": contents.kind,
        "structure": describe_with(writer, contents),
        **contents.notes,
    }


def describe_with(writer: EntryWriter, contents: Contents) -> dict[str, Any]:
    """The JSON entry of a tree, or the entries of named values."""
    if contents.kind == TREE:
        return writer.describe(contents.value, "")
    return {
        name: writer.describe(value, name) for name, value in contents.value.items()
    }


def read_contents(
    path: str | os.PathLike[str],
    *,
    caller: str,
    verify: bool = True,
    plan: Callable[[Any], Any] | None = None,
    place: Callable[[str, Any], Any] | None = None,
    devices: Iterable[Any] = (),
) -> Contents:
    """Reads contents of any kind, as `read_tree` reads a tree.

    Args:
      path: the file to read.
      caller: the name that error messages begin with.
      verify: compare the checksums of the file.
      plan: `plan(value)` gets the value with a `jax.ShapeDtypeStruct` in place of each
        array, and returns it with a `jax.sharding.Sharding` in place of each. A process
        then reads only the parts of its devices. None in place of an array reads the
        whole array.
      place: `place(name, value)` is called for each array and QTensor as soon as it is
        read, and returns the value on the devices of the caller's choice. It does not
        compute together with other processes.
      devices: those of all processes that make this call. If one of them cannot read
        its parts, all of them raise.
    """
    path = Path(path)
    agreement = Agreement(devices, f"{caller}: {path} cannot be read")
    with agreement, open_file(path, caller, verify=verify) as file:
        agreement.fingerprint = file.fingerprint()
        return _read_open_file(file, caller, plan, place)


def _read_open_file(
    file: TensorFile,
    caller: str,
    plan: Callable[[Any], Any] | None,
    place: Callable[[str, Any], Any] | None,
) -> Contents:
    """The contents of an open file, with its arrays on the devices of the plan."""
    header = read_header(file, caller)
    kind, structure = header.get("kind"), header.get("structure")
    if not isinstance(kind, str) or structure is None:
        raise file.damaged("its metadata have no kind or no structure")
    reader, at = EntryReader(file, place), None
    try:
        if plan is not None:
            shapes = EntryReader(file, shapes_only=True)
            at = plan(rebuild_with(shapes, file, kind, structure, None))
            reader.padded = shapes.padded
        value = rebuild_with(reader, file, kind, structure, at)
    except RecursionError as error:
        raise file.damaged("its metadata are nested too deeply") from error
    unused = sorted(set(file.headers) - reader.used)
    if unused:
        raise file.damaged(
            f"it holds tensors that its metadata do not name: {unused[:20]}"
        )
    notes = {
        name: note
        for name, note in header.items()
        if name not in ("version", "kind", "structure")
    }
    return Contents(kind, value, notes)


def rebuild_with(
    reader: EntryReader, file: TensorSource, kind: str, structure: Any, at: Any
) -> Any:
    """The inverse of `describe_with`."""
    if kind == TREE:
        return reader.rebuild(structure, "", at)
    if not isinstance(structure, dict):
        raise file.damaged(f"the structure of a {kind} must be a dict")
    return {
        name: reader.rebuild(entry, name, at and at[name])
        for name, entry in structure.items()
    }
