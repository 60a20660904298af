"""`quantize_checkpoint`: the same weights, in little memory, whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jaxq
from jaxq import models
from jaxq.io import layouts, quantize_checkpoint, read_checkpoint
from jaxq.io.checkpoint import _stream
from tests.io.checkpoint import directories
from tests.models.test_decoder import make

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
SHARD = 200_000  # a few shards of the model below
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("floats")
    models.save(path, make(**SIZES), dtype="bfloat16")
    (path / "generation_config.json").write_text('{"eos_token_id": 0}')
    return path


def contents(path):
    return {
        file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".x"
    }


RECIPES = {
    "gptq": layouts.get("gptq").spec({"bits": 4, "group_size": 32, "sym": False}),
    "bitsandbytes": "nf4_dq",
    "compressed-tensors": "int4",
}


@pytest.mark.parametrize("fmt", RECIPES)
def test_every_weight_is_the_one_that_quantize_gives(source, tmp_path, fmt):
    recipe = RECIPES[fmt]
    outcome = quantize_checkpoint(
        source, tmp_path, recipe, format=fmt, shard_bytes=SHARD, progress=False
    )
    assert "jaxq_progress.json" not in contents(tmp_path)
    assert (tmp_path / "generation_config.json").exists()
    assert outcome["model.norm.weight"] == "not a matrix of a layer"
    assert "embedding" in outcome["model.embed_tokens.weight"]
    with read_checkpoint(source) as floats, read_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(floats)
        quantized = [name for name in checkpoint if checkpoint.is_quantized(name)]
        assert len(quantized) == 14
        for name in floats:
            if name not in quantized:
                np.testing.assert_array_equal(checkpoint[name], floats[name])
        expected = jaxq.quantize(jnp.asarray(floats[UP]), recipe, contracting=-1)
        np.testing.assert_array_equal(
            jaxq.dequantize(checkpoint[UP], dtype="float32"),
            jaxq.dequantize(expected, dtype="float32"),
        )
    model, _ = models.load(tmp_path)
    assert model(jnp.asarray([[1, 2]])).shape == (1, 2, 97)


def test_the_safetensors_package_reads_the_shards(source, tmp_path):
    quantize_checkpoint(source, tmp_path, "int8", shard_bytes=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    total = 0
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / name, framework="numpy") as file:
            for tensor in file.keys():  # noqa: SIM118
                assert index["weight_map"][tensor] == name
                total += file.get_tensor(tensor).nbytes
    assert total == index["metadata"]["total_size"]


def test_tensors_of_odd_sizes_come_last(tmp_path):
    tensors = {
        "a.weight": np.ones((3, 32), np.float32),
        "odd": np.ones(3, np.int8),
        "odd16": np.ones(5, np.float16),
        "b.weight": np.ones((5, 32), np.float32),
    }
    directories.write(tmp_path / "floats", tensors, None)
    quantize_checkpoint(tmp_path / "floats", tmp_path / "out", "int8")
    with safe_open(tmp_path / "out/model.safetensors", framework="numpy") as file:
        names = file.offset_keys()
        offset = 0
        for name in names:
            tensor = file.get_tensor(name)
            assert offset % tensor.dtype.itemsize == 0, name
            offset += tensor.nbytes
    assert names[-1] == "odd"


def test_a_run_goes_on_after_the_last_whole_shard(source, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = {"recipe": "int8", "shard_bytes": SHARD}
    quantize_checkpoint(source, whole, **arguments)
    write, count = _stream._write_shard, 0

    def fail_at_the_third(path, *rest):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(_stream, "_write_shard", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, part, **arguments)
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_checkpoint(part)
    with pytest.raises(ValueError, match="is the record of another run"):
        quantize_checkpoint(source, part, "int4", shard_bytes=SHARD)
    # A flipped bit in the first shard is found, and the shard is written again.
    first = min(part.glob("model-*"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    again = []

    def recorded(path, *rest):
        again.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(_stream, "_write_shard", recorded)
    quantize_checkpoint(source, part, **arguments)
    shards = sorted(path.name for path in part.glob("model-*"))
    assert again == [shards[0], *shards[2:]]
    assert contents(part) == contents(whole)
    with pytest.raises(ValueError, match="has a checkpoint already"):
        quantize_checkpoint(source, part, **arguments)


SCRIPT = """
import sys
from jaxq.files import NewFile
import jaxq, time
write = NewFile.write
def slow(self, data):
    time.sleep(0.01)
    write(self, data)
NewFile.write = slow
jaxq.io.quantize_checkpoint(sys.argv[1], sys.argv[2], "int8", shard_bytes=200_000)
"""


def test_kill_9_at_any_moment_loses_nothing(source, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quantize_checkpoint(source, whole, "int8", shard_bytes=SHARD)
    for delay in (0.2, 0.5, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(source), str(killed)],
            env=dict(os.environ, JAX_PLATFORMS="cpu"),
        )
        # The first record appears when the shards begin.
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "jaxq_progress.json").exists():
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (killed / "config.json").exists():
            break
        with pytest.raises(FileNotFoundError, match="config.json"):
            read_checkpoint(killed)
    if (
        not (killed / "config.json").exists()
        or (killed / "jaxq_progress.json").exists()
    ):
        quantize_checkpoint(source, killed, "int8", shard_bytes=SHARD)
    assert contents(killed) == contents(whole)


REFUSED = {
    "data": (jaxq.Recipe([jaxq.Rule(weight="int4", method="gptq")]), "method='gptq'"),
    "rotate": ("w4a4_rotated", "rotate=True"),
    "no match": (
        jaxq.Recipe([jaxq.Rule("nothing/*", weight="int4")]),
        "match no weight",
    ),
    "skip": (jaxq.Recipe([jaxq.Rule(skip=True)]), "no rule quantizes"),
    "format": ("nf4", r"cannot hold these weights:\n  model"),
    "table": (jaxq.Recipe([jaxq.Rule(weight="int8")]), "an embedding table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_fails_before_the_work(source, tmp_path, name):
    recipe, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_named(tmp_path):
    tensors = {"up.weight": np.full((32, 32), np.nan, np.float32)}
    directories.write(tmp_path / "floats", tensors, None)
    with pytest.raises(ValueError, match="up.weight"):
        quantize_checkpoint(tmp_path / "floats", tmp_path / "out", "int8")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob(".*"))


def test_progress_shows_the_rate_and_the_time_left(source, tmp_path, capsys):
    quantize_checkpoint(source, tmp_path, "int8", progress=True)
    line = capsys.readouterr().err
    assert "GB/s" in line
    assert "0 s left" in line


def test_a_method_that_needs_no_data(source, tmp_path):
    spec = layouts.get("awq").spec({"group_size": 32})
    rules = [*jaxq.recipes.get("int4").rules[:-1]]
    rules.append(jaxq.Rule(weight=spec, method="hqq"))
    quantize_checkpoint(source, tmp_path, jaxq.Recipe(rules), format="awq")
    with read_checkpoint(source) as floats, read_checkpoint(tmp_path) as checkpoint:
        w = jnp.asarray(floats[UP]).T
        expected, _ = jaxq.methods.hqq(w, spec)
        np.testing.assert_array_equal(checkpoint[UP].T.codes(), expected.codes())


def test_a_quantized_source_is_dequantized_first(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "int8", "int8")
    quantize_checkpoint(
        tmp_path / "int8", tmp_path / "nf4", "nf4", format="bitsandbytes"
    )
    with (
        read_checkpoint(tmp_path / "int8") as before,
        read_checkpoint(tmp_path / "nf4") as after,
    ):
        floats = jaxq.dequantize(before[UP])
        expected = jaxq.quantize(floats, "nf4", contracting=-1)
        np.testing.assert_array_equal(after[UP].codes(), expected.codes())
