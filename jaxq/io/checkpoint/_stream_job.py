"""The record of a `quantize_checkpoint` that has not ended yet.

The file `jaxq_progress.json` says what is quantized and which shards are whole. It is
replaced after each shard. A run that finds it goes on after the last whole shard. The
hash of a shard is that of its header, and the header has the checksums of all bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxq.files import (
    NewFile,
    RefusedFile,
    TensorFile,
    is_file,
    parse_json,
    read_text,
    remove_leftovers,
)

RECORD = "jaxq_progress.json"


class Job:
    """What is quantized, and which shards are whole.

    Args:
      folder: where the shards are written.
      description: what is quantized and how, as JSON. A run goes on only if it has the
        same description.
      caller: the name that error messages begin with.

    Raises:
      ValueError: the folder has the record of another job, or a damaged one.
    """

    def __init__(self, folder: Path, description: dict[str, Any], caller: str):
        self._folder, self._caller = folder, caller
        self._description = json.loads(json.dumps(description))
        self._shards: dict[str, Any] = {}
        path = folder / RECORD
        remove_leftovers(folder, RECORD)
        if not is_file(path, caller):
            self._write()
            return
        try:
            record = parse_json(path, read_text(path, caller))
        except ValueError as error:
            raise ValueError(f"{caller}: {error}") from error
        is_record = isinstance(record, dict) and isinstance(record.get("shards"), dict)
        if not is_record or record.get("job") != self._description:
            raise ValueError(
                f"{caller}: {path} is the record of another run: of another source, "
                "recipe, format or size of shards. Use an empty folder, or remove this "
                "file to start anew."
            )
        self._shards = record["shards"]

    def finished(self, name: str) -> dict[str, Any] | None:
        """What `add` was told about a shard, if the shard is whole.

        All its bytes are read and compared with their checksums.
        """
        entry = self._shards.get(name)
        path = self._folder / name
        if not isinstance(entry, dict) or not is_file(path, self._caller):
            return None
        try:
            with TensorFile(path, self._caller) as file:
                if header_hash(path) != entry.get("header"):
                    return None
                for tensor in file.headers:
                    file.read(tensor)
        except RefusedFile:
            return None
        return entry

    def add(self, name: str, **facts: Any) -> None:
        """Records that a shard is whole."""
        header = header_hash(self._folder / name)
        self._shards[name] = {"header": header, **facts}
        self._write()

    def end(self) -> None:
        """Removes the record."""
        (self._folder / RECORD).unlink(missing_ok=True)

    def _write(self) -> None:
        record = {"job": self._description, "shards": self._shards}
        with NewFile(self._folder / RECORD, self._caller) as file:
            file.write(json.dumps(record, indent=1, sort_keys=True).encode())


def header_hash(path: Path) -> str:
    """The hash of the header of a safetensors file that was checked before."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.blake2b(file.read(length), digest_size=16).hexdigest()
