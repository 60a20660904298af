"""How each library marks its quantized weights in a checkpoint.

`quantization_config` in `config.json` names the library by its `quant_method`. A weight
is quantized if the checkpoint has a certain tensor of it, the marker. So lists of
modules that stay in floats need not be read.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxq.formats import unknown_name
from jaxq.io import layouts
from jaxq.io.checkpoint._parameter import Inputs
from jaxq.io.checkpoint._patterns import compile_regex
from jaxq.qtensor import PerTensor, as_activation_spec

Settings = Mapping[str, Any]


class Scheme(NamedTuple):
    """How the quantized weights of a checkpoint lie in its tensors.

    Attributes:
      layout: of the weights.
      marker: the array that every quantized weight has, and no other weight.
      settings: the settings of the layout for the module with a path. None if the
        config leaves the module in floats.
      separator: between the path of the module and the name of an array.
      weight: what a parameter has after the path of its module.
      ignored: arrays beside a weight that jaxq does not read. They hold static ranges
        of inputs and caches.
      inputs: how the module with a path quantizes its inputs.
      swaps_axes: True if the float parameter would have the axes `[out, in]`.
    """

    layout: layouts.Layout
    marker: str
    settings: Callable[[str], Settings | None]
    separator: str = "."
    weight: str = ".weight"
    ignored: tuple[str, ...] = ()
    swaps_axes: bool = True
    inputs: Callable[[str], Inputs | None] = lambda module: None


def scheme_of(config: Any) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
      ValueError: the config is not an object, or its method is unknown.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"quantization_config must be an object, got {config!r:.80}.")
    method = config.get("quant_method")
    if method is None and ("load_in_4bit" in config or "load_in_8bit" in config):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _SCHEMES:
        listing = ", ".join(sorted(_SCHEMES))
        raise ValueError(unknown_name("quant_method", str(method), _SCHEMES, listing))
    return _SCHEMES[method](config)


def _bitsandbytes(config: Settings) -> Scheme:
    if config.get("load_in_8bit"):
        threshold = config.get("llm_int8_threshold", 6.0)
        if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
            raise ValueError(
                "bitsandbytes: llm_int8_threshold must be a number of at least 0, got "
                f"{threshold!r:.80}."
            )
        inputs = Inputs(as_activation_spec("int8", "bitsandbytes"), float(threshold))
        scheme = _plain("bitsandbytes_int8", "SCB", config)
        return scheme._replace(inputs=lambda module: inputs)
    return _plain("bitsandbytes_4bit", "weight.quant_map", config)


def _plain(layout: str, marker: str, config: Settings) -> Scheme:
    """The scheme of a library with equal settings for all modules."""
    return Scheme(layouts.get(layout), marker, lambda module: config)


def _awq(config: Settings) -> Scheme:
    return _plain("awq", "qweight", config)


def _gptq(config: Settings) -> Scheme:
    """GPTQ. The setting `dynamic` has other settings for some modules."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"gptq: dynamic must be an object, got {dynamic!r:.80}.")

    def settings(module: str) -> Settings | None:
        for pattern, changes in dynamic.items():
            sign, regex = pattern[:2], pattern[2:]
            if sign not in ("+:", "-:"):
                sign, regex = "+:", pattern
            if not compile_regex(regex).match(module):
                continue
            if sign == "-:":
                return None
            if not isinstance(changes, Mapping):
                raise ValueError(f"gptq: dynamic[{pattern!r:.80}] must be an object.")
            return {**config, **changes}
        return config

    return Scheme(layouts.get("gptq"), "qweight", settings)


# Static ranges of inputs, outputs and caches.
_RANGES = (
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "output_global_scale"),
    *("k_scale", "v_scale", "q_scale"),
)


def _compressed_tensors(config: Settings) -> Scheme:
    """compressed-tensors. Each group of the config has its own settings."""
    _refuse_transforms(config)
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, Mapping) else {}
    if not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError(
            "compressed-tensors: config_groups must be an object of groups, got "
            f"{config.get('config_groups')!r:.80}."
        )

    for name, group in groups.items():
        entries = group.get("input_activations")
        if entries and _dynamic_inputs(group) is None:
            warnings.warn(
                f"compressed-tensors: input_activations of {name} are "
                f"{entries!r:.200}. jaxq reads dynamic 8-bit inputs only, so these "
                "products use float inputs.",
                stacklevel=2,
            )
    if config.get("kv_cache_scheme"):
        warnings.warn(
            "compressed-tensors: kv_cache_scheme is not read. Choose a cache with "
            "`cache=` of `generate`.",
            stacklevel=2,
        )

    def settings(module: str) -> Settings | None:
        group = _group_of(module, list(groups.values()))
        fmt = group.get("format") or config.get("format")
        return {"format": fmt, "weights": group.get("weights")}

    def inputs(module: str) -> Inputs | None:
        return _dynamic_inputs(_group_of(module, list(groups.values())))

    return Scheme(
        layouts.get("compressed_tensors"),
        "weight_scale",
        settings,
        ignored=_RANGES,
        inputs=inputs,
    )


def _refuse_transforms(config: Settings) -> None:
    """Raises ValueError if the weights are not all that a model needs."""
    sparsity = config.get("sparsity_config")
    is_dense = isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
    if sparsity and not is_dense:
        raise ValueError(
            f"compressed-tensors: sparsity_config is {sparsity!r:.80}. jaxq does not "
            "read sparse weights."
        )
    if config.get("transform_config"):
        raise ValueError(
            "compressed-tensors: transform_config says that inputs are transformed "
            "(for example by a Hadamard matrix) before products. jaxq does not read "
            "such models."
        )


def _dynamic_inputs(group: Settings) -> Inputs | None:
    """The dynamic quantization of inputs to 8 bits. None for any other."""
    entries = group.get("input_activations")
    if not isinstance(entries, Mapping):
        return None
    wanted = {"num_bits": 8, "dynamic": True, "symmetric": True}
    if any(entries.get(name) != value for name, value in wanted.items()):
        return None
    preset = {"int": "int8", "float": "fp8"}.get(str(entries.get("type")))
    strategy = entries.get("strategy")
    if preset is None or strategy not in ("token", "tensor"):
        return None
    spec = as_activation_spec(preset, "compressed-tensors")
    if strategy == "tensor":
        spec = spec.replace(granularity=PerTensor())
    return Inputs(spec)


def _group_of(module: str, groups: list[Settings]) -> Settings:
    """The group of a module: by its path, by a pattern, or by the name of a class.

    The config does not say which class a module has. So a name of a class matches
    every module that no path and no pattern matches.
    """
    if len(groups) == 1:
        return groups[0]
    by_class = []
    for group in groups:
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(
            isinstance(target, str) for target in targets
        ):
            raise ValueError(
                f"compressed-tensors: targets must be a list of names, got "
                f"{targets!r:.80}."
            )
        for target in targets:
            if target.startswith("re:"):
                if compile_regex(target[3:]).match(module):
                    return group
            elif module == target or module.endswith(f".{target}"):
                return group
            elif "." not in target and target[:1].isupper():
                by_class.append(group)
    if len({json.dumps(group, default=repr) for group in by_class}) == 1:
        return by_class[0]
    raise ValueError(
        f"compressed-tensors: config_groups has {len(by_class)} groups that may be "
        f"those of {module}, expected one. Targets with paths or 're:' patterns say "
        "which one it is."
    )


def _fp8(config: Settings) -> Scheme:
    if config.get("weight_block_size") is None and "weight_block_size" in config:
        raise ValueError(
            "fp8: weight_block_size is null. jaxq reads weights with one scale for "
            "each block."
        )
    return _plain("fp8_block", "weight_scale_inv", config)._replace(ignored=_RANGES)


def _modelopt(config: Settings) -> Scheme:
    algorithm = config.get("quant_algo")
    if algorithm not in (None, "NVFP4"):
        raise ValueError(
            f"modelopt: quant_algo must be 'NVFP4', got {algorithm!r:.80}."
        )
    scheme = _plain("modelopt_nvfp4", "weight_scale_2", {"group_size": 16})
    return scheme._replace(ignored=_RANGES)


def _mxfp4(config: Settings) -> Scheme:
    """MXFP4 of GPT-OSS: `gate_up_proj_blocks` holds the parameter `gate_up_proj`.

    The float parameter of a stack of experts is `[experts, in, out]`.
    """
    scheme = _plain("mxfp4", "blocks", config)
    return scheme._replace(separator="_", weight="", swaps_axes=False)


_SCHEMES = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
