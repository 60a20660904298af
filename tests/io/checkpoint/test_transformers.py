"""The package transformers reads what `export` writes, and the reverse."""

import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import models
from jaxq.io import layouts
from tests.io.checkpoint.directories import CASES
from tests.models.test_decoder import make

REASON = "compares with transformers on torch, which the bench extra installs"
# Sizes that all layouts can hold. Groups have up to 128 inputs.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


def package(name):
    # transformers needs accelerate to load quantized weights.
    for needed in ("torch", "transformers", "accelerate"):
        pytest.importorskip(needed, reason=REASON)
    return pytest.importorskip(name, reason=REASON)


@nnx.jit
def run(model, x):
    return model(x)


def peer_logits(path, **options):
    torch, transformers = package("torch"), package("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, **options
    ).eval()
    with torch.no_grad():
        logits = peer(torch.tensor(TOKENS, dtype=torch.long)).logits
    return logits.float().numpy()


def quantized_model(row):
    spec = layouts.get(CASES[row].layout).spec(CASES[row].config)
    return jaxq.quantize_model(make(**SIZES), spec)[0]


# The format, the package it needs, and the largest difference of logits. transformers
# has no CPU path for fp8 and runs bfloat16.
# compressed-tensors 0.20.1 does not load packed zero points, so "pack 4" is symmetric.
EXPORTED = {
    "nf4 nested": ("bitsandbytes", "bitsandbytes", 2e-4),
    "fp4": ("bitsandbytes", "bitsandbytes", 2e-4),
    "compressed-tensors pack 4": ("compressed-tensors", "compressed_tensors", 2e-4),
    "compressed-tensors pack 8": ("compressed-tensors", "compressed_tensors", 2e-4),
    "compressed-tensors float": ("compressed-tensors", "compressed_tensors", 2e-4),
    "fp8 block": ("fp8", "transformers", 0.1),
    "gguf Q4_0": ("gguf", "gguf", 2e-4),
    "gguf Q5_1": ("gguf", "gguf", 2e-4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", EXPORTED)
def test_transformers_runs_what_is_exported(tmp_path, row):
    fmt, name, tolerance = EXPORTED[row]
    package(name)
    qmodel = quantized_model(row)
    options = {"gguf_file": "model.gguf"} if fmt == "gguf" else {}
    path = tmp_path / "model.gguf" if fmt == "gguf" else tmp_path
    jaxq.io.export(qmodel, path, format=fmt)
    logits = peer_logits(tmp_path, **options)
    difference = np.abs(logits - np.asarray(run(qmodel, TOKENS))).max()
    spread = logits.std()
    assert difference <= tolerance * max(1, spread), (difference, spread)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_llm_int8(tmp_path):
    """bitsandbytes converts inputs to float16, so logits are close only."""
    package("bitsandbytes")
    transformers = package("transformers")
    qmodel, _ = jaxq.quantize_model(make(**SIZES), "llm_int8")
    jaxq.io.export(qmodel, tmp_path, format="bitsandbytes")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = peer.model.layers[1].self_attn.k_proj.weight
    kernel = qmodel.layers[1].self_attn.k_proj.kernel[...]
    np.testing.assert_array_equal(weight.data.numpy(), kernel.T.codes())
    expected = np.asarray(kernel.scale)[:, 0] * np.float32(127)
    np.testing.assert_array_equal(weight.SCB.numpy(), expected)
    logits, own = peer_logits(tmp_path), np.asarray(run(qmodel, TOKENS))
    assert np.abs(logits - own).mean() < 0.02 * logits.std()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ],
    ids=["nf4", "fp4 nested"],
)
def test_a_directory_that_transformers_quantized(tmp_path, options):
    package("bitsandbytes")
    transformers = package("transformers")
    models.save(tmp_path / "floats", make(**SIZES), dtype="float32")
    config = transformers.BitsAndBytesConfig(**options)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=config
    )
    peer.save_pretrained(tmp_path / "quantized")
    model, _ = models.load(tmp_path / "quantized")
    assert isinstance(model.layers[0].mlp.up_proj.kernel[...], jaxq.QTensor)
    logits = peer_logits(tmp_path / "quantized")
    np.testing.assert_allclose(run(model, TOKENS), logits, atol=2e-4, rtol=0)
