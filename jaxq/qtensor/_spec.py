"""QuantSpec: how to quantize.

A spec is a frozen description. Specs are compared by value, and they survive pickle
and JSON.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxq import formats
from jaxq.qtensor import _granularity
from jaxq.qtensor._granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from jaxq.qtensor._scale_rules import DEFAULT_RULE, SCALE_RULES, ScaleRule

if TYPE_CHECKING:
    from jaxq.observers import Observer

SCALE_DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
)
CODES_FROM = ("stored", "ideal")
OFFSETS = ("mean", "min")
UNBIASED = "unbiased"


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How to quantize: the format of the codes, and how scales are computed and stored.

    A quantized number is `scale * (codes - zero_point) + offset`.

    Args:
      format: the format of the codes: a name (`jaxq.formats.names()`) or a `Format`.
      granularity: where scales vary.
      symmetric: True has no zero point. False computes a zero point and needs an
        integer format. With False the range is extended to contain 0, so that 0 is
        exact (Jacob et al., 2018).
      scale: how scales are stored. Either one of the dtypes float32, bfloat16, float16,
        float8_e4m3fn, float8_e5m2, float8_e8m0fnu; or another `QuantSpec`. The scale of
        that spec may be a `QuantSpec` too (two-level scales and deeper).
      scale_rule: how the scale of a block is computed. `max` is the format's largest
        number and A is the block's largest magnitude.
        "absmax": A / max.
        "absmean": mean |x| (XNOR-Net, 2016; BitNet b1.58, 2024).
        "signed_extreme": the number with magnitude A, including its sign, divided by
        the format's most negative number (GGUF). The scale can be negative. Integer
        codes then use their most negative code too.
        The OCP microscaling rules (2023) give powers of two. "mx_floor":
        2^(floor(log2 A) - floor(log2 max)). "mx_ceil": the same with the ceiling of
        log2 A. "mx_even": "mx_floor" after A is rounded to the element's mantissa.
        "mx_round_up": the least power of two that does not clip.
        "twn", for the format ternary: numbers become 0 if |x| is at most 0.7 mean |x|.
        The scale is the mean |x| of the other numbers (Ternary Weight Networks, Li et
        al., 2016).
        "ttq", for the format ternary: numbers become 0 if |x| is at most 0.05 A. The
        scale is A. The QTensor's `codebook` holds separate values for the negative and
        the positive code. They start as the means of the numbers of each code, and can
        be trained (Trained Ternary Quantization, Zhu et al., 2017).
      clipping: "absmax" takes the extremes of the block as its range. An observer
        computes another range for each block: `jaxq.observers.mse()`,
        `percentile(99.9)` or `entropy()`, without `axis=`.
      rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic".
        Stochastic rounding, of codes or of a scale that is a `QuantSpec`, needs
        `quantize(key=)`.
      offset: None; "min", the minimum of each block, for unsigned formats (KIVI, 2024);
        or "mean", one mean for the whole array (double quantization in QLoRA, 2023).
        Unlike a zero point, an offset is a real number.
      packing: order of codes in bytes, see `jaxq.formats.Packing`. None uses the
        default of the width.
      codes_from: the scale by which numbers are divided to compute codes. "stored" is
        the scale after it is rounded or quantized. `dequantize` uses the same scale.
        "ideal" is the scale before it is rounded or quantized, as in bitsandbytes.
      headroom: the factor by which the range of a block is larger than its extremes, at
        least 1. A scale that is rounded down clips the largest numbers of its block.
        Stochastic rounding is then biased. "unbiased" is the least factor with which
        nothing is clipped (`headroom_factor`), for example 17/16 for the preset
        "nvfp4".

    Raises:
      TypeError: `format` is not a name or a `Format`, `granularity` is not a
        `Granularity`, `symmetric` is not a bool, or `clipping` is not a name or an
        observer.
      ValueError: a name is unknown, or two fields contradict each other.

    Example:
      >>> import jaxq
      >>> group = jaxq.PerGroup(size=128)
      >>> spec = jaxq.QuantSpec(format="int4", granularity=group, scale="bfloat16")
      >>> spec == jaxq.QuantSpec.from_dict(spec.to_dict())
      True
    """

    format: formats.Format | str
    granularity: Granularity = PerChannel()  # noqa: RUF009 (frozen)
    symmetric: bool = True
    scale: str | QuantSpec = "float32"
    scale_rule: str = "absmax"
    clipping: str | Observer = "absmax"
    rounding: str = "nearest_even"
    offset: str | None = None
    packing: formats.Packing | str | None = None
    codes_from: str = "stored"
    headroom: float | str = 1.0

    def __post_init__(self):
        try:
            fmt = formats.get(self.format)
        except ValueError as error:
            raise ValueError(f"QuantSpec: {error}") from None
        object.__setattr__(self, "format", fmt)
        _check_types_and_names(self)
        object.__setattr__(self, "packing", _packing_of(self))
        _check_format(self)
        _check_scale(self)
        _check_clipping(self)
        _check_headroom(self)
        objection = _objection_of_rule(self.rule, self)
        if objection:
            raise ValueError(f"QuantSpec: {objection}")

    @property
    def fmt(self) -> formats.Format:
        """`format` as a `Format`, never a name."""
        assert isinstance(self.format, formats.Format)
        return self.format

    @property
    def order(self) -> formats.Packing:
        """`packing` as a `Packing`, never a name or None."""
        assert isinstance(self.packing, formats.Packing)
        return self.packing

    @property
    def rule(self) -> ScaleRule:
        """The record of `scale_rule`."""
        return SCALE_RULES[self.scale_rule]

    @property
    def headroom_factor(self) -> float:
        """`headroom` as a number.

        "unbiased" is the product of two numbers. The first is the largest `|x| / scale`
        of the scale rule, divided by the largest number of the format. The second is
        the ratio of a scale to the stored scale if it is rounded down as far as
        possible. Scales that a float format stores as a subnormal number can be rounded
        down farther.
        """
        if self.headroom == UNBIASED:
            return _unbiased_headroom(self)
        return float(self.headroom)

    @property
    def levels(self) -> tuple[QuantSpec, ...]:
        """This spec, the spec of its scale, the spec of that scale, and so on."""
        if isinstance(self.scale, QuantSpec):
            return (self, *self.scale.levels)
        return (self,)

    @property
    def needs_key(self) -> bool:
        """True if codes or a quantized scale are rounded stochastically."""
        return any(level.rounding == "stochastic" for level in self.levels)

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed.

        A new `format` resets `packing` to the default for the bits of this format,
        unless `packing` is changed too. If the scale rule does not fit the changed
        fields, the copy has `scale_rule="absmax"`, unless `scale_rule` is changed too.
        For example, "signed_extreme" does not fit `symmetric=False`.
        """
        if "format" in changes and "packing" not in changes:
            changes["packing"] = None
        if "scale_rule" in changes:
            return dataclasses.replace(self, **changes)
        edited = dataclasses.replace(self, **changes, scale_rule=DEFAULT_RULE)
        if _objection_of_rule(self.rule, edited):
            return edited
        return dataclasses.replace(edited, scale_rule=self.scale_rule)

    def with_absmax(self) -> QuantSpec:
        """The same spec without signed scales.

        A given range (static range, clipping) and the range of an activation are
        symmetric about 0. They do not say which sign the extreme number has.

        Example:
          >>> import jaxq
          >>> jaxq.presets()["int4"].with_absmax() == jaxq.presets()["int4_absmax"]
          True
        """
        return self.replace(scale_rule=DEFAULT_RULE) if self.rule.signed else self

    def to_dict(self) -> dict[str, Any]:
        """A description that JSON can store. `from_dict` returns an equal spec."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["format"] = formats.to_dict(self.fmt)
        out["granularity"] = {
            "type": type(self.granularity).__name__,
            **dataclasses.asdict(self.granularity),
        }
        out["packing"] = self.order.value
        if isinstance(self.scale, QuantSpec):
            out["scale"] = self.scale.to_dict()
        if not isinstance(self.clipping, str):
            out["clipping"] = self.clipping.to_dict()
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantSpec:
        """The spec that `to_dict` described.

        Raises:
          ValueError: a field is unknown, missing or invalid. The error names it.
        """
        if not isinstance(data, dict):
            raise ValueError(
                "QuantSpec.from_dict: expected a dict with the fields of a "
                f"jaxq.QuantSpec, got {data!r:.80}."
            )
        field_names = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in field_names:
                problem = formats.unknown_name(
                    "field", name, field_names, "jaxq.QuantSpec"
                )
                raise ValueError(f"QuantSpec.from_dict: {problem}")
        for name in ("format", "granularity", "scale"):
            if name not in data:
                raise ValueError(f"QuantSpec.from_dict: the field {name} is missing.")
        data = dict(data)
        data["format"] = formats.from_dict(data["format"])
        data["granularity"] = _granularity_from_dict(data["granularity"])
        if isinstance(data["scale"], dict):
            data["scale"] = cls.from_dict(data["scale"])
        if isinstance(data.get("clipping"), dict):
            from jaxq import observers  # lazy: most specs have no observer

            data["clipping"] = observers.from_dict(data["clipping"])
        try:
            return cls(**data)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"QuantSpec.from_dict: {error}") from error


def as_static(spec: QuantSpec, caller: str) -> QuantSpec:
    """The spec of an operand with a static range: the same spec with `PerTensor()`.

    A static range does not say which sign the extreme number has, so scales have no
    sign.

    Args:
      spec: the spec of the operand.
      caller: the public function, for error messages.

    Raises:
      ValueError: the granularity has scales of blocks inside a row, or the scale
        depends on more than the range.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.as_static(jaxq.presets()["int8"], "quantize").granularity
      PerTensor()
    """
    if not isinstance(spec.granularity, PerTensor | PerToken | PerChannel):
        raise ValueError(
            f"{caller}: {spec.granularity} computes a scale for each block of each "
            "input, so the range cannot be static. Leave out the bounds or the "
            "observer, or use a spec with one scale (PerTensor)."
        )
    if (
        isinstance(spec.scale, QuantSpec)
        or spec.rule.reads_block
        or spec.offset == "mean"
    ):
        raise ValueError(
            f"{caller}: the scale of {spec.fmt.name} with "
            f"scale_rule={spec.scale_rule!r}, scale={spec.scale!r} and "
            f"offset={spec.offset!r} depends on more than the range, so the range "
            "cannot be static. Use scale_rule='absmax', a dtype for scale= and "
            "offset=None."
        )
    return spec.with_absmax().replace(granularity=PerTensor())


def activation_problem(spec: QuantSpec, contracted_size: int | None = None) -> str:
    """Why no product can quantize its input by a spec. Empty if products can.

    Args:
      spec: the spec of the input.
      contracted_size: the number of contracted elements of the input. None if it is
        not known.

    Example:
      >>> import jaxq
      >>> jaxq.qtensor.activation_problem(jaxq.presets()["int8"])
      ''
    """
    if spec.needs_key:
        return (
            "rounding='stochastic' needs a key at every call. Quantize x with "
            "jaxq.quantize(x, spec, key=key) before the product."
        )
    for level in spec.levels:
        if getattr(level.granularity, "axis", None) is not None:
            return (
                f"{level.granularity} names an axis. The product decides which axes of "
                "an input are contracted. Leave axis= out."
            )
    groups = spec.granularity
    if contracted_size is None or not isinstance(groups, PerGroup) or groups.pad:
        return ""
    if contracted_size % groups.size:
        return (
            f"{groups} does not divide the {contracted_size} contracted elements of an "
            f"input. Pass PerGroup({groups.size}, pad=True)."
        )
    return ""


# Checks of QuantSpec. Each function checks one group of fields.


def _check_types_and_names(spec: QuantSpec) -> None:
    """Raises unless the type and the name in each field are valid."""
    if not isinstance(spec.symmetric, bool):
        raise TypeError(
            f"QuantSpec: symmetric must be True or False, got {spec.symmetric!r}."
        )
    if not isinstance(spec.granularity, Granularity):
        raise TypeError(
            "QuantSpec: granularity must be one of jaxq's Per... objects, got "
            f"{spec.granularity!r}."
        )
    if not isinstance(spec.packing, formats.Packing | str | None):
        names = ", ".join(packing.value for packing in formats.Packing)
        raise TypeError(
            f"QuantSpec: packing must be None or one of {names}, got {spec.packing!r}."
        )
    choice = formats.check_choice
    choice("QuantSpec: scale_rule", spec.scale_rule, tuple(SCALE_RULES))
    if isinstance(spec.clipping, str):
        choice("QuantSpec: clipping", spec.clipping, ("absmax",))
    choice("QuantSpec: codes_from", spec.codes_from, CODES_FROM)
    if spec.offset is not None:
        choice("QuantSpec: offset", spec.offset, OFFSETS)
    if not isinstance(spec.scale, QuantSpec):
        choice("QuantSpec: scale", spec.scale, SCALE_DTYPES)
    choice("QuantSpec: rounding", spec.rounding, formats.ROUNDING_MODES)


def _packing_of(spec: QuantSpec) -> formats.Packing:
    """`spec.packing` as a `Packing`. None becomes the default for the code's width."""
    packing = spec.packing
    if packing is None:
        packing = formats.default_packing(spec.fmt.bits)
    if isinstance(packing, str):
        names = tuple(p.value for p in formats.Packing)
        formats.check_choice("QuantSpec: packing", packing, names)
        packing = formats.Packing(packing)
    formats.codes_per_pack(spec.fmt.bits, packing)  # raises if the two do not fit
    return packing


def _check_format(spec: QuantSpec) -> None:
    """Raises unless the format fits `symmetric` and `offset`."""
    fmt = spec.fmt
    if fmt.bits > 8:
        raise ValueError(
            f"QuantSpec: codes have at most 8 bits; {fmt.name} has {fmt.bits}. Use a "
            "format of at most 8 bits."
        )
    is_integer = fmt.kind == "integer"
    if not spec.symmetric and (not is_integer or spec.offset is not None):
        raise ValueError(
            "QuantSpec: symmetric=False computes a zero point and needs an integer "
            f"format and offset=None, got format={fmt.name} and "
            f"offset={spec.offset!r}. Use symmetric=True, or change these fields."
        )
    if spec.offset == "min" and not (is_integer and fmt.min == 0):
        raise ValueError(
            "QuantSpec: offset='min' needs an unsigned integer format, got "
            f"format={fmt.name}. Use a format such as 'uint4', or offset=None."
        )
    if fmt.max <= 0:
        raise ValueError(
            f"QuantSpec: {fmt.name} has no positive numbers, so a scale cannot be "
            "computed. Use a format with positive numbers."
        )


def _check_scale(spec: QuantSpec) -> None:
    """Raises unless the spec of a quantized scale is supported."""
    scale = spec.scale
    if not isinstance(scale, QuantSpec):
        return
    if scale.clipping != "absmax":
        raise ValueError(
            "QuantSpec: a quantized scale must not be clipped, got "
            f"clipping={scale.clipping!r} in scale=. Use clipping='absmax'."
        )
    if not scale.symmetric or scale.offset == "min":
        raise ValueError(
            "QuantSpec: a quantized scale must have symmetric=True and must not have "
            f"offset='min', got symmetric={scale.symmetric} and "
            f"offset={scale.offset!r} in scale=. Use symmetric=True and offset=None."
        )
    if scale.rule.has_threshold:
        raise ValueError(
            "QuantSpec: a quantized scale cannot have the ternary rule "
            f"scale_rule={scale.scale_rule!r}. Use another scale rule in scale=."
        )


def _objection_of_rule(rule: ScaleRule, spec: QuantSpec) -> str:
    """Why a scale rule does not fit the other fields of `spec`; empty if it does."""
    fmt = spec.fmt
    if not rule.is_default and (not spec.symmetric or spec.offset == "min"):
        return (
            f"scale_rule={rule.name!r} is for symmetric specs without "
            f"offset='min', got symmetric={spec.symmetric} and offset={spec.offset!r}. "
            "Use scale_rule='absmax'."
        )
    if rule.has_threshold and spec.rounding != "nearest_even":
        return (
            f"scale_rule={rule.name!r} computes codes by a threshold and "
            f"does not round. Use rounding='nearest_even', not {spec.rounding!r}."
        )
    if rule.has_threshold and (fmt.kind, fmt.max, fmt.min) != ("integer", 1, -1):
        return f"scale_rule={rule.name!r} is for the format ternary, not {fmt.name}."
    if spec.headroom != 1.0 and rule.reach is None:
        return (
            f"headroom={spec.headroom!r} needs a scale rule that reads the extremes of "
            f"a block only, not scale_rule={rule.name!r}. Use scale_rule='absmax', or "
            "headroom=1.0."
        )
    if not isinstance(spec.clipping, str) and (rule.reads_block or rule.signed):
        return (
            f"clipping={spec.clipping!r} gives a range, but scale_rule={rule.name!r} "
            "does not use a range. Use clipping='absmax' or scale_rule='absmax'."
        )
    if rule.signed:
        return _objection_to_signed_scale(rule, spec)
    return ""


def _objection_to_signed_scale(rule: ScaleRule, spec: QuantSpec) -> str:
    """Why scales of `spec` cannot have a sign; empty if they can."""
    for part in _formats_of_signed_numbers(spec):
        if part.min >= 0:
            return (
                f"scale_rule={rule.name!r} needs negative numbers; {part.name} has "
                "none. Use a signed format for codes and scales."
            )
    if isinstance(spec.scale, QuantSpec) and spec.scale.offset == "mean":
        return (
            f"scale_rule={rule.name!r} has negative scales, and offset='mean' in "
            "scale= is for positive scales. Use scale_rule='absmax', or a scale "
            "without offset."
        )
    return ""


def _formats_of_signed_numbers(spec: QuantSpec) -> list[formats.Format]:
    """The formats that hold signed numbers when the scale has a sign."""
    if isinstance(spec.scale, QuantSpec):
        return [spec.fmt, spec.scale.fmt]
    if spec.scale == "float32":  # not a format of codes, and it holds negative numbers
        return [spec.fmt]
    return [spec.fmt, formats.get(spec.scale)]


def _check_clipping(spec: QuantSpec) -> None:
    """Raises unless `clipping` is a name, or an observer that fits the other fields."""
    if isinstance(spec.clipping, str):
        return
    from jaxq import observers  # lazy: most specs have no observer

    if not isinstance(spec.clipping, observers.Observer):
        raise TypeError(
            "QuantSpec: clipping must be 'absmax' or one of jaxq.observers, got "
            f"{spec.clipping!r}."
        )
    if spec.clipping.axis is not None:
        raise ValueError(
            f"QuantSpec: clipping={spec.clipping!r} has axis=, but QuantSpec observes "
            "each block separately. Leave out axis=."
        )
    if spec.offset == "mean":
        raise ValueError(
            f"QuantSpec: clipping={spec.clipping!r} gives a range, but "
            f"offset={spec.offset!r} does not use a range. Use clipping='absmax', or "
            "another offset."
        )


def _check_headroom(spec: QuantSpec) -> None:
    """Raises unless `headroom` is valid and fits the other fields."""
    if spec.headroom != UNBIASED:
        is_number = isinstance(spec.headroom, int | float)
        is_number &= not isinstance(spec.headroom, bool)
        if not is_number or not 1 <= float(spec.headroom) < math.inf:
            raise ValueError(
                f"QuantSpec: headroom must be a number of at least 1, or {UNBIASED!r}, "
                f"got {spec.headroom!r}."
            )
    elif spec.codes_from != "stored" or not isinstance(spec.clipping, str):
        raise ValueError(
            f"QuantSpec: headroom={UNBIASED!r} needs codes_from='stored' and "
            f"clipping='absmax', got codes_from={spec.codes_from!r} and "
            f"clipping={spec.clipping!r}. Change these fields, or use headroom=1.0."
        )
    if spec.headroom != 1.0 and (not spec.symmetric or spec.offset == "min"):
        raise ValueError(
            f"QuantSpec: headroom={spec.headroom!r} needs symmetric=True without "
            f"offset='min', got symmetric={spec.symmetric} and offset={spec.offset!r}. "
            "Change these fields, or use headroom=1.0."
        )


def _unbiased_headroom(spec: QuantSpec) -> float:
    """The least headroom with which no number of a block is clipped."""
    fmt = spec.fmt
    limit = fmt.max
    if fmt.min < 0 and fmt.kind != "integer":  # integers use the narrow range
        limit = min(fmt.max, -fmt.min)
    overshoot = max(1.0, spec.rule.reach_of(fmt) / limit)
    return overshoot * _most_lost_by_storing(spec)


def _most_lost_by_storing(spec: QuantSpec) -> float:
    """The largest ratio of a scale to the scale that is stored for it."""
    scale = spec.scale
    if isinstance(scale, QuantSpec):
        # The largest scales are clipped if the scale of the scales is rounded down.
        clipped = _unbiased_headroom(scale) / scale.headroom_factor
        return max(_most_rounded_down(scale.fmt, scale.rounding), clipped)
    if scale == "float32" or spec.rule.powers_of_two:
        return 1.0
    return _most_rounded_down(formats.get(scale), "nearest_even")


def _most_rounded_down(fmt: formats.Format, rounding: str) -> float:
    """The largest ratio of a positive number to the number that it is rounded down to.

    Subnormal numbers do not count.
    """
    to_nearest = rounding.startswith("nearest")
    if isinstance(fmt, formats.FloatFormat | formats.ExponentFormat):
        step = 2.0**-fmt.mantissa_bits
        return 1 + step / 2 if to_nearest else 1 + step
    values = np.unique(fmt.values())
    values = values[values > 0]
    ratio = float((values[1:] / values[:-1]).max(initial=1.0))
    return (1 + ratio) / 2 if to_nearest else ratio


def _granularity_from_dict(data: dict[str, Any]) -> Granularity:
    fields = dict(data) if isinstance(data, dict) else {}
    name = fields.pop("type", None)
    is_name = isinstance(name, str) and name.startswith("Per")
    kind = getattr(_granularity, name, None) if is_name else None
    if kind is None:
        raise ValueError(
            f"QuantSpec.from_dict: unknown granularity {data!r:.80}. Use the name of a "
            "jaxq class such as 'PerGroup'."
        )
    for field, value in fields.items():
        if isinstance(value, list):  # JSON has no tuples
            fields[field] = tuple(value)
    axis, pad = fields.get("axis"), fields.get("pad", False)
    if not isinstance(pad, bool) or not (axis is None or type(axis) is int):
        raise ValueError(
            f"QuantSpec.from_dict: {name} needs pad=True or False, and an integer or "
            f"None as axis=, got pad={pad!r} and axis={axis!r}."
        )
    try:
        return kind(**fields)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"QuantSpec.from_dict: {error}.") from error
