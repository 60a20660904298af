"""The registry of formats by name, the registered formats, and their JSON form."""

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
from jaxq.formats._names import meaning_of_no_format, normalize, unknown_name

# Dettmers et al., "QLoRA" (2023), appendix E: the published table, digit for digit.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)" (2023): the
# table for blocks of 64 numbers.
_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951,
    -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666,
    0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip

# bitsandbytes' "fp4" (2022): numbers of the codes 0 to 7, times 12. Codes 8 to 15 are
# the same numbers with a minus sign, so code 8 is -0.
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
    """Registers a format by its name, for `get` and `QuantSpec(format=...)`.

    A file saved by `jaxq.save` holds the name of a registered format, not its numbers.
    Register the format again before you load the file in another process.

    Args:
      fmt: the format. A hyphen in its name is read as an underscore.

    Returns:
      `fmt`.

    Raises:
      TypeError: `fmt` is not a `Format`, or its name is not a non-empty string.
      ValueError: a different format is registered under the name.

    Example:
      >>> import jaxq
      >>> fmt = jaxq.formats.FloatFormat("float7_e3m3fn", 3, 3, flavour="finite")
      >>> fmt = jaxq.formats.register(fmt)
      >>> jaxq.formats.get("float7_e3m3fn").max
      30.0
      >>> jaxq.formats.unregister("float7_e3m3fn")
    """
    if not isinstance(fmt, Format):
        raise TypeError(
            "formats.register: fmt must be a jaxq.formats.Format, such as "
            f"jaxq.formats.IntegerFormat('int3', 3), got {fmt!r}."
        )
    if not (isinstance(fmt.name, str) and fmt.name):
        raise TypeError(
            "formats.register: the name of the format must be a non-empty string, got "
            f"{fmt.name!r}."
        )
    name = normalize(fmt.name)
    if _registry.setdefault(name, fmt) != fmt:
        raise ValueError(
            f"register: the name {fmt.name!r} is taken by {_registry[name]!r}. Give "
            "the new format another name."
        )
    return fmt


def unregister(name: str) -> None:
    """Removes a format that `register` added.

    QTensors of this format keep working, because they hold the format itself. A file
    cannot be loaded until the format is registered again.

    Args:
      name: the name of the format. Upper case letters and hyphens are accepted.

    Raises:
      TypeError: `name` is not a string.
      ValueError: no format is registered under this name, or it is one of jaxq's own
        formats.

    Example:
      >>> import jaxq
      >>> signs = jaxq.formats.CodebookFormat("signs", (-1.0, 1.0))
      >>> signs = jaxq.formats.register(signs)
      >>> jaxq.formats.unregister("signs")
      >>> "signs" in jaxq.formats.names()
      False
    """
    if not isinstance(name, str):
        raise TypeError(
            f"formats.unregister: name must be a string, got {type(name).__name__}."
        )
    key = normalize(name)
    if key in _OWN_NAMES:
        raise ValueError(
            f"formats.unregister: {name!r} is one of jaxq's own formats. Pass the name "
            "of a format that formats.register added."
        )
    if key not in _registry:
        text = unknown_name("format", name, _registry, "jaxq.formats.names()")
        raise ValueError(f"formats.unregister: {text}")
    del _registry[key]


def get(name: str | Format) -> Format:
    """Returns the format with this name. A `Format` is returned unchanged.

    Names of two patterns need no registration:

    - `float<n>_e<E>m<M>`, `float<n>_e<E>m<M>fn` and `float<n>_e<E>m<M>fnuz` are
      floating point formats of up to 32 bits. Without a suffix the format is IEEE
      style. `fn` has no infinities, and it has NaN only from 8 bits on. `fnuz` has no
      infinities and no -0.
    - `q<m>.<n>` and `uq<m>.<n>` are fixed point formats. m does not count the sign.

    Args:
      name: a name from `names()`, a name of one of these patterns, or a `Format`.
        Upper case letters and hyphens are accepted.

    Raises:
      ValueError: no format has this name. The message suggests similar names.
      TypeError: `name` is neither a string nor a `Format`.

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
    key = normalize(name)
    fmt = _registry.get(key) or _parse_float(key) or _parse_fixed_point(key)
    if fmt is None:
        raise ValueError(_unknown_format(name))
    return fmt


def _unknown_format(name: str) -> str:
    """The error message for a name that no format has."""
    key = normalize(name)
    if key in _SHORT_NAMES:
        meant = " or ".join(repr(full) for full in _SHORT_NAMES[key])
        return (
            f"unknown format {name!r}. Did you mean {meant}? jaxq.formats.names() "
            "lists them all."
        )
    meaning = meaning_of_no_format(name)
    if meaning:
        return (
            f"unknown format {name!r}. {meaning} jaxq.formats.names() lists all "
            "formats."
        )
    return unknown_name("format", name, _registry, "jaxq.formats.names()")


# Short names that people use, and the formats that they may mean. Some are the names of
# presets, which have a granularity too.
_SHORT_NAMES = {
    "fp4": ("float4_e2m1fn", "nf4"),
    "fp6": ("float6_e2m3fn", "float6_e3m2fn"),
    "fp8": ("float8_e4m3fn", "float8_e5m2"),
    "float4": ("float4_e2m1fn",),
    "float6": ("float6_e2m3fn", "float6_e3m2fn"),
    "float8": ("float8_e4m3fn", "float8_e5m2"),
    "fp8_e4m3": ("float8_e4m3fn",),
    "e2m1": ("float4_e2m1fn",),
    "e2m3": ("float6_e2m3fn",),
    "e3m2": ("float6_e3m2fn",),
    "e4m3": ("float8_e4m3fn",),
    "e5m2": ("float8_e5m2",),
    "e8m0": ("float8_e8m0fnu",),
    "bf16": ("bfloat16",),
    "fp16": ("float16",),
    "fp32": ("float32",),
    "tf32": ("tfloat32",),
}


def names() -> list[str]:
    """Returns the names of all registered formats, sorted.

    A table that was computed for one array is not registered. For example,
    `jaxq.methods.kmeans` gives its QTensors unregistered formats such as "kmeans4".

    Example:
      >>> import jaxq
      >>> [name for name in jaxq.formats.names() if name.startswith("float4")]
      ['float4_bitsandbytes', 'float4_e1m2fn', 'float4_e2m1fn', 'float4_e3m0fn']
    """
    return sorted(_registry)


def to_dict(fmt: Format) -> str | dict[str, Any]:
    """Describes a format by JSON types, for `from_dict`.

    Returns:
      The name, if `get` returns an equal format for it. Otherwise a dict of the class
      name and the fields.

    Example:
      >>> import jaxq
      >>> jaxq.formats.to_dict(jaxq.formats.get("nf4"))
      'nf4'
      >>> jaxq.formats.to_dict(jaxq.formats.FixedPointFormat("mine", 2, 1))
      {'type': 'FixedPointFormat', 'name': 'mine', 'integer_bits': 2, ...}
    """
    try:
        if get(fmt.name) == fmt:
            return fmt.name
    except ValueError:
        pass  # no format has this name
    return {"type": type(fmt).__name__, **dataclasses.asdict(fmt)}


_CLASSES: tuple[Any, ...] = (
    CodebookFormat,
    DoubleFormat,
    ExponentFormat,
    FixedPointFormat,
    FloatFormat,
    IntegerFormat,
    SignMagnitudeFormat,
)


def from_dict(data: str | dict[str, Any]) -> Format:
    """Returns the format that `to_dict` described.

    Args:
      data: a result of `to_dict`. It may be read from JSON.

    Raises:
      ValueError: `data` is a name that no format has; its "type" is not one of the
        format classes of jaxq; or a field has another type than the class declares.

    Example:
      >>> import jaxq
      >>> data = {"type": "IntegerFormat", "name": "int3_narrow", "num_bits": 3}
      >>> jaxq.formats.from_dict(data | {"narrow": True}).max
      3.0
    """
    if isinstance(data, str):
        return get(data)
    if not isinstance(data, dict):
        raise ValueError(
            f"formats.from_dict: expected a name or a dict, got {data!r:.80}."
        )
    # JSON has no tuples, but the fields must be hashable.
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in data.items()
    }
    kind = fields.pop("type", "")
    classes = {cls.__name__: cls for cls in _CLASSES}
    cls = classes.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(
            f"formats.from_dict: unknown kind of format {kind!r}. Known "
            f"kinds are {', '.join(sorted(classes))}."
        )
    _check_fields(cls, fields)
    try:
        return cls(**fields)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"formats.from_dict: {error}.") from error


def _check_fields(cls: type[Format], fields: dict[str, Any]) -> None:
    """Raises ValueError unless every field has the type that its class declares.

    A width of 4.0 would only fail where codes are computed.
    """
    declared = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    for name, value in fields.items():
        if name not in declared:
            message = unknown_name("field", name, declared, f"formats.{cls.__name__}")
            raise ValueError(f"formats.from_dict: {message}")
        if not _FIELD_TYPES[declared[name]](value):
            raise ValueError(
                f"formats.from_dict: {name} of a {cls.__name__} must be "
                f"{declared[name]}, got {value!r:.80}."
            )


def _is_table(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        type(number) in (int, float) for number in value
    )


_FIELD_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "int | None": lambda value: value is None or type(value) is int,
    "tuple[float, ...]": _is_table,
    "tuple[float, ...] | None": lambda value: value is None or _is_table(value),
}


def _parse_float(name: str) -> Format | None:
    """The floating point format with a name like float8_e4m3fn, or None."""
    match = re.fullmatch(r"float(\d+)_e(\d+)m(\d+)(fn|fnuz|)", name)
    if not match:
        return None
    width, exponent, mantissa = (int(match[i]) for i in (1, 2, 3))
    if width != 1 + exponent + mantissa:
        raise ValueError(
            f"unknown format {name!r}: e{exponent}m{mantissa} with its sign has "
            f"{1 + exponent + mantissa} bits, not {width}."
        )
    # ml_dtypes names formats below 8 bits `fn` although they have no NaN either.
    fn = "fn" if width >= 8 else "finite"
    flavour = {"": "ieee", "fnuz": "fnuz", "fn": fn}[match[4]]
    return FloatFormat(name, exponent, mantissa, flavour=flavour)


def _parse_fixed_point(name: str) -> Format | None:
    """The fixed point format with a name like q3.4 or uq0.8, or None."""
    match = re.fullmatch(r"(u?)q(\d+)\.(\d+)", name)
    if not match:
        return None
    return FixedPointFormat(name, int(match[2]), int(match[3]), signed=not match[1])


def _bitsandbytes_fp4() -> CodebookFormat:
    """The fp4 table. A half-way number goes to the smaller magnitude."""
    table = [np.float32(v) / np.float32(12) for v in (*_FP4, *(-v for v in _FP4))]
    entries = np.unique(np.asarray(table, np.float32))
    edges = (entries[1:] + entries[:-1]) / np.float32(2)
    # A number on an edge goes to the lower entry. Below zero that is the larger
    # magnitude, so negative edges move down by one float.
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
# Zero is encoded as +1 (XNOR-Net, 2016). So are negative subnormal numbers, because XLA
# flushes them to zero on CPU.
register(CodebookFormat("binary", (-1.0, 1.0), (-(2.0**-126),)))
for _bits in (4, 8):
    register(CodebookFormat(f"dynamic{_bits}", dynamic_map(signed=True, bits=_bits)))
for _bits in range(2, 8):
    register(CodebookFormat(f"log{_bits}", *powers_of_two(_bits)))
register(IntegerFormat("ternary", 2, narrow=True))
register(CodebookFormat("udynamic8", dynamic_map(signed=False)))
# Li et al., "Memory Efficient Optimizers with 4-bit States" (2023): equal steps without
# zero, for second moments.
register(CodebookFormat("ulinear4", tuple(i / 16 for i in range(1, 17))))

# `unregister` keeps these formats.
_OWN_NAMES = frozenset(_registry)
