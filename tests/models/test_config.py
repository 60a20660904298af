"""`DecoderConfig`: reading `config.json`, writing it, and errors."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxq.models import DecoderConfig
from jaxq.models._rope import RopeScaling
from tests.models.test_decoder import CONFIG

EXAMPLES = Path(__file__).parents[2] / "examples"
HF = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}


def trained_config():
    return json.loads((EXAMPLES / "tiny_llama" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "64"}, "vocab_size='64' is not a whole number of at least 1"),
        ({"hidden_size": 32.5}, "hidden_size=32.5 is not a whole number"),
        ({"sliding_window": 4.5}, "sliding_window=4.5 is not a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 is not a number above 0"),
        ({"rope_theta": "10000"}, "rope_theta='10000' is not a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "rope_scaling.factor=0 is not a number above 0",
        ),
        ({"layer_types": 5}, "layer_types=5 is not a list of names"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings='false' is not true or false",
        ),
    ],
)
def test_values_of_another_type_are_errors(change, message):
    config = trained_config() | change
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(config)


def test_mistral_config_without_a_window_has_the_default():
    config = trained_config() | {"model_type": "mistral"}
    config.pop("sliding_window", None)
    assert DecoderConfig.from_hf(config).sliding_window == 4096
    assert (
        DecoderConfig.from_hf(config | {"sliding_window": None}).sliding_window is None
    )


def test_null_means_the_default_or_none():
    config = HF | {"model_type": "gemma2"}
    nulls = {"query_pre_attn_scalar": None, "head_dim": None}
    assert DecoderConfig.from_hf(config | nulls) == DecoderConfig.from_hf(config)
    assert DecoderConfig.from_hf(config).attention_softcap == 50.0
    free = DecoderConfig.from_hf(config | {"attn_logit_softcapping": None})
    assert free.attention_softcap is None
    mixtral = DecoderConfig.from_hf(
        HF | {"model_type": "mixtral", "num_local_experts": None}
    )
    assert mixtral.experts.num_experts == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bart"}, "model_type='bart'; expected one of llama, mistral"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'; expected one of silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope'; expected"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic' needs factor"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type='yarn'; expected 'default'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "needs low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "x", "x"]},
            "layer_types has x; expected full_attention or sliding_attention",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"]},
            "layer_types has 1 entries; num_hidden_layers is 3",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True; expected False",
        ),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True; expected False",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
        ),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_unsupported_values_are_errors(change, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        DecoderConfig.from_hf(HF | change)


def test_one_error_lists_all_problems():
    config = HF | {"model_type": "x", "hidden_act": "y"}
    del config["vocab_size"]
    with pytest.raises(
        ValueError, match="model_type.*vocab_size is missing.*hidden_act"
    ):
        DecoderConfig.from_hf(config)


def test_unknown_rope_kind_is_an_error():
    with pytest.raises(ValueError, match="kind is 'longrope'; expected one of"):
        RopeScaling("longrope")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"attention_bias": True, "head_dim": 8},
        {"sliding_window": 4},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
    ],
)
def test_round_trip(changes):
    config = dataclasses.replace(CONFIG, **changes)
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_config_that_no_architecture_has_is_an_error():
    config = dataclasses.replace(CONFIG, query_key_norm="heads", sliding_window=4)
    with pytest.raises(ValueError, match="none of the architectures llama, mistral"):
        config.to_hf()
