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
        is_transposed: the file stores kernels as [out, in]. The model has [in, out].
        redundant: endings of the names of tensors that the model does not need.
    """

    prefix: str = "model."
    is_prefix_optional: bool = False
    layers: str = "layers"
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
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
