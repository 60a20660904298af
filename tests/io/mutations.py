"""Random damage to bytes, to JSON and to safetensors files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

DEEP = "[" * 100_000 + "]" * 100_000
# Values that a field of a damaged or hostile file can have.
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 256, 2**31, 2**63, 10**30, -(10**12), 0.0, 1.0, 256.0)
NAMES = "int4 int8 float8_e4m3fn float64 float99_e50m48 q9.9 PerGroup PerTensor PerFlat"
WORDS = "absmax mean low_first array qtensor dict list tuple key value w w.data odd"
ODD = ("", "..", "a,b", "f4,(", "\ud800", 1e308, float("inf"), float("nan"), None)
TREES = ([], {}, [1], [[]], [0, 0], [-1, -2], [10**12] * 2, {"is": "array"}, {"x": 1})
SWITCHES = (True, False)
VALUES = [*NUMBERS, *NAMES.split(), *WORDS.split(), *ODD, *TREES, *SWITCHES]
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "F8_E4M3", "BOOL")
SHAPES = ([], [0], [0, 2**62], [2**40], [2**62, 2**62], [1] * 70, [-1], [1.5])
COUNTS = (0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The parent and the key of every node of a tree of dicts and lists."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield tree, key
            yield from nodes(value)


def change_node(tree: Any, rng: random.Random) -> None:
    """Changes one random node of a tree of dicts and lists, in place."""
    places = list(nodes(tree))
    if not places:
        return
    parent, key = rng.choice(places)
    change = rng.randrange(10)
    if change == 0:
        del parent[key]
    elif change == 1:
        other_parent, other_key = rng.choice(places)
        parent[key] = copy.deepcopy(other_parent[other_key])
    elif change == 2 and isinstance(parent, dict):
        parent[rng.choice(("x", "is", "type", "\ud800"))] = parent[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are flipped, overwritten, cut, deleted or inserted."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not damaged:
            break
        # Half of the changes are near the start, where the header is.
        last = len(damaged) if rng.random() < 0.5 else min(len(damaged), 256)
        position = rng.randrange(last)
        change = rng.randrange(7)
        if change == 0:
            damaged[position] ^= 1 << rng.randrange(8)
        elif change == 1:
            damaged[position] = rng.randrange(256)
        elif change == 2:
            del damaged[position : position + rng.choice((1, 8, 1000))]
        elif change == 3:
            damaged[position:position] = rng.randbytes(4)
        elif change == 4:
            del damaged[position:]
        else:
            number = rng.choice(COUNTS).to_bytes(8, "little")
            size = rng.choice((4, 8))
            damaged[position : position + size] = number[:size]
    return bytes(damaged)


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with other values, or bytes that are not JSON."""
    change = rng.randrange(20)
    if change < 14:
        tree = json.loads(data)
        for _ in range(rng.choice((1, 1, 2))):
            change_node(tree, rng)
        return json.dumps(tree).encode()
    if change < 16:
        return changed_bytes(data, rng)
    start = rng.choice(
        (
            b'{"x": ' + DEEP.encode() + b", ",  # deep nesting
            b'{"x": ' + b"9" * 5000 + b", ",  # a long number
            b'{"x": [' + b"0," * 50_000 + b"0], ",  # a long list
            b'{"model_type": 1, "model_type": "llama", ',  # equal keys
            b'{"weight_map": {}, ',
            b"",
        )
    )
    return start + data.lstrip()[1:]


class Tensors(NamedTuple):
    """A safetensors file.

    Attributes:
      header: the JSON object.
      data: the bytes of all tensors.
    """

    header: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, file: bytes) -> Tensors:
        """The parts of a whole file."""
        stop = 8 + int.from_bytes(file[:8], "little")
        return cls(json.loads(file[8:stop]), file[stop:])

    def names(self) -> list[str]:
        """The names of the tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def without(self, name: str) -> Tensors:
        """The same file without one tensor and its bytes."""
        header, data = {}, b""
        for key, entry in self.header.items():
            if key == "__metadata__":
                header[key] = entry
            elif key != name:
                start, stop = entry["data_offsets"]
                offsets = [len(data), len(data) + stop - start]
                header[key] = entry | {"data_offsets": offsets}
                data += self.data[start:stop]
        return Tensors(header, data)

    def to_file(self, text: bytes | None = None) -> bytes:
        """The bytes of the file, with its header or another text."""
        text = json.dumps(self.header).encode() if text is None else text
        return len(text).to_bytes(8, "little") + text + self.data


def changed_safetensors(file: bytes, rng: random.Random) -> bytes:
    """A safetensors file with damaged bytes, a wrong header, or odd numbers."""
    if rng.random() < 0.3:
        return changed_bytes(file, rng)
    tensors = Tensors.of(file)
    # Checksums would find the damage before all other checks, so they are removed.
    for name in ("checksums", "checksums_crc32"):
        tensors.header.get("__metadata__", {}).pop(name, None)
    if not tensors.names():
        return changed_bytes(file, rng)
    name = rng.choice(tensors.names())
    change = rng.randrange(9)
    if change < 3:
        change_node({name: tensors.header[name]}, rng)
    elif change == 3:
        _lie_about(tensors.header[name], rng)
    elif change == 4:
        other = tensors.header[rng.choice(tensors.names())]
        tensors.header[name]["data_offsets"] = other["data_offsets"]
    elif change == 5:
        tensors = tensors.without(name)
    elif change == 6:
        new_name = rng.choice(("x", f"{name}.x", name[1:]))
        tensors.header[new_name] = tensors.header.pop(name)
    elif change == 7:
        text = json.dumps(tensors.header)
        again = json.dumps({name: tensors.header[name]})[1:-1]
        return tensors.to_file(f"{{{again}, {text[1:]}".encode())
    else:
        return _with_odd_numbers(tensors, name, rng).to_file()
    return tensors.to_file()


def _lie_about(entry: dict[str, Any], rng: random.Random) -> None:
    """Changes a tensor's header to another dtype or shape, or to wrong offsets."""
    change = rng.randrange(4)
    if change == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif change == 1:
        entry["shape"] = rng.choice(SHAPES)
    elif change == 2:
        entry["shape"] = entry["shape"][::-1]
    else:
        entry["data_offsets"] = [rng.choice(COUNTS), rng.choice(COUNTS)]


def _with_odd_numbers(tensors: Tensors, name: str, rng: random.Random) -> Tensors:
    """Replaces numbers of one tensor by 0, by all bits set, by NaN or by infinity."""
    entry = tensors.header[name]
    start, stop = entry["data_offsets"]
    patterns = {
        "F32": ("0000c07f", "0000807f", "000080ff"),
        "F16": ("007e", "007c", "00fc"),
        "BF16": ("c07f", "807f", "80ff"),
        "F8_E4M3": ("7f", "ff"),
    }
    texts = (*patterns.get(entry["dtype"], ()), "00", "ff", "80")
    pattern = bytes.fromhex(rng.choice(texts))
    data = bytearray(tensors.data)
    size = stop - start
    if rng.random() < 0.5:  # one number
        size = min(size, len(pattern))
    whole = pattern * (size // len(pattern) + 1)
    data[start : start + size] = whole[:size]
    return Tensors(tensors.header, bytes(data))
