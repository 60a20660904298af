"""Values as JSON entries and tensors, and back: what stands in a file's metadata for each kind of value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor import LEAVES, Meta, QTensor, QuantSpec, relayout

# Dtypes safetensors has no name for travel as bytes of their width, named in the metadata.
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NATIVE = ("bool", *_INTEGERS, "float16", "float32", "float64")


def describe(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """JSON for `value`, its arrays put into `tensors` under names that start with `name`."""
    if isinstance(value, QTensor):
        return _describe_qtensor(value, name, tensors)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jnp.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            data = describe(jax.random.key_data(value), name, tensors)
            return {"is": "key", "impl": str(jax.random.key_impl(value)), "data": data}
        array = np.asarray(value)
        if array.dtype.name in _NATIVE:
            stored = array
        elif array.dtype.isbuiltin == 2 and array.dtype.itemsize in (
            1,
            2,
        ):  # ml_dtypes: bfloat16, float8, ...
            stored = array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
        else:
            raise TypeError(
                f"save: {name or 'the value'} has dtype {array.dtype}, which cannot be saved."
            )
        tensor = name or "value"
        while (
            tensor in tensors or tensor == "__metadata__"
        ):  # {"a/b": x, "a": {"b": y}}, or safetensors' own key
            tensor += "'"
        tensors[tensor] = np.ascontiguousarray(stored).reshape(array.shape)
        entry = {"is": "array", "tensor": tensor, "dtype": array.dtype.name}
        return entry if isinstance(value, jax.Array) else {**entry, "numpy": True}
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": "value", "value": value}
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise TypeError(
                f"save: keys of {name or 'the tree'} must be strings, got {odd[0]!r}."
            )
        return {
            "is": "dict",
            "items": {
                key: describe(v, _join(name, key), tensors) for key, v in value.items()
            },
        }
    if isinstance(value, tuple) and hasattr(
        value, "_asdict"
    ):  # LayerStats, the states of observers
        return describe(value._asdict(), name, tensors)  # pyright: ignore[reportAttributeAccessIssue]
    if type(value) in (list, tuple):
        items = [describe(v, _join(name, str(i)), tensors) for i, v in enumerate(value)]
        return {"is": type(value).__name__, "items": items}
    raise TypeError(
        f"save: {name or 'the tree'} is a {type(value).__name__}. Trees are dicts, lists and tuples of arrays, numbers "
        "and QTensors; models are flax nnx modules."
    )


def _describe_qtensor(
    qt: QTensor, name: str, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    qt = relayout(qt, "rows")  # columns are for one kind of machine, files for all
    leaves = {leaf: getattr(qt, leaf) for leaf in LEAVES}
    return {
        "is": "qtensor",
        "shape": list(qt.shape),
        **qt.meta.to_dict(),
        "leaves": {
            k: None if v is None else describe(v, f"{name or 'value'}.{k}", tensors)
            for k, v in leaves.items()
        },
    }


def rebuild(
    entry: Any, name: str, tensors: dict[str, np.ndarray], used: set[str]
) -> Any:
    """The value `_describe` described."""
    kind = entry.get("is") if isinstance(entry, dict) else None
    if kind == "array":
        if entry["tensor"] not in tensors:
            raise ValueError(
                f"load: the tensor {entry['tensor']!r} is missing from the file."
            )
        used.add(entry["tensor"])
        stored, dtype = tensors[entry["tensor"]], jnp.dtype(entry["dtype"])
        if stored.dtype != dtype:
            carrier = {1: np.uint8, 2: np.uint16}.get(dtype.itemsize)
            if dtype.name in _NATIVE or stored.dtype != carrier:
                raise ValueError(
                    f"load: {entry['tensor']} is stored as {stored.dtype} but should be {dtype}."
                )
            stored = stored.view(dtype)
        held = jax.dtypes.canonicalize_dtype(dtype)
        if held == dtype:
            return jnp.asarray(stored)
        if entry.get("numpy"):
            return stored  # as it was before: jax holds no such dtype here
        raise ValueError(
            f"load: {entry['tensor']} is {dtype}, which jax turns into {held}. Set jax_enable_x64 to read it."
        )
    if kind == "key":
        return jax.random.wrap_key_data(
            rebuild(entry["data"], name, tensors, used), impl=entry["impl"]
        )
    if kind == "value":
        return entry["value"]
    if kind == "dict":
        return {
            key: rebuild(v, _join(name, key), tensors, used)
            for key, v in entry["items"].items()
        }
    if kind in ("list", "tuple"):
        items = [
            rebuild(v, _join(name, str(i)), tensors, used)
            for i, v in enumerate(entry["items"])
        ]
        return items if kind == "list" else tuple(items)
    if kind == "qtensor":
        return _rebuild_qtensor(entry, name, tensors, used)
    raise ValueError(
        f"load: {name or 'the tree'} is described as {kind!r}, which this version does not know."
    )


def _rebuild_qtensor(
    entry: dict[str, Any], name: str, tensors: dict[str, np.ndarray], used: set[str]
) -> QTensor:
    try:
        meta = Meta.from_dict(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: {name or 'the value'} is not described as a QTensor: {error}."
        ) from error
    described = [entry["leaves"].get(leaf) for leaf in LEAVES]
    leaves: list[Any] = [
        None if one is None else rebuild(one, f"{name}.{leaf}", tensors, used)
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
    if (
        sorted(geometry.order) != list(range(-ndim, 0))
        or not 0 <= geometry.num_contracted <= ndim
    ):
        return f"order {list(geometry.order)} of {ndim} axes, {geometry.num_contracted} contracted, contradicts itself"
    if not geometry.follows(qt.spec.granularity):
        return f"its spec says {qt.spec.granularity}, its geometry blocks of {list(geometry.block_shape)}"
    if not jnp.issubdtype(jnp.dtype(qt.meta.dtype), jnp.floating):
        return f"it dequantizes to {qt.meta.dtype}, which is no float"
    dtype = (
        fmt.code_dtype
        if qt.meta.packing is formats.Packing.NONE
        else np.dtype(np.uint8)
    )
    wanted = {
        "data": ((*batch, *qt.meta.stored_shape), dtype),
        "scale": ((*batch, *geometry.num_blocks), None),
    }
    if qt.spec.symmetric == (qt.zero_point is not None) or (qt.spec.offset is None) == (
        qt.offset is not None
    ):
        return "its spec and its leaves disagree on zero point or offset"
    may_have = (
        qt.spec.scale_rule == "ttq" or fmt.kind == "codebook"
    )  # k-means finds a table for every array
    if (qt.spec.scale_rule == "ttq" and qt.codebook is None) or (
        qt.codebook is not None and not may_have
    ):
        return "its spec and its leaves disagree on a codebook"
    if qt.zero_point is not None:
        wanted["zero_point"] = (wanted["scale"][0], fmt.code_dtype)
    if qt.codebook is not None:
        wanted["codebook"] = (
            (*wanted["scale"][0], fmt.codes().size),
            np.dtype(np.float32),
        )
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


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key
