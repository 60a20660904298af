"""`save` and `load`: a model or a tree in one safetensors file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxq.io._into_tree import into_tree
from jaxq.io._placement import plan_like, plan_on_mesh
from jaxq.qtensor import is_linen_module, is_nnx_module, is_nnx_state
from jaxq.serialization import Contents, as_file, read_contents, write_contents
from jaxq.sharding import Rules


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a model or a tree to one safetensors file.

    If the write fails, an old file of this name stays as it was. The same tree gives
    the same bytes. A file that is replaced keeps its permissions. Every array of a
    model is saved, also an array that is not in a Variable. Nothing else of a model is
    saved. To get a model back, give `load` a model of the same class.

    If other processes of `jax.distributed` hold parts of an array, all of them must
    make this call. The first one gets the parts of the others in its host memory and
    writes the file. If one of them has an error, all of them raise.

    Args:
      path: the file to write. Its folder must exist. If the path is a symbolic link,
        the link is replaced, and the file that it pointed to is unchanged.
      tree: a model or a tree. A model is a flax nnx module or its `nnx.state`. A tree
        has dicts with string keys, lists and tuples of arrays, QTensors, Python
        numbers, strings and None. It may also have other pytrees, such as named tuples,
        the state of an optimizer, a `TrainedWeight` or a linen `TrainState`. `load`
        returns these as dicts, or as they were if it gets `into`.

    Raises:
      TypeError: the tree holds a value that cannot be saved. The error names its path.
      ValueError: two parameters of a model have the same path.
      FileNotFoundError: the folder does not exist.
      OSError: the file cannot be written: the disk is full, the name is too long, or
        a folder or a pipe has this name. The error names the file.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxq
      >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
      >>> jaxq.save(path, {"w": jaxq.quantize(jnp.eye(64), "nf4")})
      >>> jaxq.load(path)["w"]
      QTensor(nf4[64x64], PerGroup(along -2), scale=float32, 4.5 bits, float32)
    """
    write_contents(path, contents_of(tree, "save"), caller="save")


def load(
    path: str | os.PathLike[str],
    *,
    into: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = None,
    verify: bool = True,
) -> Any:
    """Reads a file that `save` wrote.

    If arrays are put on devices of several processes, all of these processes must make
    this call. If one of them cannot read its parts, all of them raise.

    Args:
      path: the file to read.
      into: a float model of the class that was saved, or the result of
        `nnx.eval_shape`. It is not changed: `load` fills a copy with the arrays of the
        file. If the file holds a quantized weight, the copy's layer becomes a quantized
        layer. For the file of a tree, `into` is a tree with the same paths, such as the
        state of an optimizer. The result has its named tuples and other containers.
        Every array is put on the devices of the array of `into`, with its sharding. If
        a quantized weight takes the place of a float array, its codes and scales are
        sharded along the same axes. If `into` is None, a model's file gives a
        dict from paths to arrays and QTensors. The variables of a quantized linen
        module are a tree. Load them without `into`, and run them with
        `jaxq.nn.linen.Quantized(module).apply(variables, x)`. The float module raises
        the ScopeParamShapeError of Flax for them.
      mesh: puts every array on this mesh of devices. Of each array, only the parts of
        this process's devices are read, and the parts are never put together.
      rules: the mesh axes of the float weights, as in `jaxq.sharding.place`:
        PartitionSpecs by pattern, or one PartitionSpec if the file holds one array or
        QTensor. None uses the metadata of Flax in `into`, or else how the arrays of
        `into` are sharded now. All other arrays are replicated.
      verify: compare the checksums that `save` wrote. They find damage on disks and in
        transfers. They do not protect against an attacker. False reads what can be
        read of a damaged file. Files of earlier versions have no checksums.

    Returns:
      The tree, or the filled copy of `into`. Arrays are jax arrays. A numpy array of 64
      bits stays a numpy array unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: the file does not exist.
      OSError: the file cannot be read: it is a folder or a pipe, or the system refuses
        it. The error names the file.
      TypeError: `into` is a linen module; or there are rules and no mesh.
      ValueError: a shard would cut a group or a byte, or a rule matches nothing, as in
        `jaxq.sharding.place`.
      ValueError: the file was not written by jaxq.save, or has another format version,
        or is damaged. The error names the file and the value.
      ValueError: `into` has shapes on a mesh, and `load` is not called in
        `jax.set_mesh` of this mesh.
      OSError, ValueError: another process could not read its parts, or has a different
        file.
      ValueError: the file does not fit `into`. The error names every array that is
        missing, unexpected or of another shape. It also names every layer whose inputs
        are transformed in another way in the model than in the file.

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
    check_into(into, "load")
    plan = plan_on_mesh(into, mesh, rules, "load")
    place, devices = None, set() if mesh is None else set(mesh.devices.flat)
    if into is not None and mesh is None:
        plan, place, devices = plan_like(into, f"load: into= for {path}")
    contents = read_contents(
        path, caller="load", verify=verify, plan=plan, place=place, devices=devices
    )
    if contents.kind not in ("tree", "model"):
        raise ValueError(
            f"load: {path} holds a {contents.kind!r:.80}, which this version of jaxq "
            "does not know. Use the jaxq that wrote the file."
        )
    transforms = contents.notes.get("transforms")
    if "transforms" in contents.notes and not _are_names(transforms):
        raise ValueError(
            f"load: {path} is damaged: transforms must be a dict of names, got "
            f"{transforms!r:.80}. Save the file again."
        )
    if into is None:
        return contents.value
    if not is_nnx_module(into):
        return into_tree(into, contents.value, caller="load", source=str(path))
    if contents.kind != "model":
        raise ValueError(
            f"load: {path} holds a tree, not a model. Load it without into=."
        )
    from jaxq.io._into_model import into_model

    return into_model(into, contents.value, transforms, caller="load", source=str(path))


def model_as_file(model: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of the file that `save` writes for a model.

    All arrays must be in this process.
    """
    return as_file(_model_contents(model), caller="save")


def check_into(into: Any, caller: str) -> None:
    """Raises TypeError if `into` is a linen module."""
    if is_linen_module(into):
        raise TypeError(
            f"{caller}: into= is the linen module {type(into).__name__}, which holds "
            "no arrays. Load the variables without into=, and run them with "
            "jaxq.nn.linen.Quantized(module).apply(variables, x). The float module "
            "does not take quantized weights."
        )


def contents_of(tree: Any, caller: str) -> Contents:
    """What a file of a model or a tree holds."""
    if is_linen_module(tree):
        raise TypeError(
            f"{caller}: {type(tree).__name__} is a flax linen module, which holds no "
            "arrays. Save its variables."
        )
    return _model_contents(tree) if _is_model(tree) else Contents("tree", tree, {})


def _is_model(value: Any) -> bool:
    return is_nnx_module(value) or is_nnx_state(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _model_contents(model: Any) -> Contents:
    """The arrays of a model and the input transforms of its layers, by path."""
    from jaxq.io._model_arrays import input_transforms_of, parameters

    transforms = input_transforms_of(model)
    notes = {} if transforms is None else {"transforms": transforms}
    return Contents("model", parameters(model), notes)
