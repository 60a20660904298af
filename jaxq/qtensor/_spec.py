"""How to quantize: a frozen description, compared by value, that survives pickle and JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxq import formats
from jaxq.qtensor import _granularity
from jaxq.qtensor._granularity import Granularity, PerChannel, PerTensor, PerToken

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
SCALE_RULES = (
    "absmax",
    "absmean",
    "mx_ceil",
    "mx_even",
    "mx_floor",
    "mx_round_up",
    "signed_extreme",
    "ttq",
    "twn",
)
# Those that depend on more than the extremes of a block.
NEED_BLOCKS = ("absmean", "ttq", "twn")
CODES_FROM = ("stored", "ideal")
OFFSETS = ("mean", "min")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """`x = scale * (codes - zero_point) + offset`: the format of the codes and how each scale is found and kept.

    Args:
      format: what a code stands for: a name (`jaxq.formats.names()`) or a `Format`.
      granularity: where scales vary.
      symmetric: True has no zero point. False finds one for integer formats: the range is extended to contain 0,
        so that 0 is exact (Jacob et al., 2018).
      scale: how scales are kept: one of the dtypes float32, bfloat16, float16, float8_e4m3fn, float8_e5m2,
        float8_e8m0fnu, or another `QuantSpec`, whose own scale may be one again (two-level scales and deeper).
      scale_rule: scale of a block, with `max` the format's largest number and A the block's largest magnitude:
        "absmax": A / max. "absmean": mean |x| (XNOR-Net, 2016; BitNet b1.58, 2024). "signed_extreme": the number of
        magnitude A, signed, over the format's most negative number (GGUF). OCP microscaling (2023), powers of two:
        "mx_floor": 2^(floor(log2 A) - floor(log2 max)); "mx_ceil": with the ceiling of log2 A; "mx_even": floor
        after rounding A to the element's mantissa; "mx_round_up": the least power that does not clip. "twn", for
        the format ternary: what is not above 0.7 mean |x| becomes 0, and the scale is the mean |x| of the rest (Ternary
        Weight Networks, Li et al., 2016). "ttq", for ternary: what is not above 0.05 A becomes 0, the scale is A, and
        negative and positive codes stand for magnitudes of their own, the QTensor's `codebook`, which starts at the
        means and can be trained (Trained Ternary Quantization, Zhu et al., 2017).
      clipping: "absmax": the block's extremes; nothing is clipped on purpose. Or one of `jaxq.observers`, without
        `axis=`, which finds the range of each block from its numbers: `mse()`, `percentile(99.9)`, `entropy()`.
      rounding: "nearest_even", "nearest_away", "toward_zero" or "stochastic" (quantize then needs `key`).
      offset: None, "min" (each block's real minimum, unsigned formats; KIVI, 2024) or "mean" (one mean for the
        whole array; double quantization in QLoRA, 2023). Real-valued, unlike a zero point.
      packing: order of codes in bytes, see `jaxq.formats.Packing`; None takes the default of the width.
      codes_from: which scale the codes are made for: "stored", as it reads back, which adds no error; or "ideal",
        before it is rounded or quantized, as bitsandbytes does.

    Raises:
      ValueError: an unknown name, or parts that contradict each other.

    Example:
      >>> import jaxq
      >>> spec = jaxq.QuantSpec(format="int4", granularity=jaxq.PerGroup(size=128), scale="bfloat16")
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

    def __post_init__(self):
        try:
            fmt = formats.get(self.format)
        except ValueError as error:
            raise ValueError(f"QuantSpec: {error}") from None
        if not isinstance(self.symmetric, bool):
            raise TypeError(
                f"QuantSpec: symmetric must be True or False, got {self.symmetric!r}."
            )
        object.__setattr__(self, "format", fmt)
        if not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"QuantSpec: granularity must be one of jaxq's Per... objects, got {self.granularity!r}."
            )
        formats.check_choice("QuantSpec: scale_rule", self.scale_rule, SCALE_RULES)
        if isinstance(self.clipping, str):
            formats.check_choice("QuantSpec: clipping", self.clipping, ("absmax",))
        else:
            _check_clipping(self)
        formats.check_choice("QuantSpec: codes_from", self.codes_from, CODES_FROM)
        if self.offset is not None:
            formats.check_choice("QuantSpec: offset", self.offset, OFFSETS)
        if not isinstance(self.scale, QuantSpec):
            formats.check_choice("QuantSpec: scale", self.scale, SCALE_DTYPES)
        elif self.scale.clipping != "absmax":
            raise ValueError(
                "QuantSpec: a scale that is quantized itself is not clipped; leave its clipping='absmax'."
            )
        elif not self.scale.symmetric or self.scale.offset == "min":
            raise ValueError(
                "QuantSpec: a scale that is quantized itself must be symmetric, and not offset by its minimum."
            )
        formats.check_choice(
            "QuantSpec: rounding", self.rounding, formats.ROUNDING_MODES
        )
        packing = (
            formats.default_packing(fmt.bits) if self.packing is None else self.packing
        )
        if isinstance(packing, str):
            formats.check_choice(
                "QuantSpec: packing", packing, tuple(p.value for p in formats.Packing)
            )
            packing = formats.Packing(packing)
        formats.codes_per_pack(fmt.bits, packing)
        object.__setattr__(self, "packing", packing)
        if fmt.bits > 8:
            raise ValueError(
                f"QuantSpec: codes have at most 8 bits; {fmt.name} has {fmt.bits}."
            )
        if not self.symmetric and (fmt.kind != "integer" or self.offset is not None):
            raise ValueError(
                f"QuantSpec: symmetric=False finds a zero point, which only integer formats without an offset have "
                f"(format={fmt.name}, offset={self.offset!r})."
            )
        if self.offset == "min" and not (fmt.kind == "integer" and fmt.min == 0):
            raise ValueError(
                f"QuantSpec: offset='min' counts up from the minimum: use an unsigned integer, not {fmt.name}."
            )
        if self.scale_rule != "absmax" and (not self.symmetric or self.offset == "min"):
            raise ValueError(
                f"QuantSpec: scale_rule={self.scale_rule!r} is for symmetric specs without a minimum."
            )
        if fmt.max <= 0:
            raise ValueError(
                f"QuantSpec: {fmt.name} has no positive numbers to scale to."
            )
        if self.scale_rule in ("ttq", "twn") and self.rounding != "nearest_even":
            raise ValueError(
                f"QuantSpec: scale_rule={self.scale_rule!r} has a threshold, and rounds no other way."
            )
        if isinstance(self.scale, QuantSpec) and self.scale.scale_rule in (
            "ttq",
            "twn",
        ):
            raise ValueError(
                f"QuantSpec: a scale cannot be ternary by scale_rule={self.scale.scale_rule!r}."
            )
        if self.scale_rule in ("ttq", "twn") and (fmt.kind, fmt.max, fmt.min) != (
            "integer",
            1,
            -1,
        ):
            raise ValueError(
                f"QuantSpec: scale_rule={self.scale_rule!r} is for the format ternary, not {fmt.name}."
            )
        if self.scale_rule == "signed_extreme":
            parts = [fmt]
            if self.scale != "float32":  # which is no format of codes
                parts.append(
                    self.scale.fmt
                    if isinstance(self.scale, QuantSpec)
                    else formats.get(self.scale)
                )
            for part in parts:
                if part.min >= 0:
                    raise ValueError(
                        f"QuantSpec: scale_rule='signed_extreme' needs negative numbers; {part.name} has none."
                    )

    @property
    def fmt(self) -> formats.Format:
        """`format`, as the `Format` it always is after construction."""
        assert isinstance(self.format, formats.Format)
        return self.format

    @property
    def order(self) -> formats.Packing:
        """`packing`, as the `Packing` it always is after construction."""
        assert isinstance(self.packing, formats.Packing)
        return self.packing

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed."""
        if "format" in changes and "packing" not in changes:
            changes["packing"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` gives an equal spec back."""
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
          ValueError: an unknown field or granularity.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(
                    "QuantSpec.from_dict: "
                    + formats.unknown_name("field", name, known, "jaxq.QuantSpec")
                )
        data = dict(data)
        data["format"] = formats.from_dict(data["format"])
        data["granularity"] = _granularity_from_dict(data["granularity"])
        if isinstance(data["scale"], dict):
            data["scale"] = cls.from_dict(data["scale"])
        if isinstance(data.get("clipping"), dict):
            from jaxq import observers

            data["clipping"] = observers.from_dict(data["clipping"])
        return cls(**data)


def _check_clipping(spec: QuantSpec) -> None:
    from jaxq import observers  # most specs name none

    if not isinstance(spec.clipping, observers.Observer):
        raise TypeError(
            f"QuantSpec: clipping must be 'absmax' or one of jaxq.observers, got {spec.clipping!r}."
        )
    if spec.clipping.axis is not None:
        raise ValueError(
            f"QuantSpec: clipping={spec.clipping!r} looks at each block by itself, so it keeps no axis."
        )
    if (
        spec.scale_rule in NEED_BLOCKS
        or spec.scale_rule == "signed_extreme"
        or spec.offset == "mean"
    ):
        raise ValueError(
            f"QuantSpec: clipping={spec.clipping!r} gives a range, which scale_rule={spec.scale_rule!r} and "
            f"offset={spec.offset!r} do not go by."
        )


def as_static(spec: QuantSpec, caller: str) -> QuantSpec:
    """The spec of an operand whose range is known beforehand: per tensor.

    Raises:
      ValueError: its scales are of blocks of the operand itself, which nobody knows beforehand.
    """
    if not isinstance(spec.granularity, PerTensor | PerToken | PerChannel):
        raise ValueError(
            f"{caller}: {spec.granularity} finds scales of blocks in each input, so its range cannot be static. "
            "Leave the bounds or the observer out, or use a spec with one scale (PerTensor)."
        )
    if (
        isinstance(spec.scale, QuantSpec)
        or spec.scale_rule in NEED_BLOCKS
        or spec.offset == "mean"
    ):
        raise ValueError(
            f"{caller}: a scale by {spec.scale_rule!r} of {spec.fmt.name} (scale={spec.scale!r}, "
            f"offset={spec.offset!r}) depends on more than the range, so it cannot be static."
        )
    return spec.replace(granularity=PerTensor())


def _granularity_from_dict(data: dict[str, Any]) -> Granularity:
    fields = dict(data)
    name = fields.pop("type")
    kind = getattr(_granularity, name, None) if name.startswith("Per") else None
    if kind is None:
        raise ValueError(f"QuantSpec.from_dict: unknown granularity {name!r}.")
    return kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )
