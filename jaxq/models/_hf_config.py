"""`config.json` of a decoder: reading it, checking it and writing it.

`config.json` is the file in which the `transformers` package describes a model. A
config that jaxq does not support exactly is an error. Otherwise a wrong position or a
missing bias would only make the generated text worse.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxq.models._families import FAMILIES, FULL, SLIDING, Family
from jaxq.models._rope import FIELDS, RopeScaling

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Fields of a RopeScaling that config.json may leave out.
_OPTIONAL = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
)
# Keys whose null is not their default.
_NULL_MEANS_NONE = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "shared_expert_intermediate_size",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def model_types() -> tuple[str, ...]:
    """The values of `model_type` in `config.json` that `load` reads as a decoder.

    Example:
        >>> from jaxq.models import model_types
        >>> "llama" in model_types()
        True
    """
    return tuple(FAMILIES)


def read_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `DecoderConfig` that a `config.json` describes.

    Args:
        config: the parsed JSON.

    Raises:
        ValueError: as `DecoderConfig.from_hf`.
    """
    if not isinstance(config, Mapping):
        _raise_problems(
            [f"a config is an object of keys and values, not {type(config).__name__}"]
        )
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    config = _with_defaults(config, family)
    # The checks below read values, so all values must have the right type first.
    _raise_problems(_wrong_types(config))
    problems: list[str] = []
    if family is None:
        problems.append(
            f"model_type={model_type!r}; expected one of {', '.join(FAMILIES)}"
        )
        family = FAMILIES["llama"]  # finds the other problems
    fields = _common_fields(config, family, problems)
    fields |= _family_fields(config, family, problems)
    _raise_problems(problems)
    return fields


def read_encoder_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `EncoderConfig` that a `config.json` describes.

    Args:
        config: the parsed JSON.

    Raises:
        ValueError: as `EncoderConfig.from_hf`.
    """
    if not isinstance(config, Mapping):
        _raise_problems(
            [f"a config is an object of keys and values, not {type(config).__name__}"],
            "EncoderConfig.from_hf",
        )
    problems = _wrong_types(config)
    if config.get("model_type") != "bert":
        problems.append(f"model_type={config.get('model_type')!r}; expected bert")
    for key, expected in _BERT_VALUES.items():
        if config.get(key) not in (None, expected):
            problems.append(f"{key}={config[key]!r}; expected {expected!r}")
    problems += [f"{key} is missing" for key in _SIZES if config.get(key) is None]
    activation = config.get("hidden_act") or "gelu"
    if activation not in _ACTIVATIONS:
        problems.append(
            f"hidden_act={activation!r}; expected one of {', '.join(_ACTIVATIONS)}"
        )
    _raise_problems(problems, "EncoderConfig.from_hf")
    return {
        **{key: config[key] for key in _SIZES},
        "max_position_embeddings": config.get("max_position_embeddings") or 512,
        "type_vocab_size": config.get("type_vocab_size") or 2,
        "layer_norm_eps": config.get("layer_norm_eps") or 1e-12,
        "activation": _ACTIVATIONS[activation],
    }


def write_encoder_entries(config: Any) -> dict[str, Any]:
    """The dict of a `config.json` for an `EncoderConfig`."""
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        **{key: getattr(config, key) for key in _SIZES},
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        **_BERT_VALUES,
    }


# Keys that change a BERT, with the value that is supported.
_BERT_VALUES = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def write_entries(config: Any, model_type: str) -> dict[str, Any]:
    """The `config.json` of one family for a `DecoderConfig`.

    The caller must read the entries again and compare: they leave out what the family
    does not have.
    """
    family = FAMILIES[model_type]
    entries: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [family.architecture],
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        # Otherwise transformers would use the token ids of the family's own models.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    for name in (
        *_SIZES,
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        entries[name] = getattr(config, name)
    if family.rope_kinds != ():
        entries["rope_theta"] = config.rope_theta
        if config.rope_scaling.kind != "default":
            entries["rope_scaling"] = _written_scaling(config.rope_scaling)
    for key, names in family.fields.items():
        entries[key] = getattr(config, names[0])
    entries |= family.write(config)
    for key, usual in family.renamed.items():
        value = entries.pop(usual, None)
        if value is not None:
            entries.setdefault(key, value)
    return entries


def _with_defaults(config: Mapping[str, Any], family: Family | None) -> dict[str, Any]:
    """The entries under their usual names, with the defaults of the family."""
    if family is None:
        return dict(config)
    entries = dict(family.defaults)
    if config.get("sliding_window") == 0:  # as transformers writes no window
        config = {**config, "sliding_window": None}
    for key, value in config.items():
        if key in family.renamed:
            entries[family.renamed[key]] = value
    usual_names = {key: config[key] for key in config if key not in family.renamed}
    for key, value in usual_names.items():
        # Some files have both names. The name of the family counts.
        is_shadowed = any(
            usual == key and name in config for name, usual in family.renamed.items()
        )
        if not is_shadowed:
            entries[key] = value
    for key, default in family.defaults.items():
        if entries[key] is None and key not in _NULL_MEANS_NONE:
            entries[key] = default
    return entries


def _common_fields(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """The fields that all families have."""
    sizes = {key: config.get(key) for key in _SIZES}
    derived = family.read(config, [])  # for a size that the family derives
    problems += [
        f"{key} is missing"
        for key, size in sizes.items()
        if size is None and key not in derived
    ]
    num_heads, width = sizes["num_attention_heads"] or 1, sizes["hidden_size"] or 1
    fields = {
        **sizes,
        "num_key_value_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or width // num_heads,
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-6,
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }
    if config.get("quantization_config") is not None:
        problems.append(
            f"quantization_config={config['quantization_config']!r}; expected a float "
            "checkpoint, which does not have this key"
        )
    if config.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(
            f"partial_rotary_factor={config['partial_rotary_factor']!r}; expected 1.0"
        )
    if family.rope_kinds != ():
        fields |= _rope_fields(config, family, problems)
    return fields


def _family_fields(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """The fields of one family, after the checks of its keys."""
    fields: dict[str, Any] = {}
    for key, values in family.allowed.items():
        value = config.get(key)
        if value is not None and value not in values:
            expected = " or ".join(map(repr, values))
            problems.append(f"{key}={value!r}; expected {expected}")
    activation = config.get("hidden_act") or "silu"
    if activation in _ACTIVATIONS:
        fields["activation"] = _ACTIVATIONS[activation]
    else:
        problems.append(
            f"hidden_act={activation!r}; expected one of {', '.join(_ACTIVATIONS)}"
        )
    for key, names in family.fields.items():
        if key in config:
            value = config[key]
            value = bool(value) if key in _SWITCH.keys else value
            fields |= dict.fromkeys(names, value)
    fields |= family.fixed
    fields |= _window_fields(config, family, problems)
    return fields | family.read(config, problems)


def _window_fields(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """The sliding window, and the layers that have it."""
    kinds = config.get("layer_types")
    supported = {FULL} if family.layer_types is None else {FULL, SLIDING}
    unknown = sorted(set(kinds or ()) - supported)
    if unknown:
        problems.append(
            f"layer_types has {', '.join(unknown)}; expected "
            f"{' or '.join(sorted(supported))}"
        )
    num_layers = config.get("num_hidden_layers")
    if kinds is not None and num_layers is not None and len(kinds) != num_layers:
        problems.append(
            f"layer_types has {len(kinds)} entries; num_hidden_layers is {num_layers}"
        )
    if family.layer_types is None:
        return {}
    window = config.get("sliding_window")
    if "use_sliding_window" in family.defaults and not config["use_sliding_window"]:
        window = None
    if kinds is None and window is not None:
        kinds = family.layer_types(config)
    if kinds is None or FULL not in kinds:
        return {"sliding_window": window}
    if SLIDING not in kinds:
        return {"sliding_window": None}
    if window is None:
        problems.append(f"layer_types has {SLIDING}, and sliding_window is missing")
    windowed = tuple(kind == SLIDING for kind in kinds)
    return {"sliding_window": window, "window_layers": windowed}


def _rope_fields(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """The base and the scaling of the rotary frequencies.

    Older configs have the two keys `rope_scaling` and `rope_theta`. Newer configs have
    one key `rope_parameters` for both. Gemma 3 has an entry there for each kind of
    attention.
    """
    rope: dict[str, Any] = {}
    for group in _ROPE_GROUPS:
        rope |= config.get(group) or {}
    local_theta = config.get("rope_local_base_freq")
    fields: dict[str, Any] = {}
    if "full_attention" in rope or "sliding_attention" in rope:
        local = rope.get("sliding_attention") or {}
        rope = rope.get("full_attention") or {}
        local_kind = local.get("rope_type", "default")
        if local_kind != "default":
            problems.append(
                f"rope_parameters.sliding_attention: rope_type={local_kind!r}; "
                "expected 'default'"
            )
        local_theta = local.get("rope_theta") or local_theta
    if local_theta is not None:
        fields["local_rope_theta"] = local_theta
    fields["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 1e4
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r}; expected 1.0"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    allowed = family.rope_kinds or tuple(FIELDS)
    if kind not in allowed:
        problems.append(
            f"rope_type={kind!r}; expected {' or '.join(map(repr, allowed))}"
        )
        return fields
    missing = [
        name
        for name in FIELDS[kind]
        if name not in _OPTIONAL and rope.get(name) is None
    ]
    if missing:
        problems.append(f"rope_type={kind!r} needs {', '.join(missing)}")
        return fields
    fields["rope_scaling"] = _scaling(kind, rope, config)
    return fields


def _scaling(kind: str, rope: Mapping[str, Any], config: Mapping) -> RopeScaling:
    values = {name: rope[name] for name in FIELDS[kind] if rope.get(name) is not None}
    context = "original_max_position_embeddings"
    if context in FIELDS[kind]:
        longest = config.get("max_position_embeddings") or 2048
        own = config.get(context) or rope.get(context)
        # "dynamic" stretches a text that is longer than the model's own limit.
        values[context] = longest if kind == "dynamic" else own or longest
    if kind == "yarn" and rope.get("attention_factor") is None:
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        if numerator and denominator:
            values["attention_factor"] = _mscale(rope, numerator) / _mscale(
                rope, denominator
            )
    return RopeScaling(kind=kind, **values)


def _mscale(rope: Mapping[str, Any], mscale: float) -> float:
    """The attention factor of YaRN as DeepSeek writes it."""
    factor = rope["factor"]
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _written_scaling(scaling: RopeScaling) -> dict[str, Any]:
    entries: dict[str, Any] = {"rope_type": scaling.kind}
    for name in FIELDS[scaling.kind]:
        if getattr(scaling, name) is not None:
            entries[name] = getattr(scaling, name)
    return entries


def _raise_problems(problems: list[str], caller: str = "DecoderConfig.from_hf") -> None:
    """Raises one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"{caller}: {'; '.join(problems)}.")


# The types of values.


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 1 <= value <= _LARGEST_COUNT


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer can be larger than every float.
    return is_number and 0 < value <= sys.float_info.max


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and all(accepts(entry) for entry in value)
    )


class _ValueType(NamedTuple):
    """What the value of a key of config.json must be, if it is there and not null."""

    description: str
    accepts: Callable[[Any], bool]
    keys: tuple[str, ...]


# Arrays have at most so many elements along an axis that jax can index by int32.
_LARGEST_COUNT = 2**31 - 1
_ROPE_GROUPS = ("rope_scaling", "rope_parameters")
_COUNT = _ValueType(
    "a whole number of at least 1",
    _is_count,
    (
        *_SIZES,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
        "sliding_window_pattern",
        "no_rope_layer_interval",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "type_vocab_size",
    ),
)
_POSITIVE = _ValueType(
    "a number above 0",
    _is_positive,
    (
        "rms_norm_eps",
        "layer_norm_eps",
        "rope_theta",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_multiplier",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "swiglu_alpha",
        "swiglu_limit",
    ),
)
_SWITCH = _ValueType(
    "true or false",
    lambda value: isinstance(value, bool),
    (
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "use_sliding_window",
        "scale_attn_weights",
        "norm_topk_prob",
        "qkv_bias",
    ),
)
_OBJECT = _ValueType(
    "an object", lambda value: isinstance(value, Mapping), _ROPE_GROUPS
)
_NAME = _ValueType("a name", lambda value: isinstance(value, str), ("hidden_act",))
_NAMES = _ValueType(
    "a list of names", _is_list_of(lambda name: isinstance(name, str)), ("layer_types",)
)
_FLAGS = _ValueType(
    "a list of 0 and 1", _is_list_of(lambda flag: flag in (0, 1)), ("no_rope_layers",)
)
_LAYER_NUMBER = _ValueType(
    "a whole number of at least 0",
    lambda value: value == 0 or _is_count(value),
    ("max_window_layers",),
)
_LAYERS = _ValueType(
    "a list of layers",
    _is_list_of(lambda layer: layer == 0 or _is_count(layer)),
    ("mlp_only_layers",),
)
_VALUE_TYPES = (
    _LAYERS,
    *(_COUNT, _POSITIVE, _SWITCH, _OBJECT, _NAME, _NAMES, _FLAGS, _LAYER_NUMBER),
)


def _wrong_types(config: Mapping[str, Any]) -> list[str]:
    """One problem for every value that has another type than its key needs."""
    problems = []

    def check(name: str, value: Any, value_type: _ValueType) -> None:
        if value is not None and not value_type.accepts(value):
            problems.append(f"{name}={value!r} is not {value_type.description}")

    def check_rope(name: str, entries: Any) -> None:
        check(name, entries, _OBJECT)
        if not isinstance(entries, Mapping):
            return
        for key, value in entries.items():
            if key in ("full_attention", "sliding_attention"):
                check_rope(f"{name}.{key}", value)
            elif key == "truncate":
                check(f"{name}.{key}", value, _SWITCH)
            elif key in ("rope_type", "type"):
                check(f"{name}.{key}", value, _NAME)
            elif not isinstance(value, list):  # a list belongs to a kind we refuse
                check(f"{name}.{key}", value, _POSITIVE)

    for value_type in _VALUE_TYPES:
        if value_type is not _OBJECT:
            for key in value_type.keys:
                check(key, config.get(key), value_type)
    for group in _ROPE_GROUPS:
        check_rope(group, config.get(group))
    return problems
