"""The families of decoders: one row for each `model_type` of `config.json`.

A row says which keys of the file are switches of a `DecoderConfig`, and which switches
every model of the family has. The reading and the checks are in `_hf_config.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

Entries = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


def _nothing(config: Entries, problems: list[str]) -> dict[str, Any]:
    return {}


def _no_entries(config: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the `config.json` of one `model_type` becomes the fields of a config.

    Attributes:
        architecture: the class of `transformers`, as `architectures` names it.
        defaults: the values of keys that a file may leave out.
        renamed: keys that have another name in this family, with the usual name.
        fixed: fields that all models of the family have.
        fields: keys whose value is that of one or more fields.
        allowed: keys that change the model, with the values that are supported. A key
            that is missing or null is allowed.
        layer_types: returns the kind of attention of each layer for a file that does
            not say it. None says that all layers have the window. The attribute is None
            for a family without a sliding window.
        rope_kinds: the kinds of scaled rotary frequencies. None means all that jaxq
            has. An empty tuple means that the model rotates nothing.
        read: `read(config, problems)` returns further fields, and adds to the problems.
        write: `write(config)` returns further keys for a `DecoderConfig`.
    """

    architecture: str
    defaults: Entries = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Entries = dataclasses.field(default_factory=dict)
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    layer_types: Callable[[Entries], list[str] | None] | None = None
    rope_kinds: tuple[str, ...] | None = None
    read: Callable[[Entries, list[str]], dict[str, Any]] = _nothing
    write: Callable[[Any], dict[str, Any]] = _no_entries


_BIAS = {"attention_bias": ("attention_bias", "attention_output_bias")}
_MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
_TIED = {"tie_word_embeddings": True}


def _window_everywhere(config: Entries) -> None:
    return None


def _write_windows(config: Any) -> dict[str, Any]:
    kinds = [SLIDING if layer.windowed else FULL for layer in config.layer_switches()]
    return {"sliding_window": config.sliding_window, "layer_types": kinds}


def _write_window(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _num_layers(config: Entries) -> int:
    return config.get("num_hidden_layers") or 0


def _qwen_layers(config: Entries) -> list[str]:
    """The first `max_window_layers` layers of a Qwen model have no window."""
    first = config.get("max_window_layers", 28)
    return [FULL if i < first else SLIDING for i in range(_num_layers(config))]


def _write_qwen(config: Any) -> dict[str, Any]:
    has_window = config.sliding_window is not None
    return {"use_sliding_window": has_window} | _write_windows(config)


def _read_gemma(config: Entries, problems: list[str]) -> dict[str, Any]:
    return {"embedding_multiplier": math.sqrt(config.get("hidden_size") or 1)}


def _read_gemma2(config: Entries, problems: list[str]) -> dict[str, Any]:
    scale = config["query_pre_attn_scalar"] ** -0.5
    return _read_gemma(config, problems) | {"attention_scale": scale}


def _gemma2_layers(config: Entries) -> list[str]:
    return [FULL if i % 2 else SLIDING for i in range(_num_layers(config))]


def _gemma3_layers(config: Entries) -> list[str]:
    pattern = config.get("sliding_window_pattern") or 6
    layers = range(1, _num_layers(config) + 1)
    return [SLIDING if layer % pattern else FULL for layer in layers]


def _write_gemma2(config: Any) -> dict[str, Any]:
    scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
    return {
        "query_pre_attn_scalar": round(scale**-2),
        **_write_windows(config),
    }


def _write_gemma3(config: Any) -> dict[str, Any]:
    local_theta = config.local_rope_theta or config.rope_theta
    return _write_gemma2(config) | {"rope_local_base_freq": local_theta}


def _smollm3_rotary(config: Entries) -> tuple[bool, ...]:
    """Which layers of a SmolLM3 model have rotary positions."""
    rotary = config.get("no_rope_layers")  # 1 for a layer with rotary positions
    num_layers = _num_layers(config)
    if rotary is not None:
        return tuple(bool(flag) for flag in rotary[:num_layers])
    interval = config.get("no_rope_layer_interval") or 4
    return tuple((i + 1) % interval != 0 for i in range(num_layers))


def _read_smollm3(config: Entries, problems: list[str]) -> dict[str, Any]:
    rotary = _smollm3_rotary(config)
    return {"rope_layers": None if all(rotary) else rotary}


def _smollm3_layers(config: Entries) -> list[str]:
    return [FULL if rotary else SLIDING for rotary in _smollm3_rotary(config)]


def _write_smollm3(config: Any) -> dict[str, Any]:
    rotary = [int(layer.rotary) for layer in config.layer_switches()]
    return {"no_rope_layers": rotary} | _write_qwen(config)


def _read_gpt2(config: Entries, problems: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config.get("intermediate_size") is None and config.get("hidden_size"):
        fields["intermediate_size"] = 4 * config["hidden_size"]
    if config.get("scale_attn_weights") is False:
        fields["attention_scale"] = 1.0
    return fields


def _write_gpt2(config: Any) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "activation_function": _GPT2_ACTIVATIONS[config.activation],
        "scale_attn_weights": config.attention_scale is None,
    }


def _read_mixtral(config: Entries, problems: list[str]) -> dict[str, Any]:
    experts = {
        "num_experts": config["num_experts"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "intermediate_size": config.get("intermediate_size"),
    }
    return {"experts": experts}


def _read_gpt_oss(config: Entries, problems: list[str]) -> dict[str, Any]:
    experts = _read_mixtral(config, problems)["experts"]
    experts |= {
        "bias": True,
        "clamp": config["swiglu_limit"],
        "gate_slope": config["swiglu_alpha"],
    }
    return {"experts": experts}


def _read_qwen_moe(config: Entries, problems: list[str]) -> dict[str, Any]:
    experts = {
        "num_experts": config["num_experts"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "intermediate_size": config["moe_intermediate_size"],
        "normalizes_weights": bool(config["norm_topk_prob"]),
        "shared_intermediate_size": config.get("shared_expert_intermediate_size"),
    }
    step = config.get("decoder_sparse_step") or 1
    without = config.get("mlp_only_layers") or ()
    layers = tuple(
        (layer + 1) % step == 0 and layer not in without
        for layer in range(_num_layers(config))
    )
    experts["layers"] = None if all(layers) else layers
    return {"experts": experts}


def _qwen2_moe_layers(config: Entries) -> list[str]:
    last = config.get("max_window_layers", 28)
    layers = range(_num_layers(config))
    return [FULL if i % 2 or i >= last else SLIDING for i in layers]


def _write_experts(config: Any) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "intermediate_size": config.intermediate_size,
    }


def _write_mixtral(config: Any) -> dict[str, Any]:
    return _write_experts(config) | _write_window(config)


def _write_gpt_oss(config: Any) -> dict[str, Any]:
    entries = _write_experts(config) | _write_windows(config)
    if config.experts is not None:
        entries["swiglu_limit"] = config.experts.clamp
        entries["swiglu_alpha"] = config.experts.gate_slope
    return entries


def _write_qwen_moe(config: Any) -> dict[str, Any]:
    entries = _write_experts(config) | _write_qwen(config)
    if config.experts is not None:
        layers = enumerate(config.expert_layers())
        entries |= {
            "moe_intermediate_size": config.experts.intermediate_size,
            "norm_topk_prob": config.experts.normalizes_weights,
            "mlp_only_layers": [layer for layer, has in layers if not has],
        }
        if config.experts.shared_intermediate_size is not None:
            shared = config.experts.shared_intermediate_size
            entries["shared_expert_intermediate_size"] = shared
    return entries


_GPT2_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
_QWEN_WINDOW = {"sliding_window": 4096, "use_sliding_window": False}
_EXPERTS = {"num_local_experts": "num_experts"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_CAPS = {
    "attn_logit_softcapping": ("attention_softcap",),
    "final_logit_softcapping": ("logits_softcap",),
}
_CAUSAL = {"use_bidirectional_attention": (False,)}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", fields=_BIAS | _MLP_BIAS),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"sliding_window": 4096},
        layer_types=_window_everywhere,
        write=_write_window,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN_WINDOW,
        fixed={"attention_bias": True},
        layer_types=_qwen_layers,
        write=_write_qwen,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN_WINDOW | {"head_dim": 128},
        fixed={"query_key_norm": "head"},
        fields=_BIAS,
        layer_types=_qwen_layers,
        write=_write_qwen,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults=_TIED | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
        fixed={"unit_offset_norms": True, "activation": "gelu_tanh"},
        fields=_BIAS,
        allowed=_CAUSAL | {"hidden_act": ("gelu", "gelu_pytorch_tanh")},
        read=_read_gemma,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_TIED,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        renamed={"hidden_activation": "hidden_act"},
        fixed={"unit_offset_norms": True, "norm_places": "both"},
        fields=_BIAS | _CAPS,
        allowed=_CAUSAL,
        layer_types=_gemma2_layers,
        read=_read_gemma2,
        write=_write_gemma2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_TIED,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        renamed={"hidden_activation": "hidden_act"},
        fixed={
            "unit_offset_norms": True,
            "norm_places": "both",
            "query_key_norm": "head",
        },
        fields=_BIAS | _CAPS,
        allowed=_CAUSAL,
        layer_types=_gemma3_layers,
        read=_read_gemma2,
        write=_write_gemma3,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        layer_types=_window_everywhere,
        write=_write_window,
        rope_kinds=("default",),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        fixed={"norm_places": "after", "query_key_norm": "heads"},
        fields=_BIAS,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={
            **_TIED,
            "rope_theta": 2e6,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
        },
        fields=_BIAS | _MLP_BIAS,
        layer_types=_smollm3_layers,
        read=_read_smollm3,
        write=_write_smollm3,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults={"attention_multiplier": 1.0},
        fields={
            **_BIAS,
            **_MLP_BIAS,
            "attention_multiplier": ("attention_scale",),
            "embedding_multiplier": ("embedding_multiplier",),
            "residual_multiplier": ("residual_multiplier",),
            "logits_scaling": ("logits_scaling",),
        },
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        renamed=_EXPERTS,
        layer_types=_window_everywhere,
        read=_read_mixtral,
        write=_write_mixtral,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        defaults={
            **_QWEN_WINDOW,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
        fields={"qkv_bias": ("attention_bias",)},
        layer_types=_qwen2_moe_layers,
        read=_read_qwen_moe,
        write=_write_qwen_moe,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            **_QWEN_WINDOW,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        renamed=_EXPERTS,
        fixed={"query_key_norm": "head"},
        fields=_BIAS,
        layer_types=_window_everywhere,
        read=_read_qwen_moe,
        write=_write_qwen_moe,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": _GPT_OSS_ROPE,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "attention_bias": True,
        },
        renamed=_EXPERTS,
        fixed={"attention_sinks": True},
        fields=_BIAS,
        layer_types=_gemma2_layers,
        read=_read_gpt_oss,
        write=_write_gpt_oss,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        defaults={
            **_TIED,
            "vocab_size": 50257,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
        },
        renamed={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size",
            "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        fixed={
            "norm": "layer",
            "gated_mlp": False,
            "learned_positions": True,
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
        },
        allowed={
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        rope_kinds=(),
        read=_read_gpt2,
        write=_write_gpt2,
    ),
}
