"""Presets: ready-made specs by name."""

from __future__ import annotations

import re
from typing import Any

from jaxq import formats
from jaxq.qtensor._granularity import PerChannel, PerFlat, PerGroup, PerTensor
from jaxq.qtensor._spec import QuantSpec, activation_problem


def _group_spec(
    fmt: str, size: int, scale: str | QuantSpec, **fields: Any
) -> QuantSpec:
    return QuantSpec(fmt, PerGroup(size, pad=True), scale=scale, **fields)


def _microscaling_spec(fmt: str) -> QuantSpec:
    return _group_spec(fmt, 32, "float8_e8m0fnu", scale_rule="mx_floor")


_PRESETS: dict[str, QuantSpec] = {
    "af4": _group_spec("af4", 64, "float32"),
    "binary": QuantSpec("binary", PerChannel(), scale_rule="absmean"),
    "fp4_e2m1": _group_spec("float4_e2m1fn", 128, "bfloat16"),
    "fp6_e2m3": QuantSpec("float6_e2m3fn", PerChannel()),
    "fp6_e3m2": QuantSpec("float6_e3m2fn", PerChannel()),
    "fp8": QuantSpec("float8_e4m3fn", PerChannel()),
    "fp8_e5m2": QuantSpec("float8_e5m2", PerChannel()),
    # A symmetric int2 would have only three values.
    "int2": _group_spec("int2", 64, "bfloat16", symmetric=False),
    # The number of largest magnitude in a block gets the most negative code. This step
    # is 1/8 of that number (int3: 1/4), not 1/7 (1/3).
    "int3": _group_spec("int3", 128, "bfloat16", scale_rule="signed_extreme"),
    "int3_absmax": _group_spec("int3", 128, "bfloat16"),
    "int4": _group_spec("int4", 128, "bfloat16", scale_rule="signed_extreme"),
    "int4_absmax": _group_spec("int4", 128, "bfloat16"),
    "int8": QuantSpec("int8", PerChannel()),
    "log4": QuantSpec("log4", PerChannel()),
    "mxfp4": _microscaling_spec("float4_e2m1fn"),
    "mxfp6_e2m3": _microscaling_spec("float6_e2m3fn"),
    "mxfp6_e3m2": _microscaling_spec("float6_e3m2fn"),
    "mxfp8": _microscaling_spec("float8_e4m3fn"),
    "mxfp8_e5m2": _microscaling_spec("float8_e5m2"),
    "mxint8": _microscaling_spec("int8"),
    "nf4": _group_spec("nf4", 64, "float32"),
    # QLoRA subtracts the mean of the scales and quantizes the rest by a signed map.
    # Scales are positive, so this preset uses an unsigned map without an offset. A
    # small scale can then not be dequantized to a negative number. A negative scale
    # would change the signs of its block. The error of a scale is half a gap of the
    # map. It is 0.4 to 4 percent for scales of at least a tenth of the largest of 256
    # scales. Scales that are ten times smaller have about twice this relative error.
    "nf4_dq": _group_spec("nf4", 64, QuantSpec("udynamic8", PerFlat(256))),
    "nvfp4": _group_spec("float4_e2m1fn", 16, QuantSpec("float8_e4m3fn", PerTensor())),
    "ternary": QuantSpec("ternary", PerChannel(), scale_rule="absmean"),
    "ttq": QuantSpec("ternary", PerTensor(), scale_rule="ttq"),
    "uint4": _group_spec("uint4", 128, "bfloat16", symmetric=False),
    "uint8": QuantSpec("uint8", PerChannel(), symmetric=False),
    "vsq4": _group_spec("int4", 16, QuantSpec("uint4", PerChannel())),
}


for _name, _spec in _PRESETS.items():
    formats.register_preset_name(_name, _spec.fmt.name)


def presets() -> dict[str, QuantSpec]:
    """Every preset by name, in alphabetical order.

    A preset never fails on a shape: the last group may have fewer numbers.

    Example:
      >>> import jaxq
      >>> jaxq.presets()["nf4"].granularity
      PerGroup(size=64, axis=None, pad=True)
    """
    return dict(sorted(_PRESETS.items()))


def as_activation_spec(spec: str | QuantSpec, caller: str) -> QuantSpec:
    """The spec of an activation: as `as_spec`, but a name means scales without a sign.

    The range of an activation is symmetric about 0. So the name "int4" means the preset
    "int4_absmax" here. A `QuantSpec` stays as it is.

    Args:
      spec: preset name or `QuantSpec`.
      caller: the public function, for error messages.

    Raises:
      ValueError: as `as_spec`; or the spec rounds stochastically or names an axis.
      TypeError: as `as_spec`.

    Example:
      >>> import jaxq
      >>> spec = jaxq.qtensor.as_activation_spec("int4", "with_activation")
      >>> spec == jaxq.presets()["int4_absmax"]
      True
    """
    resolved = as_spec(spec, caller)
    problem = activation_problem(resolved)
    if problem:
        raise ValueError(f"{caller}: {problem}")
    return resolved.with_absmax() if isinstance(spec, str) else resolved


def as_spec(spec: str | QuantSpec, caller: str) -> QuantSpec:
    """The spec of a preset, or the spec itself.

    Args:
      spec: preset name or `QuantSpec`. A hyphen in a name counts as an underscore.
      caller: the public function, for error messages.

    Raises:
      ValueError: `spec` is a name, but no preset has this name. The message contains
        similar names. It also says if a format has this name.
      TypeError: `spec` is neither a name nor a `QuantSpec`.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.as_spec("int8", "quantize").fmt.name
      'int8'
    """
    if isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, formats.Format):
        raise TypeError(
            f"{caller}: spec must be a preset name or a QuantSpec, got the format "
            f"{spec.name!r}. Pass jaxq.QuantSpec(format=..., granularity=...), for "
            "example with jaxq.PerGroup(64)."
        )
    if not isinstance(spec, str):
        raise TypeError(
            f"{caller}: spec must be a preset name or a QuantSpec, got "
            f"{type(spec).__name__}."
        )
    preset = _PRESETS.get(spec.strip().lower().replace("-", "_"))
    if preset is not None:
        return preset
    raise ValueError(f"{caller}: {_unknown_preset(spec)}")


def _unknown_preset(name: str) -> str:
    """The error message for a name that no preset has."""
    recipe = formats.recipe_name(name)
    if recipe is not None:
        preset = f"Use the preset of its weights, {recipe.weight!r}"
        if recipe.activation is not None:
            preset += f", or that of its inputs, {recipe.activation!r}"
        return (
            f"{name!r} is a recipe for models, not a preset. {preset}. The recipe is "
            "for jaxq.quantize_model and jaxq.quantize_params. jaxq.presets() lists "
            "the presets."
        )
    message = formats.unknown_name("preset", name, _PRESETS, "jaxq.presets()")
    if name in formats.names():
        message += f" {name!r} is a format: use jaxq.QuantSpec(format={name!r}, ...)."
    if _LIKE_A_RECIPE.fullmatch(name.strip().lower().replace("-", "_")):
        message += " jaxq.recipes.names() lists the recipes for models."
    return message


# Names in the style of recipes, which also quantize activations or use a method.
_LIKE_A_RECIPE = re.compile(
    r"w\d+a\d+(_\w+)?"
    r"|\w+_(adaround|awq|dynamic|gptq|hqq|rotated|smoothquant|static)"
)
