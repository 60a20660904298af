"""Small random models of `transformers`, one for each family or feature of a family."""

from typing import Any

import numpy as np

REASON = "compares with transformers on torch, which the bench extra installs"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e3,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Gemma's default heads are wide, and its window has thousands of tokens.
GEMMA = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}
GEMMA_SIZES = {"num_hidden_layers": 3, **GEMMA}
NO_ROPE = {"num_hidden_layers": 4, "no_rope_layer_interval": 2}
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}

# Name: the config class of transformers, and its arguments besides SIZES.
DENSE = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "no_gqa": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("LlamaConfig", {"head_dim": 16}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "yarn": ("LlamaConfig", {"rope_parameters": YARN, "head_dim": 16}),
    "yarn_exact": ("LlamaConfig", {"rope_parameters": YARN | {"truncate": False}}),
    "yarn_mscale": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "dynamic": (
        "LlamaConfig",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 11},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mistral_all": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen2_tied": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "use_sliding_window": False},
    ),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", GEMMA_SIZES),
    "gemma2_caps": (
        "Gemma2Config",
        GEMMA_SIZES | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA_SIZES | {"sliding_window_pattern": 3}),
    "gemma3_linear": (
        "Gemma3TextConfig",
        {
            **GEMMA_SIZES,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "phi3_all": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", NO_ROPE),
    "smollm3_window": (
        "SmolLM3Config",
        NO_ROPE | {"use_sliding_window": True, "sliding_window": 5},
    ),
    "granite": ("GraniteConfig", GRANITE),
    "granite_biases": (
        "GraniteConfig",
        GRANITE | {"attention_bias": True, "mlp_bias": True},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2_default_width": ("GPT2Config", GPT2 | {"n_inner": None}),
}
_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": ("MixtralConfig", _LOCAL),
    "mixtral_window": ("MixtralConfig", _LOCAL | {"sliding_window": 5}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _FEW | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _FEW | {"norm_topk_prob": True, "head_dim": 16}),
    "gpt_oss": (
        "GptOssConfig",
        _LOCAL | {"sliding_window": 5, "head_dim": 16, "swiglu_limit": 0.5},
    ),
}
# Arguments that only the config of GPT-2 has under these names.
_NOT_OF_GPT2 = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def make_peer(torch: Any, transformers: Any, table: dict, name: str) -> Any:
    """The random model of a row of a table."""
    config_class, extra = table[name]
    sizes = SIZES
    if config_class == "GPT2Config":
        sizes = {key: SIZES[key] for key in SIZES if key not in _NOT_OF_GPT2}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes | extra)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Biases start at zero and norms at one, where mistakes would not show.
    with torch.no_grad():
        for value in model.parameters():
            is_bias = value.ndim == 1 or not value.any()
            if is_bias:
                value.add_(0.3 * torch.randn_like(value))
    return model


def peer_logits(torch: Any, model: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(x, dtype=torch.long)).logits.float().numpy()


def peer_text(torch: Any, model: Any, x: np.ndarray, num_tokens: int) -> np.ndarray:
    """The greedy continuation of a batch of equal lengths."""
    ids = torch.tensor(x, dtype=torch.long)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        ).numpy()
