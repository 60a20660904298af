"""Names of GGUF files (llama.cpp) and of Hugging Face checkpoints.

The architectures here have the same parts under two names. In the architecture "llama"
the outputs of the query and key projections have another order: llama.cpp rotates
neighbouring pairs of numbers, and Hugging Face rotates the two halves of a head.

A GGUF file has one tensor `[experts, out, in]` for all experts of a layer. A Hugging
Face checkpoint has a tensor `[out, in]` for each expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_OF_HF = {hf: name for name, hf in _TOP.items()}
_LAYER_OF_HF = {hf: name for name, hf in _LAYER.items()}
_EXPERTS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}


class _Mixture(NamedTuple):
    """The names of a family with mixtures of experts in Hugging Face checkpoints.

    Attributes:
      router: the module of the router.
      experts: the list of experts.
      modules: the module of an expert, by the name of its stack in a GGUF file.
    """

    router: str
    experts: str
    modules: Mapping[str, str]


_MIXTURES = {
    "mixtral": _Mixture(
        "block_sparse_moe.gate",
        "block_sparse_moe.experts",
        {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"},
    ),
    "qwen3_moe": _Mixture("mlp.gate", "mlp.experts", _EXPERTS),
}
_ROUTER = "ffn_gate_inp"
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_HF_EXPERT = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(\d+)\.(\w+)\.(weight|bias)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")

# The model_type of Hugging Face, and the architecture of GGUF.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
_PAIRED = ("llama",)  # architectures that rotate neighbouring pairs
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_EXPERT_SIZES = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_FRACTIONS = ("rms_norm_eps", "rope_theta")


def hf_name(name: str, model_type: str) -> str:
    """The name in a Hugging Face checkpoint. An unknown name is returned unchanged.

    For a stack of experts, the result has "{}" in the place of an expert's number.
    """
    block = _BLOCK.fullmatch(name)
    mixture = _MIXTURES.get(model_type)
    if block:
        module = _LAYER.get(block[2])
        if mixture and block[2] == _ROUTER:
            module = mixture.router
        if mixture and block[2] in mixture.modules:
            module = f"{mixture.experts}.{{}}.{mixture.modules[block[2]]}"
        if module is not None:
            return f"model.layers.{block[1]}.{module}.{block[3]}"
    module, _, last = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{last}"
    return name


def gguf_name(name: str, model_type: str) -> tuple[str, int | None] | None:
    """The name in a GGUF file, and the number of the expert in this tensor.

    The number is None if the tensor is not a stack of experts. The result is None if
    the architectures here do not have the parameter.
    """
    mixture = _MIXTURES.get(model_type)
    expert = _HF_EXPERT.fullmatch(name)
    if mixture and expert and expert[2] == mixture.experts:
        stacks = {module: stack for stack, module in mixture.modules.items()}
        stack = stacks.get(expert[4])
        if stack is None:
            return None
        return f"blk.{expert[1]}.{stack}.{expert[5]}", int(expert[3])
    layer = _HF_LAYER.fullmatch(name)
    if layer:
        part = _LAYER_OF_HF.get(layer[2])
        if mixture and layer[2] == mixture.router:
            part = _ROUTER
        return None if part is None else (f"blk.{layer[1]}.{part}.{layer[3]}", None)
    module, _, last = name.rpartition(".")
    return (f"{_TOP_OF_HF[module]}.{last}", None) if module in _TOP_OF_HF else None


def is_router(name: str) -> bool:
    """Whether a tensor of a GGUF file is the weight of a router."""
    block = _BLOCK.fullmatch(name)
    return block is not None and block[2] == _ROUTER


def row_order(
    name: str, architecture: str, config: Mapping[str, Any], num_rows: int
) -> np.ndarray | None:
    """Which row of the GGUF tensor each row of the Hugging Face tensor is.

    Args:
      name: of the parameter in a Hugging Face checkpoint.
      architecture: of the GGUF file.
      config: of Hugging Face.
      num_rows: of the tensor.

    Returns:
      int `[num_rows]`; None if the rows have the same order.

    Raises:
      ValueError: the rows are not those of whole heads.
    """
    key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    module = name.rpartition(".")[0].rpartition(".")[2]
    if architecture not in _PAIRED or module not in key:
        return None
    num_heads = config[key[module]]
    if num_rows % (2 * num_heads):
        raise ValueError(f"{name} has {num_rows} rows for {num_heads} heads")
    # Row 2 i + j of a head in the file is row i of its half j here.
    pairs = np.arange(num_rows).reshape(num_heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture of GGUF for a Hugging Face config.

    Raises:
      ValueError: there is none, or GGUF does not have a feature of the config.
    """
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"model_type is {model_type!r:.80}, expected one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(
            f"rope_type is {kind!r:.80}, and only 'default' and 'linear' are written"
        )
    if config.get("sliding_window") and model_type in ("mistral", "mixtral"):
        raise ValueError("it has a sliding window, which GGUF's llama does not have")
    if model_type == "qwen3_moe":
        if not config.get("norm_topk_prob"):
            raise ValueError(
                "norm_topk_prob is false, and GGUF's qwen3moe normalizes the weights "
                "of experts"
            )
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ValueError("some layers have no experts, and all of qwen3moe do")
    return _ARCHITECTURES[model_type]


def metadata_of(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The values of a GGUF file for a Hugging Face config."""
    entries = dict(config)
    num_heads = entries["num_attention_heads"]
    entries["num_key_value_heads"] = entries.get("num_key_value_heads") or num_heads
    head_dim = entries.get("head_dim") or entries["hidden_size"] // num_heads
    rope = _rope(config)
    theta = rope.get("rope_theta") or entries.get("rope_theta") or 10000.0
    entries["rope_theta"] = float(theta)
    entries["rms_norm_eps"] = float(entries.get("rms_norm_eps") or 1e-6)
    sizes = dict(_SIZES)
    if config.get("model_type") in _MIXTURES:
        sizes |= _EXPERT_SIZES
        if "num_experts" in entries:  # Qwen3-MoE has this name
            entries["num_local_experts"] = entries["num_experts"]
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": str(config.get("model_type")),
        "general.quantization_version": 2,
    }
    for key, name in sizes.items():
        if entries.get(name) is not None:
            values[f"{architecture}.{key}"] = entries[name]
    values[f"{architecture}.attention.key_length"] = head_dim
    values[f"{architecture}.attention.value_length"] = head_dim
    values[f"{architecture}.rope.dimension_count"] = head_dim
    values[f"{architecture}.vocab_size"] = entries["vocab_size"]
    if rope.get("rope_type") == "linear":
        values[f"{architecture}.rope.scaling.type"] = "linear"
        values[f"{architecture}.rope.scaling.factor"] = float(rope["factor"])
    return values


def config_of(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], str]:
    """The Hugging Face config of a GGUF file, and its architecture.

    Args:
      metadata: the values of the file.
      shapes: of the tensors, by their names in the file.

    Raises:
      ValueError: the architecture is unknown, or a value is missing or has another
        type.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in _ARCHITECTURES.values():
        known = ", ".join(sorted(set(_ARCHITECTURES.values())))
        raise ValueError(
            f"general.architecture is {architecture!r:.80}, expected one of {known}"
        )
    num_experts = metadata.get(f"{architecture}.expert_count")
    model_type, sizes = architecture, dict(_SIZES)
    if num_experts:
        by_architecture = {_ARCHITECTURES[name]: name for name in _MIXTURES}
        if architecture not in by_architecture:
            raise ValueError(f"{architecture} with experts is not known")
        model_type, sizes = by_architecture[architecture], _SIZES | _EXPERT_SIZES
    config: dict[str, Any] = {"model_type": model_type, "hidden_act": "silu"}
    for key, name in sizes.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None:
            kinds = (int, float) if name in _FRACTIONS else (int,)
            config[name] = _number(f"{architecture}.{key}", value, kinds)
    for name in ("num_attention_heads", "hidden_size"):
        if not config.get(name):
            raise ValueError(f"the value of {name} is missing")
    config["num_key_value_heads"] = (
        config.get("num_key_value_heads") or config["num_attention_heads"]
    )
    head_dim = metadata.get(f"{architecture}.attention.key_length")
    if head_dim is None:
        head_dim = metadata.get(f"{architecture}.rope.dimension_count")
    if head_dim is not None:
        config["head_dim"] = _number("the size of a head", head_dim, (int,))
    table = shapes.get("token_embd.weight")
    if table is None or len(table) != 2:
        raise ValueError("the matrix token_embd.weight is missing")
    config["vocab_size"] = table[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if model_type == "qwen3_moe":
        config["norm_topk_prob"] = True
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if not isinstance(scaling, str):
        raise ValueError(f"the type of the rope scaling is {scaling!r:.80}")
    if scaling != "none":
        factor = metadata.get(f"{architecture}.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    return config, architecture


def _number(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    # A bool is an int in Python, so the types are compared.
    if type(value) not in kinds or not 0 <= value < math.inf:
        kind = "a whole number" if kinds == (int,) else "a finite number"
        raise ValueError(f"{name} must be {kind} from 0, got {value!r:.80}")
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding, which have two names."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= config.get(name) or {}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    return rope
