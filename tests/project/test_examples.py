"""The examples run from a shell, as their docstrings say, and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as a user has
    found = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.heavy
def test_quickstart_prints_its_table():
    pytest.importorskip("tokenizers", reason="the quickstart reads a tokenizer: pip install jaxq[hf]")
    out = run("examples/01_quickstart.py", "--fast")
    number = r"\s+([\d.]+)"
    rows = {m[1]: [float(v) for v in m.groups()[1:]] for m in re.finditer(rf"^(\w+){number * 5} %", out, re.MULTILINE)}
    assert list(rows) == ["float32", "int8", "w8a8", "int4", "nf4"]
    bits, megabytes, perplexity, kl, top1 = (
        dict(zip(rows, column, strict=True)) for column in zip(*rows.values(), strict=True)
    )
    assert bits["int8"] > 8 > bits["nf4"] > bits["int4"] > 4
    assert megabytes["float32"] > megabytes["int8"] > megabytes["nf4"]
    assert 0 == kl["float32"] < kl["int8"] < kl["w8a8"] < kl["int4"]
    assert top1["int8"] > top1["int4"] > 80
    assert abs(perplexity["int8"] / perplexity["float32"] - 1) < 0.01
    assert "reloaded: logits identical" in out
    assert out.count("def read(self") == 2
