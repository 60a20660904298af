"""`jaxq inspect`, against the arrays of the files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq


@pytest.fixture(scope="module")
def quantized(model_dir, tmp_path_factory):
    model, _ = jaxq.models.load(model_dir)
    path = tmp_path_factory.mktemp("quantized") / "int4"
    qmodel, report = jaxq.quantize_model(model, "int4")
    jaxq.models.save(path, qmodel)
    return path, report


def test_a_quantized_directory_beside_its_original(run, model_dir, quantized):
    path, report = quantized
    result = run("inspect", path, "--reference", model_dir, "--json")
    assert result.code == 0, result.err
    assert result.json["quantized_by"] == "jaxq"
    assert result.json["bytes"] == report.bytes_after
    rows = {row["name"]: row for row in result.json["tensors"]}
    assert set(rows) == {row.path for row in report.rows}
    for expected in report.rows:
        row = rows[expected.path]
        assert row["shape"] == list(expected.shape)
        assert row["bits"] == pytest.approx(expected.bits_per_element)
        if expected.format is None:
            assert row["exact"]
        else:
            assert row["format"] == expected.format
            assert row["sqnr"] == pytest.approx(expected.sqnr, abs=1e-3)
    assert len(report.quantized) == sum(
        entry["tensors"] for entry in result.json["histogram"]
    )
    table = run("inspect", path, "--reference", model_dir).out
    assert "layers/0/mlp/up_proj/kernel" in table
    assert "quantized by jaxq" in table
    assert "#" * 40 in table


def test_a_float_directory(run, model_dir):
    result = run("inspect", model_dir, "--json")
    assert result.json["quantized_by"] == ""
    assert result.json["bits_per_element"] == 16
    rows = {row["name"]: row for row in result.json["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert (row["shape"], row["format"]) == ([64, 32], "BF16")
    same = run("inspect", model_dir, "--reference", model_dir, "--json")
    assert all(row["exact"] for row in same.json["tensors"])


def test_a_file_of_a_tree(run, tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    jaxq.save(tmp_path / "w", {"a": [w, 3], "b": {"c": jaxq.quantize(w, "nf4")}})
    jaxq.save(tmp_path / "floats", {"b": {"c": w}})
    words = ["inspect", tmp_path / "w", "--reference", tmp_path / "floats", "--json"]
    rows = {row["name"]: row for row in run(*words).json["tensors"]}
    assert set(rows) == {"a/0", "b/c"}
    assert rows["b/c"]["format"] == "nf4"
    assert rows["b/c"]["bits"] == 4.5
    error = np.asarray(jaxq.dequantize(jaxq.quantize(w, "nf4"))) - np.asarray(w)
    sqnr = 10 * np.log10(np.square(np.asarray(w)).sum() / np.square(error).sum())
    assert rows["b/c"]["sqnr"] == pytest.approx(sqnr, abs=1e-3)
    assert rows["a/0"]["sqnr"] is None


def test_one_number(run):
    result = run("inspect", "--number", "0.1", "--format", "float8_e4m3fn", "--json")
    assert result.json["bits"] == "0 0011 101"
    assert result.json["value"] == 0.1015625
    negative = run("inspect", "--number", "-0.3", "--format", "int4")
    assert "below     -1.0" in negative.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "Pass PATH, or --number with --format"),
        (["--number", "0.1"], 2, "belong together"),
        (["--number", "0.1", "--format", "int99"], 1, "unknown format 'int99'"),
        (["no_such_file"], 2, "does not exist"),
    ],
)
def test_wrong_arguments(run, words, code, message):
    result = run("inspect", *words)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1


def test_wrong_files(run, model_dir, tmp_path):
    assert "has no file *.safetensors" in run("inspect", tmp_path).err
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "a.safetensors" in result.err
    jaxq.save(tmp_path / "a.safetensors", {"w": jnp.ones(3)})
    result = run("inspect", tmp_path, "--reference", model_dir)
    assert result.code == 2
    assert "has no tensor of these names" in result.err
    (tmp_path / "config.json").write_text("{")
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "config.json is damaged" in result.err
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json is not a JSON object" in run("inspect", tmp_path).err
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    assert run("inspect", tmp_path, "--json").json["quantized_by"] == ""
    (tmp_path / "a.safetensors").rename(tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "none_such"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "none_such" in result.err
