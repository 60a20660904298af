"""Reads a safetensors file that may be damaged, or written by a stranger.

The file is read, not mapped into memory: if another process cuts a mapped file, the
system kills the reader. Every error is a `RefusedFile` that names the file. Memory is
only allocated for bytes that the file has.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxq.files._checksums import CHUNK, Checksums, checksum, read_checksums
from jaxq.files._part_bytes import PartBytes
from jaxq.files._paths import naming_errors
from jaxq.files._write_tensors import DTYPES

METADATA = "__metadata__"
_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors package
_MOST_AXES = 64  # of a numpy array
_MOST_BYTES = 1 << 62
# Bits of the dtypes that files can have and numpy does not. They can be listed.
_OTHER_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
_BITS = _OTHER_BITS | {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}


class RefusedFile(ValueError):
    """A file is damaged, or cannot be read here. The error names the file."""


class TensorHeader(NamedTuple):
    """What a file says about one of its tensors.

    Attributes:
      dtype: its name in the file, such as "F32".
      shape: its shape.
      start: the position of its first byte in the file.
      stop: the position after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file.

    Args:
      path: the file.
      caller: the name that error messages begin with.
      verify: compare the checksums of what is read. A file without them is read
        unchecked.

    Attributes:
      headers: the header of each tensor by name.
      metadata: texts by name.

    Raises:
      RefusedFile: the file is not a whole safetensors file, or its header does not have
        its checksum.
      OSError: the file cannot be opened or read. The error names the file.
    """

    def __init__(self, path: Path, caller: str, *, verify: bool = True):
        self.path = path
        self._caller = caller
        # Without a buffer, because tensors are read straight into their arrays.
        with naming_errors(path, caller, "the file cannot be read"):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.metadata, self.headers = self._read_header()
            self._checksums = self._read_checksums() if verify else None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def fingerprint(self) -> int:
        """A checksum of the header, which has the checksums of all tensors.

        Files of earlier versions have no checksums. Then it covers the names, dtypes
        and shapes of the tensors only.
        """
        text = json.dumps([self.metadata, self.headers], sort_keys=True)
        return zlib.crc32(text.encode())

    def read(self, name: str) -> np.ndarray:
        """The array of a tensor.

        Raises:
          RefusedFile: the file was cut since it was opened, or numpy does not have the
            dtype of the tensor.
        """
        header = self.headers[name]
        data = self._read_bytes(name, 0, header.stop - header.start)
        return self._as_array(name, data, header.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The rows `start` to `stop - 1` of a tensor: a part of its first axis.

        Only the chunks that hold these rows are read and compared with their checksums.

        Raises:
          RefusedFile: as `read`.
        """
        header = self.headers[name]
        num_rows, *row = header.shape
        row_bytes = (header.stop - header.start) // max(1, num_rows)
        data = self._read_bytes(name, start * row_bytes, stop * row_bytes)
        return self._as_array(name, data, (stop - start, *row))

    def read_parts(
        self, name: str, indices: Sequence[tuple[slice, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Parts of a tensor, such as the parts of the devices of a process.

        Only the chunks that hold bytes of the parts are read and compared with their
        checksums, each of them once. Each part is returned as soon as it is complete.
        So parts along the first axis take the memory of one or two parts, and parts
        along the last axis take the memory of all parts.

        Args:
          name: of the tensor.
          indices: of each part, a slice with step 1 for each axis.

        Yields:
          The place of a part in `indices`, and the part.

        Raises:
          RefusedFile: as `read`.
        """
        header, dtype = self.headers[name], self._dtype(name)
        parts = [PartBytes(header.shape, index, dtype.itemsize) for index in indices]
        chunk_bytes = self._checksums.chunk if self._checksums else CHUNK
        num_chunks = []  # of each part, without those that were read
        places: dict[int, list[int]] = {}  # of the parts that have bytes of a chunk
        for place, part in enumerate(parts):
            chunks = part.chunks(chunk_bytes)
            num_chunks.append(len(chunks))
            for number in chunks:
                places.setdefault(number, []).append(place)
            if not chunks:
                yield place, np.empty(part.shape, dtype)
        data: dict[int, np.ndarray] = {}
        for number in sorted(places):
            start = number * chunk_bytes
            stop = min(start + chunk_bytes, header.stop - header.start)
            chunk = self._read_bytes(name, start, stop)
            for place in places[number]:
                part = parts[place]
                if place not in data:
                    data[place] = np.empty(part.num_bytes, np.uint8)
                part.copy(chunk, start, data[place])
                num_chunks[place] -= 1
                if num_chunks[place] == 0:
                    yield place, self._as_array(name, data.pop(place), part.shape)

    def _read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some bytes of a tensor, after a comparison of their checksums."""
        header, checksums = self.headers[name], self._checksums
        if checksums is None or start == stop:
            data = np.empty(stop - start, np.uint8)
            self._read_into(data, header.start + start)
            return data
        chunks = list(checksums.chunks(start, stop))
        first = chunks[0][1]
        last = min(chunks[-1][2], header.stop - header.start)
        data = np.empty(last - first, np.uint8)
        for number, chunk_start, chunk_stop in chunks:
            chunk = data[chunk_start - first : chunk_stop - first]
            self._read_into(chunk, header.start + chunk_start)
            found = checksum(name, header.dtype, header.shape, number, chunk.data)
            if found != checksums.of(name, number):
                raise self.damaged(
                    f"bytes {chunk_start} to {chunk_start + chunk.size - 1} of {name} "
                    f"do not have their checksum. verify=False reads them anyway"
                )
        return data[start - first : stop - first]

    def _as_array(
        self, name: str, data: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        dtype = self._dtype(name)
        if dtype == np.bool_ and data.size and data.max() > 1:
            raise self.damaged(f"{name} has numbers that are neither true nor false")
        array = data.view(dtype.newbyteorder("<")).reshape(shape)
        return array.astype(dtype, copy=False)

    def damaged(self, reason: str) -> RefusedFile:
        """The error for a file that is not as it was written."""
        return RefusedFile(
            f"{self._caller}: {self.path} is damaged: {reason}. Save or download it "
            "again."
        )

    def refused(self, reason: str) -> RefusedFile:
        """The error for a file that may be whole, and that cannot be read here."""
        return RefusedFile(f"{self._caller}: {self.path} cannot be read: {reason}.")

    def _read_checksums(self) -> Checksums | None:
        described = {
            name: (header.dtype, header.shape, header.stop - header.start)
            for name, header in self.headers.items()
        }
        try:
            return read_checksums(self.metadata, described)
        except ValueError as error:
            raise self.damaged(f"{error}. verify=False reads it anyway") from error

    def _dtype(self, name: str) -> np.dtype:
        header = self.headers[name]
        if header.dtype not in DTYPES:
            raise self.damaged(f"{name} holds {header.dtype}, which numpy cannot read")
        return DTYPES[header.dtype]

    def _read_into(self, data: np.ndarray, position: int) -> None:
        """Fills an array of bytes from a position of the file."""
        buffer = data.data
        self._file.seek(position)
        while len(buffer):
            count = self._file.readinto(buffer)
            if not count:
                raise self.damaged("its end is missing, so it was cut")
            buffer = buffer[count:]

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorHeader]]:
        size = self._file.seek(0, 2)
        length_bytes = np.zeros(8, np.uint8)
        if size < 8:
            raise self._not_whole(f"it has only {size} bytes")
        self._read_into(length_bytes, 0)
        length = int.from_bytes(length_bytes.tobytes(), "little")
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise self._not_whole(f"its header of {length} bytes is not there")
        text = np.zeros(length, np.uint8)
        self._read_into(text, 8)
        entries = self._parse(text.tobytes())
        metadata = entries.pop(METADATA, None)
        metadata = {} if metadata is None else metadata
        is_text = isinstance(metadata, dict) and all(
            isinstance(value, str) for value in metadata.values()
        )
        if not is_text:
            raise self._not_whole("its metadata are not texts")
        headers = {
            name: self._tensor_header(name, entry, 8 + length)
            for name, entry in entries.items()
        }
        self._check_order(headers, 8 + length, size)
        return metadata, headers

    def _parse(self, text: bytes) -> dict[str, Any]:
        """The JSON object of the header."""
        try:
            # Strict: Python's decoder takes the last of two equal names.
            entries = json.loads(
                text.decode("utf-8"), object_pairs_hook=without_equal_names
            )
        except (ValueError, RecursionError) as error:
            raise self._not_whole(f"its header cannot be parsed: {error}") from error
        if not isinstance(entries, dict):
            raise self._not_whole("its header is not a JSON object")
        return entries

    def _tensor_header(self, name: str, entry: Any, data_start: int) -> TensorHeader:
        """The header of a tensor, after a check of every field."""
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape = fields.get("dtype"), fields.get("shape", ())
        offsets = fields.get("data_offsets", ())
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._not_whole(f"{name} has the unknown dtype {dtype!r:.40}")
        if not _are_sizes(shape) or len(shape) > _MOST_AXES:
            raise self._not_whole(f"{name} has the shape {shape!r:.80}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._not_whole(f"{name} has the offsets {offsets!r:.80}")
        # numpy multiplies the sizes of an empty array too, without those that are 0.
        if math.prod(size or 1 for size in shape) * _BITS[dtype] > 8 * _MOST_BYTES:
            raise self._not_whole(f"{name} has the shape {shape!r:.80}")
        start, stop = offsets
        if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
            raise self._not_whole(
                f"{name} needs {math.prod(shape)} numbers of {dtype}, and has "
                f"{stop - start} bytes"
            )
        return TensorHeader(dtype, tuple(shape), data_start + start, data_start + stop)

    def _check_order(
        self, headers: dict[str, TensorHeader], data_start: int, size: int
    ) -> None:
        """Raises unless the tensors fill the file, without holes or shared bytes."""
        end = data_start
        for name, header in sorted(
            headers.items(), key=lambda item: (item[1].start, item[1].stop)
        ):
            if header.start != end:
                raise self._not_whole(f"{name} does not begin where another one ends")
            end = header.stop
        if end != size:
            raise self._not_whole(f"it has {size} bytes, and its tensors end at {end}")

    def _not_whole(self, reason: str) -> RefusedFile:
        return self.damaged(f"it is not a whole safetensors file: {reason}")


def without_equal_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different, for `object_pairs_hook`."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {name!r} is there twice")
        fields[name] = value
    return fields


def _are_sizes(value: Any) -> bool:
    """Whether this is a list of integers that a file position can be."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MOST_BYTES for item in value
    )
