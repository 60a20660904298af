"""Rounding toward zero, compared with exact fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from jaxq.qtensor import requantize, scale_values
from jaxq.qtensor._quotient import quotient_toward_zero
from tests.arrays import assert_same, normal

FORMATS = (
    *("int2", "int3", "int4", "int8", "q3.4", "int4_sign_magnitude"),
    *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn"),
    *("float8_e5m2", "nf4", "af4", "log4"),
)


def numbers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators; many quotients are whole or nearly so."""
    random = np.random.default_rng(0)
    x = random.standard_normal(size) * np.exp2(random.integers(-100, 100, size))
    scale = random.standard_normal(size) * np.exp2(random.integers(-20, 20, size))
    x, scale = x.astype(np.float32), scale.astype(np.float32)
    whole = random.integers(1, 128, size // 2).astype(np.float32)
    near = x[: size // 2]
    scale[: size // 2] = near * (1 / whole)  # rounded: just above or below
    return x, scale


@pytest.mark.parametrize(
    "function", [quotient_toward_zero, jax.jit(quotient_toward_zero)]
)
def test_the_quotient_is_exact(function):
    x, scale = numbers(4000)
    quotient = np.asarray(function(x, scale))
    outward = np.nextafter(quotient, np.inf * np.sign(quotient))
    for a, b, q, next_q in zip(x, scale, quotient, outward, strict=True):
        exact = abs(Fraction(float(a)) / Fraction(float(b)))
        assert abs(Fraction(float(q))) <= exact < abs(Fraction(float(next_q)))
    np.testing.assert_array_equal(np.sign(quotient), np.sign(x) * np.sign(scale))


def test_quotients_of_special_numbers():
    tiny, huge = np.float32(2.0**-120), np.float32(2.0**120)
    x = np.array([0.0, -0.0, 1.0, np.nan, np.inf, 1.0, huge, -huge, tiny], np.float32)
    s = np.array([2.0, 2.0, 0.0, 1.0, 1.0, np.nan, tiny, tiny, huge], np.float32)
    largest = np.finfo(np.float32).max
    expected = [0, 0, 0, np.nan, np.inf, np.nan, largest, -largest, 0]
    np.testing.assert_array_equal(quotient_toward_zero(x, s), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_extreme_of_a_block_gets_the_extreme_of_the_format(fmt):
    w = normal(128, 100)
    spec = QuantSpec(fmt, PerGroup(32), rounding="toward_zero")
    qt = jaxq.quantize(w, spec)
    largest = np.abs(np.asarray(w)).reshape(4, 32, 100).max(1)
    values = np.abs(np.asarray(jaxq.dequantize(qt))).reshape(4, 32, 100).max(1)
    expected = np.asarray(qt.scale).T * np.float32(spec.fmt.max)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(values, largest, rtol=3e-7)


@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_the_exact_quotient_rounded_toward_zero(fmt, scale):
    w = normal(64, 16)
    spec = QuantSpec(fmt, PerGroup(32), scale=scale, rounding="toward_zero")
    qt = jax.jit(lambda w: jaxq.quantize(w, spec))(w)
    assert_same(qt, jaxq.quantize(w, spec))
    assert_same(requantize(w, qt), qt)
    scales = np.repeat(np.asarray(scale_values(qt)).T, 32, axis=0)
    # A quotient of two float32 numbers that is not exact in float64 is at least 2^-48
    # from every number of a format.
    exact = np.asarray(w, np.float64) / scales
    table = np.unique(spec.fmt.values())
    if spec.fmt.kind == "integer":
        table = table[table >= -spec.fmt.max]
    magnitude = np.abs(exact)
    below = np.zeros_like(magnitude)
    for sign in (1, -1):
        side = np.sort(np.abs(table[table * sign >= 0]))
        index = np.clip(np.searchsorted(side, magnitude, "right") - 1, 0, None)
        below = np.where(np.sign(exact) == sign, side[index] * sign, below)
    np.testing.assert_array_equal(spec.fmt.decode(qt.codes()), below)


def test_asymmetric_and_offset_ranges_reach_their_end():
    w = jnp.abs(normal(128, 50)).at[0].set(0.0)
    for fields in ({"symmetric": False}, {"offset": "min"}):
        spec = QuantSpec("uint4", PerGroup(128), rounding="toward_zero", **fields)
        codes = np.asarray(jaxq.quantize(w, spec).codes())
        assert (codes.max(0) == 15).all()
        assert (codes.min(0) == 0).all()
