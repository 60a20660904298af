"""Tensors that grow by rows in a file: the package safetensors reads them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxq.files import NewFile, TensorFile, TensorStream


def test_tensors_that_grow_by_rows(tmp_path):
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = {
        # A row is no whole number of chunks of 1 MiB.
        "large": rng.integers(0, 255, (5, 700_000), np.uint8),
        "beside": rng.normal(size=(5, 3)).astype(np.float32),
        "odd": rng.integers(0, 255, (3, 5), np.uint8),
        "whole": rng.normal(size=(4, 4)).astype(np.float32),
    }
    with NewFile(path, "test") as file:
        stream = TensorStream(file, list(tensors), 1 << 23)
        for start, stop in ((0, 2), (2, 3), (3, 5)):
            for name in ("large", "beside"):
                stream.add_rows(name, tensors[name][start:stop], 5)
        for row in range(3):
            stream.add_rows("odd", tensors["odd"][row : row + 1], 3)
        stream.add("whole", tensors["whole"])
        stream.finish({})
    stored = load_file(path)
    assert set(stored) == set(tensors)
    with TensorFile(path, "test") as file:  # compares checksums
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(stored[name], tensor)
            np.testing.assert_array_equal(file.read(name), tensor)
    data = bytearray(path.read_bytes())
    data[-1_500_000] ^= 1
    path.write_bytes(data)
    with (
        TensorFile(path, "test") as file,
        pytest.raises(ValueError, match="do not have their checksum"),
    ):
        file.read("large")
