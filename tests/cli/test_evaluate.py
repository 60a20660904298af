"""`jaxq evaluate`, against `jaxq.evaluation`."""

import numpy as np
import pytest

import jaxq


@pytest.fixture(scope="module")
def quantized(model_dir, tmp_path_factory):
    model, tokenizer = jaxq.models.load(model_dir)
    path = tmp_path_factory.mktemp("quantized") / "int4"
    qmodel, _ = jaxq.quantize_model(model, "int4")
    jaxq.models.save(path, qmodel, tokenizer=tokenizer)
    return path


def tokens_of(model_dir, text):
    model, tokenizer = jaxq.models.load(model_dir)
    return model, np.asarray(tokenizer.encode(text.read_text()).ids, np.int32)


def test_one_model(run, model_dir, text):
    result = run("evaluate", model_dir, "--text", text, "--tokens", "100", "--json")
    assert result.code == 0, result.err
    model, tokens = tokens_of(model_dir, text)
    expected = jaxq.evaluation.perplexity(model, tokens[:100], context=32)
    assert result.json["perplexity"] == pytest.approx(expected)
    assert result.json["windows"] == 3
    assert result.json["predictions"] == 93
    assert result.json["tokens_per_second"]["model"] > 0
    assert result.json["peak_memory"]["num_bytes"] > 1e6


def test_beside_a_reference(run, model_dir, quantized, text):
    words = ["evaluate", quantized, "--reference", model_dir, "--text", text]
    result = run(*words, "--context", "16", "--json")
    assert result.code == 0, result.err
    model, tokens = tokens_of(model_dir, text)
    qmodel, _ = jaxq.models.load(quantized)
    expected = jaxq.evaluation.compare(model, qmodel, tokens, context=16)
    for name, value in expected._asdict().items():
        assert result.json[name.removeprefix("num_")] == pytest.approx(value), name
    sizes = result.json["parameter_bytes"]
    assert sizes["model"] < sizes["reference"]
    table = run(*words, "--context", "16")
    assert f"{expected.kl_p99:.5f}" in table.out
    assert f"{expected.top1_agreement:.2%}" in table.out


def test_one_window_has_no_error_and_json_stays_json(run, model_dir, text):
    result = run("evaluate", model_dir, "--text", text, "--tokens", "32", "--json")
    assert result.json["windows"] == 1
    assert result.json["perplexity_error"] is None


def test_another_tokenizer_is_an_error(run, model_dir, quantized, text, tmp_path):
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    path = other / "tokenizer.json"
    entries = json.loads(path.read_text())
    entries["added_tokens"] = []
    path.write_text(json.dumps(entries))
    words = ["evaluate", quantized, "--reference", other, "--text", text]
    result = run(*words)
    assert result.code == 2
    assert "another tokenizer" in result.err
    path.unlink()
    result = run("evaluate", other, "--text", text)
    assert result.code == 2
    assert "has no tokenizer.json" in result.err


def test_a_short_text(run, model_dir, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("def")
    result = run("evaluate", model_dir, "--text", path)
    assert result.code == 1
    assert "do not fill one window of context=32" in result.err
