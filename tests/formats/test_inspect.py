"""`inspect` against ml_dtypes, numpy and struct."""

import math
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxq import formats

NUMBERS = [0.1, -0.1, 0.0, 1.0, -1.0, 3.0, 447.0, 1e9, -1e9, 1e-9, 0.25, 255.0]
NAMES = [
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4"),
    *("bfloat16", "float4_e2m1fn", "float6_e3m2fn"),
]


@pytest.mark.parametrize("name", NAMES)
def test_bits_and_neighbours_are_those_of_ml_dtypes(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    fmt = formats.get(name)
    patterns = np.arange(1 << fmt.bits)
    carrier = np.uint16 if fmt.bits == 16 else np.uint8
    with np.errstate(invalid="ignore"):  # the patterns of NaN
        values = patterns.astype(carrier).view(dtype).astype(np.float64)
    finite = np.unique(values[np.isfinite(values)])
    for number in NUMBERS:
        got = formats.inspect(number, name)
        clipped = np.float32(np.clip(number, finite[0], finite[-1]))
        expected = clipped.astype(dtype)
        mask = (1 << fmt.bits) - 1
        assert got.code == int(expected.view(carrier)) & mask
        assert got.value == float(expected)
        assert got.error == float(expected) - number
        assert got.bits.replace(" ", "") == f"{got.code:0{fmt.bits}b}"
        assert got.bits.split() == [
            part for part in (got.sign, got.exponent, got.mantissa) if part
        ]
        smaller, larger = finite[finite < got.value], finite[finite > got.value]
        assert got.below == (smaller[-1] if smaller.size else None)
        assert got.above == (larger[0] if larger.size else None)


@pytest.mark.parametrize(
    "number",
    [*NUMBERS, 1e-45, -1e-45, 2.0**-126, -(2.0**-126), 3.4028234663852886e38, 1e39],
)
def test_float32_is_that_of_numpy(number):
    got = formats.inspect(number, "float32")
    largest = float(np.finfo(np.float32).max)
    expected = np.float32(np.clip(number, -largest, largest))
    assert got.code == int(expected.view(np.uint32))
    assert (len(got.sign), len(got.exponent), len(got.mantissa)) == (1, 8, 23)
    with np.errstate(over="ignore"):
        below = float(np.nextafter(expected, np.float32(-np.inf)))
        above = float(np.nextafter(expected, np.float32(np.inf)))
    assert got.below == (below if math.isfinite(below) else None)
    assert got.above == (above if math.isfinite(above) else None)


@pytest.mark.parametrize("number", NUMBERS)
def test_float64_is_python(number):
    got = formats.inspect(number, "float64")
    assert got.code == struct.unpack("<Q", struct.pack("<d", number))[0]
    assert got.error == 0
    assert got.above == math.nextafter(number, math.inf)


def test_tfloat32_has_steps_of_ten_bits():
    got = formats.inspect(1.0, "tfloat32")
    assert (got.below, got.above) == (1 - 2.0**-11, 1 + 2.0**-10)
    got = formats.inspect(-1.0, "tfloat32")
    assert (got.below, got.above) == (-1 - 2.0**-10, -1 + 2.0**-11)


def test_other_kinds_of_formats():
    got = formats.inspect(-3.4, "int4")
    assert (got.bits, got.value, got.below, got.above) == ("1101", -3.0, -4.0, -2.0)
    got = formats.inspect(100, "int4")
    assert (got.value, got.above) == (7.0, None)
    got = formats.inspect(0.5, "nf4")
    assert got.value == pytest.approx(0.44070982933044434)
    assert (got.sign, len(got.bits)) == ("", 4)
    got = formats.inspect(5.0, "float8_e8m0fnu")
    assert (got.value, got.exponent, got.sign) == (4.0, "10000001", "")
    got = formats.inspect(math.nan, "float8_e4m3fn")
    assert math.isnan(got.value)
    assert got.below is None
    with pytest.raises(ValueError, match="unknown format 'float8_e4m3x'"):
        formats.inspect(0.1, "float8_e4m3x")
