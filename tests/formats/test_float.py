"""Floating point formats against ml_dtypes, and against exact distances in float64.

ml_dtypes does not have all of the formats. The distances are an oracle for all.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.formats import ExponentFormat, FloatFormat, get
from jaxq.formats import _rounding as rounding_module
from tests.arrays import assert_same
from tests.formats import oracle
from tests.tables import thinned

ML_DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
    "float6_e2m3fn": ml_dtypes.float6_e2m3fn,
    "float6_e3m2fn": ml_dtypes.float6_e3m2fn,
    "float8_e3m4": ml_dtypes.float8_e3m4,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
# (exponent bits, mantissa bits, bias, flavour) of the formats of ml_dtypes, of formats
# that it does not have, and of formats with unusual biases.
PARTS = {
    "bfloat16": (8, 7, 127, "ieee"),
    "float16": (5, 10, 15, "ieee"),
    "float4_e1m2fn": (1, 2, 0, "finite"),
    "float4_e2m1fn": (2, 1, 1, "finite"),
    "float4_e3m0fn": (3, 0, 3, "finite"),
    "float6_e2m3fn": (2, 3, 1, "finite"),
    "float6_e3m2fn": (3, 2, 3, "finite"),
    "float8_e3m4": (3, 4, 3, "ieee"),
    "float8_e4m3": (4, 3, 7, "ieee"),
    "float8_e4m3b11fnuz": (4, 3, 11, "fnuz"),
    "float8_e4m3fn": (4, 3, 7, "fn"),
    "float8_e4m3fnuz": (4, 3, 8, "fnuz"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e5m2fnuz": (5, 2, 16, "fnuz"),
    "float3_e1m1fn": (1, 1, 0, "finite"),
    "float12_e5m6": (5, 6, 15, "ieee"),
    "float9_e8m0fn_low": (7, 1, 100, "fn"),
    "float8_e7m0fn_high": (7, 0, 20, "fnuz"),
    "float13_e8m4": (8, 4, 127, "ieee"),
    "float16_e1m14fn": (1, 14, -3, "finite"),
}
USER = (
    "float3_e1m1fn",
    "float12_e5m6",
    "float9_e8m0fn_low",
    "float8_e7m0fn_high",
    "float13_e8m4",
    "float16_e1m14fn",
)
MODES = [
    (rounding, saturate) for rounding in oracle.ROUNDINGS for saturate in (True, False)
]


def make(name: str) -> FloatFormat:
    if name in USER:
        e, m, bias, flavour = PARTS[name]
        return FloatFormat(name, e, m, bias, flavour)
    return get(name)


def every_code(fmt) -> np.ndarray:
    """All codes, repeated up to 2^16 codes, so that all formats share one shape."""
    mask = fmt.code_dtype.type((1 << fmt.bits) - 1)
    return np.arange(1 << 16).astype(fmt.code_dtype) & mask


@functools.cache
def hard_inputs(name: str) -> np.ndarray:
    """All bfloat16 numbers, numbers that are hard for the format, and random numbers.

    Hard numbers are those of the format, their midpoints, and the neighbours of both.
    """
    numbers = oracle.magnitudes(*PARTS[name])
    numbers = numbers[numbers < 2.0**128]
    bfloat16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    hard = oracle.hard_numbers(np.concatenate([-numbers[:0:-1], numbers]))
    # There are only two sizes, so that the formats share compiled operations.
    size = (1 << 18) if len(hard) < (1 << 17) else (1 << 19)
    num_random = size - len(hard) - len(bfloat16)
    random = oracle.random_patterns(num_random, seed=0)
    return np.concatenate([bfloat16, hard, random])


@functools.cache
def encoded(name: str) -> dict[tuple[str, bool], np.ndarray]:
    """Codes of `hard_inputs` in every mode, from one compiled program."""
    fmt = make(name)

    @jax.jit
    def encode(x):
        return [fmt.encode(x, rounding=r, saturate=saturate) for r, saturate in MODES]

    codes = map(np.asarray, encode(hard_inputs(name)))
    return dict(zip(MODES, codes, strict=True))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_decode_equals_ml_dtypes(name):
    fmt, dtype = get(name), np.dtype(ML_DTYPES[name])
    codes = every_code(fmt)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = codes.view(dtype).astype(np.float32)
    assert_same(fmt.decode(jnp.asarray(codes)), expected)
    assert_same(jax.jit(fmt.decode)(codes), expected)


@pytest.mark.parametrize("name", PARTS)
def test_decode_follows_the_definition(name):
    fmt, numbers = make(name), oracle.magnitudes(*PARTS[name])[:-1]
    decoded = np.asarray(fmt.decode(jnp.asarray(every_code(fmt))))
    positive = decoded[: len(numbers)]
    negative = decoded[1 << (fmt.bits - 1) :][: len(numbers)]
    np.testing.assert_array_equal(positive, numbers.astype(np.float32))
    np.testing.assert_array_equal(negative[1:], -numbers[1:].astype(np.float32))
    if PARTS[name][3] == "fnuz":
        assert np.isnan(negative[0])
    else:
        assert negative[0] == 0
        assert np.signbit(negative[0])
    assert (fmt.max, fmt.min) == (numbers[-1], -numbers[-1])
    assert fmt.smallest_positive == numbers[1]
    assert fmt.max_exponent == np.floor(np.log2(numbers[-1]))
    assert fmt.mantissa_bits == PARTS[name][1]


@pytest.mark.parametrize(
    ("name", "saturate"),
    thinned(
        itertools.product(ML_DTYPES, (True, False)),
        [(name, i % 2 == 0) for i, name in enumerate(ML_DTYPES)],
    ),
)
def test_encode_equals_ml_dtypes(name, saturate):
    fmt, x = get(name), hard_inputs(name)
    with np.errstate(all="ignore"):
        if saturate:
            x = np.clip(x, np.float32(-fmt.max), np.float32(fmt.max))
        expected = x.astype(ML_DTYPES[name])
    codes = encoded(name)["nearest_even", saturate]
    # NaN may have another payload, so only its place is compared.
    nan = np.isnan(expected.astype(np.float32))
    numbers = codes.view(ML_DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(numbers), nan)
    np.testing.assert_array_equal(codes[~nan], expected.view(codes.dtype)[~nan])


@pytest.mark.parametrize("name", PARTS)
def test_encode_takes_the_nearest_number(name):
    x = hard_inputs(name)
    expected = oracle.encode_float(x, *PARTS[name], MODES)
    for mode, codes in encoded(name).items():
        wrong = np.flatnonzero(codes != expected[mode])
        first = wrong[:5]
        assert wrong.size == 0, (
            f"{mode}: {wrong.size} wrong codes: {x[first]} gave {codes[first]}, "
            f"expected {expected[mode][first]}"
        )


@pytest.mark.parametrize("name", PARTS)
def test_eager_equals_jitted(name):
    x = hard_inputs(name)[: 1 << 16]
    eager = np.asarray(make(name).encode(x))
    np.testing.assert_array_equal(eager, encoded(name)["nearest_even", True][: 1 << 16])


@pytest.mark.parametrize(
    "name", thinned(ML_DTYPES, ["float16", "float8_e4m3fnuz", "float4_e2m1fn"])
)
def test_encode_of_a_million_random_patterns_equals_ml_dtypes(name):
    fmt, x = get(name), oracle.random_patterns(1 << 20, seed=3)
    with np.errstate(all="ignore"):
        expected = x.astype(ML_DTYPES[name])
    nan = np.isnan(expected.astype(np.float32))
    for encode in (fmt.encode, jax.jit(fmt.encode, static_argnames="saturate")):
        codes = np.asarray(encode(x, saturate=False))
        np.testing.assert_array_equal(codes[~nan], expected.view(codes.dtype)[~nan])
        assert np.isnan(codes.view(ML_DTYPES[name]).astype(np.float32)[nan]).all()


@pytest.mark.parametrize("name", PARTS)
def test_stochastic_gives_a_neighbour(name):
    fmt, x = make(name), hard_inputs(name)[::4][: 1 << 16]
    codes = fmt.encode(x, rounding="stochastic", key=jax.random.key(0))
    inside = np.isfinite(x) & (np.abs(x) <= fmt.max)
    x, codes = x[inside], np.asarray(codes)[inside]
    magnitude = oracle.magnitudes(*PARTS[name])[codes & ((1 << (fmt.bits - 1)) - 1)]
    rounded = magnitude * np.where(np.signbit(x), -1, 1)
    # Both neighbours of a number of the format are the number itself.
    below, above = oracle.neighbours(x, fmt.values())
    wrong = (rounded != below) & (rounded != above)
    assert not wrong.any(), f"{x[wrong][:5]} became {rounded[wrong][:5]}"
    minus = np.signbit(x) & ~((fmt.flavour == "fnuz") & (rounded == 0))
    np.testing.assert_array_equal(codes >> (fmt.bits - 1), minus)


def test_stochastic_bfloat16_is_exactly_unbiased(monkeypatch):
    # With all 65,536 values of the noise, a pattern whose lower half is L must go up in
    # exactly L cases. So must subnormal numbers.
    noise = jnp.arange(1 << 16, dtype=jnp.uint32)
    noise = noise + np.uint32(0xABCD0000)  # the upper bits must not matter
    monkeypatch.setattr(rounding_module, "random_bits", lambda key, shape, dtype: noise)
    for high in (0x3F80, 0x0000, 0xC2FF):
        for low in (0, 1, 2, 0x5555, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            x = np.full(1 << 16, (high << 16) | low, np.uint32).view(np.float32)
            options = {"rounding": "stochastic", "key": jax.random.key(0)}
            codes = np.asarray(get("bfloat16").encode(x, **options))
            assert set(np.unique(codes)) <= {high, high + 1}
            assert (codes == high + 1).sum() == low
            numbers = np.asarray(get("bfloat16").round(x, **options))
            np.testing.assert_array_equal(numbers.view(np.uint32) >> 16, codes)


@pytest.mark.parametrize("name", [*PARTS, "float8_e8m0fnu"])
def test_stochastic_mean_is_the_number(name):
    # In n draws the share that goes up has the standard deviation sqrt(p (1 - p) / n).
    # Five standard deviations are allowed. The seed is fixed. The first gaps are those
    # between subnormal numbers of the format. Some of these are subnormal in float32.
    fmt, draws = make(name) if name in PARTS else get(name), 1 << 12
    numbers = fmt.values().astype(np.float64)
    numbers = numbers[numbers >= 0]
    last = len(numbers) - 2
    spread = np.linspace(0, last, 5).astype(int)
    starts = np.unique(np.concatenate([[0, 1, last], spread]))
    below, above = numbers[starts][:, None], numbers[starts + 1][:, None]
    inside = below + (above - below) * np.array([0.1, 0.5, 0.8125])
    x = np.resize(inside.T.astype(np.float32), 16)
    many = np.repeat(x, draws)
    codes = fmt.encode(many, rounding="stochastic", key=jax.random.key(1))
    rounded = np.asarray(fmt.decode(codes)).astype(np.float64).reshape(-1, draws)
    low, high = oracle.neighbours(x, numbers)
    share = (rounded == high[:, None]).mean(1)
    with np.errstate(invalid="ignore"):
        p = np.where(high > low, (x - low) / (high - low), 1.0)
    bound = 5 * np.sqrt(p * (1 - p) / draws)
    assert (np.abs(share - p) <= bound).all(), f"{x} went up with {share}, not {p}"


@pytest.fixture(scope="module")
def scales():
    hard = oracle.hard_numbers(2.0 ** np.arange(-127, 128))
    return np.concatenate([hard, hard_inputs("bfloat16")])[: 1 << 16]


class TestExponent:
    """float8_e8m0fnu, the scale type of microscaling formats."""

    def test_decode_equals_ml_dtypes(self):
        fmt = get("float8_e8m0fnu")
        codes = np.arange(256, dtype=np.uint8)
        expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        assert np.isnan(expected[255])
        assert_same(fmt.decode(jnp.asarray(codes)), expected)
        assert_same(jax.jit(fmt.decode)(codes), expected)

    def test_encode_equals_ml_dtypes(self, scales):
        # ml_dtypes does not saturate: numbers that are too large become NaN.
        x = scales
        with np.errstate(invalid="ignore"):
            expected = x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        fmt = get("float8_e8m0fnu")
        np.testing.assert_array_equal(fmt.encode(x, saturate=False), expected)
        too_large = (expected == 255) & (x > 0)
        saturated = np.where(too_large, 254, expected)
        np.testing.assert_array_equal(jax.jit(fmt.encode)(x), saturated)

    def test_toward_zero_gives_the_exponent(self, scales):
        x = scales
        code = np.asarray(ExponentFormat("mine").encode(x, rounding="toward_zero"))
        real = np.isfinite(x) & (x > 0)
        exponent = np.maximum(np.frexp(x[real].astype(np.float64))[1] - 1, -127)
        np.testing.assert_array_equal(code[real], exponent + 127)
        np.testing.assert_array_equal(code[x == np.inf], 254)
        np.testing.assert_array_equal(code[~(x > 0)], 255)

    def test_stochastic_gives_a_neighbour(self, scales):
        fmt = get("float8_e8m0fnu")
        codes = fmt.encode(scales, rounding="stochastic", key=jax.random.key(0))
        inside = (scales > 0) & (scales <= 2.0**127)
        rounded = np.asarray(fmt.decode(codes))[inside]
        below, above = oracle.neighbours(scales[inside], fmt.values())
        assert ((rounded == below) | (rounded == above)).all()


def test_infinities_and_nan_by_flavour():
    x = np.resize(np.array([np.inf, -np.inf, np.nan, 1e30, -1e30], np.float32), 1 << 16)

    def cast(name, saturate):
        return np.asarray(get(name).decode(get(name).encode(x, saturate=saturate)))[:5]

    inf, nan = np.inf, np.nan
    # With and without saturation, from the OCP 8-bit and microscaling specifications.
    expected = {
        "float8_e5m2": (
            [57344, -57344, nan, 57344, -57344],
            [inf, -inf, nan, inf, -inf],
        ),
        "float8_e4m3fn": ([448, -448, nan, 448, -448], [nan] * 5),
        "float8_e4m3fnuz": ([240, -240, nan, 240, -240], [nan] * 5),
        "float4_e2m1fn": ([6, -6, 0, 6, -6], [6, -6, 0, 6, -6]),
    }
    for name, (saturating, plain) in expected.items():
        np.testing.assert_array_equal(cast(name, True), saturating)
        np.testing.assert_array_equal(cast(name, False), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent_bits": 0, "num_mantissa_bits": 3}, "exponent_bits must be 1 to 8"),
        ({"exponent_bits": 9, "num_mantissa_bits": 3}, "exponent_bits must be 1 to 8"),
        ({"exponent_bits": 8, "num_mantissa_bits": 24}, "mantissa_bits 0 to 23"),
        ({"exponent_bits": 4, "num_mantissa_bits": -1}, "mantissa_bits 0 to 23"),
        ({"exponent_bits": 4, "num_mantissa_bits": 0}, "'ieee' keeps the top exponent"),
        ({"exponent_bits": 1, "num_mantissa_bits": 3}, "'ieee' keeps the top exponent"),
        (
            {"exponent_bits": 4, "num_mantissa_bits": 3, "flavour": "ocp"},
            "flavour must be one of",
        ),
        (
            {"exponent_bits": 8, "num_mantissa_bits": 3, "flavour": "fn"},
            "beyond float32",
        ),
        ({"exponent_bits": 4, "num_mantissa_bits": 3, "bias": 130}, "beyond float32"),
    ],
)
def test_invalid_formats_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FloatFormat("mine", **arguments)
