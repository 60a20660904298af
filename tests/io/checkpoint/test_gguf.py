"""GGUF files: names, rows of heads, and models that are written and read."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import models
from jaxq.files import GgufFile, NewFile, NewTensor, write_gguf
from jaxq.io import layouts
from jaxq.io.checkpoint._gguf_names import config_of
from jaxq.models import ExpertsConfig
from tests import tables
from tests.models.test_decoder import make

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]


@nnx.jit
def run(model, x):
    return model(x)


def quantized_model(kind):
    spec = layouts.get("gguf").spec({"type": kind})
    qmodel, _ = jaxq.quantize_model(make(**SIZES), spec)
    return qmodel


@pytest.mark.parametrize("kind", tables.thinned(TYPES, ["Q4_0", "Q4_1"]))
def test_an_exported_model_comes_back(tmp_path, kind):
    path = tmp_path / "model.gguf"
    qmodel = quantized_model(kind)
    jaxq.io.export(qmodel, path, format="gguf")
    loaded, tokenizer = models.load(path)
    assert tokenizer is None
    config, written = loaded.config, qmodel.config
    assert config.num_key_value_heads == written.num_key_value_heads
    assert config.rms_norm_eps == pytest.approx(written.rms_norm_eps)
    kernel = loaded.layers[0].self_attn.q_proj.kernel[...]
    original = qmodel.layers[0].self_attn.q_proj.kernel[...]
    np.testing.assert_array_equal(kernel.codes(), original.codes())
    np.testing.assert_allclose(
        run(loaded, TOKENS), run(qmodel, TOKENS), atol=1e-5, rtol=0
    )


EXPERTS = ExpertsConfig(num_experts=3, num_experts_per_token=2, intermediate_size=128)
# The architecture in the package gguf, and settings of the model.
MIXTURES = {
    "mixtral": ("LLAMA", {"experts": EXPERTS}),
    "qwen3_moe": (
        "QWEN3MOE",
        {
            "experts": dataclasses.replace(EXPERTS, intermediate_size=96),
            "query_key_norm": "head",
        },
    ),
}


@pytest.mark.parametrize("family", tables.thinned(MIXTURES, ["qwen3_moe"]))
def test_experts_are_stacks_in_the_file(tmp_path, family):
    architecture, options = MIXTURES[family]
    path = tmp_path / "model.gguf"
    spec = layouts.get("gguf").spec({"type": "Q4_0"})
    model = make(**SIZES, num_hidden_layers=1, **options)
    assert model.config.to_hf()["model_type"] == family
    qmodel, _ = jaxq.quantize_model(model, spec)
    jaxq.io.export(qmodel, path, format="gguf")
    loaded, _ = models.load(path)
    assert loaded.config.experts == model.config.experts
    experts = qmodel.layers[0].mlp.experts
    kernel = loaded.layers[0].mlp.experts.up_proj.kernel[...]
    assert kernel.batch_shape == (3,)
    np.testing.assert_array_equal(kernel.codes(), experts.up_proj.kernel[...].codes())
    np.testing.assert_allclose(
        run(loaded, TOKENS), run(qmodel, TOKENS), atol=1e-4, rtol=0
    )

    gguf = pytest.importorskip("gguf", reason="reads the file by the package gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture]]
    names = {gguf.TENSOR_NAMES[kind].format(bid=0) for kind in kinds}
    assert {name.removesuffix(".weight") for name in tensors} <= names
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    for name in ("gate", "up", "down"):
        tensor = tensors[f"blk.0.ffn_{name}_exps.weight"]
        assert tensor.tensor_type.name == "Q4_0"
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = jaxq.dequantize(getattr(experts, f"{name}_proj").kernel[...])
        np.testing.assert_array_equal(floats, np.swapaxes(own, -1, -2))


def test_experts_of_other_dtypes_are_refused(tmp_path):
    # Names are sorted as texts, so expert 2 comes after expert 11.
    experts = dataclasses.replace(EXPERTS, num_experts=12)
    model = make(**SIZES, num_hidden_layers=1, experts=experts)
    models.save(tmp_path, model, dtype=jnp.float32)
    path = tmp_path / "model.safetensors"
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    safetensors.save_file(tensors | {name: tensors[name].astype(np.float16)}, path)
    with jaxq.io.read_checkpoint(tmp_path) as checkpoint:
        assert [*checkpoint].index(name) > [*checkpoint].index(name.replace("2", "11"))
        with pytest.raises(ValueError, match=r"experts.2.w1.weight: it is F16"):
            jaxq.io.export(checkpoint, tmp_path / "model.gguf", format="gguf")


def test_a_stack_without_all_experts_is_refused(tmp_path):
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    options = MIXTURES["mixtral"][1]
    jaxq.io.export(make(**SIZES, num_hidden_layers=1, **options), path, format="gguf")
    with GgufFile(path, "test") as file, NewFile(other, "test") as new:
        tensors = {
            name: NewTensor(h.type, h.shape, lambda name=name: file.read(name))
            for name, h in file.headers.items()
        }
        write_gguf(new, file.metadata | {"llama.expert_count": 4}, tensors)
    with pytest.raises(ValueError, match=r"_exps.weight has the shape \[3.*expected 4"):
        models.load(other)


def test_a_quantized_embedding_and_head(tmp_path):
    """llama.cpp quantizes the embedding too. Q6_K here has blocks of the package."""
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    config = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = make(**config)
    jaxq.io.export(model, path, format="gguf")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (97, 210)).astype(np.uint8)
    blocks[:, 208:] = np.full((97, 1), 2e-4, np.float16).view(np.uint8)
    with GgufFile(path, "test") as file, NewFile(other, "test") as new:
        tensors = {
            name: NewTensor(
                header.type, header.shape, lambda name=name: file.read(name)
            )
            for name, header in file.headers.items()
        }
        table = NewTensor("Q6_K", (97, 256), lambda: blocks)
        tensors["token_embd.weight"] = table
        write_gguf(new, file.metadata, tensors)
    loaded, _ = models.load(other)
    embedding = loaded.embed_tokens.embedding[...]
    assert isinstance(embedding, jaxq.QTensor)
    gguf = pytest.importorskip("gguf", reason="dequantizes by the package gguf")
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(np.asarray(jaxq.dequantize(embedding)), expected)
    model.embed_tokens.embedding.set_value(jnp.asarray(expected))
    np.testing.assert_allclose(
        run(loaded, TOKENS), run(model, TOKENS), atol=1e-4, rtol=1e-4
    )


def test_the_tokenizer_is_written_and_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install jaxq[hf]")
    _, tokenizer = models.load("examples/tiny_llama")
    path = tmp_path / "model.gguf"
    jaxq.io.export(make(**SIZES), path, format="gguf", tokenizer=tokenizer)
    _, loaded = models.load(path)
    assert isinstance(loaded, tokenizers.Tokenizer)
    assert loaded.encode("def f(x):").ids == tokenizer.encode("def f(x):").ids
    with GgufFile(path, "test") as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        merges = file.metadata["tokenizer.ggml.merges"]
        kinds = file.metadata["tokenizer.ggml.token_type"]
    assert tokens == [tokenizer.id_to_token(i) for i in range(len(tokens))]
    assert kinds.tolist()[:2] == [3, 1]  # <|endoftext|> is a control token
    model = json.loads(tokenizer.to_str())["model"]
    assert merges == [" ".join(pair) for pair in model["merges"]]


def test_what_gguf_does_not_have_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    qmodel, _ = jaxq.quantize_model(make(**SIZES), "nf4")
    with pytest.raises(ValueError, match=r"cannot hold these weights:(\n.*){14}$"):
        jaxq.io.export(qmodel, path, format="gguf")
    with pytest.raises(ValueError, match='must end with ".gguf"'):
        jaxq.io.export(qmodel, tmp_path, format="gguf")
    with pytest.raises(ValueError, match="sliding window"):
        jaxq.io.export(make(**SIZES, sliding_window=4), path, format="gguf")
    assert not path.exists()


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with NewFile(path, "test") as file:
        write_gguf(file, {"general.architecture": "mamba"}, {})
    with pytest.raises(ValueError, match="model.gguf: general.architecture is 'mamba'"):
        models.load(path)


def test_rows_of_query_heads_are_those_of_the_halves():
    """The inverse of the permutation in llama.cpp's converter."""
    from jaxq.io.checkpoint._gguf_names import row_order

    heads, half = 2, 3
    config = {"num_attention_heads": heads}
    order = row_order("x.q_proj.weight", "llama", config, heads * 2 * half)
    rows = np.arange(heads * 2 * half)
    # permute() of convert_hf_to_gguf.py: halves become neighbours.
    permuted = rows.reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(permuted[order], rows)
    assert row_order("x.v_proj.weight", "llama", config, 12) is None
    assert row_order("x.q_proj.weight", "qwen2", config, 12) is None


@pytest.mark.parametrize("value", [2.5, -1, float("inf"), True, np.arange(2), "2"])
def test_a_size_that_is_no_whole_number_is_named(value):
    metadata = {"general.architecture": "llama", "llama.embedding_length": 8}
    shapes = {"token_embd.weight": (4, 8)}
    config, _ = config_of(metadata | {"llama.attention.head_count": 2}, shapes)
    assert config["num_attention_heads"] == 2
    with pytest.raises(ValueError, match="head_count must be a whole number"):
        config_of(metadata | {"llama.attention.head_count": value}, shapes)
    with pytest.raises(ValueError, match="the size of a head must be a whole number"):
        config_of(
            metadata
            | {"llama.attention.head_count": 2, "llama.rope.dimension_count": value},
            shapes,
        )
