"""Reads and writes the container of GGUF files (llama.cpp), versions 2 and 3.

    "GGUF" | version u32 | number of tensors u64 | number of values u64
    values:  name | type u32 | value
    tensors: name | number of axes u32 | sizes u64 | type u32 | offset u64
    zeros up to the alignment | the bytes of the tensors

Numbers are little endian. A string has its length (u64) before its bytes. The first
size of a tensor is that of its contiguous axis, so shapes here are in reversed order.
Every tensor starts at a multiple of the alignment.

A file may be damaged, or written by a stranger. As for safetensors, it is read and not
mapped, every error names the file, and memory is only taken for bytes that the file
has.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxq.files._paths import naming_errors
from jaxq.files._read_tensors import RefusedFile
from jaxq.files._write_tensors import Writable

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MOST_ALIGNMENT = 1 << 20
_MOST_HEADER_BYTES = 1 << 28
_MOST_AXES = 4
_MOST_BYTES = 1 << 62

# Types of values. The struct code of each number, and the names of the others.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _I32, _F32 = 4, 5, 6

# Types of tensors: the name, the numbers of a block and the bytes of a block.
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "BF16": (30, 1, 2),
    "MXFP4": (39, 32, 17),
}
_TYPES = {number: name for name, (number, _, _) in BLOCKS.items()}
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


class GgufTensor(NamedTuple):
    """What a file says about one of its tensors.

    Attributes:
      type: its name, such as "F32" or "Q4_0".
      shape: of the numbers, with the contiguous axis last.
      start: the position of its first byte in the file.
      stop: the position after its last byte.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array that `GgufFile.read` returns."""
        return _DTYPES.get(self.type, np.dtype(np.uint8))

    @property
    def nbytes(self) -> int:
        """The number of bytes of the array."""
        return self.stop - self.start

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of this array: blocks are bytes along the last axis."""
        return array_shape(self.type, self.shape)


def array_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the array of a tensor. Blocks are bytes along the last axis."""
    if kind in _DTYPES:
        return shape
    _, numbers, size = BLOCKS[kind]
    return (*shape[:-1], shape[-1] // numbers * size)


class GgufFile:
    """An open GGUF file.

    Args:
      path: the file.
      caller: the name that error messages begin with.

    Attributes:
      metadata: the values by name. An array of numbers is a numpy array, and an array
        of strings is a list.
      headers: the header of each tensor by name.

    Raises:
      RefusedFile: the file is damaged, or of another version.
      OSError: the file cannot be opened or read. The error names the file.
    """

    def __init__(self, path: Path, caller: str):
        self.path = path
        self._caller = caller
        with naming_errors(path, caller, "the file cannot be read"):
            self._file = open(path, "rb")  # noqa: SIM115
        try:
            self._size = self._file.seek(0, 2)
            self._file.seek(0)
            self.metadata, self.headers = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def read(self, name: str, entry: int | None = None) -> np.ndarray:
        """The array of a tensor: numbers, or the bytes of blocks.

        Args:
          name: of the tensor.
          entry: the index along the first axis; None reads all entries.

        Raises:
          RefusedFile: the file was cut since it was opened.
        """
        header = self.headers[name]
        start, num_bytes, shape = header.start, header.nbytes, header.array_shape
        if entry is not None:
            num_bytes //= shape[0]
            start += entry * num_bytes
            shape = shape[1:]
        self._file.seek(start)
        data = np.empty(num_bytes, np.uint8)
        view = data.data
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise self.damaged("its end is missing, so it was cut")
            view = view[count:]
        array = data.view(header.dtype.newbyteorder("<")).reshape(shape)
        return array.astype(header.dtype, copy=False)

    def damaged(self, reason: str) -> RefusedFile:
        """The error for a file that is not as it was written."""
        return RefusedFile(
            f"{self._caller}: {self.path} is not a whole GGUF file: {reason}. Download "
            "it again."
        )

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic = self._take(4)
        if magic != _MAGIC:
            raise self.damaged(f"it begins with {magic!r}")
        version = self._number(_U32)
        if version not in _VERSIONS:
            raise RefusedFile(
                f"{self._caller}: {self.path} has version {version!r:.40} of GGUF, "
                f"expected one of {_VERSIONS}."
            )
        num_tensors, num_values = self._count("tensors", 24), self._count("values", 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            name = self._string()
            if name in metadata:
                raise self.damaged(f"the value {name!r:.80} is there twice")
            metadata[name] = self._value(name, self._number(_U32), is_inner=False)
        infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in infos:
                raise self.damaged(f"the tensor {name!r:.80} is there twice")
            infos[name] = self._tensor_info(name)
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT:
            raise self.damaged(f"{_ALIGNMENT} is {alignment!r:.40}")
        data_start = -(-self._file.tell() // alignment) * alignment
        return metadata, self._headers(infos, alignment, data_start)

    def _headers(
        self,
        infos: Mapping[str, tuple[str, tuple[int, ...], int]],
        alignment: int,
        data_start: int,
    ) -> dict[str, GgufTensor]:
        """The headers of all tensors, which must not share bytes."""
        headers = {}
        for name, (kind, shape, offset) in infos.items():
            _, numbers, size = BLOCKS[kind]
            if shape and shape[-1] % numbers:
                raise self.damaged(
                    f"{name} has rows of {shape[-1]} numbers, no whole number of "
                    f"{kind} blocks of {numbers}"
                )
            num_bytes = math.prod(shape) // numbers * size
            start = data_start + offset
            if offset % alignment or start + num_bytes > self._size:
                raise self.damaged(
                    f"{name} has {num_bytes} bytes at {start}, and the file has "
                    f"{self._size} bytes and the alignment {alignment}"
                )
            headers[name] = GgufTensor(kind, shape, start, start + num_bytes)
        end = data_start
        for name, header in sorted(headers.items(), key=lambda item: item[1][2:]):
            if header.start < end:
                raise self.damaged(f"{name} begins inside another tensor")
            end = header.stop
        return headers

    def _tensor_info(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """The type, the shape and the offset of a tensor."""
        num_axes = self._number(_U32)
        if num_axes > _MOST_AXES:
            raise self.damaged(f"{name} has {num_axes} axes")
        shape = tuple(self._number(10) for _ in range(num_axes))[::-1]
        number, offset = self._number(_U32), self._number(10)
        if number not in _TYPES:
            raise RefusedFile(
                f"{self._caller}: {self.path}: {name} has the type {number}, which "
                f"jaxq does not read. It reads {', '.join(BLOCKS)}."
            )
        if math.prod(size or 1 for size in shape) > _MOST_BYTES:
            raise self.damaged(f"{name} has the shape {list(shape)}")
        if offset > _MOST_BYTES:
            raise self.damaged(f"{name} has the offset {offset}")
        return _TYPES[number], shape, offset

    def _value(self, name: str, kind: int, *, is_inner: bool) -> Any:
        if kind in _NUMBERS:
            return self._number(kind)
        if kind == _BOOL:
            byte = self._take(1)[0]
            if byte > 1:
                raise self.damaged(f"{name:.80} is neither true nor false")
            return bool(byte)
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or is_inner:
            raise self.damaged(f"{name:.80} has the unknown type {kind}")
        item_kind = self._number(_U32)
        if item_kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[item_kind]).newbyteorder("<")
            count = self._count(name, dtype.itemsize)
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        count = self._count(name, 8 if item_kind == _STRING else 1)
        return [self._value(name, item_kind, is_inner=True) for _ in range(count)]

    def _count(self, name: str, least_bytes: int) -> int:
        """The number of items, each of which has at least so many bytes."""
        count = self._number(10)
        if count * least_bytes > self._size - self._file.tell():
            raise self.damaged(f"{name:.80} has {count} items, more than fit the file")
        return count

    def _number(self, kind: int) -> Any:
        code = f"<{_NUMBERS[kind]}"
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        data = self._take(self._count("a text", 1))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not UTF-8: {error}") from error

    def _take(self, size: int) -> bytes:
        if self._file.tell() + size > min(self._size, _MOST_HEADER_BYTES):
            raise self.damaged("its header ends too early, or is too long")
        return self._file.read(size)


class NewTensor(NamedTuple):
    """A tensor that is written.

    Attributes:
      type: its name, such as "F32" or "Q4_0".
      shape: of the numbers.
      read: computes the array, as `GgufFile.read` returns it.
    """

    type: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_gguf(
    file: Writable, metadata: Mapping[str, Any], tensors: Mapping[str, NewTensor]
) -> None:
    """Writes a GGUF file of version 3, tensor by tensor.

    Args:
      file: an empty file, such as a `NewFile`.
      metadata: str, bool, int, float, and lists of str, int or float by name.
      tensors: by name.
    """
    parts = [
        _MAGIC,
        struct.pack("<IQQ", 3, len(tensors), len(metadata)),
        *(_string(name) + _value(value) for name, value in metadata.items()),
    ]
    offset, starts = 0, {}
    for name, tensor in tensors.items():
        number, numbers, size = BLOCKS[tensor.type]
        starts[name] = offset
        parts.append(_string(name) + struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
        parts.append(struct.pack("<IQ", number, offset))
        offset += _aligned(math.prod(tensor.shape) // numbers * size)
    header = b"".join(parts)
    file.write(header + b"\0" * (_aligned(len(header)) - len(header)))
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.read())
        assert array.shape == array_shape(tensor.type, tensor.shape), name
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = little_endian.reshape(-1).view(np.uint8)
        file.write(data.data)
        file.write(b"\0" * (_aligned(data.size) - data.size))


def _aligned(size: int) -> int:
    return -(-size // _DEFAULT_ALIGNMENT) * _DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """The type and the bytes of a value."""
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _U32
        # llama.cpp reads the types of tokens as signed numbers.
        kind = _I32 if kind == _U32 else kind
        items = b"".join(_item(kind, item) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind = _kind(value)
    return struct.pack("<I", kind) + _item(kind, value)


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return _STRING
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _U32 if value >= 0 else _I32
    return _F32


def _item(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind == _BOOL:
        return struct.pack("<?", value)
    return struct.pack(f"<{_NUMBERS[kind]}", value)
