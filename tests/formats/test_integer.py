"""Integers: rounding in every mode against exact distances, at ties, at the ends of the range and beyond."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import IntegerFormat, get, round_to_integer
from tests.formats import oracle

# Every quarter from -300 to 300, what float32 has next to each, and halves that a float32 sum would misround.
_quarters = np.arange(-1200, 1201, dtype=np.float32) / 4
X = np.concatenate(
    [
        _quarters,
        np.nextafter(_quarters, np.float32(np.inf)),
        np.nextafter(_quarters, np.float32(-np.inf)),
        np.float32([0.49999997, -0.49999997, 8388607.5, -8388607.5, 16777217, 3e9, -3e9, 3e38, -3e38, 1e-45, -0.0]),
        np.float32([np.inf, -np.inf]),
    ]
)


def rounded(x: np.ndarray, rounding: str) -> np.ndarray:
    """Whole numbers in float64, where adding a half is exact for every float32 below 2^52."""
    x = x.astype(np.float64)
    if rounding == "nearest_away":
        return np.sign(x) * np.floor(np.abs(x) + 0.5)
    return np.rint(x) if rounding == "nearest_even" else np.trunc(x)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_codes_are_rounded_and_clipped(rounding):
    for name in ("int2", "int4", "int4_narrow", "int8", "int8_narrow", "uint2", "uint4", "uint8"):
        fmt = get(name)
        codes = np.asarray(fmt.encode(X, rounding=rounding))
        np.testing.assert_array_equal(codes, np.clip(rounded(X, rounding), fmt.min, fmt.max), err_msg=name)
        np.testing.assert_array_equal(np.asarray(fmt.decode(jnp.asarray(codes))), codes.astype(np.float32))


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_round_to_integer(rounding):
    expected = rounded(X, rounding)
    np.testing.assert_array_equal(np.asarray(round_to_integer(jnp.asarray(X), rounding)), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(round_to_integer, static_argnums=1)(X, rounding)), expected)
    assert np.isnan(round_to_integer(jnp.float32(np.nan), rounding))


def test_casts_neither_wrap_nor_truncate():
    # What a bare astype gets wrong: 7.5 -> 7, 128 -> -128, 8 -> -8 at four bits.
    assert get("int8").encode([7.5, 2.5, 128.0, 127.5, -128.5, 300.0]).tolist() == [8, 2, 127, 127, -128, 127]
    assert get("int4").encode([8.0, 7.5, -8.5, 20.0]).tolist() == [7, 7, -8, 7]
    assert get("uint4").encode([-1.0, 15.5, 16.0, np.nan]).tolist() == [0, 15, 15, 0]


def test_stochastic_is_unbiased():
    # n draws of a number with fraction p: the mean has a deviation of sqrt(p (1 - p) / n); five of them, fixed seed.
    fmt, draws = get("int8"), 1 << 14
    x = np.float32([-127.9, -3.5, -0.25, 0.0, 0.1, 0.5, 2.0, 64.75, 126.99])
    many = np.broadcast_to(x[:, None], (x.size, draws))
    codes = np.asarray(fmt.encode(many, rounding="stochastic", key=jax.random.key(0))).astype(np.float64)
    assert ((codes == np.floor(many)) | (codes == np.ceil(many))).all()
    p = x.astype(np.float64) - np.floor(x)
    assert (np.abs(codes.mean(1) - x) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bits": 1}, "signed width must be 2 to 8"),
        ({"num_bits": 9}, "signed width must be 2 to 8"),
        ({"num_bits": 0, "signed": False}, "unsigned width must be 1 to 8"),
        ({"num_bits": 4, "signed": False, "narrow": True}, "narrow range is for signed"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntegerFormat("mine", **arguments)
