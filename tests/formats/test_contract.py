"""All registered formats and some others, times all promises of `Format`."""

import copy
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxq.formats import CodebookFormat, FloatFormat, Format, IntegerFormat, get, names
from tests import tables
from tests.arrays import assert_same
from tests.formats import oracle

SIZE = 1 << 12
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")

# (bits, max, min, smallest positive, number of distinct finite numbers) of registered
# formats, from their definitions.
FACTS = {
    "bfloat16": (
        16,
        (2 - 2.0**-7) * 2.0**127,
        -(2 - 2.0**-7) * 2.0**127,
        2.0**-133,
        2 * 0x7F80 - 1,
    ),
    "float16": (16, 65504, -65504, 2.0**-24, 2 * 0x7C00 - 1),
    "float8_e3m4": (8, 15.5, -15.5, 2.0**-6, 2 * 0x70 - 1),
    "float8_e4m3": (8, 240, -240, 2.0**-9, 2 * 0x78 - 1),
    "float8_e4m3b11fnuz": (8, 30, -30, 2.0**-13, 255),
    "float8_e4m3fn": (8, 448, -448, 2.0**-9, 253),
    "float8_e4m3fnuz": (8, 240, -240, 2.0**-10, 255),
    "float8_e5m2": (8, 57344, -57344, 2.0**-16, 2 * 0x7C - 1),
    "float8_e5m2fnuz": (8, 57344, -57344, 2.0**-17, 255),
    "float8_e8m0fnu": (8, 2.0**127, 2.0**-127, 2.0**-127, 255),
    "float6_e2m3fn": (6, 7.5, -7.5, 0.125, 63),
    "float6_e3m2fn": (6, 28, -28, 0.0625, 63),
    "float4_e1m2fn": (4, 3.5, -3.5, 0.5, 15),
    "float4_e2m1fn": (4, 6, -6, 0.5, 15),
    "float4_e3m0fn": (4, 16, -16, 0.25, 15),
    "int1": (1, 0, -1, 0, 2),
    **{f"int{b}": (b, 2 ** (b - 1) - 1, -(2 ** (b - 1)), 1, 2**b) for b in range(2, 9)},
    **{
        f"int{b}_sign_magnitude": (b, 2 ** (b - 1) - 1, 1 - 2 ** (b - 1), 1, 2**b - 1)
        for b in range(2, 9)
    },
    **{
        f"int{b}_narrow": (b, 2 ** (b - 1) - 1, 1 - 2 ** (b - 1), 1, 2**b - 1)
        for b in range(2, 9)
    },
    **{f"uint{b}": (b, 2**b - 1, 0, 1, 2**b) for b in range(1, 9)},
    # test_codebook.py tests the smallest numbers of the NormalFloats.
    **{f"nf{b}": (b, 1, -1, None, 2**b) for b in range(2, 9)},
    "nf4": (4, 1, -1, 0.07958029955625534, 16),
    "af4": (4, 1, -1, 0.04273164, 16),
    "float4_bitsandbytes": (4, 1, -1, 0.0625 / 12, 15),
    "binary": (1, 1, -1, 1, 2),
    "ternary": (2, 1, -1, 1, 3),
    **{
        f"log{b}": (b, 1, -1, 2.0 ** -(2 ** (b - 1) - 2), 2**b - 1) for b in range(2, 8)
    },
    "dynamic4": (4, 1, -0.8875, 5.5e-3, 16),
    "dynamic8": (8, 1, -0.99296875, 5.5e-7, 256),
    "udynamic8": (8, 1, 0, 3.25e-7, 256),
    "ulinear4": (4, 1, 1 / 16, 1 / 16, 16),
}
OTHERS = (
    FloatFormat("float12_e5m6", 5, 6),
    FloatFormat("float5_e2m2_low", 2, 2, -20, "fn"),
    get("q3.4"),
    get("uq0.8"),
    get("q0.15"),
    CodebookFormat("shuffled", (0.5, -2.0, 0.0, 7.0, -0.125)),
    CodebookFormat("two_zeros", (0.0, 1.0, -0.0, -1.0)),
    CodebookFormat("positive", (0.25, 1.0, 3.0)),
)
# These have too many numbers to list. tests/emulation/test_cast.py tests them.
WIDE = {"float32", "float64", "tfloat32"}
ALL = [*(get(name) for name in names() if name not in WIDE), *OTHERS]
# In families with all widths from 1 to 8, the widths 5, 6 and 7 are heavy.
IN_BETWEEN = re.compile(r"(u?int|nf|log)[567](_.*)?")
over_formats = pytest.mark.parametrize(
    "fmt",
    tables.thinned(ALL, [fmt for fmt in ALL if not IN_BETWEEN.fullmatch(fmt.name)]),
    ids=str,
)
# For tests that compile one program for each format.
over_some_formats = pytest.mark.parametrize(
    "fmt", tables.thinned(ALL, ALL[::12]), ids=str
)


@functools.cache
def values(fmt: Format) -> np.ndarray:
    return fmt.values()


@functools.cache
def inputs(fmt: Format) -> np.ndarray:
    """Numbers of the format, midpoints, their neighbours, and random numbers.

    They are ascending and have no NaN. The tests of one kind of format use all numbers
    of a format. Here about 512 of them must do.
    """
    numbers = values(fmt)[:: max(1, len(values(fmt)) // 512)]
    largest = min(2 * fmt.max, float(np.finfo(np.float32).max))
    random = np.random.default_rng(0).uniform(-1, 1, SIZE) ** 3 * largest
    special = np.array(
        [np.inf, -np.inf, 0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, fmt.max, fmt.min],
        np.float32,
    )
    hard = np.concatenate([special, oracle.hard_numbers(numbers)])
    assert len(hard) < SIZE
    return np.sort(np.concatenate([hard, random.astype(np.float32)])[:SIZE])


def decoded(fmt: Format, codes) -> np.ndarray:
    """The numbers of the codes, repeated up to one size for all formats."""
    codes = np.asarray(codes, fmt.code_dtype)
    repeated = np.resize(codes, max(SIZE, len(codes)))
    return np.asarray(fmt.decode(jnp.asarray(repeated)))


def run(
    fmt: Format, x, seed: int = 0
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The codes and the numbers of `x` in every mode.

    It is not jitted, so that all formats share compiled operations of one shape.
    """
    codes = {}
    for mode in ROUNDINGS:
        key = jax.random.key(seed) if mode == "stochastic" else None
        codes[mode] = fmt.encode(x, rounding=mode, key=key)
    codes["overflow"] = fmt.encode(x, saturate=False)
    return codes, {name: fmt.decode(code) for name, code in codes.items()}


@functools.cache
def results(fmt: Format):
    """The codes and the numbers of `inputs(fmt)`, one array for each mode."""
    return jax.tree.map(np.asarray, run(fmt, inputs(fmt)))


def in_range(fmt: Format, x: np.ndarray) -> np.ndarray:
    return (x >= fmt.min) & (x <= fmt.max)


def test_the_table_has_every_registered_format():
    missing = sorted(set(FACTS) - set(names()))
    assert not missing, f"not registered: {missing}"
    extra = [name for name in names() if name not in FACTS and name not in WIDE]
    assert not extra, f"add a row for {extra}"


@pytest.mark.parametrize(
    "name",
    tables.thinned(FACTS, [name for name in FACTS if not IN_BETWEEN.fullmatch(name)]),
)
def test_facts(name):
    fmt, (bits, largest, smallest, positive, count) = get(name), FACTS[name]
    numbers = values(fmt)
    assert (fmt.name, fmt.bits, len(numbers)) == (name, bits, count)
    assert (
        (fmt.max, fmt.min)
        == (numbers[-1], numbers[0])
        == (np.float32(largest), np.float32(smallest))
    )
    assert fmt.smallest_positive == min(numbers[numbers > 0], default=0)
    if positive is not None:
        assert fmt.smallest_positive == pytest.approx(positive, rel=1e-6)
    signed = isinstance(fmt, IntegerFormat) and fmt.signed
    assert fmt.code_dtype == (
        np.int8 if signed else np.uint16 if bits > 8 else np.uint8
    )


@over_formats
def test_values_ascend_and_are_distinct(fmt):
    numbers = values(fmt)
    assert numbers.dtype == np.float32
    assert np.isfinite(numbers).all()
    assert (np.diff(numbers.astype(np.float64)) > 0).all()
    assert not np.signbit(numbers[numbers == 0]).any()
    assert len(numbers) <= 2**fmt.bits


@over_formats
def test_codes_lists_every_code_that_encode_gives(fmt):
    codes = fmt.codes()
    assert codes.dtype == fmt.code_dtype
    patterns = codes.astype(np.int64) % 2**fmt.bits
    assert (np.diff(patterns) > 0).all(), "not in the order of the bit patterns"
    assert set(results(fmt)[0]["nearest_even"].tolist()) <= set(codes.tolist())
    assert fmt.zero_code in codes.tolist()
    if 0 in values(fmt):
        assert decoded(fmt, [fmt.zero_code])[0] == 0


@over_formats
def test_numbers_of_the_format_do_not_change(fmt):
    # A format may have two codes of zero. Then encode may give the other one.
    codes = np.resize(fmt.codes()[:: max(1, len(fmt.codes()) // SIZE)], SIZE)
    numbers = np.asarray(fmt.decode(jnp.asarray(codes)))
    again, _ = run(fmt, numbers, seed=1)
    finite = np.isfinite(numbers) & ((numbers != 0) | (fmt.kind == "float"))
    for mode, code in again.items():
        np.testing.assert_array_equal(
            np.asarray(code)[finite], codes[finite], err_msg=mode
        )
        decoded_again = np.asarray(fmt.decode(code))
        not_nan = np.isfinite(numbers)
        np.testing.assert_array_equal(decoded_again[not_nan], numbers[not_nan])


@over_formats
def test_rounds_to_a_neighbour_and_nearest_modes_to_the_nearer_one(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    inside = in_range(fmt, x)
    below, above = oracle.neighbours(x[inside], values(fmt))
    for mode in ROUNDINGS:
        rounded = numbers[mode][inside]
        assert ((rounded == below) | (rounded == above)).all(), mode
    if getattr(fmt, "boundaries", None) is not None:
        return  # a table with its own boundaries does not round to the nearer number
    half = (above - below) / 2
    for mode in ("nearest_even", "nearest_away"):
        # The boundaries of a table are midpoints rounded to float32.
        slack = 0
        if fmt.kind == "codebook":
            slack = np.spacing(np.abs(x[inside])).astype(np.float64)
        error = np.abs(numbers[mode][inside].astype(np.float64) - x[inside])
        far = error > half + slack
        if fmt.name == "float8_e8m0fnu":  # below 2^-126 it goes up, as in ml_dtypes
            far &= x[inside] >= 2.0**-126
        rounded = numbers[mode][inside]
        assert not far.any(), f"{mode}: {x[inside][far][:5]} became {rounded[far][:5]}"


@over_formats
def test_toward_zero_does_not_increase_the_magnitude(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    has_zero = in_range(fmt, x) & (0 in values(fmt))
    assert (np.abs(numbers["toward_zero"])[has_zero] <= np.abs(x)[has_zero]).all()


@over_formats
def test_rounding_is_monotone(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    if fmt.name == "float8_e8m0fnu":  # zero and negative numbers are NaN
        numbers = {mode: number[x > 0] for mode, number in numbers.items()}
    for mode in ("nearest_even", "nearest_away", "toward_zero"):
        assert (np.diff(numbers[mode].astype(np.float64)) >= 0).all(), mode


@over_formats
def test_numbers_beyond_the_range_saturate(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    for mode in ROUNDINGS:
        assert (numbers[mode][x > fmt.max] == np.float32(fmt.max)).all(), mode
        if fmt.name == "float8_e8m0fnu":
            assert np.isnan(numbers[mode][x <= 0]).all()
            assert (numbers[mode][(x > 0) & (x < fmt.min)] == np.float32(fmt.min)).all()
        else:
            assert (numbers[mode][x < fmt.min] == np.float32(fmt.min)).all(), mode


@over_formats
def test_nan_becomes_nan_or_one_fixed_number(fmt):
    nan = np.array([np.nan, -np.nan] * (SIZE // 2), np.float32)
    _, numbers = run(fmt, nan)
    has_nan = np.isnan(decoded(fmt, fmt.codes())).any()
    for mode, number in numbers.items():
        if has_nan:
            assert np.isnan(number).all(), mode
        else:  # the lowest entry of a table, else zero
            expected = fmt.min if fmt.kind == "codebook" else 0
            assert (np.asarray(number) == expected).all(), mode


@over_formats
def test_rounding_twice_changes_nothing(fmt):
    codes, numbers = results(fmt)
    for mode in ROUNDINGS:
        key = jax.random.key(2) if mode == "stochastic" else None
        again = np.asarray(fmt.encode(numbers[mode], rounding=mode, key=key))
        real = ~np.isnan(numbers[mode])
        np.testing.assert_array_equal(again[real], codes[mode][real], err_msg=mode)


@over_some_formats
def test_jitted_equals_eager(fmt):
    @jax.jit
    def encode_and_decode(x):
        codes = fmt.encode(x)
        return codes, fmt.decode(codes)

    codes, numbers = encode_and_decode(inputs(fmt))
    assert (codes.dtype, codes.shape) == (fmt.code_dtype, (SIZE,))
    assert (numbers.dtype, numbers.shape) == (np.float32, (SIZE,))
    eager_codes, eager_numbers = results(fmt)
    assert_same(codes, eager_codes["nearest_even"])
    assert_same(numbers, eager_numbers["nearest_even"])


one_of_each_kind = pytest.mark.parametrize(
    "name", ["bfloat16", "float4_e2m1fn", "float8_e8m0fnu", "int4", "nf4", "nf8"]
)


@one_of_each_kind
def test_jitted_equals_eager_in_every_mode(name):
    fmt = get(name)
    assert_same(jax.jit(functools.partial(run, fmt))(inputs(fmt)), results(fmt))


@one_of_each_kind
def test_vmap_scalars_and_bfloat16(name):
    fmt = get(name)
    x = inputs(fmt).reshape(4, -1)
    half = jnp.asarray(x).astype(jnp.bfloat16)

    @jax.jit
    def every_way(x, half, widened):
        return (
            jax.vmap(fmt.encode)(x),
            fmt.encode(x[0, 5]),
            fmt.encode(half),
            fmt.encode(widened),
        )

    widened = np.asarray(half).astype(np.float32)
    mapped, scalar, from_half, from_widened = every_way(x, half, widened)
    np.testing.assert_array_equal(mapped.reshape(-1), results(fmt)[0]["nearest_even"])
    assert (scalar.shape, scalar) == ((), mapped[0, 5])
    np.testing.assert_array_equal(from_half, from_widened)  # also subnormal numbers


@over_formats
def test_shapes_and_dtypes(fmt):
    for shape in ((), (0, 3), (2, 1, 5)):
        codes = jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct(shape, np.float32))
        assert (codes.shape, codes.dtype) == (shape, fmt.code_dtype)
        numbers = jax.eval_shape(fmt.decode, codes)
        assert (numbers.shape, numbers.dtype) == (shape, np.float32)


@over_formats
def test_formats_are_compared_by_value(fmt):
    for twin in (pickle.loads(pickle.dumps(fmt)), copy.deepcopy(fmt)):
        assert twin == fmt
        assert hash(twin) == hash(fmt)
    assert str(fmt) == fmt.name
    assert [other for other in ALL if other == fmt] == [fmt]


def test_equal_formats_share_one_trace():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def encode(x, fmt):
        traces.append(fmt)
        return fmt.encode(x)

    for fmt in (
        FloatFormat("f", 4, 3),
        FloatFormat("f", 4, 3, 7),
        pickle.loads(pickle.dumps(FloatFormat("f", 4, 3))),
    ):
        encode(jnp.ones(3), fmt)
    assert len(traces) == 1


@over_formats
def test_rounding_and_key_are_checked(fmt):
    with pytest.raises(ValueError, match="rounding must be one of nearest_even"):
        fmt.encode(1.0, rounding="up")
    with pytest.raises(ValueError, match="needs a PRNG key"):
        fmt.encode(1.0, rounding="stochastic")
    with pytest.raises(ValueError, match="does not use it"):
        fmt.encode(1.0, key=jax.random.key(0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_values_are_known_inside_shard_map(kind):
    """Lists of numbers are constants, also where the axes of the mesh are Manual."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    fmt = get("float6_e3m2fn")

    def shard(x):
        return x + float(fmt.values()[-1])

    shard = jax.shard_map(shard, mesh=mesh, in_specs=P(), out_specs=P())
    with jax.set_mesh(mesh):
        y = jax.jit(shard)(jnp.zeros(4))
    assert float(y[0]) == fmt.max
