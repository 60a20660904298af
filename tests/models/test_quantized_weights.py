"""Directories of quantized models: saved and loaded, the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.models import Llama, LlamaConfig, load, save
from tests.tables import thinned

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
TOKENS = jnp.array([[1, 5, 3, 9, 2]])
RECIPES = thinned(
    ["int4", "w8a8", "nf4_dq", "nvfp4", "llm_int8", "int3"],
    ["int4", "w8a8"],
)


def float_model(**settings):
    return Llama(CONFIG, rngs=nnx.Rngs(0), **settings)


def arrays(model):
    return jax.tree.leaves(nnx.state(model))


def assert_same(model, other):
    assert len(arrays(model)) == len(arrays(other))
    for a, b in zip(arrays(model), arrays(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(
        np.asarray(jax.jit(model)(TOKENS)), np.asarray(jax.jit(other)(TOKENS))
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_bit_comes_back(tmp_path, recipe):
    batches = [TOKENS] if recipe == "llm_int8" else None
    qmodel, _ = jaxq.quantize_model(float_model(), recipe, calibration=batches)
    save(tmp_path / "a", qmodel, eos_token_id=0)
    loaded, tokenizer = load(tmp_path / "a")
    assert tokenizer is None
    assert_same(qmodel, loaded)
    entries = json.loads((tmp_path / "a" / "config.json").read_text())
    assert entries["quantization_config"]["quant_method"] == "jaxq"
    assert entries["eos_token_id"] == 0


def test_the_dtype_is_that_of_the_saved_model(tmp_path):
    model = float_model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    qmodel, _ = jaxq.quantize_model(model, "int8")
    save(tmp_path, qmodel)
    assert_same(qmodel, load(tmp_path)[0])
    assert_same(qmodel, load(tmp_path, dtype="bfloat16")[0])
    with pytest.raises(ValueError, match="was quantized in bfloat16, and dtype is fl"):
        load(tmp_path, dtype=jnp.float32)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_layers_are_stacked_or_in_a_list(tmp_path, is_stacked):
    qmodel, _ = jaxq.quantize_model(float_model(), "int8")
    in_list, stacked = qmodel, jaxq.models.stacked(qmodel)
    save(tmp_path, stacked if is_stacked else in_list)
    assert_same(in_list, load(tmp_path)[0])
    assert_same(stacked, load(tmp_path, scan_layers=True)[0])


def test_a_float_model_takes_the_place_of_a_quantized_one(tmp_path):
    model = float_model()
    save(tmp_path, jaxq.quantize_model(model, "int8")[0])
    save(tmp_path, model, dtype="float32")
    assert_same(model, load(tmp_path)[0])
    save(tmp_path, jaxq.quantize_model(model, "int8")[0])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = float_model()
    qmodel, _ = jaxq.quantize_model(model, "int8")
    save(tmp_path, qmodel)

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("jaxq.files._write_directory.write_tensors", full)
    with pytest.raises(OSError, match="the disk is full"):
        save(tmp_path, jaxq.quantize_model(model, "int4")[0])
    monkeypatch.undo()
    assert_same(qmodel, load(tmp_path)[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_rotated_inputs_come_back(tmp_path):
    model, _ = jaxq.quantize_model(float_model(), "w8a8_rotated")
    save(tmp_path, model)
    loaded, _ = load(tmp_path)
    assert_same(model, loaded)
    change_config(
        tmp_path,
        quantization_config={
            "quant_method": "jaxq",
            "dtype": "float32",
            "scan_layers": False,
            "rotated_inputs": ["layers/9/mlp/down_proj"],
        },
    )
    with pytest.raises(ValueError, match="'layers/9/mlp/down_proj' in rotated_inputs"):
        load(tmp_path)


def test_other_transforms_are_refused(tmp_path):
    eye = jnp.eye(CONFIG.hidden_size)
    rotated = jaxq.models.rotate(float_model(), eye, online=lambda x: x[..., ::-1])
    model, _ = jaxq.quantize_model(rotated, "int8")
    with pytest.raises(ValueError, match="transform their inputs"):
        save(tmp_path, model)


def change_config(path, **entries):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"num_hidden_layers": 1}, "in the file, not in the model"),
        ({"hidden_size": 64}, "does not fit the model"),
        (
            {"quantization_config": {"quant_method": "jaxq", "dtype": "int8"}},
            "config.json: quantization_config is .*; expected dtype float32 or bfl",
        ),
        (
            {"quantization_config": {"quant_method": "jaxq", "dtype": "float32"}},
            "scan_layers true or false, and a list rotated_inputs",
        ),
    ],
)
def test_a_config_of_other_weights(tmp_path, entries, message):
    save(tmp_path, jaxq.quantize_model(float_model(), "int8")[0])
    change_config(tmp_path, **entries)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damage_is_found(tmp_path):
    save(tmp_path, jaxq.quantize_model(float_model(), "int8")[0])
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(tmp_path)
