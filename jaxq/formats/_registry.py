"""Formats by name, with the nearest names suggested for one that is not there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxq.formats._codebook import (
    CodebookFormat,
    dynamic_map,
    normal_float,
    powers_of_two,
)
from jaxq.formats._float import DoubleFormat, ExponentFormat, FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._integer import FixedPointFormat, IntegerFormat, SignMagnitudeFormat
from jaxq.formats._names import normalize, unknown_name

# Dettmers et al., "QLoRA" (2023), appendix E: the published table, digit for digit.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)" (2023): the table for blocks of 64.
_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0, 0.04273164, 0.12934483,
    0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip

# bitsandbytes' "fp4" (2022): its codes are not in the order of its numbers, and 8 is -0.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

_FLOATS = (
    DoubleFormat("float64"),
    FloatFormat("float32", 8, 23),
    FloatFormat("tfloat32", 8, 10),
    FloatFormat("bfloat16", 8, 7),
    FloatFormat("float16", 5, 10),
    FloatFormat("float8_e3m4", 3, 4),
    FloatFormat("float8_e4m3", 4, 3),
    FloatFormat("float8_e4m3b11fnuz", 4, 3, 11, "fnuz"),
    FloatFormat("float8_e4m3fn", 4, 3, flavour="fn"),
    FloatFormat("float8_e4m3fnuz", 4, 3, flavour="fnuz"),
    FloatFormat("float8_e5m2", 5, 2),
    FloatFormat("float8_e5m2fnuz", 5, 2, flavour="fnuz"),
    FloatFormat("float6_e2m3fn", 2, 3, flavour="finite"),
    FloatFormat("float6_e3m2fn", 3, 2, flavour="finite"),
    FloatFormat("float4_e1m2fn", 1, 2, flavour="finite"),
    FloatFormat("float4_e2m1fn", 2, 1, flavour="finite"),
    FloatFormat("float4_e3m0fn", 3, 0, flavour="finite"),
    ExponentFormat("float8_e8m0fnu"),
)

_registry: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Makes `fmt` known by its name, for `get` and `QuantSpec(format=...)`.

    Raises:
      ValueError: another format already has the name.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.register(jaxq.formats.FloatFormat("float7_e3m3fn", 3, 3, flavour="finite"))
      >>> jaxq.formats.get("float7_e3m3fn").max
      30.0
    """
    name = normalize(fmt.name)
    if _registry.setdefault(name, fmt) != fmt:
        raise ValueError(
            f"register: the name {fmt.name!r} is taken by {_registry[name]!r}."
        )
    return fmt


def get(name: str | Format) -> Format:
    """The format called `name`; a `Format` comes back as it is.

    Registered names aside, `float<n>_e<E>m<M>` with an optional `fn`, `fnuz` makes any ExMy format up to 32 bits:
    bare is IEEE style, `fn` has no infinities (and, under 8 bits, no NaN), `fnuz` has neither infinities nor -0.
    `q<m>.<n>` and `uq<m>.<n>` make fixed point, m not counting the sign.

    Raises:
      ValueError: no such format; close matches are named.

    Example:
      >>> import jaxq
      >>> jaxq.formats.get("float5_e2m2fn").max
      7.0
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"formats.get takes a name or a Format, got {type(name).__name__}."
        )
    found = (
        _registry.get(normalize(name))
        or _parse_float(normalize(name))
        or _parse_fixed_point(normalize(name))
    )
    if found is None:
        raise ValueError(
            unknown_name("format", name, _registry, "jaxq.formats.names()")
        )
    return found


def names() -> list[str]:
    """The names of every registered format, ascending.

    Tables made for one array have a name but no entry: those of `jaxq.methods.kmeans`, "kmeans4", live in its QTensors.
    """
    return sorted(_registry)


def to_dict(fmt: Format) -> str | dict[str, Any]:
    """A JSON-ready description: the name of a format `get` knows, else its class and fields."""
    try:
        if get(fmt.name) == fmt:
            return fmt.name
    except ValueError:
        pass
    return {"type": type(fmt).__name__, **dataclasses.asdict(fmt)}


def from_dict(data: str | dict[str, Any]) -> Format:
    """The format that `to_dict` described.

    Raises:
      ValueError: an unknown name or class.
    """
    if isinstance(data, str):
        return get(data)
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
    }
    kinds: dict[str, Callable[..., Format]] = {
        kind.__name__: kind
        for kind in (
            CodebookFormat,
            DoubleFormat,
            ExponentFormat,
            FixedPointFormat,
            FloatFormat,
            IntegerFormat,
            SignMagnitudeFormat,
        )
    }
    kind = kinds.get(fields.pop("type", ""))
    if kind is None:
        raise ValueError(
            f"formats.from_dict: unknown kind of format {data.get('type')!r}; known are {sorted(kinds)}."
        )
    return kind(**fields)


def _parse_float(name: str) -> Format | None:
    match = re.fullmatch(r"float(\d+)_e(\d+)m(\d+)(fn|fnuz|)", name)
    if not match:
        return None
    width, exponent, mantissa, suffix = (
        int(match[1]),
        int(match[2]),
        int(match[3]),
        match[4],
    )
    if width != 1 + exponent + mantissa:
        raise ValueError(
            f"unknown format {name!r}: e{exponent}m{mantissa} with its sign has {1 + exponent + mantissa} bits, "
            f"not {width}."
        )
    flavour = {"": "ieee", "fnuz": "fnuz", "fn": "fn" if width >= 8 else "finite"}[
        suffix
    ]
    return FloatFormat(name, exponent, mantissa, flavour=flavour)


def _parse_fixed_point(name: str) -> Format | None:
    match = re.fullmatch(r"(u?)q(\d+)\.(\d+)", name)
    return (
        FixedPointFormat(name, int(match[2]), int(match[3]), not match[1])
        if match
        else None
    )


def _bitsandbytes_fp4() -> CodebookFormat:
    """A number half-way between two goes to the smaller magnitude, on either side of zero."""
    table = [np.float32(v) / np.float32(12) for v in (*_FP4, *(-v for v in _FP4))]
    ordered = np.unique(np.asarray(table, np.float32))
    edges = (ordered[1:] + ordered[:-1]) / np.float32(2)
    edges = np.where(edges < 0, np.nextafter(edges, np.float32(-np.inf)), edges)
    return CodebookFormat(
        "float4_bitsandbytes", tuple(map(float, table)), tuple(edges.tolist())
    )


for _fmt in _FLOATS:
    register(_fmt)
for _bits in range(1, 9):
    register(IntegerFormat(f"int{_bits}", _bits))
    register(IntegerFormat(f"uint{_bits}", _bits, signed=False))
for _bits in range(2, 9):
    register(IntegerFormat(f"int{_bits}_narrow", _bits, narrow=True))
    register(SignMagnitudeFormat(f"int{_bits}_sign_magnitude", _bits))
    register(CodebookFormat(f"nf{_bits}", _NF4 if _bits == 4 else normal_float(_bits)))
register(_bitsandbytes_fp4())
register(CodebookFormat("af4", _AF4))
# Zero counts as positive (XNOR-Net, 2016), and so do numbers too small for float32's normal range.
register(CodebookFormat("binary", (-1.0, 1.0), (-(2.0**-126),)))
register(CodebookFormat("dynamic8", dynamic_map(signed=True)))
for _bits in range(2, 8):
    register(CodebookFormat(f"log{_bits}", *powers_of_two(_bits)))
register(IntegerFormat("ternary", 2, narrow=True))
register(CodebookFormat("udynamic8", dynamic_map(signed=False)))
