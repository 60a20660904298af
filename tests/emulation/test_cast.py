"""cast: the values of encode and decode in one step, on every carrier, in every mode, to the bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import formats
from tests import tables
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
    """Numbers of the format, midpoints, their neighbours, every kind of float32; one size for all formats."""
    numbers = (
        formats.get(name).values()
        if formats.get(name).bits <= 16
        else np.float32([0, 1])
    )
    hard = oracle.hard_numbers(numbers[:: max(1, len(numbers) // 4096)])
    special = np.float32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    )
    return np.concatenate(
        [special, hard, oracle.random_patterns(SIZE - len(hard) - len(special), seed=1)]
    )


def same(actual, expected) -> bool:
    """Equal bits; any NaN equals any other."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    nan = np.isnan(actual.astype(np.float32))
    unsigned = f"u{actual.dtype.itemsize}"
    equal = (actual.view(unsigned) == expected.view(unsigned)) | nan
    return bool(equal.all() and (nan == np.isnan(expected.astype(np.float32))).all())


EVERY_KIND = ("bfloat16", "float8_e4m3fnuz", "float8_e8m0fnu", "int4", "nf4")


@pytest.mark.parametrize("name", tables.thinned([*FLOATS, *OTHERS], EVERY_KIND))
def test_is_decode_of_encode(name):
    fmt, x = formats.get(name), inputs(name)
    modes = [
        (rounding, saturate)
        for rounding in formats.ROUNDING_MODES
        for saturate in (True, False)
    ]

    @jax.jit
    def both(x, key):
        out = []
        for rounding, saturate in modes:
            options = {
                "rounding": rounding,
                "saturate": saturate,
                "key": key if rounding == "stochastic" else None,
            }
            out.append(
                (jaxq.cast(x, fmt, **options), fmt.decode(fmt.encode(x, **options)))
            )
        return out

    found = dict(zip(modes, both(x, jax.random.key(0)), strict=True))
    for mode, (value, expected) in found.items():
        assert same(value, expected), mode
    assert same(jaxq.cast(x, fmt), found["nearest_even", True][0]), "eager"


@pytest.mark.parametrize(
    "name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float6_e2m3fn"]
)
def test_is_ml_dtypes(name):
    x = inputs(name)
    dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    assert same(jax.jit(lambda x: jaxq.cast(x, name, saturate=False))(x), expected)


@pytest.mark.parametrize("name", WIDE)
def test_wide_formats_by_integer_arithmetic_on_python_numbers(name):
    fmt, x = formats.get(name), inputs(name)[:4096]
    got = np.asarray(jaxq.cast(x, name, saturate=False))
    m, low = fmt.mantissa_bits, 1 - fmt.bias
    real = np.isfinite(x)
    exponent = np.maximum(np.frexp(x[real].astype(np.float64))[1] - 1, low)
    unit = np.ldexp(1.0, exponent - m)
    expected = np.rint(x[real] / unit) * unit
    expected = np.where(
        np.abs(expected) > fmt.max, np.copysign(np.inf, expected), expected
    )
    np.testing.assert_array_equal(got[real].astype(np.float64), expected)
    assert same(got[~real], x[~real])
    codes = jax.jit(fmt.encode)(np.where(np.isnan(x), np.float32(0), x))
    assert codes.dtype == np.uint32
    finite = np.isfinite(x) & (np.abs(x) <= fmt.max)
    assert same(np.asarray(fmt.decode(codes))[finite], got[finite])


CARRIED = [
    (carrier, name)
    for carrier in ("bfloat16", "float16")
    for name in (*FLOATS, "float32", "float64", "tfloat32")
]


@pytest.mark.parametrize(("carrier", "name"), tables.thinned(CARRIED, CARRIED[::2]))
@np.errstate(all="ignore")  # numpy 2 warns of signalling NaN and of overflow in casts
def test_narrow_carriers_hold_what_comes_out(carrier, name):
    x = np.arange(1 << 16, dtype=np.uint16).view(
        getattr(ml_dtypes, carrier, np.float16)
    )
    wide = np.asarray(jaxq.cast(x.astype(np.float32), name, saturate=False))
    got = np.asarray(jaxq.cast(x, name, saturate=False))
    assert same(got, wide.astype(x.dtype))
    real = np.isfinite(
        got.astype(np.float32)
    )  # beyond the carrier's range there are infinities
    np.testing.assert_array_equal(
        got[real].astype(np.float32), wide[real]
    )  # nothing was rounded twice
    full = np.asarray(jaxq.cast(x, name)).astype(np.float64)
    if not name.endswith("fnuz") and name != "float32":
        assert np.isfinite(full[~np.isnan(x.astype(np.float32))]).all()
    assert np.nanmax(full) <= formats.get(name).max


def test_float64_is_rounded_once():
    # Through float32 the first would fall on a tie and go to 1; it lies above the tie.
    hard = [
        1 + 2.0**-8 + 2.0**-40,
        1 + 2.0**-8 - 2.0**-40,
        -(1 + 3 * 2.0**-8) + 2.0**-41,
        2.0**-134 + 2.0**-170,
        1e300,
    ]
    with jax.enable_x64(True):
        x = jnp.asarray(hard, jnp.float64)
        got = jax.jit(lambda x: jaxq.cast(x, "bfloat16"))(x)
        assert got.dtype == jnp.float64
        largest = (2 - 2.0**-7) * 2.0**127
        expected = [1 + 2.0**-7, 1.0, -(1 + 2.0**-7), 2.0**-133, largest]
        assert np.asarray(got).tolist() == expected
        wide = formats.get("float64")
        in_float32 = [float(np.float32(v)) for v in hard[:-1]] + [
            float(np.finfo(np.float32).max)
        ]
        for cast, expected in (
            (lambda x: jaxq.cast(x, "float64"), hard),
            (lambda x: wide.decode(wide.encode(x)), hard),
            (lambda x: jaxq.cast(x, "float32"), in_float32),
        ):
            assert np.asarray(jax.jit(cast)(x)).tolist() == expected
        with pytest.raises(TypeError, match="nf4 is computed in float32, x is float64"):
            jaxq.cast(x, "nf4")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        formats.get("float64").encode(1.0)


def test_a_rounding_inside_jit_is_not_dropped():
    a, b = np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)
    got = jax.jit(
        lambda a, b: (
            jaxq.cast(jaxq.cast(a, "bfloat16") + jaxq.cast(b, "bfloat16"), "bfloat16")
            * 3
        )
    )(a, b)
    half = ml_dtypes.bfloat16
    expected = (a.astype(half) + b.astype(half)).astype(np.float32) * 3
    np.testing.assert_array_equal(got, expected)


def test_stochastic_rounding_goes_up_with_the_probability_of_its_distance():
    # 2^16 draws of one number: the mean is the number up to four standard deviations.
    x = np.float32(1.001)
    cast = jax.jit(
        lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key)
    )
    many = np.asarray(cast(np.full(1 << 16, x), jax.random.key(0)))
    below, unit = np.float32(1.0), 2.0**-7
    assert set(many.tolist()) == {1.0, 1.0 + unit}
    share = (float(x) - below) / unit
    assert abs(np.mean(many > below) - share) < 4 * np.sqrt(
        share * (1 - share) / many.size
    )
    assert cast(np.float32([1.0, -2.5]), jax.random.key(1)).tolist() == [1.0, -2.5]


def test_gradient_passes_straight_through():
    x = np.float32([0.1, 3.0, 1000.0, -7.7])
    grad = jax.jit(
        jax.grad(
            lambda x: jnp.sum(
                jaxq.cast(x, "float8_e4m3fn") * np.arange(4, dtype=np.float32)
            )
        )
    )(x)
    assert grad.tolist() == [0, 1, 2, 3]
    assert jax.jit(jax.vmap(lambda x: jaxq.cast(x, "int4")))(x).tolist() == [
        0,
        3,
        7,
        -8,
    ]


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
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxq.cast(*arguments, **options)


def test_second_derivatives():
    assert (
        jax.jit(jax.hessian(lambda x: jaxq.cast(x, "bfloat16") ** 2))(np.float32(1.3))
        == 2
    )
