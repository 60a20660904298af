"""Writes a safetensors file tensor by tensor, when sizes are not known before.

The header of a safetensors file comes first and lists all tensors. It may end with
spaces. So space for it is reserved, and it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.files._checksums import checksums_of, with_texts
from jaxq.files._new_file import NewFile
from jaxq.files._write_tensors import check_name, dtype_name, tensor_bytes

_ALIGNMENT = 8
_DIGITS_PER_BYTE = 8 / (1 << 20)  # of the checksums


class TensorStream:
    """A safetensors file that grows by one tensor at a time.

    Every tensor starts at a multiple of its item size. A tensor whose bytes are no
    multiple of 8 is kept in memory and written last.

    Args:
      file: an empty file.
      names: of all tensors that may come.
      most_bytes: of all tensors together.
    """

    def __init__(self, file: NewFile, names: list[str], most_bytes: int):
        self._file = file
        entries = sum(400 + 14 * len(name.encode()) for name in names)
        reserved = 4096 + entries + int(2 * _DIGITS_PER_BYTE * most_bytes)
        self._reserved = -(-reserved // _ALIGNMENT) * _ALIGNMENT
        self._end = 0
        self._entries: dict[str, Any] = {}
        self._texts: dict[str, str] = {}
        self._last: dict[str, np.ndarray] = {}
        file.write(bytes(8 + self._reserved))

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor."""
        check_name(name)
        if tensor.nbytes % _ALIGNMENT:
            self._last[name] = tensor
        else:
            self._write(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> bytes:
        """Writes the last tensors and the header, and returns the header."""
        for name in sorted(
            self._last, key=lambda name: (-self._last[name].dtype.itemsize, name)
        ):
            self._write(name, self._last[name])
        self._last.clear()
        described = {
            name: (entry["dtype"], entry["shape"])
            for name, entry in self._entries.items()
        }
        texts = with_texts(metadata, described, self._texts)
        entries = {"__metadata__": dict(sorted(texts.items())), **self._entries}
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(header) <= self._reserved
        header = header.ljust(self._reserved)
        self._file.write_start(self._reserved.to_bytes(8, "little") + header)
        return header

    def _write(self, name: str, tensor: np.ndarray) -> None:
        dtype, shape = dtype_name(tensor), list(tensor.shape)
        data = tensor_bytes(tensor)
        start, self._end = self._end, self._end + len(data)
        offsets = [start, self._end]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._texts[name] = checksums_of(name, dtype, shape, data)
        self._file.write(data)
