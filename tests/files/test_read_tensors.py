"""Reading: what the safetensors package reads, cut files, and checksums."""

import json
import os

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxq import files
from jaxq.files import _checksums
from tests.files.test_new_file import TENSORS, write_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def read(path, **options):
    with files.TensorFile(path, "load", **options) as file:
        return {name: file.read(name) for name in file.headers}


def split(path):
    """The JSON header of a file, and the bytes after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def assert_equal(tensors, expected):
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensor, expected[name])


def test_tensors_come_back(path):
    write_tensors(path, TENSORS, {"text": "ü"})
    assert_equal(read(path), TENSORS)
    with files.TensorFile(path, "load") as file:
        assert file.metadata["text"] == "ü"


def test_files_of_the_safetensors_package(path):
    tensors = {
        name: np.ascontiguousarray(tensor.astype(tensor.dtype.newbyteorder("=")))
        for name, tensor in TENSORS.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert_equal(read(path), tensors)


HEADERS = [
    b"",
    b"[]",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a": 1}',
    b'{"__metadata__": {"x": 1}}',
    b'{"__metadata__": 3}',
]
FIELDS = [
    ("dtype", "F33"),
    ("dtype", 3),
    ("dtype", "F64"),
    ("shape", [3]),
    ("shape", [2.0]),
    ("shape", [-2]),
    ("shape", "2"),
    ("shape", [2] + [1] * 70),
    ("shape", [0, 10**30]),
    ("data_offsets", [0, 4]),
    ("data_offsets", [4, 12]),
    ("data_offsets", [8, 0]),
    ("data_offsets", [0, 8, 8]),
    ("data_offsets", [False, 8]),
    ("data_offsets", None),
]


@pytest.mark.parametrize("header", HEADERS, ids=repr)
def test_headers_that_are_no_headers(path, header):
    join(path, header, b"")
    with pytest.raises(files.RefusedFile, match=r"load: .*file\.safetensors is"):
        read(path)
    with pytest.raises(SafetensorError), safe_open(path, framework="numpy"):
        pass


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_entries_that_contradict_the_file(path, field, value):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    join(path, {"a": entry | {field: value}}, bytes(8))
    with pytest.raises(files.RefusedFile, match=r"file\.safetensors is damaged.*\ba\b"):
        read(path)


def test_two_tensors_do_not_share_bytes(path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    join(path, {"a": entry, "b": entry}, bytes(8))
    with pytest.raises(files.RefusedFile, match="does not begin where another"):
        read(path)
    text = json.dumps({"a": entry})
    join(path, f"{text[:-1]}, {text[1:]}".encode(), bytes(8))
    with pytest.raises(files.RefusedFile, match="the name 'a' is there twice"):
        read(path)


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_cut_while_it_is_read(path, verify):
    write_tensors(path, {"a": np.ones(1_000_000, np.float32)}, {})
    with files.TensorFile(path, "load", verify=verify) as file:
        os.truncate(path, 100_000)
        with pytest.raises(files.RefusedFile, match="its end is missing"):
            file.read("a")


# Checksums.


def test_every_flipped_bit_is_found(path):
    small = {"a": np.arange(4, dtype=np.float32), "b": np.arange(9, dtype=np.int8)}
    write_tensors(path, small, {"note": "text"})
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors = read(path)
        except files.RefusedFile:
            refused += 1
        else:
            # Another kind of white space after the header is no damage.
            assert_equal(tensors, small)
    assert refused >= 8 * (len(whole) - 8)


@pytest.mark.parametrize("chunk", [_checksums.CHUNK, 8])
def test_swapped_names_are_found(path, monkeypatch, chunk):
    monkeypatch.setattr(_checksums, "CHUNK", chunk)
    tensors = {name: np.full(8, i, np.float32) for i, name in enumerate("ab")}
    write_tensors(path, tensors, {})
    header, data = split(path)
    header["a"], header["b"] = header["b"], header["a"]
    join(path, header, data)
    with pytest.raises(files.RefusedFile, match=r"bytes 0 to \d+ of [ab] do not have"):
        read(path)
    swapped = read(path, verify=False)
    np.testing.assert_array_equal(swapped["a"], tensors["b"])


def test_swapped_chunks_are_found(path, monkeypatch):
    monkeypatch.setattr(_checksums, "CHUNK", 8)
    write_tensors(path, {"a": np.arange(4, dtype=np.float32)}, {})
    header, data = split(path)
    join(path, header, data[8:] + data[:8])
    with pytest.raises(files.RefusedFile, match="bytes 0 to 7 of a"):
        read(path)


@pytest.mark.parametrize("name", ["checksums", "checksums_crc32"])
def test_checksums_that_are_gone_are_damage(path, name):
    write_tensors(path, {"a": np.ones(2, np.float32)}, {})
    header, data = split(path)
    del header["__metadata__"][name]
    join(path, header, data)
    with pytest.raises(files.RefusedFile, match=r"checksum.*verify=False"):
        read(path)
    assert set(read(path, verify=False)) == {"a"}


def test_a_tensor_that_is_gone_is_damage(path):
    write_tensors(path, {"a": np.ones(2, np.float32), "b": np.ones(2, np.int8)}, {})
    header, data = split(path)
    del header["b"]
    join(path, header, data[:8])
    with pytest.raises(files.RefusedFile, match="checksums are not those of"):
        read(path)


def test_rows_are_checked_without_the_rest(path, monkeypatch):
    monkeypatch.setattr(_checksums, "CHUNK", 48)
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)  # 16 bytes a row
    write_tensors(path, {"a": rows}, {})
    header, data = split(path)
    damaged = bytearray(data)
    damaged[5 * 16 + 3] ^= 1  # row 5, in the chunk of rows 3 to 5
    join(path, header, bytes(damaged))
    with files.TensorFile(path, "load") as file:
        for start, stop in ((0, 3), (1, 2), (6, 10), (9, 10), (2, 2)):
            found = file.read_rows("a", start, stop)
            np.testing.assert_array_equal(found, rows[start:stop])
        for start, stop in ((0, 4), (3, 4), (5, 7)):
            with pytest.raises(files.RefusedFile, match="bytes 48 to 95 of a"):
                file.read_rows("a", start, stop)


@pytest.mark.parametrize("chunk", [8, 20, 48, 1 << 20])
def test_parts_are_those_of_the_whole(path, monkeypatch, chunk):
    monkeypatch.setattr(_checksums, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    tensors = {
        "scalar": np.float32(3.0).reshape(()),
        "vector": rng.integers(0, 255, 13).astype(np.uint8),
        "matrix": rng.normal(size=(9, 7)).astype(np.float32),
        "stack": rng.normal(size=(3, 4, 5, 6)).astype(np.float16),
    }
    write_tensors(path, tensors, {})
    for verify in (True, False):
        with files.TensorFile(path, "load", verify=verify) as file:
            for name, tensor in tensors.items():
                for _ in range(40):
                    ends = [sorted(rng.integers(0, n + 1, 2)) for n in tensor.shape]
                    keep = rng.random(tensor.ndim) < 0.4
                    index = tuple(
                        slice(None) if whole else slice(int(start), int(stop))
                        for whole, (start, stop) in zip(keep, ends, strict=True)
                    )
                    found = read_part(file, name, index)
                    np.testing.assert_array_equal(found, tensor[index])
                    assert found.dtype == tensor.dtype


def read_part(file, name, index):
    [(place, part)] = file.read_parts(name, [index])
    assert place == 0
    return part


def test_a_part_reads_and_checks_its_own_chunks_only(path, monkeypatch):
    monkeypatch.setattr(_checksums, "CHUNK", 48)
    rows = np.arange(120, dtype=np.float32).reshape(10, 12)  # a chunk for each row
    write_tensors(path, {"a": rows}, {})
    header, data = split(path)
    damaged = bytearray(data)
    damaged[5 * 48 + 3] ^= 1
    join(path, header, bytes(damaged))
    with files.TensorFile(path, "load") as file:
        num_read = count_bytes(monkeypatch, file)
        for part in (slice(0, 5), slice(6, 10)):
            found = read_part(file, "a", (part, slice(2, 4)))
            np.testing.assert_array_equal(found, rows[part, 2:4])
        assert sum(num_read) == 9 * 48
        with pytest.raises(files.RefusedFile, match="bytes 240 to 287 of a"):
            read_part(file, "a", (slice(4, 6), slice(6, 8)))


def test_parts_read_each_chunk_once(path, monkeypatch):
    monkeypatch.setattr(_checksums, "CHUNK", 100)  # begins and ends inside a row
    rows = np.arange(120, dtype=np.float32).reshape(10, 12)
    write_tensors(path, {"a": rows}, {})
    all_rows, nothing = slice(None), slice(3, 3)
    columns = [(all_rows, slice(start, start + 3)) for start in range(0, 12, 3)]
    blocks = [(slice(start, start + 5), all_rows) for start in (5, 0)]
    with files.TensorFile(path, "load") as file:
        for indices, order in (
            (columns, [0, 1, 2, 3]),
            ([*columns, (nothing, all_rows)], [4, 0, 1, 2, 3]),
            # A part is there before the chunks after it are read.
            (blocks, [1, 0]),
        ):
            num_read = count_bytes(monkeypatch, file)
            found, read_before = {}, {}
            for place, part in file.read_parts("a", indices):
                found[place], read_before[place] = part, sum(num_read)
            assert list(found) == order
            for place, index in enumerate(indices):
                np.testing.assert_array_equal(found[place], rows[index])
            assert sum(num_read) == rows.nbytes
        assert read_before == {1: 300, 0: 480}


def test_every_reading_is_compared_with_the_checksum(path):
    rows = np.arange(120, dtype=np.float32).reshape(10, 12)
    write_tensors(path, {"a": rows}, {})
    header, data = split(path)
    with files.TensorFile(path, "load") as file:
        file.read("a")
        join(path, header, bytes([data[0] ^ 1]) + data[1:])
        for read in (file.read, lambda name: file.read_rows(name, 0, 2)):
            with pytest.raises(files.RefusedFile, match="bytes 0 to 479 of a"):
                read("a")
        with pytest.raises(files.RefusedFile, match="bytes 0 to 479 of a"):
            read_part(file, "a", (slice(0, 2), slice(0, 2)))


def count_bytes(monkeypatch, file):
    """The sizes of all later reads of an open file."""
    sizes, read_into = [], file._read_into

    def counted(data, position):
        sizes.append(data.size)
        read_into(data, position)

    monkeypatch.setattr(file, "_read_into", counted)
    return sizes


def test_a_crc_of_zlib_is_the_standard_one():
    # The check value of CRC-32, of the text "123456789".
    assert _checksums.zlib.crc32(b"123456789") == 0xCBF43926
