"""Every family of decoders against a small random model of `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxq.models import generate, load, save
from tests import tables
from tests.models.peers import DENSE, REASON, make_peer, peer_logits, peer_text

DEFAULT = (
    *("yarn", "dynamic", "mistral", "qwen2", "qwen3", "gemma2_caps"),
    *("gemma3_linear", "phi3", "olmo2", "smollm3_window", "granite", "gpt2"),
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@nnx.jit
def run(model, x):
    return model(x)


@nnx.jit
def decode(model, x, cache):
    return model.decode(x, cache)


def tokens(b=2, t=19):
    return np.random.default_rng(0).integers(0, 97, (b, t)).astype(np.int32)


@pytest.mark.parametrize("name", tables.thinned(DENSE, DEFAULT))
def test_logits_and_text_are_those_of_transformers(torch, transformers, name, tmp_path):
    peer = make_peer(torch, transformers, DENSE, name)
    peer.save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert tokenizer is None
    x = tokens()
    np.testing.assert_allclose(
        run(model, x), peer_logits(torch, peer, x), atol=2e-4, rtol=0
    )
    text = generate(model, x[:, :8], 12)
    np.testing.assert_array_equal(text, peer_text(torch, peer, x[:, :8], 12))


# One row for each family that `save` writes in another way.
SAVED = ("qwen3", "gemma2_caps", "gemma3_linear", "smollm3_window", "granite", "gpt2")


@pytest.mark.parametrize("name", tables.thinned(SAVED, ["gemma3_linear", "gpt2"]))
def test_transformers_reads_what_save_writes(torch, transformers, name, tmp_path):
    make_peer(torch, transformers, DENSE, name).save_pretrained(tmp_path / "peer")
    model, _ = load(tmp_path / "peer")
    save(tmp_path / "jaxq", model, dtype=jnp.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "jaxq").eval()
    np.testing.assert_allclose(
        run(model, tokens()), peer_logits(torch, again, tokens()), atol=2e-4, rtol=0
    )


@pytest.mark.parametrize(
    "name", tables.thinned(["gemma3", "smollm3_window", "gpt2"], ["gemma3"])
)
def test_a_scan_over_different_layers(torch, transformers, name, tmp_path):
    """Windows and rotary positions that alternate are switches in the scan."""
    make_peer(torch, transformers, DENSE, name).save_pretrained(tmp_path)
    plain, _ = load(tmp_path)
    scanned, _ = load(tmp_path, scan_layers=True)
    x = tokens()
    expected = np.asarray(run(plain, x))
    np.testing.assert_allclose(run(scanned, x), expected, atol=2e-4, rtol=0)
    part, cache = decode(scanned, x[:, :13], scanned.init_cache(2, 19))
    rest, _ = decode(scanned, x[:, 13:], cache)
    parts = np.concatenate([part, rest], axis=1)
    np.testing.assert_allclose(parts, expected, atol=2e-4, rtol=0)


def test_old_files_of_gpt2(torch, transformers, tmp_path):
    """They have no prefix, and they hold the causal mask."""
    make_peer(torch, transformers, DENSE, "gpt2").save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): value
        for name, value in load_file(file).items()
    }
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file(tensors, file)
    old, _ = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(old), nnx.state(model))


def test_whole_gains_are_float32(torch, transformers, tmp_path):
    """1 + g has more bits than g."""
    peer = make_peer(torch, transformers, DENSE, "gemma2").to(torch.bfloat16)
    peer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype=jnp.bfloat16)
    assert model.layers[0].mlp.up_proj.kernel.dtype == jnp.bfloat16
    gains = peer.model.norm.weight.detach().float().numpy()
    np.testing.assert_array_equal(model.norm.scale[...], 1 + gains)
    save(tmp_path / "again", model)
    again, _ = load(tmp_path / "again")
    np.testing.assert_array_equal(again.norm.scale[...], 1 + gains)
