"""`jaxq convert`, against numpy's rounding."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxq

PATH = ("layers", 0, "mlp", "up_proj", "kernel")


def kernel(model):
    return np.asarray(dict(nnx.to_flat_state(nnx.state(model)))[PATH].get_value())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_rounded_to_nearest(run, model_dir, tmp_path, dtype):
    out = tmp_path / "out"
    result = run("convert", model_dir, "--dtype", dtype, "--out", out, "--json")
    assert result.code == 0, result.err
    model, tokenizer = jaxq.models.load(model_dir)
    converted, other = jaxq.models.load(out)
    expected = kernel(model).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(kernel(converted), expected)
    assert other.to_str() == tokenizer.to_str()
    assert f'"dtype": "{dtype}"' in (out / "config.json").read_text()
    back = tmp_path / "back"
    assert run("convert", out, "--dtype", "bfloat16", "--out", back).code == 0
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(kernel(jaxq.models.load(back)[0]), expected)


def test_wrong_arguments(run, model_dir, tmp_path):
    out = tmp_path / "out"
    assert run("convert", model_dir, "--dtype", "int8", "--out", out).code == 2
    model, _ = jaxq.models.load(model_dir)
    jaxq.models.save(tmp_path / "q", jaxq.quantize_model(model, "int8")[0])
    result = run("convert", tmp_path / "q", "--dtype", "float16", "--out", out)
    assert result.code == 2
    assert "has quantized weights" in result.err
    assert not out.exists()
    assert "Pass --dtype or --format" in run("convert", model_dir, "--out", out).err


@pytest.fixture(scope="module")
def wide_dir(model_dir, tmp_path_factory):
    """A model whose layers have whole groups of 128, with its int4 model."""
    _, tokenizer = jaxq.models.load(model_dir)
    config = jaxq.models.LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    path = tmp_path_factory.mktemp("wide") / "float"
    model = jaxq.models.Llama(config, rngs=nnx.Rngs(0))
    jaxq.models.save(path, model, tokenizer=tokenizer, dtype="float32")
    return path


@pytest.mark.parametrize(
    ("recipe", "format_name"), [("int4", "gptq"), ("mxfp4", "gguf"), ("int4", "hf")]
)
def test_other_formats_hold_the_same_numbers(
    run, wide_dir, tmp_path, recipe, format_name
):
    name = "a.gguf" if format_name == "gguf" else "a"
    first, second = tmp_path / "own", tmp_path / name
    result = run("quantize", wide_dir, "--recipe", recipe, "--out", first)
    assert result.code == 0, result.err
    words = ["convert", first, "--format", format_name, "--out", second, "--json"]
    result = run(*words)
    assert result.code == 0, result.err
    assert result.json["bytes"] > 1e5
    tokens = np.arange(16)[None]
    logits = [jaxq.models.load(path)[0](tokens) for path in (first, second)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    # inspect reads the other library's weights, and names them as the float model does.
    result = run("inspect", second, "--reference", wide_dir, "--json")
    assert result.code == 0, result.err
    rows = {row["name"]: row for row in result.json["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    own = run("inspect", first, "--reference", wide_dir, "--json").json["tensors"]
    kernel = {row["name"]: row for row in own}["layers/0/mlp/up_proj/kernel"]
    assert row["sqnr"] == pytest.approx(kernel["sqnr"], abs=0.01)
    assert row["shape"] == kernel["shape"][::-1]
    if format_name != "hf":
        assert row["bits"] < 5
    # quantize writes the same directory at once.
    third = tmp_path / ("b.gguf" if format_name == "gguf" else "b")
    words = ["--recipe", recipe, "--format", format_name, "--out", third]
    assert run("quantize", wide_dir, *words).code == 0
    files = [path.rglob("*") if path.is_dir() else [path] for path in (second, third)]
    sizes = [sum(file.stat().st_size for file in own) for own in files]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--recipe", "int4"],
        ["quantize", "--recipe", "int4", "--format", "gptq"],
        ["convert", "--dtype", "float32"],
    ],
)
def test_the_chat_template_and_the_end_token_are_kept(run, wide_dir, tmp_path, words):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(wide_dir, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    settings = '{"chat_template": "x", "eos_token": "</s>"}'
    (source / "tokenizer_config.json").write_text(settings)
    (source / "generation_config.json").write_text('{"top_k": 3}')
    assert run(words[0], source, *words[1:], "--out", out).code == 0
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 7
    assert (out / "tokenizer_config.json").read_text() == settings
    assert (out / "generation_config.json").read_text() == '{"top_k": 3}'


def test_weights_that_a_format_cannot_hold(run, wide_dir, tmp_path):
    out = tmp_path / "out"
    words = ["--recipe", "nf4", "--format", "gptq", "--out", out]
    result = run("quantize", wide_dir, *words)
    assert result.code == 1
    assert "format='gptq' cannot hold these weights" in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
