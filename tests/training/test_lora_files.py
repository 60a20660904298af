"""Adapters in the files of PEFT."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxq
from jaxq import training
from jaxq.models import Llama, LlamaConfig, stacked
from tests.arrays import assert_same
from tests.training.test_lora import (
    Experts,
    Model,
    X,
    quantized,
    with_random_adapters,
)

TOKENS = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
PREFIX = "base_model.model."


def llama(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return Llama(LlamaConfig(**(sizes | changes)), rngs=nnx.Rngs(0))


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def tensors_of(path):
    return load_file(path / "adapter_model.safetensors")


def adapters_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "dropout": 0.25}, {"targets": "up", "dora": True}]
)
def test_adapters_survive_a_file(tmp_path, options):
    qmodel = quantized()
    lora = with_random_adapters(training.add_lora(qmodel, rank=4, alpha=6, **options))
    training.save_lora(tmp_path, lora)
    again = training.load_lora(tmp_path, qmodel)
    assert_same(adapters_of(again), adapters_of(lora))
    for model in (lora, again):
        model.eval()
    np.testing.assert_array_equal(again(X), lora(X))
    assert config_of(tmp_path)["lora_dropout"] == options.get("dropout", 0)
    assert again.up.dot_general.dropout == options.get("dropout", 0)


def test_the_names_and_axes_of_tensors(tmp_path):
    lora = with_random_adapters(training.add_lora(Model(nnx.Rngs(0)), rank=4))
    training.save_lora(tmp_path, lora)
    tensors = tensors_of(tmp_path)
    assert {name: value.shape for name, value in tensors.items()} == {
        f"{PREFIX}up.lora_A.weight": (4, 64),
        f"{PREFIX}up.lora_B.weight": (128, 4),
        f"{PREFIX}heads.lora_A.weight": (4, 128),
        f"{PREFIX}heads.lora_B.weight": (64, 4),
        f"{PREFIX}mix.lora_A.weight": (4, 64),
        f"{PREFIX}mix.lora_B.weight": (64, 4),
    }
    up = lora.up.dot_general
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}up.lora_A.weight"], up.lora_a[...].T
    )
    config = config_of(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 16)
    assert config["target_modules"] == ["heads", "mix", "up"]


def test_a_stack_has_the_same_file_as_a_list(tmp_path):
    """Each layer of a stack is a module with the name of Hugging Face."""
    model = llama()
    lora = with_random_adapters(training.add_lora(model, rank=4))
    training.save_lora(tmp_path / "list", lora, base_model="my/model")
    training.save_lora(tmp_path / "stack", stacked(lora), base_model="my/model")
    assert_same(tensors_of(tmp_path / "stack"), tensors_of(tmp_path / "list"))
    config = config_of(tmp_path / "stack")
    assert config == config_of(tmp_path / "list")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "my/model"
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    assert tensors_of(tmp_path / "stack")[name].shape == (48, 4)
    assert not any("lm_head" in name for name in tensors_of(tmp_path / "stack"))
    into_stack = training.load_lora(tmp_path / "list", stacked(model))
    assert_same(adapters_of(into_stack), adapters_of(stacked(lora)))


def test_layers_with_other_ranks(tmp_path):
    model = llama()
    lora = training.add_lora(model, rank=4, targets="**/self_attn/*")
    lora = training.add_lora(lora, rank=2, alpha=3, targets="**/0/mlp/down_proj")
    lora = with_random_adapters(lora)
    training.save_lora(tmp_path, lora)
    config = config_of(tmp_path)
    escaped = r"model\.layers\.0\.mlp\.down_proj"
    assert config["rank_pattern"] == {escaped: 2}
    assert config["alpha_pattern"] == {escaped: 3}
    assert "model.layers.0.mlp.down_proj" in config["target_modules"]
    again = training.load_lora(tmp_path, model)
    np.testing.assert_array_equal(again(TOKENS), lora(TOKENS))
    with pytest.raises(ValueError, match="adapters for 1 of the 2 layers"):
        training.load_lora(tmp_path, stacked(model))


def test_names_of_layers(tmp_path):
    lora = training.add_lora(quantized(), targets="up")
    training.save_lora(tmp_path, lora, names=lambda path, number: f"net.{path}")
    assert f"{PREFIX}net.up.lora_A.weight" in tensors_of(tmp_path)
    with pytest.raises(ValueError, match=r"does not have: net\.up"):
        training.load_lora(tmp_path, quantized())
    training.load_lora(tmp_path, quantized(), names=lambda path, number: f"net.{path}")
    with pytest.raises(ValueError, match="two layers the name 'x'"):
        training.save_lora(tmp_path, lora, names=lambda path, number: "x")


def test_errors_of_writing(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter"):
        training.save_lora(tmp_path, quantized())
    experts = training.add_lora(Experts(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="multiplies several matrices"):
        training.save_lora(tmp_path, experts)
    mixed = training.add_lora(quantized(), targets="up")
    mixed = training.add_lora(mixed, targets="heads", dropout=0.5)
    with pytest.raises(ValueError, match="the adapters differ in dropout"):
        training.save_lora(tmp_path, mixed)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bias": "all"}, "bias: 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"use_dora": True}, "up has no lora_magnitude_vector"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, change, text):
    training.save_lora(tmp_path, training.add_lora(quantized(), targets="up"))
    config = config_of(tmp_path) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        training.load_lora(tmp_path, quantized())


def test_adapters_of_another_model(tmp_path):
    training.save_lora(tmp_path, training.add_lora(Model(nnx.Rngs(0)), targets="up"))
    small = Model(nnx.Rngs(0))
    small.up = nnx.Linear(32, 128, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"is \[8, 64\], but .* needs \[8, 32\]"):
        training.load_lora(tmp_path, small)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        training.load_lora(tmp_path / "other", small)


# PEFT itself. It reads attributes that transformers has deprecated.

DEPRECATED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.fixture
def peft():
    """PEFT, or a skip that says what to install."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    return pytest.importorskip(
        "peft", reason="NOT CHECKED AGAINST PEFT: pip install peft accelerate"
    )


def torch_model(path, model):
    """The same model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    jaxq.io.export(model, path, format="hf")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(TOKENS, np.int64))).logits.numpy()


@DEPRECATED
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_peft_reads_our_files(peft, tmp_path, options):
    model = llama()
    lora = with_random_adapters(training.add_lora(model, rank=4, **options), scale=0.1)
    training.save_lora(tmp_path / "adapters", lora)
    theirs = torch_model(tmp_path / "model", model)
    before = logits_of(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters")
    after = logits_of(theirs)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(lora(TOKENS), after, atol=2e-4)


@DEPRECATED
@pytest.mark.parametrize("dora", [False, True])
def test_we_read_files_of_peft(peft, tmp_path, dora):
    import torch

    model = llama()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 7},
        use_dora=dora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(torch_model(tmp_path / "model", model), config)
    theirs.save_pretrained(tmp_path / "adapters")
    lora = training.load_lora(tmp_path / "adapters", model)
    np.testing.assert_allclose(lora(TOKENS), logits_of(theirs.eval()), atol=2e-4)
    training.save_lora(tmp_path / "again", lora)
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "adapters"))
