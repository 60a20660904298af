"""Integers and fixed point: all rounding modes, at ties and at the range's ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import (
    FixedPointFormat,
    IntegerFormat,
    SignMagnitudeFormat,
    get,
    round_to_integer,
)
from tests.formats import oracle

# Every quarter from -300 to 300, the float32 neighbours of each, and numbers for which
# adding 0.5 in float32 rounds to the wrong integer.
_quarters = np.arange(-1200, 1201, dtype=np.float32) / 4
_hard = np.float32([0.49999997, 8388607.5, 16777217, 3e9, 3e38, 1e-45, 0.0, np.inf])
X = np.concatenate(
    [
        _quarters,
        np.nextafter(_quarters, np.float32(np.inf)),
        np.nextafter(_quarters, np.float32(-np.inf)),
        _hard,
        -_hard,
    ]
)
INTEGERS = (
    *("int2", "int4", "int4_narrow", "int8", "int8_narrow"),
    *("uint2", "uint4", "uint8"),
)


def rounded(x: np.ndarray, rounding: str) -> np.ndarray:
    """`x` rounded in float64, where adding a half to a float32 below 2^52 is exact."""
    x = x.astype(np.float64)
    if rounding == "nearest_away":
        return np.sign(x) * np.floor(np.abs(x) + 0.5)
    return np.rint(x) if rounding == "nearest_even" else np.trunc(x)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_codes_are_rounded_and_clipped(rounding):
    for name in INTEGERS:
        fmt = get(name)
        codes = np.asarray(fmt.encode(X, rounding=rounding))
        expected = np.clip(rounded(X, rounding), fmt.min, fmt.max)
        np.testing.assert_array_equal(codes, expected, err_msg=name)
        numbers = fmt.decode(jnp.asarray(codes))
        np.testing.assert_array_equal(numbers, codes.astype(np.float32))


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_round_to_integer(rounding):
    expected = rounded(X, rounding)
    jitted = jax.jit(round_to_integer, static_argnums=1)
    np.testing.assert_array_equal(round_to_integer(jnp.asarray(X), rounding), expected)
    np.testing.assert_array_equal(jitted(X, rounding), expected)
    assert np.isnan(round_to_integer(jnp.float32(np.nan), rounding))


def test_encode_neither_wraps_nor_truncates():
    # A plain astype gives 7 for 7.5, and -128 for 128. At four bits it gives -8 for 8.
    codes = get("int8").encode([7.5, 2.5, 128.0, 127.5, -128.5, 300.0])
    assert codes.tolist() == [8, 2, 127, 127, -128, 127]
    assert get("int4").encode([8.0, 7.5, -8.5, 20.0]).tolist() == [7, 7, -8, 7]
    assert get("uint4").encode([-1.0, 15.5, 16.0, np.nan]).tolist() == [0, 15, 15, 0]


def test_stochastic_is_unbiased():
    # The mean of n draws of a number with fraction p has the standard deviation
    # sqrt(p (1 - p) / n). Five standard deviations are allowed. The seed is fixed.
    fmt, draws = get("int8"), 1 << 14
    x = np.float32([-127.9, -3.5, -0.25, 0.0, 0.1, 0.5, 2.0, 64.75, 126.99])
    many = np.broadcast_to(x[:, None], (x.size, draws))
    codes = fmt.encode(many, rounding="stochastic", key=jax.random.key(0))
    codes = np.asarray(codes).astype(np.float64)
    assert ((codes == np.floor(many)) | (codes == np.ceil(many))).all()
    p = x.astype(np.float64) - np.floor(x)
    assert (np.abs(codes.mean(1) - x) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bits": 1, "narrow": True}, "narrow width must be 2 to 8"),
        ({"num_bits": 9}, "integer width must be 1 to 8"),
        ({"num_bits": 0, "signed": False}, "integer width must be 1 to 8"),
        (
            {"num_bits": 4, "signed": False, "narrow": True},
            "narrow range is for signed",
        ),
    ],
)
def test_invalid_integer_formats_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntegerFormat("mine", **arguments)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sign_magnitude_codes_hold_sign_and_magnitude(bits, rounding):
    fmt = get(f"int{bits}_sign_magnitude")
    codes = np.asarray(fmt.encode(X, rounding=rounding))
    magnitude = np.minimum(np.abs(rounded(X, rounding)), 2 ** (bits - 1) - 1)
    magnitude = magnitude.astype(np.uint8)
    sign_bit = np.uint8(1 << (bits - 1))
    np.testing.assert_array_equal(codes, magnitude + np.signbit(X) * sign_bit)
    decoded = np.asarray(fmt.decode(jnp.asarray(codes)))
    np.testing.assert_array_equal(np.abs(decoded), magnitude)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(X))
    assert fmt.decode(jnp.asarray(np.uint8([0, sign_bit]))).tolist() == [0, 0]


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("name", ["q3.4", "q0.15", "q7.0", "uq4.4", "uq0.8", "q8.7"])
def test_fixed_point_is_a_scaled_integer(name, rounding):
    fmt, (m, n) = get(name), map(int, name.lstrip("uq").split("."))
    signed = name.startswith("q")
    low, high = -(2 ** (m + n)) * signed, 2 ** (m + n) - 1
    x = np.concatenate([X / 64, X])
    codes = np.asarray(fmt.encode(x, rounding=rounding))
    whole = rounded(x.astype(np.float64) * 2**n, rounding)  # the product is exact
    np.testing.assert_array_equal(codes, np.clip(whole, low, high))
    numbers = fmt.decode(jnp.asarray(codes))
    np.testing.assert_array_equal(numbers, codes / np.float32(2**n))
    assert fmt.bits == m + n + signed
    assert codes.dtype == f"{'' if signed else 'u'}int{8 if fmt.bits <= 8 else 16}"
    assert (fmt.min, fmt.max) == (low / 2**n, high / 2**n)


def test_fixed_point_example():
    # In Q3.4 1.03 becomes 16/16, half a step goes to the even code, and 7.97 saturates.
    codes = get("q3.4").encode(np.float32([1.03, 0.03125, 7.97]))
    assert codes.tolist() == [16, 0, 127]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SignMagnitudeFormat("mine", 1),
            "width must be 2 to 8 bits, got num_bits=1",
        ),
        (lambda: FixedPointFormat("mine", 12, 4), "at most 16 bits with the sign"),
        (lambda: FixedPointFormat("mine", -1, 4), "must not be negative"),
        (lambda: FixedPointFormat("mine", 0, 0), "got integer_bits=0"),
        (lambda: get("q12.12"), "at most 16 bits with the sign"),
    ],
)
def test_invalid_fixed_point_formats_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
