"""Ready-made specs by name."""

from __future__ import annotations

from jaxq import formats
from jaxq.qtensor._granularity import PerChannel, PerFlat, PerGroup, PerTensor
from jaxq.qtensor._spec import QuantSpec


def _group(fmt: str, size: int, scale: str | QuantSpec, **more) -> QuantSpec:
    return QuantSpec(fmt, PerGroup(size, pad=True), scale=scale, **more)


def _mx(fmt: str) -> QuantSpec:
    return _group(fmt, 32, "float8_e8m0fnu", scale_rule="mx_floor")


_PRESETS: dict[str, QuantSpec] = {
    "af4": _group("af4", 64, "float32"),
    "binary": QuantSpec("binary", PerChannel(), scale_rule="absmean"),
    "fp4_e2m1": _group("float4_e2m1fn", 128, "bfloat16"),
    "fp6_e2m3": QuantSpec("float6_e2m3fn", PerChannel()),
    "fp6_e3m2": QuantSpec("float6_e3m2fn", PerChannel()),
    "fp8": QuantSpec("float8_e4m3fn", PerChannel()),
    "fp8_e5m2": QuantSpec("float8_e5m2", PerChannel()),
    "int2": _group(
        "int2", 64, "bfloat16", symmetric=False
    ),  # symmetric, it would have three values
    "int3": _group("int3", 128, "bfloat16"),
    "int4": _group("int4", 128, "bfloat16"),
    "int8": QuantSpec("int8", PerChannel()),
    "log4": QuantSpec("log4", PerChannel()),
    "mxfp4": _mx("float4_e2m1fn"),
    "mxfp6_e2m3": _mx("float6_e2m3fn"),
    "mxfp6_e3m2": _mx("float6_e3m2fn"),
    "mxfp8": _mx("float8_e4m3fn"),
    "mxfp8_e5m2": _mx("float8_e5m2"),
    "mxint8": _mx("int8"),
    "nf4": _group("nf4", 64, "float32"),
    # Scales are positive, so an unsigned map without an offset serves them: unlike the signed map about the mean, no
    # block among larger ones can come back with its sign turned. Half a gap of the map is 0.4 to 4 per cent of a scale
    # within a tenth of the largest of its 256, and twice that for each power of ten below.
    "nf4_dq": _group("nf4", 64, QuantSpec("udynamic8", PerFlat(256))),
    "nvfp4": _group("float4_e2m1fn", 16, QuantSpec("float8_e4m3fn", PerTensor())),
    "ternary": QuantSpec("ternary", PerChannel(), scale_rule="absmean"),
    "ttq": QuantSpec("ternary", PerTensor(), scale_rule="ttq"),
    "uint4": _group("uint4", 128, "bfloat16", symmetric=False),
    "uint8": QuantSpec("uint8", PerChannel(), symmetric=False),
    "vsq4": _group("int4", 16, QuantSpec("uint4", PerChannel())),
}


def presets() -> dict[str, QuantSpec]:
    """Every preset by name, ascending. Presets never fail on a shape: a last partial group is padded.

    Example:
      >>> import jaxq
      >>> jaxq.presets()["nf4"].granularity
      PerGroup(size=64, axis=None, pad=True)
    """
    return dict(sorted(_PRESETS.items()))


def as_spec(spec: str | QuantSpec, caller: str) -> QuantSpec:
    """A preset's spec, or the spec itself.

    Raises:
      ValueError: no such preset; close matches are named, and so is a format of that name.
      TypeError: neither a name nor a spec.
    """
    if isinstance(spec, QuantSpec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"{caller}: spec must be a preset name or a QuantSpec, got {type(spec).__name__}."
        )
    found = _PRESETS.get(spec.strip().lower().replace("-", "_"))
    if found is None:
        message = formats.unknown_name("preset", spec, _PRESETS, "jaxq.presets()")
        if spec in formats.names():
            message += (
                f" {spec!r} is a format: use jaxq.QuantSpec(format={spec!r}, ...)."
            )
        raise ValueError(f"{caller}: {message}")
    return found
