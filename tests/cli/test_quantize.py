"""`jaxq quantize`, against `jaxq.quantize_model`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

TOKENS = jnp.arange(32)[None]


def logits(path):
    model, _ = jaxq.models.load(path)
    return np.asarray(jax.jit(model)(TOKENS))


def test_the_directory_holds_the_quantized_model(run, model_dir, tmp_path):
    out = tmp_path / "out"
    result = run("quantize", model_dir, "--recipe", "int4", "--out", out, "--json")
    assert result.code == 0, result.err
    model, tokenizer = jaxq.models.load(model_dir)
    expected, report = jaxq.quantize_model(model, "int4")
    assert result.json["totals"] == report.to_dict()["totals"]
    assert (logits(out) == np.asarray(jax.jit(expected)(TOKENS))).all()
    assert jaxq.models.load(out)[1].to_str() == tokenizer.to_str()
    again = run("quantize", model_dir, "--recipe", "int8", "--out", out)
    assert again.code == 2
    assert "--overwrite" in again.err
    again = run("quantize", model_dir, "--recipe", "int8", "--out", out, "--overwrite")
    assert again.code == 0
    assert "in floats: lm_head/kernel (output head, left in floats" in again.out
    assert f"wrote {out}" in again.out


def test_calibration_is_that_of_the_text(run, model_dir, text, tmp_path):
    out = tmp_path / "out"
    words = ["--recipe", "int4_gptq", "--calibration", text, "--context", "16"]
    result = run("quantize", model_dir, *words, "--out", out, "--samples", "9")
    assert result.code == 0, result.err
    model, tokenizer = jaxq.models.load(model_dir)
    ids = np.asarray(tokenizer.encode(text.read_text()).ids, np.int32)
    num_windows = len(ids) // 16
    windows = ids[: num_windows * 16].reshape(num_windows, 16)
    # 9 windows are two batches of 4, evenly spread over the text.
    chosen = np.linspace(0, num_windows - 1, 8).round().astype(int)
    batches = list(windows[chosen].reshape(2, 4, 16))
    expected, _ = jaxq.quantize_model(model, "int4_gptq", calibration=batches)
    assert (logits(out) == np.asarray(jax.jit(expected)(TOKENS))).all()


def test_a_budget_of_bits(run, model_dir, text, tmp_path):
    words = ["--recipe", "int4", "--calibration", text, "--target-bits", "6.5"]
    result = run(
        *("quantize", model_dir, *words, "--out", tmp_path / "out", "--json"),
        *("--choices", "int4, int8"),
    )
    assert result.code == 0, result.err
    assert 5 < result.json["totals"]["bits_per_weight"] <= 6.5
    assert set(result.json["choices"].values()) == {"int4", "int8"}


def test_a_recipe_of_a_file(run, model_dir, tmp_path):
    import json

    recipe = jaxq.Recipe(
        [jaxq.Rule("lm_head", weight="nf4"), *jaxq.recipes.get("int8").rules]
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    out = tmp_path / "out"
    result = run("quantize", model_dir, "--recipe", path, "--out", out, "--json")
    formats = {row["path"]: row["format"] for row in result.json["rows"]}
    assert formats["lm_head/kernel"] == "nf4"
    path.write_text("[")
    result = run("quantize", model_dir, "--recipe", path, "--out", tmp_path / "two")
    assert result.code == 2
    assert str(path) in result.err


def test_a_stream_is_that_of_quantize_checkpoint(run, model_dir, tmp_path):
    words = ["quantize", model_dir, "--recipe", "int8", "--stream"]
    words += ["--format", "compressed-tensors", "--out", tmp_path / "a"]
    result = run(*words, "--json")
    assert result.code == 0, result.err
    expected = jaxq.io.quantize_checkpoint(model_dir, tmp_path / "b", "int8")
    assert result.json["parameters"] == expected
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            data = [(tmp_path / folder / name).read_bytes() for folder in "ab"]
            assert data[0] == data[1]
    result = run("quantize", model_dir, "--recipe", "int8", "--stream", "--out", "x")
    assert result.code == 2
    assert "--stream cannot write --format jaxq" in result.err
    assert run(*words, "--target-bits", "4").code == 2


def test_a_stream_with_statistics(run, model_dir, text, tmp_path):
    stats = tmp_path / "stats.safetensors"
    words = ["--text", text, "--context", "16", "--out", stats]
    assert run("statistics", "collect", model_dir, *words).code == 0
    words = ["--recipe", "int4_gptq", "--statistics", stats]
    words += ["--format", "compressed-tensors"]
    result = run("quantize", model_dir, *words, "--out", tmp_path / "a")
    assert result.code == 0, result.err
    result = run("quantize", model_dir, *words, "--stream", "--out", tmp_path / "b")
    assert result.code == 0, result.err
    assert (logits(tmp_path / "a") == logits(tmp_path / "b")).all()


@pytest.mark.parametrize(
    ("recipe", "fmt", "message"),
    [
        ("int4_gptq", "modelopt", "cannot hold these weights"),
        ("w8a8_static", "compressed-tensors", "has no static ranges of inputs"),
    ],
)
def test_a_format_is_refused_before_the_calibration(
    run, model_dir, text, tmp_path, monkeypatch, recipe, fmt, message
):
    calls = []
    quantize_model = jaxq.nn.quantize_model

    def recorded(*args, **options):
        calls.append(options)
        return quantize_model(*args, **options)

    monkeypatch.setattr(jaxq.nn, "quantize_model", recorded)
    words = ["--recipe", recipe, "--calibration", text, "--format", fmt]
    result = run("quantize", model_dir, *words, "--out", tmp_path / "out")
    assert result.code != 0
    assert message in result.err
    assert not any("calibration" in options for options in calls)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "int5"], "unknown recipe 'int5'"),
        (["--recipe", "int4_gptq"], "needs data. Pass --calibration"),
        (["--recipe", "int4", "--target-bits", "4.5"], "--target-bits needs --cal"),
        (["--recipe", "int4", "--calibration", "none.txt"], "'none.txt' does not"),
    ],
)
def test_wrong_arguments_write_nothing(run, model_dir, tmp_path, words, message):
    result = run("quantize", model_dir, *words, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short_or_no_text(run, model_dir, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("def")
    words = ["quantize", model_dir, "--recipe", "int4_gptq", "--calibration", path]
    result = run(*words, "--out", tmp_path / "out")
    assert result.code == 2
    assert "a window has 32" in result.err
    path.write_bytes(b"\xff\xfe\x00")
    result = run(*words, "--out", tmp_path / "out")
    assert result.code == 2
    assert "not a text file in UTF-8" in result.err


def test_a_directory_that_is_no_model(run, tmp_path):
    result = run("quantize", tmp_path, "--recipe", "int4", "--out", tmp_path / "out")
    assert result.code == 1
    assert result.err.startswith("jaxq: error: jaxq.models.load: ")
    assert "config.json" in result.err
    assert result.err.count("\n") == 1
