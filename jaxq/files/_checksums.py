"""Checksums of a safetensors file, for damage on disks and in transfers.

Each tensor has one CRC-32 for every `CHUNK` bytes. So a reader of a few rows checks
what it reads. The checksum of a chunk also covers the name, dtype and shape of its
tensor and its number, so data under another name are damage too. One more checksum
covers the metadata and the list of tensors.

A CRC finds every flipped bit and every run of at most 32 bits. It does not protect
against an attacker, who can compute it as well.

References:
  Peterson and Brown, Cyclic Codes for Error Detection, 1961.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CHUNK = 1 << 20
# The metadata of a file with checksums have the two names. If the second one is gone,
# the first one still says that it was there.
MARK = "checksums"
CHECKSUMS = "checksums_crc32"
_MARK_TEXT = "crc32"
_DIGITS = 8  # of a checksum, hexadecimal


def with_checksums(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, Sequence[int], memoryview]],
) -> dict[str, str]:
    """Metadata with the checksums of tensors.

    Args:
      metadata: the other texts of the file.
      tensors: name of dtype, shape and bytes of each tensor by name.
    """
    texts = {
        name: checksums_of(name, dtype, shape, data)
        for name, (dtype, shape, data) in tensors.items()
    }
    described = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    return with_texts(metadata, described, texts)


def checksums_of(name: str, dtype: str, shape: Sequence[int], data: memoryview) -> str:
    """The checksums of all chunks of a tensor."""
    return "".join(
        checksum(name, dtype, shape, number, data[start : start + CHUNK])
        for number, start in enumerate(range(0, len(data), CHUNK))
    )


def with_texts(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    texts: Mapping[str, str],
) -> dict[str, str]:
    """Metadata with checksums that `checksums_of` computed.

    Args:
      metadata: the other texts of the file.
      tensors: name of dtype and shape of each tensor by name.
      texts: the checksums of each tensor by name.
    """
    marked = {**metadata, MARK: _MARK_TEXT}
    contents = {
        "chunk": CHUNK,
        "metadata": metadata_checksum(marked, tensors),
        "tensors": texts,
    }
    return {**marked, CHECKSUMS: json.dumps(contents, sort_keys=True)}


def checksum(
    name: str, dtype: str, shape: Sequence[int], number: int, data: memoryview
) -> str:
    """The checksum of one chunk of a tensor."""
    start = zlib.crc32(json.dumps([name, dtype, list(shape), number]).encode())
    return f"{zlib.crc32(data, start):08x}"


def metadata_checksum(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, Sequence[int]]]
) -> str:
    """The checksum of all texts and of the headers of all tensors."""
    headers = {name: [dtype, list(shape)] for name, (dtype, shape) in tensors.items()}
    text = json.dumps([dict(metadata), headers], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


class Checksums:
    """The checksums that a file states.

    Attributes:
      chunk: the number of bytes of a chunk.
    """

    def __init__(self, chunk: int, tensors: Mapping[str, str]):
        self.chunk = chunk
        self._tensors = tensors

    def of(self, name: str, number: int) -> str:
        """The checksum of a chunk of a tensor."""
        return self._tensors[name][number * _DIGITS : (number + 1) * _DIGITS]

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Number, start and stop of the chunks that cover some bytes of a tensor."""
        for number in range(start // self.chunk, -(-stop // self.chunk)):
            yield number, number * self.chunk, (number + 1) * self.chunk


def read_checksums(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, Sequence[int], int]],
) -> Checksums | None:
    """The checksums in the metadata of a file; None if it was written without them.

    Args:
      metadata: all texts of the file.
      tensors: name of dtype, shape and number of bytes of each tensor by name.

    Raises:
      ValueError: the metadata or the list of tensors do not have their checksum.
    """
    if CHECKSUMS not in metadata:
        if MARK in metadata:
            raise ValueError("its checksums are missing")
        return None
    try:
        contents: Any = json.loads(metadata[CHECKSUMS])
        chunk, texts = contents["chunk"], contents["tensors"]
        stated = contents["metadata"]
        is_valid = type(chunk) is int and chunk > 0 and set(texts) == set(tensors)
        is_valid = is_valid and all(
            isinstance(texts[name], str)
            and len(texts[name]) == _DIGITS * -(-num_bytes // chunk)
            for name, (_, _, num_bytes) in tensors.items()
        )
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its checksums cannot be parsed") from error
    if not is_valid:
        raise ValueError("its checksums are not those of its tensors")
    others = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    headers = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    if metadata_checksum(others, headers) != stated:
        raise ValueError("its metadata do not have their checksum")
    return Checksums(chunk, texts)
