"""The names that tensors have in the files of each family of models.

A parameter of a layer has a module name in the model, such as "self_attn.q_proj". The
tables below give the module that holds its numbers in a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """The names of tensors in the files of a family.

    Attributes:
        prefix: of all names but that of the head.
        is_prefix_optional: some files of the family leave out the prefix.
        layers: the name of the list of layers.
        modules: modules with another name than in the model. Names of modules inside a
            layer begin after the number of the layer.
        fused: modules that are a part of another one, with the modules that follow one
            another in it.
        experts: what the name of a module of an expert begins with, with a place for
            the number of the expert. Without it, one tensor holds all experts.
        expert_modules: modules of an expert with another name than in the model.
        is_transposed: the file stores kernels as [out, in]. The model has [in, out].
        redundant: endings of the names of tensors that the model does not need.
    """

    prefix: str = "model."
    is_prefix_optional: bool = False
    layers: str = "layers"
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    experts: str | None = "mlp.experts.{}."
    expert_modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_transposed: bool = True
    # Old checkpoints store their rotary tables.
    redundant: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def layer_prefix(self, number: int) -> str:
        """What the names of the tensors of a layer begin with."""
        return f"{self.prefix}{self.layers}.{number}."


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_INPUT_NORM = {"post_attention_layernorm": "pre_feedforward_layernorm"}

_LLAMA = Naming()
_GEMMA = Naming(modules=_OUTPUT_NORMS | _INPUT_NORM)
_OTHERS = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Naming(modules=_OUTPUT_NORMS),
    "phi3": Naming(
        fused={
            "self_attn.qkv_proj": _ATTENTION,
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }
    ),
    "mixtral": Naming(
        modules={"mlp.router": "block_sparse_moe.gate"},
        experts="block_sparse_moe.experts.{}.",
        expert_modules={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "qwen2_moe": Naming(modules={"mlp.router": "mlp.gate"}),
    "qwen3_moe": Naming(modules={"mlp.router": "mlp.gate"}),
    "gpt_oss": Naming(experts=None),
    "bert": Naming(
        prefix="bert.",
        is_prefix_optional=True,
        layers="encoder.layer",
        modules={
            "embed_tokens": "embeddings.word_embeddings",
            "embed_positions": "embeddings.position_embeddings",
            "embed_token_types": "embeddings.token_type_embeddings",
            "embed_norm": "embeddings.LayerNorm",
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "attention_output_norm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "mlp_output_norm": "output.LayerNorm",
        },
        # Positions, and the heads of the tasks of the first training.
        redundant=(
            ".position_ids",
            "pooler.dense.weight",
            "pooler.dense.bias",
            *("cls.predictions.bias", "cls.predictions.decoder.weight"),
            *("cls.predictions.decoder.bias", "cls.seq_relationship.weight"),
            *("cls.seq_relationship.bias", "cls.predictions.transform.dense.weight"),
            *("predictions.transform.dense.bias", "transform.LayerNorm.weight"),
            "transform.LayerNorm.bias",
        ),
    ),
    "gpt2": Naming(
        prefix="transformer.",
        is_prefix_optional=True,
        layers="h",
        modules={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "norm": "ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused={"attn.c_attn": _ATTENTION},
        is_transposed=False,
        # Old files store the causal mask.
        redundant=(".attn.bias", ".attn.masked_bias"),
    ),
}


def naming_of(model_type: str) -> Naming:
    """The names in the files of models of this `model_type`."""
    return _OTHERS.get(model_type, _LLAMA)
