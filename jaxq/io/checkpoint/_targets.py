"""How a quantized checkpoint is written: the layout, and its `quantization_config`.

`_schemes` reads what these functions write.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxq.formats import unknown_name
from jaxq.io import layouts
from jaxq.qtensor import PerTensor, QTensor, as_activation_spec

Settings = Mapping[str, Any]


class WeightSettings(NamedTuple):
    """What a layout says about the weight of a module.

    Attributes:
      layout: the settings of the layout.
      inputs: how the module quantizes its inputs; None if it does not.
    """

    layout: Settings
    inputs: Settings | None = None


# quantization_config from the settings of each quantized module, and the paths of the
# modules whose weight is a float matrix.
Combine = Callable[[Mapping[str, WeightSettings], list[str]], dict[str, Any]]


class Target(NamedTuple):
    """A format that `export` writes to a directory.

    Attributes:
      layouts: the names of the layouts; each weight has the first one that holds it.
      combine: makes `quantization_config`.
      inputs: what the config says about the quantization of inputs. It raises a
        ValueError if it cannot say it.
      has_stacks: True if the format has stacks of experts and no other weights.
    """

    layouts: tuple[str, ...]
    combine: Combine
    inputs: Callable[[QTensor], Settings | None]
    has_stacks: bool = False


def target(name: str, caller: str) -> Target:
    """The target with a name. Hyphens and underscores are the same.

    Raises:
      ValueError: no target has this name.
    """
    key = str(name).strip().lower().replace("-", "_")
    if key not in _TARGETS:
        listing = ", ".join(sorted(target_names()))
        known = [*_TARGETS, "gguf", "hf"]
        message = unknown_name("format", str(name), known, listing)
        raise ValueError(f"{caller}: {message}")
    return _TARGETS[key]


def target_names() -> list[str]:
    """The names of all targets."""
    return list(_TARGETS)


def _no_inputs(qt: QTensor) -> None:
    """Raises if inputs are quantized: the format cannot say so."""
    if qt.meta.activation is not None:
        raise ValueError(
            "it quantizes its inputs, and the format cannot say so. Quantize the "
            "weights only, or use compressed-tensors"
        )


def _llm_int8_inputs(qt: QTensor) -> Settings | None:
    """The threshold of LLM.int8, which quantizes its inputs to int8."""
    spec = qt.meta.activation
    if spec is None or qt.spec.fmt.bits == 4:
        return _no_inputs(qt)
    if spec != as_activation_spec("int8", "export") or qt.meta.outliers is None:
        raise ValueError(
            f"it quantizes its inputs by {spec!r:.200}. bitsandbytes has int8 with "
            'outlier columns: qt.with_activation("int8", outliers=6.0)'
        )
    return {"llm_int8_threshold": qt.meta.outliers}


def _compressed_tensors_inputs(qt: QTensor) -> dict[str, Any] | None:
    """How compressed-tensors describes the quantization of inputs."""
    spec = qt.meta.activation
    if spec is None:
        return None
    is_plain = qt.input_range is None and qt.meta.outliers is None
    for preset, kind in (("int8", "int"), ("fp8", "float")):
        own = as_activation_spec(preset, "export")
        for strategy in ("token", "tensor"):
            if strategy == "tensor":
                own = own.replace(granularity=PerTensor())
            if is_plain and spec == own:
                return {
                    "num_bits": 8,
                    "type": kind,
                    "symmetric": True,
                    "strategy": strategy,
                    "dynamic": True,
                }
    raise ValueError(
        f"it quantizes its inputs by {spec!r:.200}. Of compressed-tensors, jaxq writes "
        "dynamic quantization of inputs by the presets int8 and fp8"
    )


def _same_settings(
    modules: Mapping[str, WeightSettings], library: str
) -> dict[str, Any]:
    """The settings of all modules, which must be equal.

    Raises:
      ValueError: two modules have different settings.
    """
    first_module, first = next(iter(modules.items()))
    for module, other in modules.items():
        if other.layout != first.layout or other.inputs != first.inputs:
            raise ValueError(
                f"{library} has one setting for all weights, but {first_module} has "
                f"{dict(first.layout)} and {module} has {dict(other.layout)}. Quantize "
                "both in the same way."
            )
    return dict(first.layout)


def _bitsandbytes(
    modules: Mapping[str, WeightSettings], floats: list[str]
) -> dict[str, Any]:
    config = _same_settings(modules, "bitsandbytes")
    for settings in modules.values():
        config |= settings.inputs or {}
    return config | {"llm_int8_skip_modules": floats}


def _awq(modules: Mapping[str, WeightSettings], floats: list[str]) -> dict[str, Any]:
    return _same_settings(modules, "AWQ") | {"modules_to_not_convert": floats}


def _gptq(modules: Mapping[str, WeightSettings], floats: list[str]) -> dict[str, Any]:
    """The most frequent settings. `dynamic` has those of other modules."""
    texts = Counter(_text(settings.layout) for settings in modules.values())
    base = json.loads(texts.most_common(1)[0][0])
    dynamic: dict[str, Any] = {}
    for module, settings in modules.items():
        changes = {
            key: value
            for key, value in settings.layout.items()
            if base.get(key) != value
        }
        if changes:
            dynamic[f"+:^{re.escape(module)}$"] = changes
    dynamic |= {
        f"-:^{re.escape(module)}$": {} for module in floats if module != "lm_head"
    }
    return base | {"lm_head": "lm_head" in modules, "dynamic": dynamic}


def _compressed_tensors(
    modules: Mapping[str, WeightSettings], floats: list[str]
) -> dict[str, Any]:
    """One group for each combination of settings."""
    members: dict[str, list[str]] = {}
    for module, settings in modules.items():
        key = _text({"layout": settings.layout, "inputs": settings.inputs})
        members.setdefault(key, []).append(module)
    groups = {}
    for number, (text, paths) in enumerate(members.items()):
        settings = json.loads(text)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(members) == 1 else paths,
            "format": settings["layout"]["format"],
            "weights": settings["layout"]["weights"],
            "input_activations": settings["inputs"],
            "output_activations": None,
        }
    names = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": floats,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _fp8(modules: Mapping[str, WeightSettings], floats: list[str]) -> dict[str, Any]:
    config = _same_settings(modules, "fp8")
    return config | {
        "activation_scheme": "dynamic",
        "modules_to_not_convert": floats,
    }


def _modelopt(
    modules: Mapping[str, WeightSettings], floats: list[str]
) -> dict[str, Any]:
    return _same_settings(modules, "ModelOpt") | {"ignore": floats}


def _mxfp4(modules: Mapping[str, WeightSettings], floats: list[str]) -> dict[str, Any]:
    return _same_settings(modules, "MXFP4") | {"modules_to_not_convert": floats}


def _text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True)


_TARGETS = {
    "awq": Target(("awq",), _awq, _no_inputs),
    "bitsandbytes": Target(
        ("bitsandbytes_4bit", "bitsandbytes_int8"), _bitsandbytes, _llm_int8_inputs
    ),
    "compressed_tensors": Target(
        ("compressed_tensors",), _compressed_tensors, _compressed_tensors_inputs
    ),
    "fp8": Target(("fp8_block",), _fp8, _no_inputs),
    "gptq": Target(("gptq",), _gptq, _no_inputs),
    "modelopt": Target(("modelopt_nvfp4",), _modelopt, _no_inputs),
    # As GPT-OSS ships it.
    "mxfp4": Target(("mxfp4",), _mxfp4, _no_inputs, has_stacks=True),
}


def layout_for(qt: QTensor, names: tuple[str, ...]) -> layouts.Layout:
    """The layout of a target for a weight.

    The layouts of bitsandbytes differ by the width of codes.
    """
    if len(names) == 1:
        return layouts.get(names[0])
    return layouts.get(names[0] if qt.spec.fmt.bits == 4 else names[1])
