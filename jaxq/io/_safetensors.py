"""A file as a whole: written at once or not at all, read with every byte accounted for."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxq.io._models import into_model, is_module, parameters, transforms
from jaxq.serialization._entries import describe, rebuild

FORMAT_VERSION = 1


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a model or a tree to one safetensors file, whole or not at all.

    Args:
      path: of the file; its folder must exist. A symbolic link is replaced, the file it led to stays as it is.
      tree: a flax nnx module or its `nnx.state`, or dicts (string keys), lists and tuples of arrays, Python numbers,
        strings, None and QTensors. Named tuples, such as the statistics of `jaxq.nn.calibrate`, come back as dicts.
        Of a model every array is saved, in a Variable or not; what else it holds is made by its class.

    Raises:
      TypeError: something in the tree that cannot be saved, named by its path.
      ValueError: two parameters of a model have one path.
      FileNotFoundError: the folder does not exist.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxq
      >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
      >>> jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64), "nf4")})
      >>> jaxq.load(path)["w"]
      QTensor(nf4[64x64], PerGroup(along -2), scale=float32, 4.5 bits, float32)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: the folder {path.parent} does not exist.")
    tensors: dict[str, np.ndarray] = {}
    if is_module(tree):
        kind, structure = (
            "model",
            {name: describe(v, name, tensors) for name, v in parameters(tree).items()},
        )
    else:
        kind, structure = "tree", describe(tree, "", tensors)
    header = {"version": FORMAT_VERSION, "kind": kind, "structure": structure}
    if kind == "model" and (found := transforms(tree)) is not None:
        header["transforms"] = found
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
    )
    os.close(handle)
    try:
        save_file(
            tensors, temporary, metadata={"format": "jaxq", "jaxq": json.dumps(header)}
        )
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], *, into: Any = None) -> Any:
    """Reads what `save` wrote.

    Args:
      path: of the file.
      into: a float model, to get back a quantized model of its class: parameters are replaced, quantized layers get
        their QTensors and jaxq's hooks. The model itself stays as it is. None returns a tree; of a model's file,
        a dict from paths to arrays and QTensors. A model of `nnx.eval_shape` serves too.

    Returns:
      The tree, or the model. Arrays are jax arrays; what was a numpy array of 64 bits, which jax holds under
      `jax_enable_x64` only, is one again without it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a jaxq file, another version, a damaged entry; `into` and file differ: every missing,
        extra or misshaped parameter is named, and every layer whose inputs are transformed in one of them only.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _read_header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} is not a whole safetensors file: {error}."
        ) from error
    used: set[str] = set()
    try:
        if header["kind"] == "model":
            tree = {
                name: rebuild(entry, name, tensors, used)
                for name, entry in header["structure"].items()
            }
        else:
            tree = rebuild(header["structure"], "", tensors, used)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"load: the metadata of {path} is damaged: {error!r}."
        ) from error
    if set(tensors) - used:
        raise ValueError(
            f"load: {path} holds tensors its metadata does not name: {sorted(set(tensors) - used)}."
        )
    if into is None:
        return tree
    if header["kind"] != "model":
        raise ValueError(
            f"load: {path} holds a tree, not a model. Load it without into=."
        )
    return into_model(into, tree, path, header.get("transforms"))


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or "jaxq" not in metadata:
        raise ValueError(
            f"load: {path} was not written by jaxq.save. For a Hugging Face directory use jaxq.models.load."
        )
    try:
        header = json.loads(metadata["jaxq"])
    except ValueError as error:
        raise ValueError(
            f"load: the metadata of {path} is damaged: {error}."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"load: the metadata of {path} is damaged: a {type(header).__name__} instead of an object."
        )
    if not isinstance(header.get("transforms", {}), dict):
        raise ValueError(
            f"load: the metadata of {path} is damaged: transforms are {header['transforms']!r}."
        )
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"load: {path} has format version {header.get('version')}; this jaxq reads version {FORMAT_VERSION}."
        )
    return header
