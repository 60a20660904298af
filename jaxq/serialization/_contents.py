"""What one file holds: a tree, or a flat dict of named values with a kind and notes.

`write_tree` and `read_tree` are for trees. `write_contents` and `read_contents` also
carry the named values of a model, for `jaxq.io`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxq.files import check_folder
from jaxq.serialization._entries import EntryReader, EntryWriter
from jaxq.serialization._files import FORMAT_VERSION, read_file, write_file

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


def read_tree(path: str | os.PathLike[str]) -> Any:
    """Reads a tree that `write_tree` wrote.

    Args:
      path: the file to read.

    Returns:
      The tree. Arrays are jax arrays. A numpy array of 64 bits stays a numpy array
      unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: the file does not exist.
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
    contents = read_contents(path, caller="read_tree")
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
    check_folder(path, caller)
    writer = EntryWriter(caller)
    if contents.kind == TREE:
        structure = writer.describe(contents.value, "")
    else:
        structure = {
            name: writer.describe(value, name) for name, value in contents.value.items()
        }
    header = {
        "version": FORMAT_VERSION,
        "kind": contents.kind,
        "structure": structure,
        **contents.notes,
    }
    write_file(path, writer.tensors, header, caller)


def read_contents(path: str | os.PathLike[str], *, caller: str) -> Contents:
    """Reads contents of any kind, as `read_tree` reads a tree.

    Args:
      path: the file to read.
      caller: the name that error messages begin with.
    """
    path = Path(path)
    header, tensors = read_file(path, caller)
    reader = EntryReader(caller, tensors)
    try:
        kind, structure = header.pop("kind"), header.pop("structure")
        if kind == TREE:
            value = reader.rebuild(structure, "")
        else:
            value = {
                name: reader.rebuild(entry, name) for name, entry in structure.items()
            }
    # A damaged header can miss any field, or hold a value of any type.
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{caller}: the metadata of {path} is damaged: {error!r}. "
            "Save the file again."
        ) from error
    unused = sorted(set(tensors) - reader.used)
    if unused:
        raise ValueError(
            f"{caller}: {path} holds tensors that its metadata does not name: {unused}."
            " The file is damaged. Save it again."
        )
    del header["version"]
    return Contents(kind, value, header)
