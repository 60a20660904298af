"""cast: equal to decode of encode, bit for bit, in all dtypes and all modes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import formats
from tests import tables
from tests.arrays import assert_same
from tests.formats import oracle

FLOATS = [
    name
    for name in formats.names()
    if formats.get(name).kind == "float" and formats.get(name).bits <= 16
]
FLOATS = [name for name in FLOATS if name != "float8_e8m0fnu"]
OTHERS = (
    "float8_e8m0fnu",
    "int4",
    "int8_narrow",
    "nf4",
    "dynamic8",
    "log4",
    "q3.4",
    "uq0.8",
    "int4_sign_magnitude",
)
WIDE = ("tfloat32", "float32", "float20_e8m11", "float19_e6m12")
SIZE = 1 << 17


@functools.cache
def inputs(name: str) -> np.ndarray:
    """Numbers of the format, midpoints, their neighbours, and random float32 patterns.

    The size is the same for all formats.
    """
    fmt = formats.get(name)
    numbers = fmt.values() if fmt.bits <= 16 else np.float32([0, 1])
    hard = oracle.hard_numbers(numbers[:: max(1, len(numbers) // 4096)])
    special = np.float32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    )
    num_random = SIZE - len(hard) - len(special)
    return np.concatenate([special, hard, oracle.random_patterns(num_random, seed=1)])


ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
EVERY_KIND = ("bfloat16", "float8_e4m3fnuz", "float8_e8m0fnu", "int4", "nf4")


@pytest.mark.parametrize("name", tables.thinned([*FLOATS, *OTHERS], EVERY_KIND))
def test_cast_equals_decode_of_encode(name):
    fmt, x = formats.get(name), inputs(name)

    @jax.jit
    def both_ways(x, key):
        rounded, decoded = {}, {}
        for rounding, saturate in itertools.product(ROUNDINGS, (True, False)):
            mode = f"{rounding}, saturate={saturate}"
            options = {"rounding": rounding, "saturate": saturate}
            options["key"] = key if rounding == "stochastic" else None
            rounded[mode] = jaxq.cast(x, fmt, **options)
            decoded[mode] = fmt.decode(fmt.encode(x, **options))
        return rounded, decoded

    rounded, decoded = both_ways(x, jax.random.key(0))
    assert_same(rounded, decoded)
    eager = jaxq.cast(x, fmt)
    assert_same(eager, rounded["nearest_even, saturate=True"])


@pytest.mark.parametrize(
    "name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float6_e2m3fn"]
)
def test_cast_equals_ml_dtypes(name):
    x = inputs(name)
    dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    cast = jax.jit(lambda x: jaxq.cast(x, name, saturate=False))
    assert_same(cast(x), expected)


@pytest.mark.parametrize("name", WIDE)
def test_wide_formats_against_float64(name):
    fmt, x = formats.get(name), inputs(name)[:4096]
    rounded = np.asarray(jaxq.cast(x, name, saturate=False))
    m, low = fmt.mantissa_bits, 1 - fmt.bias
    real = np.isfinite(x)
    exponent = np.maximum(np.frexp(x[real].astype(np.float64))[1] - 1, low)
    unit = np.ldexp(1.0, exponent - m)
    expected = np.rint(x[real] / unit) * unit
    over = np.abs(expected) > fmt.max
    expected = np.where(over, np.copysign(np.inf, expected), expected)
    np.testing.assert_array_equal(rounded[real].astype(np.float64), expected)
    assert_same(rounded[~real], x[~real])
    codes = jax.jit(fmt.encode)(np.where(np.isnan(x), np.float32(0), x))
    assert codes.dtype == np.uint32
    finite = np.isfinite(x) & (np.abs(x) <= fmt.max)
    assert_same(np.asarray(fmt.decode(codes))[finite], rounded[finite])


CARRIED = [
    (carrier, name)
    for carrier in ("bfloat16", "float16")
    for name in (*FLOATS, "float32", "float64", "tfloat32")
]


@pytest.mark.parametrize(("carrier", "name"), tables.thinned(CARRIED, CARRIED[::2]))
@np.errstate(all="ignore")  # numpy 2 warns of signalling NaN and of overflow in casts
def test_float16_and_bfloat16_arrays_are_rounded_once(carrier, name):
    dtype = getattr(ml_dtypes, carrier, np.float16)
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = np.asarray(jaxq.cast(x.astype(np.float32), name, saturate=False))
    rounded = np.asarray(jaxq.cast(x, name, saturate=False))
    assert_same(rounded, wide.astype(x.dtype))
    # Numbers beyond the range of the dtype are infinite. All others are exact.
    real = np.isfinite(rounded.astype(np.float32))
    np.testing.assert_array_equal(rounded[real].astype(np.float32), wide[real])
    full = np.asarray(jaxq.cast(x, name)).astype(np.float64)
    if not name.endswith("fnuz") and name != "float32":
        assert np.isfinite(full[~np.isnan(x.astype(np.float32))]).all()
    assert np.nanmax(full) <= formats.get(name).max


def test_float64_is_rounded_once():
    # The first number is above a tie. Rounded to float32 it would be on the tie.
    hard = [
        1 + 2.0**-8 + 2.0**-40,
        1 + 2.0**-8 - 2.0**-40,
        -(1 + 3 * 2.0**-8) + 2.0**-41,
        2.0**-134 + 2.0**-170,
        1e300,
    ]
    with jax.enable_x64(True):
        x = jnp.asarray(hard, jnp.float64)
        rounded = jax.jit(lambda x: jaxq.cast(x, "bfloat16"))(x)
        assert rounded.dtype == jnp.float64
        largest = (2 - 2.0**-7) * 2.0**127
        expected = [1 + 2.0**-7, 1.0, -(1 + 2.0**-7), 2.0**-133, largest]
        assert np.asarray(rounded).tolist() == expected
        wide = formats.get("float64")
        largest = float(np.finfo(np.float32).max)
        in_float32 = [*(float(np.float32(v)) for v in hard[:-1]), largest]
        for cast, expected in (
            (lambda x: jaxq.cast(x, "float64"), hard),
            (lambda x: wide.decode(wide.encode(x)), hard),
            (lambda x: jaxq.cast(x, "float32"), in_float32),
        ):
            assert np.asarray(jax.jit(cast)(x)).tolist() == expected
        with pytest.raises(TypeError, match="nf4 is computed in float32, but x"):
            jaxq.cast(x, "nf4")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        formats.get("float64").encode(1.0)


def test_xla_does_not_remove_a_cast_inside_jit():
    a, b = np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)

    @jax.jit
    def fn(a, b):
        total = jaxq.cast(a, "bfloat16") + jaxq.cast(b, "bfloat16")
        return jaxq.cast(total, "bfloat16") * 3

    half = ml_dtypes.bfloat16
    expected = (a.astype(half) + b.astype(half)).astype(np.float32) * 3
    np.testing.assert_array_equal(fn(a, b), expected)


def test_stochastic_rounding_up_has_the_probability_of_the_distance():
    # In 2^16 draws the share that goes up may differ by four standard deviations.
    x = np.float32(1.001)
    cast = jax.jit(
        lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key)
    )
    many = np.asarray(cast(np.full(1 << 16, x), jax.random.key(0)))
    below, unit = np.float32(1.0), 2.0**-7
    assert set(many.tolist()) == {1.0, 1.0 + unit}
    share = (float(x) - below) / unit
    deviation = np.sqrt(share * (1 - share) / many.size)
    assert abs(np.mean(many > below) - share) < 4 * deviation
    assert cast(np.float32([1.0, -2.5]), jax.random.key(1)).tolist() == [1.0, -2.5]


def test_gradient_is_straight_through():
    x = np.float32([0.1, 3.0, 1000.0, -7.7])
    weights = np.arange(4, dtype=np.float32)

    def weighted_sum(x):
        return jnp.sum(jaxq.cast(x, "float8_e4m3fn") * weights)

    assert jax.jit(jax.grad(weighted_sum))(x).tolist() == [0, 1, 2, 3]


def test_vmap():
    x = np.float32([0.1, 3.0, 1000.0, -7.7])
    to_int4 = jax.jit(jax.vmap(lambda x: jaxq.cast(x, "int4")))
    assert to_int4(x).tolist() == [0, 3, 7, -8]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones(3, np.int32), "bfloat16"), {}, TypeError, "got int32.*astype"),
        (
            (np.ones(3, np.float32), "bfloat17"),
            {},
            ValueError,
            "cast: unknown format 'bfloat17'. Did you mean 'bfloat16'",
        ),
        (
            (np.ones(3, np.float32), "bfloat16"),
            {"rounding": "up"},
            ValueError,
            "cast: rounding must be one of",
        ),
        (
            (np.ones(3, np.float32), "bfloat16"),
            {"rounding": "stochastic"},
            ValueError,
            "needs a PRNG key",
        ),
        (
            (np.ones(3, jnp.bfloat16), "nf4"),
            {},
            TypeError,
            "bfloat16 cannot hold the numbers of nf4",
        ),
        (
            (np.ones(3, np.float16), "float8_e8m0fnu"),
            {},
            TypeError,
            "float16 cannot hold",
        ),
    ],
)
def test_invalid_arguments_raise(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxq.cast(*arguments, **options)


def test_second_derivatives():
    second = jax.jit(jax.hessian(lambda x: jaxq.cast(x, "bfloat16") ** 2))
    assert second(np.float32(1.3)) == 2
