"""The examples run from a shell and print what their docstrings promise."""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import jaxq

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> str:
    environment = dict(os.environ) | variables
    flags = environment.pop("XLA_FLAGS", "").split()
    # One device, as users have.
    flags = [flag for flag in flags if "device_count" not in flag]
    environment["XLA_FLAGS"] = " ".join(flags)
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.heavy
def test_accumulators_prints_its_tables_and_saves_its_plot(tmp_path):
    pytest.importorskip(
        "tokenizers", reason="the example reads a tokenizer: pip install jaxq[hf]"
    )
    pytest.importorskip(
        "matplotlib", reason="the example draws a plot: pip install jaxq[plots]"
    )
    out = run(
        "examples/02_accumulators.py", "--fast", "--out", str(tmp_path / "plot.png")
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    row = re.compile(r"^(\S.*?\S)  +((?:[\d.e+-]+ *)+)( %)?$", re.MULTILINE)
    lines = [(m[1], [float(v) for v in m[2].split()]) for m in row.finditer(out)]
    errors = {name: values for name, values in lines if len(values) == 8}
    assert len(errors) == 7
    # Sums in float32 are right. Sums in bfloat16 get worse with length, unless they
    # are chunked.
    assert (
        errors["bf16, fp32 sum"][-1]
        < 1e-6
        < errors["e4m3, 14-bit sum, chunks of 128"][-1]
    )
    assert errors["bf16, bf16 sum"][-1] > 4 * errors["bf16, bf16 sum"][0]
    assert errors["bf16, bf16 sum, chunks of 32"][-1] < errors["bf16, bf16 sum"][-1] / 2
    kl = {name: values[1] for name, values in lines if len(values) == 3}
    assert len(kl) == 4
    assert (
        0
        == kl["float32"]
        < kl["bf16, fp32 sum"]
        < kl["bf16, bf16 sum"]
        < kl["e4m3, bf16 sum"]
    )


def test_quickstart_prints_its_table():
    pytest.importorskip(
        "tokenizers", reason="the quickstart reads a tokenizer: pip install jaxq[hf]"
    )
    out = run("examples/01_quickstart.py", "--fast")
    number = r"\s+([\d.]+)"
    rows = {
        m[1]: [float(v) for v in m.groups()[1:]]
        for m in re.finditer(rf"^(\w+){number * 5} %", out, re.MULTILINE)
    }
    assert list(rows) == ["bfloat16", "w8a8", "nf4", "int3"]
    bits, megabytes, perplexity, kl, top1 = (
        dict(zip(rows, column, strict=True))
        for column in zip(*rows.values(), strict=True)
    )
    assert bits["w8a8"] > 8 > bits["nf4"] > 4 > bits["int3"] > 3
    assert megabytes["bfloat16"] > megabytes["w8a8"] > megabytes["nf4"]
    assert 0 == kl["bfloat16"] < kl["w8a8"] < kl["nf4"] < kl["int3"] / 2
    assert perplexity["int3"] > 1.05 * perplexity["nf4"]
    assert perplexity["nf4"] > perplexity["w8a8"]
    assert top1["w8a8"] > top1["nf4"] > 80
    assert abs(perplexity["w8a8"] / perplexity["bfloat16"] - 1) < 0.01
    assert "reloaded: logits identical" in out
    assert out.count("\n[def read(self") == 2


@pytest.mark.heavy
def test_digits_keep_their_accuracy_in_int8():
    pytest.importorskip(
        "sklearn",
        reason="the example reads scikit-learn's digits: pip install scikit-learn",
    )
    out = run("examples/03_digits.py", "--fast")
    rows = {
        m[1]: float(m[2])
        for m in re.finditer(r"^(\w+) +([\d.]+)% +\d+ +\d+ +[\d.]+$", out, re.MULTILINE)
    }
    assert list(rows) == ["float32", "int8", "w8a8_static"]
    assert rows["float32"] > 94
    # 0.6 per cent are two of the 359 images.
    for name in ("int8", "w8a8_static"):
        assert abs(rows[name] - rows["float32"]) <= 0.6, rows
    assert "int32 sums: 3 of 3" in out
    assert "int8 static" in out
    assert "static activation quantization to int8" in out


NUMBER = r" +([+-]?[\d,.]+)"


def numbers(out: str, row: str, count: int) -> list[float]:
    """The numbers after the name of a row, which is a regular expression."""
    match = re.search(rf"^{row}{NUMBER * count}(?: %)?$", out, re.MULTILINE)
    assert match, f"no row {row} with {count} numbers in\n{out}"
    return [float(number.replace(",", "")) for number in match.groups()]


def percentages(out: str, row: str) -> list[float]:
    """The numbers of a row, some of which have percent signs."""
    return numbers(out.replace(" %", ""), row, 5)


def require_plots_and_tokenizers() -> None:
    pytest.importorskip(
        "tokenizers", reason="the example reads a tokenizer: pip install jaxq[hf]"
    )
    pytest.importorskip(
        "matplotlib", reason="the example draws a plot: pip install jaxq[plots]"
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "start"),
    [
        ((), "GPTQ"),
        # Without text and without GPTQ: training begins with rounding to nearest.
        (("--data", "self", "--start", "rtn"), "round to nearest"),
    ],
    ids=["library", "self"],
)
def test_qat_is_better_than_its_start(tmp_path, options, start):
    require_plots_and_tokenizers()
    plot = tmp_path / "plot.png"
    out = run("examples/04_qat.py", "--fast", "--out", str(plot), *options)
    assert plot.read_bytes().startswith(b"\x89PNG")
    _, float_perplexity, float_kl = numbers(out, "float32", 3)
    assert float_kl == 0
    rows = {
        name: numbers(out, f"int2 +{name}", 3)
        for name in ("round to nearest", "GPTQ", f"QAT from {start}")
    }
    bits = {row[0] for row in rows.values()}
    assert bits == {2.375}
    _, before, kl_before = rows[start]
    _, after, kl_after = rows[f"QAT from {start}"]
    assert float_perplexity < after < before
    assert kl_after < kl_before
    assert rows["GPTQ"][1] < rows["round to nearest"][1]


@pytest.mark.heavy
def test_small_student_prints_its_table_and_saves_its_plot(tmp_path):
    require_plots_and_tokenizers()
    plot = tmp_path / "plot.png"
    out = run("examples/05_small_student.py", "--fast", "--out", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    share = re.search(r"student: [\d,]+ parameters, (\d+)% of the teacher's", out)
    assert share
    assert 60 <= int(share[1]) <= 70
    (teacher,) = numbers(out, "teacher", 1)
    for name in ("alone", "distilled"):
        *seeds, mean, spread = numbers(out, name, 4)
        # The perplexity of a model that knows nothing is 2048.
        assert teacher < min(seeds) <= mean <= max(seeds) < 2048
        assert spread == pytest.approx(max(seeds) - min(seeds), abs=0.02)


def test_digits_student_learns_from_soft_labels(tmp_path):
    pytest.importorskip(
        "sklearn",
        reason="the example reads scikit-learn's digits: pip install scikit-learn",
    )
    pytest.importorskip(
        "matplotlib", reason="the example draws a plot: pip install jaxq[plots]"
    )
    plot = tmp_path / "plot.png"
    out = run("examples/06_digits_student.py", "--fast", "--out", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    large, teacher, _ = numbers(out, "teacher, labels", 3)
    small, distilled, _ = numbers(out, "student, soft labels", 3)
    assert small <= large / 10
    # The student has seen no label. Chance is 10 %.
    assert teacher > 90
    assert distilled > 85


@pytest.mark.heavy
def test_narrow_optimizer_states_train_as_float_states(tmp_path):
    require_plots_and_tokenizers()
    plot = tmp_path / "plot.png"
    out = run("examples/07_optimizer_states.py", "--fast", "--out", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    float_row = percentages(out, "adamw, float32")
    assert float_row[0] == 8
    assert float_row[2:] == [0, 0, 0]
    # Twenty steps are too few to compare losses. A state that diverges shows.
    limits = {"adamw8bit": (2.1, 1), "adamw4bit": (1.1, 5)}
    for name, (most_bytes, most_change) in limits.items():
        state_bytes, _, mean, low, high = percentages(out, name)
        assert state_bytes <= most_bytes
        assert low <= mean <= high
        assert max(abs(low), abs(high)) < most_change


@pytest.mark.heavy
def test_qlora_adapts_the_model_in_a_quarter_of_the_bytes():
    pytest.importorskip(
        "tokenizers", reason="the example reads a tokenizer: pip install jaxq[hf]"
    )
    out = run("examples/09_qlora.py", "--fast")
    share = re.search(r"quantized weights take ([\d.]+) of the bytes of bfloat16", out)
    assert share
    # 4 bits, a byte for 64 numbers, and a float32 for 256 of these bytes.
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert float(share[1]) == pytest.approx(bits / 16, abs=6e-4)
    rows = {name: numbers(out, name, 5) for name in ("LoRA", "QLoRA", "QLoRA, LoftQ")}
    for layers, model, _, before, after in rows.values():
        assert layers < model
        assert after < before
    assert rows["QLoRA"][0] < 0.27 * rows["LoRA"][0]
    assert rows["QLoRA"][1] < rows["LoRA"][1]
    # The adapters alone have states of the optimizer.
    assert rows["QLoRA"][2] == rows["LoRA"][2]


def test_the_text_of_numpy_is_split_by_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    numpy_text = importlib.import_module("numpy_text")
    characters = types.SimpleNamespace(
        encode=lambda text: types.SimpleNamespace(ids=[ord(c) for c in text])
    )
    heldout = "".join(map(chr, numpy_text.heldout_tokens(characters, 50_000)))
    training = "".join(map(chr, numpy_text.training_tokens(characters)))
    assert "def qr(a, mode='reduced')" in heldout
    assert "def qr(a, mode='reduced')" not in training
    assert "def nanmean(" in training
    assert len(numpy_text.training_tokens(characters, 1000)) == 1000


@pytest.mark.heavy
def test_training_writes_a_model_and_resumes(tmp_path):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the example trains a tokenizer: pip install jaxq[hf]"
    )
    places = [f"--{name}={tmp_path / name}" for name in ("out", "work", "heldout")]
    run("examples/train_tiny_llama.py", "--steps=2", *places)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    run("examples/train_tiny_llama.py", "--steps=3", "--resume", *places)
    model, tokenizer = jaxq.models.load(tmp_path / "out")
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first
    tokens = np.asarray(
        tokenizer.encode((tmp_path / "heldout").read_text()[:2000]).ids, np.int32
    )
    # The perplexity of a model that knows nothing is the number of tokens.
    value = jaxq.evaluation.perplexity(model, tokens, context=64)
    assert value < model.config.vocab_size


def test_models_on_a_mesh_compute_the_same():
    pytest.importorskip(
        "tokenizers", reason="the example reads a tokenizer: pip install jaxq[hf]"
    )
    out = run("examples/08_on_a_mesh.py", "--fast")
    row = re.compile(
        r"^(\S+) +(one device|tensor parallel|fully sharded) +([\d,]+) +([\d.]+)"
        r"(?: \(([\d.]+)\)  (yes|no))?$",
        re.MULTILINE,
    )
    rows = {(m[1], m[2]): m for m in row.finditer(out)}
    assert len(rows) == 6
    for name in ("float32", "int4"):
        total = int(rows[name, "one device"][3].replace(",", ""))
        # Tensor parallel has two shards, fully sharded has eight.
        for layout, share in (("tensor parallel", 0.75), ("fully sharded", 0.127)):
            match = rows[name, layout]
            assert int(match[3].replace(",", "")) < share * total
            assert abs(float(match[4]) - float(match[5])) < 0.01
            assert match[6] == "yes"
