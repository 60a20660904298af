"""The sizes and switches of a decoder.

One class covers all families of models. Each switch is one difference between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxq.models._hf_config import model_types, read_entries, write_entries
from jaxq.models._rope import RopeScaling


class LayerSwitches(NamedTuple):
    """What differs between the layers of a model.

    Attributes:
        windowed: the layer has the sliding window. A Python boolean, or a traced one in
            a scan.
        rotary: the layer has rotary positions. Likewise.
    """

    windowed: Any
    rotary: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sizes and switches of the mixtures of experts of a `Decoder`.

    Args:
        num_experts: number of experts of a layer.
        num_experts_per_token: how many of them each token uses.
        intermediate_size: width of an expert.
        normalizes_weights: the weights of a token's experts are divided by their sum.
        shared_intermediate_size: width of an expert that all tokens use, behind a gate.
            None means that there is none.
        bias: whether the router and the experts have biases.
        clamp: experts compute `(up + 1) gate sigmoid(slope gate)`, with numbers clipped
            to this limit. None means `act(gate) up`.
        gate_slope: the slope of that sigmoid.
        layers: for each layer, whether it has experts. None means that all have. The
            other layers have an MLP.

    Raises:
        ValueError: a size is below 1, or a token uses more experts than there are.

    Example:
        >>> from jaxq.models import ExpertsConfig
        >>> experts = ExpertsConfig(num_experts=8, num_experts_per_token=2,
        ...                         intermediate_size=64)
        >>> experts.normalizes_weights
        True
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalizes_weights: bool = True
    shared_intermediate_size: int | None = None
    bias: bool = False
    clamp: float | None = None
    gate_slope: float = 1.702
    layers: tuple[bool, ...] | None = None

    def __post_init__(self):
        for name in ("num_experts", "num_experts_per_token", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ExpertsConfig: {name} is {getattr(self, name)}; it must be at "
                    "least 1."
                )
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"ExpertsConfig: a token uses {self.num_experts_per_token} experts, "
                f"and there are {self.num_experts}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`. Most names are those of `config.json`.

    The defaults are those of Llama.

    Args:
        vocab_size: number of token ids.
        hidden_size: width d of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key heads and of value heads. It divides
            `num_attention_heads`.
        head_dim: width of one head, an even number.
        rms_norm_eps: the norms add it to the mean square before they take the root.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: a `RopeScaling`.
        max_position_embeddings: the training context in tokens. Only learned positions
            read it.
        tie_word_embeddings: whether the output head is the input embedding.
        attention_bias: whether the q, k and v projections have a bias.
        attention_output_bias: whether the output projection of attention has a bias.
        mlp_bias: whether the projections of the MLP have a bias.
        sliding_window: a token attends to itself and to the `sliding_window - 1` tokens
            before it. None means all tokens before it.
        window_layers: for each layer, whether it has the sliding window. None means
            that all layers have it.
        norm: "rms" for RMSNorm, "layer" for LayerNorm with a bias.
        norm_places: "before" attention and the MLP, "after" them, or "both".
        unit_offset_norms: files hold the gains of the norms minus 1. The model holds
            whole gains in float32, because bfloat16 has too few bits for 1 + g.
        query_key_norm: "head" normalizes each head of q and k, "heads" all heads
            together. None does not normalize.
        activation: of the MLP: "silu", "gelu", or "gelu_tanh", its approximation.
        gated_mlp: True for `down(act(gate(x)) * up(x))`, False for `down(act(up(x)))`.
        learned_positions: add a learned vector for each position, and rotate nothing.
        rope_layers: for each layer, whether it has rotary positions. None means that
            all layers have them.
        local_rope_theta: base of the rotary wavelengths of layers with the window.
            These layers then have no scaling. None means that they are like the others.
        attention_scale: scores are multiplied by it. None means `1 / sqrt(head_dim)`.
        attention_softcap: scores x become `c tanh(x / c)` for this c. None means no
            cap.
        logits_softcap: the same for the logits.
        attention_sinks: each query head has a trained score that takes a part of the
            softmax and has no value.
        experts: an `ExpertsConfig` for a mixture of experts. None means an MLP in every
            layer.
        embedding_multiplier: input embeddings are multiplied by it.
        residual_multiplier: what attention and the MLP add to the stream is multiplied
            by it.
        logits_scaling: logits are divided by it.
        scan_layers: stack the parameters of the layers along a leading axis and run
            the layers by one scan. The logits are the same, and compile time does not
            grow with depth. Calibration needs layers in a list: see
            `jaxq.models.unrolled`.

    Raises:
        ValueError: a size is below 1, `head_dim` is odd, `num_attention_heads` is not a
            multiple of `num_key_value_heads`, a list does not have one entry for each
            layer, or a name is unknown.

    Example:
        >>> from jaxq.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=256, hidden_size=64, head_dim=16,
        ...                        intermediate_size=128, num_hidden_layers=2,
        ...                        num_attention_heads=4, num_key_value_heads=2)
        >>> DecoderConfig.from_hf(config.to_hf()) == config
        True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_places: Literal["before", "after", "both"] = "before"
    unit_offset_norms: bool = False
    query_key_norm: Literal["head", "heads"] | None = None
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    learned_positions: bool = False
    rope_layers: tuple[bool, ...] | None = None
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    attention_sinks: bool = False
    experts: ExpertsConfig | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    scan_layers: bool = False

    def __post_init__(self):
        self._check_sizes()
        for name, names in _NAMES.items():
            if getattr(self, name) not in names:
                raise ValueError(
                    f"DecoderConfig: {name} is {getattr(self, name)!r}; expected one "
                    f"of {', '.join(map(repr, names))}."
                )
        expert_layers = None if self.experts is None else self.experts.layers
        per_layer = {
            "window_layers": self.window_layers,
            "rope_layers": self.rope_layers,
            "experts.layers": expert_layers,
        }
        for name, layers in per_layer.items():
            if layers is not None and len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"DecoderConfig: {name} has {len(layers)} entries; "
                    f"num_hidden_layers is {self.num_hidden_layers}."
                )
        if self.scan_layers and len(set(self.expert_layers())) > 1:
            raise ValueError(
                "DecoderConfig: scan_layers needs layers of one kind, and "
                "experts.layers has layers with experts and without. Use "
                "scan_layers=False."
            )
        if self.window_layers is not None and self.sliding_window is None:
            raise ValueError(
                "DecoderConfig: window_layers needs sliding_window, the number of "
                "tokens."
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, scan_layers: bool = False
    ) -> DecoderConfig:
        """The config of a model that a Hugging Face `config.json` describes.

        Args:
            config: the parsed JSON. `jaxq.models.model_types()` lists the values of
                `model_type` that are supported.
            scan_layers: see the class.

        Returns:
            The config.

        Raises:
            ValueError: a key is missing, has a value of another type, or has a value
                that this model does not support. One message lists all such keys.

        Example:
            >>> from jaxq.models import DecoderConfig
            >>> DecoderConfig.from_hf({
            ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
            ...     "intermediate_size": 48, "num_hidden_layers": 1,
            ...     "num_attention_heads": 2,
            ... }).head_dim
            16
        """
        fields = read_entries(config)
        experts = fields.pop("experts", None)
        if experts is not None:
            experts = ExpertsConfig(**experts)
        return cls(**fields, experts=experts, scan_layers=scan_layers)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a `config.json` that `transformers` reads as the same model.

        Returns:
            A dict that `json.dumps` accepts.

        Raises:
            ValueError: no Hugging Face architecture that jaxq writes has these features
                together.

        Example:
            >>> from jaxq.models import DecoderConfig
            >>> config = DecoderConfig(vocab_size=256, hidden_size=64, head_dim=16,
            ...                        intermediate_size=128, num_hidden_layers=2,
            ...                        num_attention_heads=4, num_key_value_heads=2,
            ...                        sliding_window=32)
            >>> config.to_hf()["model_type"]
            'mistral'
        """
        for model_type in model_types():
            entries = write_entries(self, model_type)
            try:
                again = DecoderConfig.from_hf(entries, scan_layers=self.scan_layers)
            except ValueError:  # this family cannot have such values
                continue
            if again == self:
                return entries
        raise ValueError(
            "DecoderConfig.to_hf: none of the architectures "
            f"{', '.join(model_types())} has the features of {self} together. Use "
            "jaxq.save for such a model."
        )

    def layer_switches(self) -> tuple[LayerSwitches, ...]:
        """What differs between the layers, for each layer."""
        num_layers = self.num_hidden_layers
        has_window = self.sliding_window is not None
        windowed = self.window_layers or (has_window,) * num_layers
        rotary = self.rope_layers or (not self.learned_positions,) * num_layers
        return tuple(
            LayerSwitches(bool(w), bool(r))
            for w, r in zip(windowed, rotary, strict=True)
        )

    def expert_layers(self) -> tuple[bool, ...]:
        """Which layers have experts, for each layer."""
        experts = self.experts
        if experts is not None and experts.layers is not None:
            return experts.layers
        return (experts is not None,) * self.num_hidden_layers

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DecoderConfig: {name} is {getattr(self, name)}; it must be at "
                    "least 1."
                )
        num_heads, num_key_heads = self.num_attention_heads, self.num_key_value_heads
        if num_key_heads < 1 or num_heads % num_key_heads:
            raise ValueError(
                f"DecoderConfig: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_key_heads}. Every key head serves the same "
                "number of query heads."
            )
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(
                f"DecoderConfig: head_dim is {self.head_dim}; rotary embedding needs "
                "an even number."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"DecoderConfig: sliding_window is {self.sliding_window}; it must be "
                "at least 1. Use None for no window."
            )


_NAMES = {
    "norm": ("rms", "layer"),
    "norm_places": ("before", "after", "both"),
    "query_key_norm": (None, "head", "heads"),
    "activation": ("silu", "gelu", "gelu_tanh"),
}
