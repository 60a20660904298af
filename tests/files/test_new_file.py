"""Whole writes: permissions, links, leftovers, and errors that name the target."""

import os
import resource
import secrets
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open

from jaxq import files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.bin"


def write(path, data=b"new"):
    files.remove_leftovers(path.parent, path.name)
    with files.NewFile(path, "save") as file:
        file.write(data)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_new_file_has_the_permissions_of_any_new_file(path, tmp_path, monkeypatch):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")

    def fail(mask):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", fail)
    write(path)
    assert mode(path) == mode(plain)


def test_threads_that_save_leave_other_files_their_permissions(path, tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    targets = [path.with_name(f"{number}") for number in range(8)]

    def save(target):
        for _ in range(20):
            write(target)

    threads = [threading.Thread(target=save, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    modes = set()
    for number in range(200):
        other = tmp_path / f"other{number}"
        other.write_bytes(b"")
        modes.add(mode(other))
    for thread in threads:
        thread.join()
    assert modes == {mode(plain)}
    assert {target.read_bytes() for target in targets} == {b"new"}


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(path, permissions):
    path.write_bytes(b"old")
    path.chmod(permissions)
    write(path)
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)


def test_a_link_is_replaced(path, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    path.symlink_to(target)
    write(path)
    assert target.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


def test_a_planted_link_is_not_followed(path, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    path.with_name(f".{path.name}.{'0' * 16}.partial").symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"save: .*file\.bin"):
        write(path)
    assert victim.read_bytes() == b"precious"
    assert not path.exists()


def test_two_saves_at_once_do_not_remove_each_other(path):
    with files.NewFile(path, "save") as slow:
        slow.write(b"slow")
        write(path, b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow"
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxq import files
with files.NewFile(Path(sys.argv[1]), "save") as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_save_removes_the_leftover_of_a_killed_one(path, tmp_path):
    other = tmp_path / "other"
    for target in (path, other):
        subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert len(os.listdir(tmp_path)) == 2
    link = tmp_path / f".{path.name}.{'0' * 16}.partial"
    link.symlink_to(other)
    pipe = tmp_path / f".{path.name}.{'1' * 16}.partial"
    os.mkfifo(pipe)
    write(path)
    # Leftovers of another target stay, and so does everything that is not a file.
    left = [name for name in os.listdir(tmp_path) if name.startswith(".other.")]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [path.name, link.name, pipe.name, *left]
    )
    assert len(left) == 1
    files.remove_leftovers(tmp_path)
    assert left[0] not in os.listdir(tmp_path)


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    write(tmp_path / ("é" * 127))
    assert os.listdir(tmp_path) == ["é" * 127]
    with pytest.raises(OSError, match="save: the file cannot.*too long.*é"):
        write(tmp_path / ("é" * 128))


def test_a_pipe_or_a_folder_in_the_way(path):
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match=r"a pipe, a socket .*file\.bin"):
        write(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"it is a folder.*file\.bin"):
        write(path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("size", [100_000, 3_000])
def test_a_full_disk(path, size):
    """A limit on the size of files stands for the disk. Small data wait in a buffer."""
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"save: the file cannot be.*file\.bin") as e:
            write(path, bytes(size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_names_of_files_are_synced(path, monkeypatch):
    synced = []
    fsync = os.fsync

    def watch(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    write(path)
    assert synced[0].endswith(".partial")
    assert synced[1:] == [str(path.parent)]


# Tensors.

TENSORS = {
    "scalar": np.asarray(3, np.float32),
    "empty": np.zeros((0, 3), np.int8),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "big endian": np.arange(3, dtype=">i4"),
    "bool": np.asarray([True, False]),
    "ünïcode \n": np.ones(3, ml_dtypes.bfloat16),
    **{str(dtype): np.arange(1, 6).astype(dtype) for dtype in files.DTYPES.values()},
}


def write_tensors(path, tensors, metadata):
    with files.NewFile(path, "save") as file:
        files.write_tensors(file, tensors, metadata)


def test_the_safetensors_package_reads_the_same_tensors(path):
    write_tensors(path, TENSORS, {"b": "1", "a": '"ü"'})
    with safe_open(path, framework="numpy") as file:
        assert file.metadata().items() >= {"b": "1", "a": '"ü"'}.items()
        assert set(file.keys()) == set(TENSORS)
        for name, expected in TENSORS.items():
            if name.startswith("float8"):
                continue  # the package has no numpy dtype for it
            tensor = file.get_tensor(name)
            assert tensor.dtype == expected.dtype.newbyteorder("=")
            np.testing.assert_array_equal(tensor, expected)


def test_the_safetensors_package_reads_the_same_bytes_of_float8(path):
    write_tensors(path, TENSORS, {})
    read = dict(deserialize(path.read_bytes()))
    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    for dtype, name in (names | {"F8_E8M0": "float8_e8m0fnu"}).items():
        assert read[name]["dtype"] == dtype
        assert bytes(read[name]["data"]) == TENSORS[name].tobytes()


def test_tensors_start_at_multiples_of_their_item_size(path):
    write_tensors(path, TENSORS, {})
    with safe_open(path, framework="numpy") as file:
        names = file.offset_keys()
    sizes = [TENSORS[name].dtype.itemsize for name in names if TENSORS[name].size]
    assert sizes == sorted(sizes, reverse=True)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_same_tensors_give_the_same_bytes(path):
    metadata = {str(number): "" for number in range(8)}
    write_tensors(path, TENSORS, metadata)
    first = path.read_bytes()
    for _ in range(4):
        reordered = dict(reversed(TENSORS.items()))
        write_tensors(path, reordered, dict(reversed(metadata.items())))
        assert path.read_bytes() == first


@pytest.mark.parametrize("name", ["__metadata__", "half \ud800"])
def test_names_that_no_file_can_have(path, name):
    with pytest.raises(ValueError, match=r"__metadata__|half of a character"):
        write_tensors(path, {name: np.ones(1)}, {})
    assert not path.exists()
