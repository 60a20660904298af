"""The trained model, exported to each format and loaded back: the same perplexity."""

import functools
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import models
from jaxq.evaluation import perplexity
from jaxq.io import layouts
from tests import tables
from tests.io.layouts.cases import CASES

EXAMPLES = Path(__file__).parents[3] / "examples"
# The formats of `export`, with the weights of each.
FORMATS = {
    "awq": "awq",
    "bitsandbytes": "nf4 nested",
    "compressed-tensors": "compressed-tensors pack 4",
    "fp8": "fp8 block",
    "gguf": "gguf Q4_0",
    "gptq": "gptq 4",
    "modelopt": "modelopt nvfp4",
}


@nnx.jit
def run(model, x):
    return model(x)


def perplexity_of(model, tokens):
    return perplexity(functools.partial(run, model), tokens, context=64, batch_size=4)


@pytest.fixture(scope="module")
def trained():
    """The float model, its tokenizer, a text, and its perplexity on the text."""
    pytest.importorskip("tokenizers", reason="pip install jaxq[hf]")
    model, tokenizer = models.load(EXAMPLES / "tiny_llama", scan_layers=True)
    text = (EXAMPLES / "heldout.txt").read_text(encoding="utf-8")[:3000]
    tokens = np.asarray(tokenizer.encode(text).ids)[:256]
    assert len(tokens) == 256
    return model, tokenizer, tokens, perplexity_of(model, tokens)


@pytest.mark.parametrize("fmt", tables.thinned(FORMATS, ["gguf", "gptq"]))
def test_an_exported_model_has_the_same_perplexity(tmp_path, trained, fmt):
    model, tokenizer, tokens, float_perplexity = trained
    case = CASES[FORMATS[fmt]]
    qmodel, _ = jaxq.quantize_model(model, layouts.get(case.layout).spec(case.config))
    path = tmp_path / ("model.gguf" if fmt == "gguf" else "model")
    jaxq.io.export(qmodel, path, format=fmt, tokenizer=tokenizer)
    again, own_tokenizer = models.load(path, scan_layers=True)
    assert own_tokenizer.to_str() == tokenizer.to_str()
    expected = perplexity_of(qmodel, tokens)
    assert perplexity_of(again, tokens) == pytest.approx(expected, rel=1e-6)
    # Float weights would give another number.
    assert float_perplexity != pytest.approx(expected, rel=1e-4)
