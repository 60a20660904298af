"""The sizes of a Llama-family model, read from and written to `config.json`.

`config.json` is the file in which the `transformers` package describes a model. A
config that this model does not support exactly is an error. Otherwise a wrong position
or a missing bias would only make the generated text worse.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_MODEL_TYPES = ("llama", "mistral", "qwen2")
# The fields of a RopeScaling that each kind has in config.json.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    Args:
        kind: "default" changes nothing. "linear" divides every frequency by `factor`.
            "llama3" divides low frequencies by `factor`, keeps high frequencies, and
            blends linearly between the two.
        factor: the stretch, at least 1.
        low_freq_factor: for "llama3". A wavelength above
            `original_max_position_embeddings / low_freq_factor` tokens counts as a low
            frequency.
        high_freq_factor: for "llama3". A wavelength below
            `original_max_position_embeddings / high_freq_factor` tokens counts as a
            high frequency.
        original_max_position_embeddings: for "llama3": the training context in tokens.

    Raises:
        ValueError: `kind` is not "default", "linear" or "llama3".

    Example:
        >>> RopeScaling("linear", factor=2.0).factor
        2.0

    References:
        Chen et al., Extending Context Window of Large Language Models via Positional
            Interpolation, 2023 (linear).
        Llama team, The Llama 3 Herd of Models, 2024 (llama3).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in tuple(_ROPE_FIELDS):
            raise ValueError(
                f"RopeScaling: kind is {self.kind!r}; expected 'default', 'linear' or "
                "'llama3'."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a `Llama`. The names are those of `config.json`.

    Args:
        vocab_size: number of token ids.
        hidden_size: width d of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key heads and of value heads. It divides
            `num_attention_heads`.
        head_dim: width of one head, an even number.
        rms_norm_eps: the norms add it to the mean square before they take the root.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: a `RopeScaling`.
        max_position_embeddings: the training context in tokens. The model does not
            read it.
        tie_word_embeddings: whether the output head is the input embedding.
        attention_bias: whether the q, k and v projections have a bias.
        attention_output_bias: whether the output projection of attention has a bias.
        mlp_bias: whether the projections of the MLP have a bias.
        sliding_window: a token attends to itself and to the `sliding_window - 1` tokens
            before it. None means all tokens before it.
        scan_layers: stack the parameters of the layers along a leading axis and run
            the layers by one scan. The logits are the same, and compile time does not
            grow with depth. Calibration needs layers in a list: see
            `jaxq.models.unrolled`.

    Raises:
        ValueError: a size is below 1, `head_dim` is odd, or `num_attention_heads` is
            not a multiple of `num_key_value_heads`.

    Example:
        >>> config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=16)
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
                    f"LlamaConfig: {name} is {getattr(self, name)}; it must be at "
                    "least 1."
                )
        num_heads, num_key_heads = self.num_attention_heads, self.num_key_value_heads
        if num_key_heads < 1 or num_heads % num_key_heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_key_heads}. Every key head serves the same "
                "number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig: head_dim is {self.head_dim}; rotary embedding needs an "
                "even number."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"LlamaConfig: sliding_window is {self.sliding_window}; it must be at "
                "least 1. Use None for no window."
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, scan_layers: bool = False
    ) -> LlamaConfig:
        """The config of a model that a Hugging Face `config.json` describes.

        Args:
            config: the parsed JSON, with `model_type` "llama", "mistral" or "qwen2".
            scan_layers: see the class.

        Returns:
            The config.

        Raises:
            ValueError: a key is missing, has a value of another type, or has a value
                that this model does not support. One message lists all such keys.

        Example:
            >>> LlamaConfig.from_hf({
            ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
            ...     "intermediate_size": 48, "num_hidden_layers": 1,
            ...     "num_attention_heads": 2,
            ... }).head_dim
            16
        """
        # The checks below read values, so all values must have the right type first.
        _raise_problems(_wrong_types(config))
        problems: list[str] = []
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            problems.append(
                f"model_type={model_type!r}; expected one of {', '.join(_MODEL_TYPES)}"
            )
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            problems.append(
                f"hidden_act={config['hidden_act']!r}; expected 'silu' or 'swish'"
            )
        if config.get("partial_rotary_factor") not in (None, 1.0):
            problems.append(
                f"partial_rotary_factor={config['partial_rotary_factor']!r}; expected "
                "1.0"
            )
        if config.get("quantization_config") is not None:
            problems.append(
                f"quantization_config={config['quantization_config']!r}; expected a "
                "float checkpoint, which does not have this key"
            )
        sizes = _read_sizes(config, problems)
        scaling, theta = _read_rope(config, problems)
        window = _read_window(config, problems)
        _raise_problems(problems)
        # Qwen2 always has biases of q, k and v, and never one of the output projection.
        is_qwen = model_type == "qwen2"
        has_bias = is_qwen or bool(config.get("attention_bias", False))
        num_heads = sizes["num_attention_heads"]
        return cls(
            **sizes,
            num_key_value_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or sizes["hidden_size"] // num_heads,
            rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=has_bias,
            attention_output_bias=has_bias and not is_qwen,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=window,
            scan_layers=scan_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a `config.json` that `transformers` reads as the same model.

        Returns:
            A dict that `json.dumps` accepts.

        Raises:
            ValueError: no single Hugging Face architecture has these features together.

        Example:
            >>> config = LlamaConfig(vocab_size=256, hidden_size=64,
            ...                      intermediate_size=128, num_hidden_layers=2,
            ...                      num_attention_heads=4, num_key_value_heads=2,
            ...                      head_dim=16, sliding_window=32)
            >>> config.to_hf()["model_type"]
            'mistral'
        """
        model_type = _matching_model_type(self)
        if model_type is None:
            raise ValueError(
                f"LlamaConfig.to_hf: attention_bias={self.attention_bias}, "
                f"attention_output_bias={self.attention_output_bias}, "
                f"mlp_bias={self.mlp_bias}, sliding_window={self.sliding_window}, "
                f"head_dim={self.head_dim} together match none of the architectures "
                f"{', '.join(_MODEL_TYPES)}. Use jaxq.save for such a model."
            )
        entries = dataclasses.asdict(self)
        # These are written below, and only if the architecture has them.
        for name in (
            "rope_scaling",
            "scan_layers",
            "attention_bias",
            "attention_output_bias",
            "mlp_bias",
            "sliding_window",
        ):
            del entries[name]
        entries["model_type"] = model_type
        entries["hidden_act"] = "silu"
        entries["architectures"] = [model_type.capitalize() + "ForCausalLM"]
        if model_type == "llama":
            entries["attention_bias"] = self.attention_bias
            entries["mlp_bias"] = self.mlp_bias
        if model_type == "mistral":
            entries["sliding_window"] = self.sliding_window
        scaling = self.rope_scaling
        if scaling.kind != "default":
            fields = {
                name: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.kind]
            }
            entries["rope_scaling"] = {"rope_type": scaling.kind, **fields}
        return entries


def _matching_model_type(config: LlamaConfig) -> str | None:
    """The Hugging Face architecture with the features of a config, or None."""
    if config.attention_bias and not config.attention_output_bias:
        # Qwen2 has no head_dim of its own: its heads fill the hidden size.
        heads_width = config.head_dim * config.num_attention_heads
        if config.sliding_window or config.mlp_bias:
            return None
        return "qwen2" if heads_width == config.hidden_size else None
    if config.sliding_window:
        has_bias = config.attention_output_bias or config.mlp_bias
        return None if has_bias else "mistral"
    if config.attention_output_bias and not config.attention_bias:
        return None
    return "llama"


def _raise_problems(problems: list[str]) -> None:
    """Raises one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError("LlamaConfig.from_hf: " + "; ".join(problems) + ".")


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 1 <= value <= _LARGEST_COUNT


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer can be larger than every float.
    return is_number and 0 < value <= sys.float_info.max


class _ValueType(NamedTuple):
    """What the value of a key of config.json must be, if it is there and not null."""

    description: str
    accepts: Callable[[Any], bool]
    keys: tuple[str, ...]


# Arrays have at most so many elements along an axis that jax can index by int32.
_LARGEST_COUNT = 2**31 - 1
_REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_COUNT = _ValueType(
    "a whole number of at least 1",
    _is_count,
    (
        *_REQUIRED_SIZES,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
    ),
)
_POSITIVE = _ValueType("a number above 0", _is_positive, ("rms_norm_eps", "rope_theta"))
_SWITCH = _ValueType(
    "true or false",
    lambda value: isinstance(value, bool),
    ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
)
_OBJECT = _ValueType(
    "an object",
    lambda value: isinstance(value, Mapping),
    ("rope_scaling", "rope_parameters"),
)
_NAMES = _ValueType(
    "a list of names",
    lambda value: (
        isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    ),
    ("layer_types",),
)


def _wrong_types(config: Any) -> list[str]:
    """One problem for every value that has another type than its key needs."""
    if not isinstance(config, Mapping):
        return [
            f"a config is an object of keys and values, not {type(config).__name__}"
        ]
    problems = []

    def check(name: str, value: Any, value_type: _ValueType) -> None:
        if value is not None and not value_type.accepts(value):
            problems.append(f"{name}={value!r} is not {value_type.description}")

    for value_type in (_COUNT, _POSITIVE, _SWITCH, _OBJECT, _NAMES):
        for key in value_type.keys:
            check(key, config.get(key), value_type)
    for group in _OBJECT.keys:
        entries = config.get(group)
        if not isinstance(entries, Mapping):
            continue
        for key, value in entries.items():
            if key not in ("rope_type", "type"):
                check(f"{group}.{key}", value, _POSITIVE)
    return problems


def _read_sizes(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The sizes that every config must have; None for a size that is missing."""
    sizes = {key: config.get(key) for key in _REQUIRED_SIZES}
    problems += [f"{key} is missing" for key, size in sizes.items() if size is None]
    return sizes


def _read_rope(
    config: Mapping[str, Any], problems: list[str]
) -> tuple[RopeScaling, float]:
    """The scaling and the base of the rotary frequencies.

    Older configs have the two keys `rope_scaling` and `rope_theta`. Newer configs have
    one key `rope_parameters` for both.
    """
    groups = [key for key in _OBJECT.keys if config.get(key)]
    rope: dict[str, Any] = {}
    for group in groups:
        rope |= config[group]
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r}; expected 1.0"
        )
    fields = _ROPE_FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        problems.append(
            f"{groups[-1]}: rope_type={kind!r}; expected 'default', 'linear' or "
            "'llama3'"
        )
        return RopeScaling(), theta
    missing = [field for field in fields if rope.get(field) is None]
    if missing:
        problems.append(f"{groups[-1]}: rope_type={kind!r} needs {', '.join(missing)}")
        return RopeScaling(), theta
    return RopeScaling(kind=kind, **{field: rope[field] for field in fields}), theta


def _read_window(config: Mapping[str, Any], problems: list[str]) -> int | None:
    """The sliding window of all layers, or None for full attention.

    It adds a problem to `problems` if the layers have different kinds of attention.
    """
    attention_kinds = set(config.get("layer_types") or ())
    model_type = config.get("model_type")
    # If a Mistral config does not have the key, transformers uses 4096. If the value
    # is null, there is no window.
    default = 4096 if model_type == "mistral" else None
    window = config.get("sliding_window", default)
    if model_type == "llama":
        window = None
    if model_type == "qwen2":
        if not config.get("use_sliding_window", False):
            window = None
        elif not attention_kinds:
            problems.append(
                "use_sliding_window=True needs layer_types with one kind of attention "
                "for all layers"
            )
    if len(attention_kinds) > 1 or attention_kinds - {
        "full_attention",
        "sliding_attention",
    }:
        problems.append(
            f"layer_types has {sorted(attention_kinds)}; only one kind of attention "
            "for all layers is supported"
        )
    elif attention_kinds == {"full_attention"}:
        window = None
    return window
