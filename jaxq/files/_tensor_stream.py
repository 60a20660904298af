"""Writes a safetensors file tensor by tensor, when sizes are not known before.

The header of a safetensors file comes first and lists all tensors. It may end with
spaces. So space for it is reserved, and it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.files._checksums import CHUNK, checksum, checksums_of, with_texts
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
        self._growing: _GrowingTensor | None = None
        self._waiting: dict[str, list[np.ndarray]] = {}
        file.write(bytes(8 + self._reserved))

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor."""
        check_name(name)
        if tensor.nbytes % _ALIGNMENT:
            self._last[name] = tensor
        else:
            self._write(name, tensor)

    def add_rows(self, name: str, rows: np.ndarray, num_rows: int) -> None:
        """Appends rows of a tensor, which are entries of its first axis, in order.

        Only one tensor grows in the file. Until it is whole, the rows of other tensors
        wait in memory. So the largest tensor should come first.

        Args:
          name: of the tensor.
          rows: the next rows, `[rows, ...]`.
          num_rows: the number of rows of the whole tensor. It is the same for all
            tensors that are not whole yet.
        """
        check_name(name)
        row_bytes = rows.nbytes // max(1, len(rows))
        is_first = self._growing is None and name not in self._waiting
        if is_first and num_rows * row_bytes % _ALIGNMENT == 0:
            shape = [num_rows, *rows.shape[1:]]
            self._growing = _GrowingTensor(name, dtype_name(rows), shape)
        if self._growing is not None and self._growing.name == name:
            data = tensor_bytes(rows)
            self._growing.add(data)
            self._file.write(data)
            if self._growing.num_rows(row_bytes) == num_rows:
                self._complete(self._growing)
        else:
            self._waiting.setdefault(name, []).append(rows)
        if self._growing is None:
            self._add_waiting(num_rows)

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

    def _complete(self, tensor: _GrowingTensor) -> None:
        """Lists a tensor whose rows are all in the file."""
        self._list(tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes)
        self._texts[tensor.name] = tensor.checksums()
        self._growing = None

    def _add_waiting(self, num_rows: int) -> None:
        """Writes the tensors whose rows are all in memory."""
        for name, parts in list(self._waiting.items()):
            if sum(map(len, parts)) == num_rows:
                del self._waiting[name]
                self.add(name, np.concatenate(parts))

    def _list(self, name: str, dtype: str, shape: list[int], num_bytes: int) -> None:
        """Adds a tensor to the header. Its bytes are the next ones in the file."""
        start, self._end = self._end, self._end + num_bytes
        offsets = [start, self._end]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    def _write(self, name: str, tensor: np.ndarray) -> None:
        dtype, shape = dtype_name(tensor), list(tensor.shape)
        data = tensor_bytes(tensor)
        self._list(name, dtype, shape, len(data))
        self._texts[name] = checksums_of(name, dtype, shape, data)
        self._file.write(data)


class _GrowingTensor:
    """A tensor that is written in parts, with the checksums of its chunks.

    Attributes:
      name: of the tensor.
      dtype: the name of the dtype in the file.
      shape: of the whole tensor.
      num_bytes: the number of bytes so far.
    """

    def __init__(self, name: str, dtype: str, shape: list[int]):
        self.name, self.dtype, self.shape = name, dtype, shape
        self.num_bytes = 0
        self._texts: list[str] = []
        self._rest = bytearray()  # the part of a chunk that is not complete

    def add(self, data: memoryview) -> None:
        """Counts the next bytes."""
        self.num_bytes += len(data)
        self._rest += data
        num_whole = len(self._rest) // CHUNK
        for _ in range(num_whole):
            self._texts.append(self._checksum(self._rest[:CHUNK]))
            del self._rest[:CHUNK]

    def num_rows(self, row_bytes: int) -> int:
        """How many rows were added."""
        return self.num_bytes // max(1, row_bytes)

    def checksums(self) -> str:
        """What `checksums_of` returns for the whole tensor."""
        last = [self._checksum(self._rest)] if self._rest else []
        return "".join([*self._texts, *last])

    def _checksum(self, chunk: bytearray) -> str:
        number = len(self._texts)
        return checksum(self.name, self.dtype, self.shape, number, memoryview(chunk))
