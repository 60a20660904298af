"""`jaxq statistics`, against `jaxq.nn.calibrate`."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxq

LAYER = "layers/0/mlp/down_proj"


@pytest.fixture(scope="module")
def halves(text, tmp_path_factory):
    """Two halves of a text."""
    folder = tmp_path_factory.mktemp("halves")
    words = text.read_text()
    paths = folder / "a.txt", folder / "b.txt"
    paths[0].write_text(words[:1200])
    paths[1].write_text(words[1200:])
    return paths


def batches_of(model_dir, path, context):
    _, tokenizer = jaxq.models.load(model_dir)
    ids = np.asarray(tokenizer.encode(path.read_text()).ids, np.int32)
    windows = ids[: len(ids) // context * context].reshape(-1, context)
    num_batches = -(-len(windows) // 8)
    size = len(windows) // num_batches
    chosen = np.linspace(0, len(windows) - 1, num_batches * size).round().astype(int)
    return list(windows[chosen].reshape(num_batches, size, context))


def test_collect_merge_show_and_quantize(run, model_dir, halves, tmp_path):
    model, _ = jaxq.models.load(model_dir)
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, file in zip(halves, files, strict=True):
        words = ["--text", path, "--out", file, "--observer", "absmax"]
        result = run("statistics", "collect", model_dir, *words, "--json")
        assert result.code == 0, result.err
        batches = batches_of(model_dir, path, 32)
        expected = jaxq.nn.calibrate(model, batches)[LAYER]
        rows = {row["layer"]: row for row in result.json["layers"]}
        assert rows[LAYER]["rows"] == float(expected.count)
        largest = float(expected.absmax.max())
        assert rows[LAYER]["largest_magnitude"] == pytest.approx(largest)
        assert result.json["tokens"] == sum(batch.size for batch in batches)
    merged = tmp_path / "both.safetensors"
    result = run("statistics", "merge", *files, "--out", merged, "--json")
    assert result.code == 0, result.err
    assert result.json["observer"] == "absmax"
    assert result.json["sources"] == [str(path) for path in halves]
    shown = run("statistics", "show", merged)
    assert LAYER in shown.out
    assert "static ranges by absmax" in shown.out
    # The second moments are those of both texts.
    hessian = jaxq.load(merged)["layers"][LAYER]["hessian"]
    parts = [jaxq.load(file)["layers"][LAYER] for file in files]
    counts = [float(part["count"]) for part in parts]
    both = sum(
        count * np.asarray(part["hessian"], np.float64)
        for count, part in zip(counts, parts, strict=True)
    ) / sum(counts)
    np.testing.assert_allclose(np.asarray(hessian), both, rtol=1e-4, atol=1e-6)
    # A static range covers both texts.
    out = tmp_path / "out"
    words = ["--recipe", "fp8_static", "--statistics", merged, "--out", out, "--json"]
    result = run("quantize", model_dir, *words)
    assert result.code == 0, result.err
    row = {row["path"]: row for row in result.json["rows"]}[f"{LAYER}/kernel"]
    highs = [max(map(abs, part_range(file))) for file in files]
    assert max(map(abs, row["input_range"])) == pytest.approx(max(highs))


def part_range(file):
    """The extremes of a layer's inputs, of all rows."""
    stats = jaxq.load(file)["layers"][LAYER]
    held_out = np.asarray(stats["held_out"])[np.asarray(stats["held_out_ranks"]) >= 0]
    low = min(float(np.min(stats["low"])), float(held_out.min()))
    return low, max(float(np.max(stats["high"])), float(held_out.max()))


def test_gptq_with_statistics_is_gptq_with_the_text(run, model_dir, text, tmp_path):
    stats = tmp_path / "s.safetensors"
    run("statistics", "collect", model_dir, "--text", text, "--out", stats)
    words = ["quantize", model_dir, "--recipe", "int4_gptq"]
    first = run(*words, "--statistics", stats, "--out", tmp_path / "a")
    second = run(*words, "--calibration", text, "--out", tmp_path / "b")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    models = [jaxq.models.load(tmp_path / name)[0] for name in "ab"]
    leaves = [jax.tree.leaves(nnx.state(model)) for model in models]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_statistics_of_another_model_are_an_error(
    run, model_dir, text, tmp_path, halves
):
    config = jaxq.models.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    )
    _, tokenizer = jaxq.models.load(model_dir)
    other = tmp_path / "other"
    model = jaxq.models.Llama(config, rngs=nnx.Rngs(0))
    jaxq.models.save(other, model, tokenizer=tokenizer)
    mine, others = tmp_path / "mine", tmp_path / "others"
    run("statistics", "collect", model_dir, "--text", text, "--out", mine)
    run("statistics", "collect", other, "--text", text, "--out", others)
    words = ["--recipe", "int4_gptq", "--statistics", mine, "--out", tmp_path / "out"]
    result = run("quantize", other, *words)
    assert result.code == 2
    assert "a model with another config" in result.err
    result = run("statistics", "merge", mine, others, "--out", tmp_path / "both")
    assert result.code == 2
    assert "of another model" in result.err
    assert not (tmp_path / "both").exists()
    both = ["--statistics", mine, "--calibration", text, "--out", tmp_path / "out"]
    result = run("quantize", model_dir, "--recipe", "int4_gptq", *both)
    assert result.code == 2
    assert "not both" in result.err


def test_a_file_that_has_no_statistics(run, tmp_path):
    jaxq.save(tmp_path / "w", {"w": 3})
    result = run("statistics", "show", tmp_path / "w")
    assert result.code == 1
    assert "has no calibration statistics" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "entries",
    [
        {"layers": [1]},
        {"layers": {"a": 3}},
        {"layers": {"a": {"unknown": 1}}},
        {"tokens": "many"},
        {"sources": None},
        {"observer": "{"},
        {"observer": '{"type": "none"}'},
    ],
)
def test_damaged_statistics_name_the_file(run, tmp_path, entries):
    path = tmp_path / "a.safetensors"
    whole = {"kind": "statistics", "model": "x", "sources": ["a"], "tokens": 1}
    jaxq.save(path, whole | {"observer": "", "layers": {}} | entries)
    result = run("statistics", "show", path)
    assert result.code == 1
    assert f"{path}: the statistics are damaged: " in result.err
    assert result.err.count("\n") == 1


def test_a_file_is_replaced_only_if_asked(run, model_dir, text, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("kept")
    for words in (["collect", model_dir, "--text", text], ["merge", path]):
        result = run("statistics", *words, "--out", path)
        assert result.code == 2
        assert "the file exists. Pass --overwrite" in result.err
        assert path.read_text() == "kept"
    words = ["collect", model_dir, "--text", text, "--overwrite"]
    assert run("statistics", *words, "--out", path).code == 0
    assert run("statistics", "show", path).code == 0
    result = run("statistics", "merge", path, "--out", tmp_path / "none" / "a")
    assert "there is no directory" in result.err
