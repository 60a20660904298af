"""Saving and loading: safetensors with what is not a tensor in the file's metadata.

A file holds a tree (dicts, lists, tuples of arrays, numbers and QTensors) or a model (its parameters by path). Each
leaf of a QTensor is a tensor of its own: `<path>.data`, `<path>.scale` (`<path>.scale.data` if that is quantized),
`<path>.zero_point`, `<path>.offset`, `<path>.codebook`; spec, geometry and packing stand in the metadata, so a tree
needs no template. Writing goes to a temporary file beside the target, which then takes its place: a crash leaves the
old file whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxq import formats
from jaxq.qtensor import LEAVES, Meta, QTensor, QuantSpec, relayout

__all__ = ["load", "save"]

FORMAT_VERSION = 1
# Dtypes safetensors has no name for travel as bytes of their width, named in the metadata.
_NATIVE = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a model or a tree to one safetensors file, whole or not at all.

    Args:
      path: of the file; its folder must exist.
      tree: a flax nnx module or its `nnx.state`, or dicts (string keys), lists and tuples of arrays, Python numbers,
        strings, None and QTensors.

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
    if _is_module(tree):
        kind, structure = "model", {name: _describe(v, name, tensors) for name, v in _parameters(tree).items()}
    else:
        kind, structure = "tree", _describe(tree, "", tensors)
    header = {"version": FORMAT_VERSION, "kind": kind, "structure": structure}
    if kind == "model" and (transforms := _transforms(tree)) is not None:
        header["transforms"] = transforms
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"format": "jaxq", "jaxq": json.dumps(header)})
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
      The tree, or the model. Arrays are jax arrays.

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
        raise ValueError(f"load: {path} is not a whole safetensors file: {error}.") from error
    used: set[str] = set()
    try:
        if header["kind"] == "model":
            tree = {name: _rebuild(entry, name, tensors, used) for name, entry in header["structure"].items()}
        else:
            tree = _rebuild(header["structure"], "", tensors, used)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"load: the metadata of {path} is damaged: {error!r}.") from error
    if set(tensors) - used:
        raise ValueError(f"load: {path} holds tensors its metadata does not name: {sorted(set(tensors) - used)}.")
    if into is None:
        return tree
    if header["kind"] != "model":
        raise ValueError(f"load: {path} holds a tree, not a model. Load it without into=.")
    return _into_model(into, tree, path, header.get("transforms"))


# Describing what is not a tensor.


def _describe(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """JSON for `value`, its arrays put into `tensors` under names that start with `name`."""
    if isinstance(value, QTensor):
        return _describe_qtensor(value, name, tensors)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = _describe(jax.random.key_data(value), name, tensors)
            return {"is": "key", "impl": str(jax.random.key_impl(value)), "data": data}
        array = np.asarray(value)
        if array.dtype.name in _NATIVE:
            stored = array
        elif array.dtype.isbuiltin == 2 and array.dtype.itemsize in (1, 2):  # ml_dtypes: bfloat16, float8, ...
            stored = array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
        else:
            raise TypeError(f"save: {name or 'the value'} has dtype {array.dtype}, which cannot be saved.")
        tensor = name or "value"
        while tensor in tensors or tensor == "__metadata__":  # {"a/b": x, "a": {"b": y}}, or safetensors' own key
            tensor += "'"
        tensors[tensor] = np.ascontiguousarray(stored).reshape(array.shape)
        return {"is": "array", "tensor": tensor, "dtype": array.dtype.name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": "value", "value": value}
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise TypeError(f"save: keys of {name or 'the tree'} must be strings, got {odd[0]!r}.")
        return {"is": "dict", "items": {key: _describe(v, _join(name, key), tensors) for key, v in value.items()}}
    if type(value) in (list, tuple):
        items = [_describe(v, _join(name, str(i)), tensors) for i, v in enumerate(value)]
        return {"is": type(value).__name__, "items": items}
    raise TypeError(
        f"save: {name or 'the tree'} is a {type(value).__name__}. Trees are dicts, lists and tuples of arrays, numbers "
        "and QTensors; models are flax nnx modules."
    )


def _describe_qtensor(qt: QTensor, name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    qt = relayout(qt, "rows")  # columns are for one kind of machine, files for all
    leaves = {leaf: getattr(qt, leaf) for leaf in LEAVES}
    return {
        "is": "qtensor",
        "shape": list(qt.shape),
        **qt.meta.to_dict(),
        "leaves": {
            k: None if v is None else _describe(v, f"{name or 'value'}.{k}", tensors) for k, v in leaves.items()
        },
    }


def _rebuild(entry: Any, name: str, tensors: dict[str, np.ndarray], used: set[str]) -> Any:
    """The value `_describe` described."""
    kind = entry.get("is") if isinstance(entry, dict) else None
    if kind == "array":
        if entry["tensor"] not in tensors:
            raise ValueError(f"load: the tensor {entry['tensor']!r} is missing from the file.")
        used.add(entry["tensor"])
        stored, dtype = tensors[entry["tensor"]], jnp.dtype(entry["dtype"])
        if stored.dtype != dtype:
            carrier = {1: np.uint8, 2: np.uint16}.get(dtype.itemsize)
            if dtype.name in _NATIVE or stored.dtype != carrier:
                raise ValueError(f"load: {entry['tensor']} is stored as {stored.dtype} but should be {dtype}.")
            stored = stored.view(dtype)
        array = jnp.asarray(stored)
        if array.dtype != dtype:
            raise ValueError(
                f"load: {entry['tensor']} is {dtype}, which jax turns into {array.dtype}. "
                "Set jax_enable_x64 to read it."
            )
        return array
    if kind == "key":
        return jax.random.wrap_key_data(_rebuild(entry["data"], name, tensors, used), impl=entry["impl"])
    if kind == "value":
        return entry["value"]
    if kind == "dict":
        return {key: _rebuild(v, _join(name, key), tensors, used) for key, v in entry["items"].items()}
    if kind in ("list", "tuple"):
        items = [_rebuild(v, _join(name, str(i)), tensors, used) for i, v in enumerate(entry["items"])]
        return items if kind == "list" else tuple(items)
    if kind == "qtensor":
        return _rebuild_qtensor(entry, name, tensors, used)
    raise ValueError(f"load: {name or 'the tree'} is described as {kind!r}, which this version does not know.")


def _rebuild_qtensor(entry: dict[str, Any], name: str, tensors: dict[str, np.ndarray], used: set[str]) -> QTensor:
    try:
        meta = Meta.from_dict(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {name or 'the value'} is not described as a QTensor: {error}.") from error
    described = [entry["leaves"].get(leaf) for leaf in LEAVES]
    leaves: list[Any] = [
        None if one is None else _rebuild(one, f"{name}.{leaf}", tensors, used)
        for leaf, one in zip(LEAVES, described, strict=True)
    ]
    qt = QTensor.tree_unflatten(meta, leaves)
    try:
        problem = _shape_problem(qt, tuple(entry["shape"]))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = f"its geometry contradicts itself, {error}"
    if problem:
        raise ValueError(f"load: {name or 'the value'} is damaged: {problem}.")
    return qt


def _shape_problem(qt: QTensor, shape: tuple[int, ...]) -> str | None:
    """None if every leaf has the shape and dtype its description implies, else what is wrong."""
    geometry, fmt = qt.meta.geometry, qt.spec.fmt
    batch = shape[: len(shape) - len(geometry.shape)]
    if shape[len(batch) :] != geometry.shape:
        return f"shape {list(shape)} does not end in {list(geometry.shape)}"
    ndim = len(geometry.shape)
    if sorted(geometry.order) != list(range(-ndim, 0)) or not 0 <= geometry.num_contracted <= ndim:
        return f"order {list(geometry.order)} of {ndim} axes, {geometry.num_contracted} contracted, contradicts itself"
    if not geometry.follows(qt.spec.granularity):
        return f"its spec says {qt.spec.granularity}, its geometry blocks of {list(geometry.block_shape)}"
    if not jnp.issubdtype(jnp.dtype(qt.meta.dtype), jnp.floating):
        return f"it dequantizes to {qt.meta.dtype}, which is no float"
    dtype = fmt.code_dtype if qt.meta.packing is formats.Packing.NONE else np.dtype(np.uint8)
    wanted = {"data": ((*batch, *qt.meta.stored_shape), dtype), "scale": ((*batch, *geometry.num_blocks), None)}
    if qt.spec.symmetric == (qt.zero_point is not None) or (qt.spec.offset is None) == (qt.offset is not None):
        return "its spec and its leaves disagree on zero point or offset"
    may_have = qt.spec.scale_rule == "ttq" or fmt.kind == "codebook"  # k-means finds a table for every array
    if (qt.spec.scale_rule == "ttq" and qt.codebook is None) or (qt.codebook is not None and not may_have):
        return "its spec and its leaves disagree on a codebook"
    if qt.zero_point is not None:
        wanted["zero_point"] = (wanted["scale"][0], fmt.code_dtype)
    if qt.codebook is not None:
        wanted["codebook"] = ((*wanted["scale"][0], fmt.codes().size), np.dtype(np.float32))
    if qt.input_range is not None:
        if qt.meta.activation is None:
            return "it has a range of inputs, and leaves them in floats"
        wanted["input_range"] = ((*batch, 2), np.dtype(np.float32))
    if isinstance(qt.spec.scale, QuantSpec) != isinstance(qt.scale, QTensor):
        return "its spec and its scale disagree"
    if isinstance(qt.spec.scale, str):
        wanted["scale"] = (wanted["scale"][0], jnp.dtype(qt.spec.scale))
    elif isinstance(qt.scale, QTensor) and qt.scale.spec != qt.spec.scale:
        return "its spec and its scale's spec differ"
    for leaf, (sizes, kind) in wanted.items():
        found = getattr(qt, leaf)
        if tuple(found.shape) != sizes or (kind is not None and found.dtype != kind):
            return f"{leaf} is {found.dtype}{list(found.shape)}, expected {kind or ''}{list(sizes)}"
    return None


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or "jaxq" not in metadata:
        raise ValueError(
            f"load: {path} was not written by jaxq.save. For a Hugging Face directory use jaxq.models.load."
        )
    try:
        header = json.loads(metadata["jaxq"])
    except ValueError as error:
        raise ValueError(f"load: the metadata of {path} is damaged: {error}.") from error
    if not isinstance(header, dict):
        raise ValueError(f"load: the metadata of {path} is damaged: a {type(header).__name__} instead of an object.")
    if not isinstance(header.get("transforms", {}), dict):
        raise ValueError(f"load: the metadata of {path} is damaged: transforms are {header['transforms']!r}.")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"load: {path} has format version {header.get('version')}; this jaxq reads version {FORMAT_VERSION}."
        )
    return header


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


# Models. Flax is imported only where a model is at hand.


def _is_module(value: Any) -> bool:
    import sys

    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.State)


def _parameters(model: Any) -> dict[str, Any]:
    """Path and value of every variable of a model or of a state; shared ones once."""
    from flax import nnx

    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(model) if isinstance(model, nnx.State) else nnx.iter_graph(model):
        name = "/".join(map(str, path))
        if name in found:
            raise ValueError(f"save: two parameters have the path {name!r}. Rename an attribute.")
        if isinstance(variable, nnx.Variable):
            found[name] = variable.get_value()
        elif isinstance(model, nnx.State):  # of nnx.pure or nnx.to_arrays: values without their Variables
            found[name] = variable
    return found


def _transforms(model: Any) -> dict[str, str] | None:
    """What inputs of layers go through at run time, by path; None of a state, which cannot tell."""
    from flax import nnx

    from jaxq.models._transforms import input_transforms

    return input_transforms(model) if isinstance(model, nnx.Module) else None


def _into_model(model: Any, found: dict[str, Any], path: Path, transforms: dict[str, str] | None) -> Any:
    from flax import nnx

    from jaxq import nn

    if not isinstance(model, nnx.Module):
        raise TypeError(f"load: into= must be a flax nnx module, got {type(model).__name__}.")
    copy = nnx.clone(model)
    variables = {"/".join(map(str, p)): v for p, v in nnx.iter_graph(copy) if isinstance(v, nnx.Variable)}
    problems = [f"  {name}: in the model, missing from the file" for name in variables if name not in found]
    problems += [f"  {name}: in the file, not in the model" for name in found if name not in variables]
    own = _transforms(copy) or {}
    theirs = own if transforms is None else transforms
    for name in sorted({*own, *theirs}):
        mine, saved = own.get(name, "nothing"), theirs.get(name, "nothing")
        if mine != saved:
            remedy = "Pass a model of the same jaxq.models.rotate(..., online=...)"
            problems.append(f"  {name}: its inputs go through {mine} in the model, {saved} in the file. {remedy}")
    layers: dict[int, list[tuple[Any, Any, str]]] = {}
    for layer_path, layer, kind in nn.find_layers(copy):
        layers.setdefault(id(getattr(layer, kind.weight)), []).append((layer, kind, layer_path))
    for name, value in found.items():
        if name not in variables:
            continue
        current = variables[name].get_value()
        if isinstance(current, QTensor):
            if not isinstance(value, QTensor) or _as_used(current) != _as_used(value):
                problems.append(f"  {name}: {_short(current)} in the model, {_short(value)} in the file")
        elif not isinstance(value, QTensor):
            if _short(current) != _short(value):
                problems.append(f"  {name}: {_short(current)} in the model, {_short(value)} in the file")
        elif (current.shape, current.dtype) != (value.shape, value.dtype):
            problems.append(f"  {name}: {_short(current)} in the model, {_short(value)} in the file")
        elif id(variables[name]) not in layers:
            problems.append(f"  {name}: quantized in the file, but in no layer jaxq knows")
        else:
            for layer, kind, _ in layers[id(variables[name])]:
                problem = kind.problem(layer) or _axes_problem(layer, kind, value)
                problems += [f"  {name}: {problem}"] if problem else []
    if problems:
        raise ValueError(f"load: {path} does not fit the model:\n" + "\n".join(problems))
    replaced: dict[int, Any] = {}
    for name, value in found.items():
        variable = variables[name]
        if isinstance(value, QTensor) and not isinstance(variable.get_value(), QTensor):
            quantized = replaced[id(variable)] = nn.QuantizedParam(value)
            for layer, kind, _ in layers[id(variable)]:
                nn.put_weight(layer, kind, quantized)
        else:
            variable.set_value(value)
    nn.replace_variables(copy, replaced)
    return copy


def _axes_problem(layer: Any, kind: Any, value: QTensor) -> str | None:
    from jaxq import nn

    try:
        contracting, batch = nn.weight_axes(layer, kind)
    except ValueError as error:
        return str(error)
    if set(contracting) != set(value.meta.geometry.contracted) or len(batch) != len(value.batch_shape):
        return f"{value!r} does not contract the layer's axes {list(contracting)}"
    return None


def _as_used(qt: QTensor) -> tuple:
    """What two QTensors must share to take each other's place: all but the order of packing."""
    geometry = dataclasses.replace(qt.meta.geometry, multiple=1)
    return qt.shape, qt.spec.replace(packing=None), geometry, qt.meta.dtype, qt.meta.activation, qt.meta.outliers


def _short(value: Any) -> str:
    if isinstance(value, QTensor):
        return f"{value!r} of {value.spec.granularity}"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return str(jax.tree.map(_short, value, is_leaf=lambda v: isinstance(v, QTensor)))
    return type(value).__name__
