"""The numbers that define a Llama-family model, and their reading from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

_MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    Args:
        kind: `"default"` (no change), `"linear"` (every frequency divided by `factor`) or `"llama3"` (low
            frequencies divided by `factor`, high ones kept, a linear blend in between).
        factor: the stretch, >= 1.
        low_freq_factor: llama3: wavelengths above `original_max_position_embeddings / low_freq_factor` tokens
            count as low frequencies.
        high_freq_factor: llama3: wavelengths below `original_max_position_embeddings / high_freq_factor` tokens
            count as high frequencies.
        original_max_position_embeddings: llama3: the training context in tokens.

    References:
        Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, 2023 (linear).
        Llama team, The Llama 3 Herd of Models, 2024 (llama3).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"RopeScaling: kind is {self.kind!r}; supported are 'default', 'linear' and 'llama3'. "
                "Other kinds would give wrong positions without any other sign."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a `Llama`, named as in Hugging Face's `config.json`.

    Args:
        vocab_size: number of token ids.
        hidden_size: width d of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; divides `num_attention_heads`.
        head_dim: width of one head, even.
        rms_norm_eps: added to the mean square before the root.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: a `RopeScaling`.
        max_position_embeddings: the context in tokens the model was trained for (kept for the record).
        tie_word_embeddings: whether the output head is the input embedding.
        attention_bias: whether q, k and v projections have a bias.
        attention_output_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the MLP's projections have a bias.
        sliding_window: a token attends to itself and the `sliding_window - 1` before it; None means all.
        scan_layers: stack the layers' parameters along a leading axis and run them by one scan: same logits,
            compile time independent of depth. Calibration needs them in a list: `jaxq.models.unrolled`.

    Raises:
        ValueError: sizes that do not fit together.

    Example:
        >>> config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        >>> LlamaConfig.from_hf(config.to_hf()) == config
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
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    scan_layers: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LlamaConfig: {name} is {getattr(self, name)}; it must be at least 1."
                )
        if (
            self.num_key_value_heads < 1
            or self.num_attention_heads % self.num_key_value_heads
        ):
            raise ValueError(
                f"LlamaConfig: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every key head serves as many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig: head_dim is {self.head_dim}; rotary embedding needs an even width."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"LlamaConfig: sliding_window is {self.sliding_window}; it must be at least 1, or None for all."
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, scan_layers: bool = False
    ) -> LlamaConfig:
        """Reads the dict of a Hugging Face `config.json` (`model_type` llama, mistral or qwen2).

        Args:
            config: the parsed JSON.
            scan_layers: see the class.

        Raises:
            ValueError: one message listing every key whose value this model cannot honour.
        """
        problems = _wrong_kinds(config)
        if problems:  # nothing below could be trusted
            raise ValueError("LlamaConfig.from_hf: " + "; ".join(problems) + ".")

        def need(key: str) -> Any:
            if config.get(key) is None:
                problems.append(f"{key} is missing")
            return config.get(key)

        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            problems.append(
                f"model_type={model_type!r}; supported are {', '.join(_MODEL_TYPES)}"
            )
        _expect(config, "hidden_act", ("silu", "swish"), problems, default="silu")
        _expect(config, "partial_rotary_factor", (None, 1.0), problems)
        if config.get("quantization_config") is not None:
            problems.append(
                f"quantization_config={config['quantization_config']!r}; only float checkpoints are read here"
            )
        sizes = {
            key: need(key)
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        }
        scaling, theta = _read_rope(config, problems)
        window = _read_window(config, problems)
        if problems:
            raise ValueError("LlamaConfig.from_hf: " + "; ".join(problems) + ".")
        qwen = model_type == "qwen2"
        bias = qwen or bool(config.get("attention_bias", False))
        heads = sizes["num_attention_heads"]
        return cls(
            **sizes,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or sizes["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias,
            attention_output_bias=bias and not qwen,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=window,
            scan_layers=scan_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a `config.json` that `transformers` reads as the same model.

        Raises:
            ValueError: the model mixes features no single Hugging Face architecture has.
        """
        qkv_only = self.attention_bias and not self.attention_output_bias
        if (
            (qkv_only and (self.sliding_window or self.mlp_bias))
            or (
                self.sliding_window
                and (self.attention_bias or self.attention_output_bias or self.mlp_bias)
            )
            or (self.attention_output_bias and not self.attention_bias)
            or (
                qkv_only
                and self.head_dim * self.num_attention_heads != self.hidden_size
            )
        ):
            raise ValueError(
                f"LlamaConfig.to_hf: attention_bias={self.attention_bias}, attention_output_bias="
                f"{self.attention_output_bias}, mlp_bias={self.mlp_bias}, sliding_window={self.sliding_window}, "
                f"head_dim={self.head_dim} together match none of the architectures {', '.join(_MODEL_TYPES)}."
            )
        model_type = (
            "qwen2" if qkv_only else "mistral" if self.sliding_window else "llama"
        )
        skip = (
            "rope_scaling",
            "scan_layers",
            "attention_bias",
            "attention_output_bias",
            "mlp_bias",
            "sliding_window",
        )
        out = {k: v for k, v in dataclasses.asdict(self).items() if k not in skip}
        out |= {"model_type": model_type, "hidden_act": "silu"}
        out["architectures"] = [model_type.capitalize() + "ForCausalLM"]
        if model_type == "llama":
            out |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        if model_type == "mistral":
            out["sliding_window"] = self.sliding_window
        scaling = self.rope_scaling
        if scaling.kind == "linear":
            out["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        elif scaling.kind == "llama3":
            fields = dataclasses.asdict(scaling)
            out["rope_scaling"] = {"rope_type": fields.pop("kind"), **fields}
        return out


# What a key of config.json must hold if it is there and not null: a test, and its words.
_KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "a whole number of at least 1",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        (
            *(
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            ),
            *(
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "sliding_window",
            ),
        ),
    ),
    (
        "a number above 0",
        lambda v: (
            isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf
        ),
        ("rms_norm_eps", "rope_theta"),
    ),
    (
        "true or false",
        lambda v: isinstance(v, bool),
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    ),
    (
        "an object",
        lambda v: isinstance(v, Mapping),
        ("rope_scaling", "rope_parameters"),
    ),
    ("a list", lambda v: isinstance(v, list | tuple), ("layer_types",)),
)


def _wrong_kinds(config: Any) -> list[str]:
    """One problem for every value that is not of its kind."""
    if not isinstance(config, Mapping):
        return [
            f"a config is an object of keys and values, not {type(config).__name__}"
        ]
    found = [
        (key, config.get(key), words, test)
        for words, test, keys in _KINDS
        for key in keys
    ]
    for group in ("rope_scaling", "rope_parameters"):
        inner = config.get(group)
        if isinstance(inner, Mapping):
            positive = next(kind for kind in _KINDS if kind[0] == "a number above 0")
            numbers = {k: v for k, v in inner.items() if k not in ("rope_type", "type")}
            found += [
                (f"{group}.{key}", value, *positive[:2])
                for key, value in numbers.items()
            ]
    return [
        f"{key}={value!r} is not {words}"
        for key, value, words, test in found
        if value is not None and not test(value)
    ]


def _expect(
    config: Mapping[str, Any],
    key: str,
    allowed: tuple,
    problems: list[str],
    default: Any = None,
) -> None:
    value = config.get(key, default)
    if value not in allowed:
        problems.append(
            f"{key}={value!r}; supported: {', '.join(repr(a) for a in allowed)}"
        )


def _read_rope(
    config: Mapping[str, Any], problems: list[str]
) -> tuple[RopeScaling, float]:
    """Both spellings: `rope_scaling` beside `rope_theta`, and the newer `rope_parameters` holding all."""
    both = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    rope: dict[str, Any] = {}
    for key in both:
        rope |= config[key]
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r}; supported: 1.0"
        )
    if kind == "default":
        return RopeScaling(), theta
    wanted = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }.get(kind)
    if wanted is None:
        problems.append(
            f"{both[-1]}: rope_type={kind!r}; supported are 'default', 'linear' and 'llama3'"
        )
        return RopeScaling(), theta
    missing = [key for key in wanted if rope.get(key) is None]
    if missing:
        problems.append(f"{both[-1]}: rope_type={kind!r} needs {', '.join(missing)}")
        return RopeScaling(), theta
    return RopeScaling(kind=kind, **{key: rope[key] for key in wanted}), theta


def _read_window(config: Mapping[str, Any], problems: list[str]) -> int | None:
    """The window of all layers; layers of different kinds are not supported."""
    kinds = set(config.get("layer_types") or ())
    model_type = config.get("model_type")
    # A Mistral config that says nothing means transformers' default; null means no window.
    window = config.get("sliding_window", 4096 if model_type == "mistral" else None)
    if model_type == "qwen2":
        if not config.get("use_sliding_window", False):
            window = None
        elif not kinds:
            problems.append(
                "use_sliding_window=True without layer_types; only one window for all layers is supported"
            )
    elif model_type == "llama":
        window = None
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        problems.append(
            f"layer_types holds {sorted(kinds)}; supported is one kind of attention for all layers"
        )
    elif kinds == {"full_attention"}:
        window = None
    return window
