"""GGUF containers: whole ones come back, damaged ones are refused."""

import random
import struct

import numpy as np
import pytest

from jaxq.files import GgufFile, NewFile, NewTensor, write_gguf

VALUES = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.number": 0.5,
    "a.texts": ["x", "ünï"],
    "a.numbers": [1, -2],
}
ARRAYS = {
    "matrix": ("F32", (3, 5), np.arange(15, dtype=np.float32).reshape(3, 5)),
    "blocks": ("Q4_0", (2, 64), np.arange(72, dtype=np.uint8).reshape(2, 36)),
    "half": ("F16", (7,), np.arange(7, dtype=np.float16)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.gguf"
    tensors = {
        name: NewTensor(kind, shape, lambda array=array: array)
        for name, (kind, shape, array) in ARRAYS.items()
    }
    with NewFile(path, "test") as file:
        write_gguf(file, VALUES, tensors)
    return path


def test_values_and_tensors_come_back(path):
    with GgufFile(path, "test") as file:
        assert list(file.headers) == list(ARRAYS)
        for name, (kind, shape, array) in ARRAYS.items():
            assert (file.headers[name].type, file.headers[name].shape) == (kind, shape)
            np.testing.assert_array_equal(file.read(name), array)
            assert file.read(name).dtype == array.dtype
        for name, value in VALUES.items():
            read = file.metadata[name]
            assert (read.tolist() if name == "a.numbers" else read) == value


def test_the_gguf_package_reads_the_same(path):
    gguf = pytest.importorskip("gguf", reason="reads files of the package gguf")
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        kind, shape, array = ARRAYS[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape[::-1].tolist()) == shape
        np.testing.assert_array_equal(tensor.data, array)
    for name, value in VALUES.items():
        assert reader.get_field(name).contents() == value


def test_files_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf", reason="reads files of the package gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint64("big", 2**40)
    writer.add_array("texts", ["a", "b"])
    floats = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q5_1
    blocks = gguf.quants.quantize(floats, kind)
    writer.add_tensor("w", blocks, raw_dtype=kind)
    writer.add_tensor("b", floats)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "b.gguf", "test") as file:
        assert file.metadata["big"] == 2**40
        assert file.metadata["texts"] == ["a", "b"]
        assert file.headers["w"].type == "Q5_1"
        assert file.headers["w"].shape == (4, 64)
        np.testing.assert_array_equal(file.read("w"), blocks)
        np.testing.assert_array_equal(file.read("b"), floats)


def _replaced(old, new):
    return lambda data: data.replace(old, new, 1)


LONG = struct.pack("<Q", 1 << 60)
REFUSED = {
    "another magic": (lambda data: b"GGML" + data[4:], "begins with"),
    "version 1": (lambda data: data[:4] + b"\1" + data[5:], "has version 1"),
    "big endian": (lambda data: data[:4] + data[4:8][::-1] + data[8:], "has version"),
    "many tensors": (lambda data: data[:8] + LONG + data[16:], "tensors has"),
    "many values": (lambda data: data[:16] + LONG + data[24:], "values has"),
    "a long name": (lambda data: data[:24] + LONG + data[32:], "a text has"),
    "an unknown type": (
        _replaced(b"a.flag\x07", b"a.flag\x63"),
        "a.flag has the unknown type",
    ),
    "a switch of 2": (_replaced(b"a.flag\7\0\0\0\1", b"a.flag\7\0\0\0\2"), "neither"),
    "equal tensors": (_replaced(b"matrix", b"blocks"), "blocks' is there twice"),
    "a huge shape": (
        _replaced(struct.pack("<QQ", 5, 3), struct.pack("<QQ", 1 << 62, 1 << 62)),
        "has the shape",
    ),
    "partial blocks": (
        _replaced(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 60, 2)),
        "no whole number of Q4_0 blocks",
    ),
    "an unknown tensor type": (
        _replaced(struct.pack("<QQI", 64, 2, 2), struct.pack("<QQI", 64, 2, 99)),
        "has the type 99",
    ),
    "shared bytes": (
        _replaced(struct.pack("<QIQ", 2, 2, 64), struct.pack("<QIQ", 2, 2, 32)),
        "begins inside another tensor",
    ),
    "a cut": (lambda data: data[:-64], "bytes at"),
    "text that is not UTF-8": (_replaced(b"llama", b"\xff\xfe\xfd\xfc\xfb"), "UTF-8"),
    "empty": (lambda data: b"", "ends too early"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused(path, name):
    change, message = REFUSED[name]
    data = path.read_bytes()
    changed = change(data)
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path, "test")
    assert str(path) in str(caught.value)


def test_every_mutant_is_read_or_refused(path):
    """Flipped, removed and added bytes: no other error than one that names the file."""
    data, rng = path.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(1_000):
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            position = rng.randrange(min(len(mutant), 400))
            change = rng.randrange(3)
            if change == 0:
                mutant[position] = rng.randrange(256)
            elif change == 1:
                del mutant[position : position + rng.choice((1, 8))]
            else:
                mutant[position:position] = rng.randbytes(rng.choice((1, 8)))
        path.write_bytes(mutant)
        try:
            with GgufFile(path, "test") as file:
                for name in file.headers:
                    file.read(name)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert all(str(path) in error for error in refused)
