"""`save` and `load`: a model or a tree in one safetensors file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from jaxq.serialization import Contents, read_contents, write_contents


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a model or a tree to one safetensors file.

    A crash leaves the old file whole. Every array of a model is saved, inside a
    Variable or not. The model's class makes everything else.

    Args:
      path: the file to write. Its folder must exist. If the path is a symbolic link,
        the link is replaced, and the file that it pointed to is unchanged.
      tree: a flax nnx module or its `nnx.state`; or dicts with string keys, lists and
        tuples of arrays, QTensors, Python numbers, strings and None. A named tuple,
        such as the statistics of `jaxq.nn.calibrate`, is read back as a dict.

    Raises:
      TypeError: the tree holds a value that cannot be saved. The error names its path.
      ValueError: two parameters of a model have the same path.
      FileNotFoundError: the folder does not exist.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxq
      >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
      >>> jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64), "nf4")})
      >>> jaxq.load(path)["w"]
      QTensor(nf4[64x64], PerGroup(along -2), scale=float32, 4.5 bits, float32)
    """
    contents = _model_contents(tree) if _is_model(tree) else Contents("tree", tree, {})
    write_contents(path, contents, caller="save")


def load(path: str | os.PathLike[str], *, into: Any = None) -> Any:
    """Reads a file that `save` wrote.

    Args:
      path: the file to read.
      into: a float model of the class that was saved, or the result of
        `nnx.eval_shape`. It is not changed: `load` fills a copy with the arrays of the
        file. If the file holds a quantized weight, the copy's layer becomes a quantized
        layer. If `into` is None, a model's file gives a dict from paths to arrays and
        QTensors.

    Returns:
      The tree, or the filled copy of `into`. Arrays are jax arrays. A numpy array of 64
      bits stays a numpy array unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: the file does not exist.
      TypeError: `into` is not a flax nnx module.
      ValueError: the file was not written by jaxq.save, or has another format version,
        or is damaged.
      ValueError: the file does not fit `into`. The error names every parameter that is
        missing, superfluous or of another shape, and every layer whose inputs are
        transformed in only one of the two.

    Example:
      >>> import os, tempfile, jaxq
      >>> from flax import nnx
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> qmodel, _ = jaxq.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), "int8")
      >>> jaxq.save(path, qmodel)
      >>> loaded = jaxq.load(path, into=nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
      >>> loaded.kernel[...]
      QTensor(int8[64x8], PerChannel(along -2), scale=float32, 8.5 bits, float32)
    """
    contents = read_contents(path, caller="load")
    transforms = contents.notes.get("transforms")
    if not isinstance(contents.notes.get("transforms", {}), dict):
        raise ValueError(
            f"load: the metadata of {path} is damaged: transforms are {transforms!r}."
        )
    if into is None:
        return contents.value
    if contents.kind != "model":
        raise ValueError(
            f"load: {path} holds a tree, not a model. Load it without into=."
        )
    from jaxq.io._into_model import into_model

    return into_model(into, contents.value, Path(path), transforms)


def _is_model(value: Any) -> bool:
    """Whether `value` is an nnx module or state. Saving a tree does not import Flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.State)


def _model_contents(model: Any) -> Contents:
    """The arrays of a model by path, and what its layers do to their inputs."""
    from jaxq.io._model_arrays import input_transforms_of, parameters

    transforms = input_transforms_of(model)
    notes = {} if transforms is None else {"transforms": transforms}
    return Contents("model", parameters(model), notes)
