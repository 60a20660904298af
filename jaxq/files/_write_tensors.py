"""Writes a safetensors file.

A file is `[8 bytes: length of the header] [header, JSON] [bytes of the tensors]`. The
writer of the safetensors package puts the metadata in another order in each process,
and it opens the file by its name. This writer writes the same bytes for the same
tensors, to a file that is already open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxq.files._checksums import with_checksums

# Names of dtypes in safetensors files.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writable(Protocol):
    """An open file."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_tensors(
    file: Writable, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors, metadata and checksums to an open file, as a safetensors file.

    Args:
      file: an empty file, such as a `NewFile`.
      tensors: arrays by name, of the dtypes in `DTYPES`.
      metadata: texts by name.

    Raises:
      ValueError: a name is "__metadata__", or is not valid Unicode.
    """
    # Wide numbers first: then every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        check_name(name)
    described = {}
    for name in names:
        tensor = tensors[name]
        described[name] = (dtype_name(tensor), tensor.shape, tensor_bytes(tensor))
    metadata = with_checksums(metadata, described)
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape, data) in described.items():
        start, end = end, end + len(data)
        offsets = [start, end]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for _, _, data in described.values():
        file.write(data)


def check_name(name: str) -> None:
    """Raises ValueError if no tensor can have this name."""
    if name == "__metadata__":
        raise ValueError(
            "a tensor has the name '__metadata__', which safetensors reserves."
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name {name!r} of a tensor has half of a character, which UTF-8 does "
            "not have. Choose another name."
        ) from error


def dtype_name(tensor: np.ndarray) -> str:
    """The name of a tensor's dtype in safetensors files."""
    return _NAMES[tensor.dtype.newbyteorder("=")]


def tensor_bytes(tensor: np.ndarray) -> memoryview:
    """The bytes of a tensor in C order, little-endian."""
    little_endian = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8).data
