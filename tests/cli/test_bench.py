"""`jaxq bench`: what is timed and how it is shown. No time is asserted."""

import pytest

import jaxq


def test_a_product(run):
    words = ["bench", "--shape", "4x64x32", "--preset", "int8", "--calls", "2"]
    result = run(*words, "--json")
    assert result.code == 0, result.err
    seconds = result.json["seconds"]
    assert seconds["float"]["num_calls"] == seconds["quantized"]["num_calls"] == 2
    ratio = seconds["quantized"]["median"] / seconds["float"]["median"]
    assert result.json["ratio"] == pytest.approx(ratio)
    assert result.json["shape"] == [4, 64, 32]
    assert result.json["bits_per_weight"] == 8.5
    table = run(*words).out
    assert "8.500 bits per weight" in table
    assert result.json["explain"] in table


def test_a_model(run, model_dir):
    words = ["bench", model_dir, "--recipe", "int4", "--calls", "1", "--context", "8"]
    result = run(*words, "--json")
    assert result.code == 0, result.err
    model, _ = jaxq.models.load(model_dir)
    _, report = jaxq.quantize_model(model, "int4")
    assert result.json["bits_per_weight"] == report.bits_per_weight
    assert result.json["tokens"] == [1, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Pass SOURCE with --recipe, or --shape"),
        (["--shape", "4x64"], "expected MxKxN"),
        (["--shape", "0x64x2"], "expected MxKxN"),
    ],
)
def test_wrong_arguments(run, words, message):
    result = run("bench", *words)
    assert result.code == 2
    assert message in result.err


def test_wrong_recipes(run, model_dir):
    assert "SOURCE needs --recipe" in run("bench", model_dir).err
    result = run("bench", model_dir, "--recipe", "int4_gptq")
    assert result.code == 2
    assert "needs data" in result.err
    result = run("bench", "--shape", "4x64x32", "--preset", "int5")
    assert result.code == 1
    assert "int5" in result.err
