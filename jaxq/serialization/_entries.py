"""Turns values into JSON entries and tensors, and back.

`EntryWriter` describes a value by a JSON entry and collects its arrays. `EntryReader`
rebuilds the value. The field "is" of an entry says which kind of value it describes:

  "array"    "tensor" (its name in the file), "dtype", and "numpy": true if it was not
             a jax array
  "key"      a PRNG key: "impl", and "data" (the entry of an array)
  "value"    "value": None, a bool, a number or a string
  "dict"     "items": entries by key. Other pytree nodes are written as dicts too.
  "list"     "items": entries
  "tuple"    "items": entries
  "box"      a linen box of metadata: "box" (the name of its class), "names" and "rules"
             of axes, and "value" (the entry of an array or a QTensor)
  "qtensor"  "shape", the fields of its `Meta`, and "leaves": entries by name
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxq.files import RefusedFile
from jaxq.processes import put
from jaxq.qtensor import (
    LEAVES,
    Meta,
    QTensor,
    check_leaves,
    is_nnx_module,
    is_nnx_variable,
    relayout,
    without_padding,
)
from jaxq.serialization._boxes import box_fields, boxed, name_of_value
from jaxq.serialization._damage import NATIVE, damage_of, dtype_of
from jaxq.serialization._read_shards import Index, read_shards
from jaxq.sharding import is_box, value_in_box

# safetensors has no name for some dtypes of jax. So an array of another dtype than
# `NATIVE`, such as bfloat16, is stored as unsigned integers of the same width, and its
# entry names the dtype.
_CARRIERS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct)


class EntryWriter:
    """Describes values by JSON entries, and collects their arrays in `tensors`.

    Args:
      caller: the function that errors name.
      fetch: returns the numbers of an array, or None if another process writes the
        file. `tensors` then has an empty array. With `fetch=None` no numbers are read,
        arrays may be `jax.ShapeDtypeStruct`s, and codes are described in their layout
        on the device.

    Attributes:
      tensors: the arrays by name.
      shapes: their shapes by name.
    """

    def __init__(self, caller: str, fetch: Callable[[Any], np.ndarray | None] | None):
        self._caller = caller
        self._shapes_only = fetch is None
        self._fetch = fetch or _no_numbers
        self.tensors: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def describe(self, value: Any, path: str) -> dict[str, Any]:
        """The entry of `value`. The names of its tensors start with `path`."""
        if _is_qtensor_of_arrays(value):
            return self._describe_qtensor(value, path)
        if is_nnx_variable(value):
            return self.describe(value.get_value(), path)
        if _is_key(value):
            data = self.describe(jax.random.key_data(value), path)
            return {"is": "key", "impl": str(jax.random.key_impl(value)), "data": data}
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return self._describe_array(value, path)
        if self._shapes_only and isinstance(value, jax.ShapeDtypeStruct):
            return self._describe_array(value, path)
        if value is None or isinstance(value, bool | int | float | str):
            return {"is": "value", "value": value}
        if isinstance(value, dict):
            return self._describe_dict(value, path)
        # Named tuples: the statistics of layers, the states of observers.
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            named_tuple: Any = value
            return self._describe_dict(named_tuple._asdict(), path)
        if type(value) in (list, tuple):
            items = [
                self.describe(v, _child_path(path, str(i))) for i, v in enumerate(value)
            ]
            return {"is": type(value).__name__, "items": items}
        if is_box(value):
            fields = box_fields(value)
            if fields is not None:
                inner = value_in_box(value)
                name = name_of_value(isinstance(inner, QTensor))
                entry = self.describe(inner, _child_path(path, name))
                return {"is": "box", **fields, "value": entry}
        parts = None if is_nnx_module(value) else _parts(value)
        if parts is not None:
            return self._describe_dict(parts, path)
        raise TypeError(
            f"{self._caller}: {path or 'the tree'} has type {type(value).__name__}, "
            "which cannot be saved. A tree may hold pytrees of arrays, QTensors, "
            "numbers, strings and None. Save an nnx module alone, or its nnx.state."
        )

    def _describe_array(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{self._caller}: {path or 'the value'} is a masked array. A file has "
                "no masks. Save value.filled(...), or data and mask as two arrays."
            )
        dtype = value.dtype
        stored_dtype = dtype if dtype.name in NATIVE else None
        # isbuiltin == 2: a dtype of another package, here ml_dtypes (bfloat16, float8).
        if stored_dtype is None and dtype.isbuiltin == 2:
            stored_dtype = _CARRIERS.get(dtype.itemsize)
        if stored_dtype is None:
            raise TypeError(
                f"{self._caller}: {path or 'the value'} has dtype {dtype}, which "
                "cannot be saved. Convert it to a dtype that jax has."
            )
        tensor = path or "value"
        # Two values can have one path: {"a/b": x, "a": {"b": y}}. The name
        # "__metadata__" is reserved by safetensors.
        while tensor in self.tensors or tensor == "__metadata__":
            tensor += "'"
        self.shapes[tensor] = tuple(value.shape)
        array = self._fetch(value)
        if array is None:
            array = np.empty(0, dtype)
        stored = array.view(stored_dtype)
        self.tensors[tensor] = np.ascontiguousarray(stored).reshape(array.shape)
        entry = {"is": "array", "tensor": tensor, "dtype": dtype.name}
        return entry if isinstance(value, _ARRAYS) else {**entry, "numpy": True}

    def _describe_dict(self, value: dict, path: str) -> dict[str, Any]:
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{self._caller}: the keys of {path or 'the tree'} must be "
                    f"strings, got {key!r}. Convert them with str."
                )
            if not _is_text(key):
                raise ValueError(
                    f"{self._caller}: the key {key!r} of {path or 'the tree'} has half "
                    "of a character, which UTF-8 does not have. Choose another key."
                )
        # jax sorts the keys of dicts too, so equal trees give equal bytes.
        items = {
            key: self.describe(v, _child_path(path, key))
            for key, v in sorted(value.items())
        }
        return {"is": "dict", "items": items}

    def _describe_qtensor(self, qt: QTensor, path: str) -> dict[str, Any]:
        check_leaves(qt, self._caller, path)
        # The layout "columns" is for TPU kernels. A file is for every platform.
        if not self._shapes_only:
            qt = relayout(qt, "rows")
        leaves = {}
        for name in LEAVES:
            leaf = getattr(qt, name)
            leaf_path = f"{path or 'value'}.{name}"
            leaves[name] = None if leaf is None else self.describe(leaf, leaf_path)
        shape = list(qt.shape)
        return {"is": "qtensor", "shape": shape, **qt.meta.to_dict(), "leaves": leaves}


class TensorSource(Protocol):
    """Tensors by name: an open `TensorFile`, or arrays in memory.

    `headers` has an object with a `shape` for each tensor.
    """

    @property
    def headers(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> np.ndarray: ...

    def read_parts(
        self, name: str, indices: Sequence[Index]
    ) -> Iterable[tuple[int, np.ndarray]]: ...

    def damaged(self, reason: str) -> RefusedFile: ...

    def refused(self, reason: str) -> RefusedFile: ...


class EntryReader:
    """Rebuilds values from JSON entries and the tensors of an open file.

    `used` collects the names of the tensors that were read. Every error is a
    `RefusedFile`, which names the file and the path of the value.

    Args:
      file: the open file, or arrays in memory.
      place: `place(path, value)` returns a value on the devices where it belongs, or
        None.
      shapes_only: rebuild values with a `jax.ShapeDtypeStruct` in place of each array,
        with the sharding of `rebuild(at=)`. No tensor is read.
    """

    def __init__(
        self,
        file: TensorSource,
        place: Callable[[str, Any], Any] | None = None,
        *,
        shapes_only: bool = False,
    ):
        self._file = file
        self._place = place
        self._shapes_only = shapes_only
        self.used: set[str] = set()
        # Paths of QTensors with codes for the padding of blocks. Only files of earlier
        # versions have them.
        self.padded: set[str] = set()

    def rebuild(self, entry: Any, path: str, at: Any = None) -> Any:
        """The value from which `EntryWriter.describe` made `entry`.

        Args:
          entry: the JSON entry.
          path: of the value, for errors.
          at: the value with a `jax.sharding.Sharding` in place of each array, of which
            only the parts of this process are read. None in place of an array or a
            tree reads whole arrays.
        """
        kind = entry.get("is") if isinstance(entry, dict) else None
        rebuild = _REBUILDERS.get(kind) if isinstance(kind, str) else None
        if rebuild is None:
            raise self._file.refused(
                f"{path or 'the tree'} is described as {kind!r:.80}, which this "
                "version of jaxq does not know. Use a newer version"
            )
        try:
            value = rebuild(self, entry, path, at)
        except RefusedFile:
            raise
        # A damaged entry can miss any field, or hold a value of any type.
        except (
            *(ArithmeticError, AttributeError, LookupError),
            *(SyntaxError, TypeError, ValueError),
        ) as error:
            reason = repr(error) if isinstance(error, LookupError) else str(error)
            raise self._file.damaged(
                f"the metadata of {path or 'the tree'} are wrong: {reason}"
            ) from error
        return value if self._place is None else self._place(path, value)

    def _rebuild_key(self, entry: dict[str, Any], path: str, at: Any) -> Any:
        data = self.rebuild(entry["data"], path, at)
        if not isinstance(data, _ARRAYS):
            raise TypeError("the data of a key must be an array")

        def wrap(data: Any) -> jax.Array:
            return jax.random.wrap_key_data(data, impl=entry["impl"])

        return jax.eval_shape(wrap, data) if self._shapes_only else wrap(data)

    def _rebuild_value(self, entry: dict[str, Any], path: str, at: Any) -> Any:
        value = entry["value"]
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise TypeError(f"a value must be a number or a text, got {value!r:.80}")
        return value

    def _rebuild_dict(
        self, entry: dict[str, Any], path: str, at: Any
    ) -> dict[str, Any]:
        items = entry["items"]
        if not isinstance(items, dict):
            raise TypeError(f"the items of a dict must be a dict, got {items!r:.80}")
        return {
            key: self.rebuild(item, _child_path(path, key), at and at[key])
            for key, item in items.items()
        }

    def _rebuild_list(self, entry: dict[str, Any], path: str, at: Any) -> list[Any]:
        items = entry["items"]
        if not isinstance(items, list):
            raise TypeError(f"the items of a list must be a list, got {items!r:.80}")
        return [
            self.rebuild(item, _child_path(path, str(i)), at and at[i])
            for i, item in enumerate(items)
        ]

    def _rebuild_tuple(
        self, entry: dict[str, Any], path: str, at: Any
    ) -> tuple[Any, ...]:
        return tuple(self._rebuild_list(entry, path, at))

    def _rebuild_box(self, entry: dict[str, Any], path: str, at: Any) -> Any:
        kind = entry["value"]["is"]
        if kind not in ("array", "qtensor"):
            raise TypeError(f"a box must hold an array, got a {kind!r:.80}")
        name = name_of_value(kind == "qtensor")
        value = self.rebuild(entry["value"], _child_path(path, name), value_in_box(at))
        return boxed(value, entry)

    def _rebuild_array(self, entry: dict[str, Any], path: str, at: Any) -> Any:
        name = entry["tensor"]
        if not isinstance(name, str) or name not in self._file.headers:
            raise self._file.damaged(
                f"the tensor {name!r:.80} is missing from the file"
            )
        # A small file could fill all memory if many entries named one tensor.
        if name in self.used:
            raise self._file.damaged(f"two values are described as the tensor {name!r}")
        self.used.add(name)
        dtype = dtype_of(entry["dtype"])
        if dtype is None:
            raise self._file.damaged(
                f"{name} has the unknown dtype {entry['dtype']!r:.80}"
            )
        jax_dtype = jax.dtypes.canonicalize_dtype(dtype)
        if jax_dtype != dtype and not entry.get("numpy"):
            raise self._file.refused(
                f"{name} is {dtype}, which jax turns into {jax_dtype}. Set "
                "jax_enable_x64 to read it"
            )
        if self._shapes_only:
            shape = tuple(self._file.headers[name].shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=at)
        # jax would round 64 bits to 32. So such an array stays on the host.
        if at is not None and jax_dtype == dtype:
            return self._read_shards(name, dtype, at)
        stored = self._in_dtype(name, self._file.read(name), dtype)
        return stored if jax_dtype != dtype else self._on_device(name, stored)

    def _in_dtype(self, name: str, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """An array of the file in the dtype that its entry names."""
        if stored.dtype == dtype:
            return stored
        carrier = _CARRIERS.get(dtype.itemsize)
        if dtype.name in NATIVE or stored.dtype != carrier:
            raise self._file.damaged(
                f"{name} is stored as {stored.dtype} but should be {dtype}"
            )
        return stored.view(dtype)

    def _on_device(self, name: str, stored: np.ndarray, device: Any = None) -> Any:
        """An array of the file on a device. None is the default device."""
        try:
            if device is None:
                return jnp.asarray(stored)
            return jax.device_put(stored, device)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # not the fault of the file
                raise
            raise self._file.refused(
                f"{name} is {stored.dtype}, which this platform cannot hold: {error}"
            ) from error

    def _read_shards(self, name: str, dtype: np.dtype, at: Sharding) -> jax.Array:
        """An array on several devices. Only the shards of this process are read."""

        def read(indices: Sequence[Index]) -> Iterator[tuple[int, np.ndarray]]:
            for place, shard in self._file.read_parts(name, indices):
                yield place, self._in_dtype(name, shard, dtype)

        def put(shard: np.ndarray, device: Any) -> jax.Array:
            return self._on_device(name, shard, device)

        return read_shards(self._file.headers[name].shape, dtype, at, read, put)

    def _rebuild_qtensor(self, entry: dict[str, Any], path: str, at: Any) -> QTensor:
        name = path or "the value"
        shape = entry["shape"]
        if not _is_shape(shape):
            raise self._file.damaged(f"{name} has the shape {shape!r:.80}")
        try:
            meta = Meta.from_dict(entry)
        except (TypeError, ValueError) as error:
            raise self._file.damaged(
                f"{name} is not described as a QTensor: {error}. A newer version of "
                "jaxq may have written it"
            ) from error
        # The shardings are those of codes without padding.
        part_at = None if path in self.padded else at
        leaves: list[Any] = []
        for leaf_name in LEAVES:
            leaf, leaf_path = entry["leaves"].get(leaf_name), f"{path}.{leaf_name}"
            leaf_at = getattr(part_at, leaf_name, None)
            leaves.append(
                None if leaf is None else self.rebuild(leaf, leaf_path, leaf_at)
            )
            _check_leaf(leaf_name, leaves[-1])
        dtype = dtype_of(meta.dtype)
        if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise self._file.refused(
                f"{name} dequantizes to {dtype}, which jax turns into float32. "
                "Set jax_enable_x64 to read it"
            )
        qt = QTensor.tree_unflatten(meta, leaves)
        try:
            # Earlier versions stored the padding of blocks too.
            if self._shapes_only:
                whole = jax.eval_shape(without_padding, qt)
                if whole.data.shape != qt.data.shape:
                    self.padded.add(path)
                    qt = whole
            else:
                qt = without_padding(qt)
            damage = damage_of(qt, tuple(shape), values=not self._shapes_only)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            damage = f"its geometry contradicts itself: {error}"
        if damage:
            raise self._file.damaged(f"{name} is wrong: {damage}")
        return qt if part_at is at else jax.tree.map(_put_whole, qt, at)


_REBUILDERS = {
    "array": EntryReader._rebuild_array,
    "key": EntryReader._rebuild_key,
    "value": EntryReader._rebuild_value,
    "dict": EntryReader._rebuild_dict,
    "list": EntryReader._rebuild_list,
    "tuple": EntryReader._rebuild_tuple,
    "box": EntryReader._rebuild_box,
    "qtensor": EntryReader._rebuild_qtensor,
}


def _no_numbers(array: Any) -> None:
    del array


def _put_whole(leaf: jax.Array, at: Sharding | None) -> jax.Array:
    """An array that this process has as a whole, on the devices of a sharding."""
    return leaf if at is None else put(leaf, at, compares=False)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and size >= 0 for size in value
    )


def _check_leaf(name: str, leaf: Any) -> None:
    """Raises TypeError unless a leaf of a QTensor has the type that it needs."""
    is_array = isinstance(leaf, _ARRAYS)
    if name == "data":
        is_valid = is_array
    elif name == "scale":
        is_valid = is_array or isinstance(leaf, QTensor)
    else:
        is_valid = is_array or leaf is None
    if not is_valid:
        raise TypeError(f"{name} is described as a {type(leaf).__name__}")


def _is_qtensor_of_arrays(value: Any) -> bool:
    """Whether `value` is a QTensor whose leaves are arrays.

    Optimizers of nnx models hold QTensors whose leaves are Variables.
    """
    return isinstance(value, QTensor) and not is_nnx_variable(value.data)


def _is_key(value: Any) -> bool:
    """Whether `value` is a jax array of PRNG keys."""
    return isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )


def _parts(value: Any) -> dict[str, Any] | None:
    """The children of a pytree node by name, or None if `value` is not a node."""
    children, _ = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda node: node is not value
    )
    if any(child is value for _, child in children):
        return None
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): child
        for path, child in children
    }


def _is_text(key: str) -> bool:
    """Whether UTF-8 can hold a string. It has no lone surrogates."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _child_path(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
