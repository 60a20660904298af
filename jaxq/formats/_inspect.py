"""One number in one format, bit by bit."""

from __future__ import annotations

import dataclasses
import math
import struct

import jax.numpy as jnp
import numpy as np

from jaxq.debug_checks import allow_nonfinite
from jaxq.formats._float import DoubleFormat, ExponentFormat, FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._registry import get
from jaxq.meshes import compile_time_eval

# The numbers of a format with more bits are too many to list.
_MOST_LISTED_BITS = 16


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a format stores for one number.

    Attributes:
      number: the number.
      format: the name of the format.
      code: the stored code, without sign: the bits as a whole number.
      bits: the bits of the code. In a floating point format, spaces separate sign,
        exponent and mantissa.
      sign: the sign bit. Empty if the format has no such field.
      exponent: the bits of the exponent. Empty if the format has no such field.
      mantissa: the bits of the mantissa. Empty if the format has no such field.
      value: the stored number.
      error: `value - number`.
      below: the next smaller finite number of the format. None if there is none.
      above: the next larger finite number of the format. None if there is none.

    Example:
      >>> import jaxq
      >>> result = jaxq.formats.inspect(0.1, "float8_e4m3fn")
      >>> result.bits, result.value, result.below, result.above
      ('0 0011 101', 0.1015625, 0.09375, 0.109375)
    """

    number: float
    format: str
    code: int
    bits: str
    sign: str
    exponent: str
    mantissa: str
    value: float
    error: float
    below: float | None
    above: float | None

    def __str__(self) -> str:
        """One line for each attribute."""
        lines = [
            f"{self.number!r} in {self.format}",
            f"bits      {self.bits} (code {self.code})",
            f"value     {self.value!r}",
            f"error     {self.error:.6g}",
            f"below     {_text(self.below)}",
            f"above     {_text(self.above)}",
        ]
        return "\n".join(lines)


@allow_nonfinite()
def inspect(number: float, fmt: str | Format) -> Inspection:
    """Shows what a format stores for a number: bits, value, error and neighbours.

    The number is rounded to nearest, and saturates. It is rounded to float32 first, as
    `Format.encode` does it. The exception is float64.

    Args:
      number: a Python number. It may be infinite or NaN.
      fmt: a format or its name.

    Returns:
      An `Inspection`. Print it, or read its attributes.

    Raises:
      ValueError: no format has this name.

    Example:
      >>> import jaxq
      >>> print(jaxq.formats.inspect(0.3, "int4"))
      0.3 in int4
      bits      0000 (code 0)
      value     0.0
      error     -0.3
      below     -1.0
      above     1.0
    """
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    number = float(number)
    if isinstance(fmt, DoubleFormat):
        code = struct.unpack("<Q", struct.pack("<d", number))[0]
        value = number
    else:
        with compile_time_eval():
            stored = fmt.encode(jnp.float32(_as_float32(number)))
            value = float(np.asarray(fmt.decode(stored)))
        code = int(np.asarray(stored)) & ((1 << fmt.bits) - 1)
    text = f"{code:0{fmt.bits}b}"
    fields = _fields(fmt, text)
    below, above = _neighbours(fmt, value)
    return Inspection(
        number=number,
        format=fmt.name,
        code=code,
        bits=" ".join(part for part in fields if part) or text,
        sign=fields[0],
        exponent=fields[1],
        mantissa=fields[2],
        value=value,
        error=0.0 if value == number else value - number,
        below=below,
        above=above,
    )


def _as_float32(number: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(number)


def _fields(fmt: Format, text: str) -> tuple[str, str, str]:
    """The bits of sign, exponent and mantissa. Empty for other kinds of formats."""
    if isinstance(fmt, ExponentFormat):
        return "", text, ""
    if isinstance(fmt, DoubleFormat):
        num_exponent_bits = 11
    elif isinstance(fmt, FloatFormat):
        num_exponent_bits = fmt.exponent_bits
    else:
        return "", "", ""
    end = 1 + num_exponent_bits
    return text[0], text[1:end], text[end:]


def _neighbours(fmt: Format, value: float) -> tuple[float | None, float | None]:
    """The next smaller and the next larger finite number of a format."""
    if math.isnan(value):
        return None, None
    if fmt.bits <= _MOST_LISTED_BITS:
        values = fmt.values().astype(np.float64)
        smaller, larger = values[values < value], values[values > value]
        below = float(smaller[-1]) if smaller.size else None
        above = float(larger[0]) if larger.size else None
        return below, above
    below, above = -_next_larger(fmt, -value), _next_larger(fmt, value)
    return _if_finite(below), _if_finite(above)


def _next_larger(fmt: Format, value: float) -> float:
    """The next larger number of a floating point format with a sign and infinity."""
    if value == -math.inf:
        return fmt.min
    if isinstance(fmt, DoubleFormat):
        return math.nextafter(value, math.inf)
    assert isinstance(fmt, FloatFormat)
    # The distance of two numbers of one binade. Below a power of two it is half of it.
    exponent = max(math.frexp(value)[1] - 1, 1 - fmt._bias) if value else 1 - fmt._bias
    is_lower_end = value < 0 and math.frexp(value)[0] == -0.5
    if is_lower_end and exponent > 1 - fmt._bias:
        exponent -= 1
    larger = value + 2.0 ** (exponent - fmt.num_mantissa_bits)
    return larger if larger <= fmt.max else math.inf


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "none" if value is None else repr(value)
