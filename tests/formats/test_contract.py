"""One table: every registered format, and some nobody registered, times every promise of `Format`."""

import copy
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import CodebookFormat, FloatFormat, Format, IntegerFormat, get, names
from tests import tables
from tests.formats import oracle

SIZE = 1 << 12
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")

# (bits, max, min, smallest positive, distinct finite numbers) of what is registered, from the formats' definitions.
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
    # The NormalFloats' smallest numbers are the construction's own business: see test_codebook.py.
    **{f"nf{b}": (b, 1, -1, None, 2**b) for b in range(2, 9)},
    "nf4": (4, 1, -1, 0.07958029955625534, 16),
    "af4": (4, 1, -1, 0.04273164, 16),
    "float4_bitsandbytes": (4, 1, -1, 0.0625 / 12, 15),
    "binary": (1, 1, -1, 1, 2),
    "ternary": (2, 1, -1, 1, 3),
    **{
        f"log{b}": (b, 1, -1, 2.0 ** -(2 ** (b - 1) - 2), 2**b - 1) for b in range(2, 8)
    },
    "dynamic8": (8, 1, -0.99296875, 5.5e-7, 256),
    "udynamic8": (8, 1, 0, 3.25e-7, 256),
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
# Too many numbers to list: tests/emulation/test_cast.py has them.
WIDE = {"float32", "float64", "tfloat32"}
ALL = [*(get(name) for name in names() if name not in WIDE), *OTHERS]
# Of families that come in every width the widths from 5 to 7 are heavy.
IN_BETWEEN = re.compile(r"(u?int|nf|log)[567](_.*)?")
over_formats = pytest.mark.parametrize(
    "fmt",
    tables.thinned(ALL, [fmt for fmt in ALL if not IN_BETWEEN.fullmatch(fmt.name)]),
    ids=str,
)
# Where each is a program of its own.
over_some_formats = pytest.mark.parametrize(
    "fmt", tables.thinned(ALL, ALL[::12]), ids=str
)


@functools.cache
def values(fmt: Format) -> np.ndarray:
    return fmt.values()


@functools.cache
def inputs(fmt: Format) -> np.ndarray:
    """The format's numbers, what lies half-way and next to them, and numbers of every size; ascending, no NaN."""
    numbers = values(fmt)[
        :: max(1, len(values(fmt)) // 512)
    ]  # all of them are tried in the tests of one kind
    random = np.random.default_rng(0).uniform(-1, 1, SIZE) ** 3 * min(
        2 * fmt.max, float(np.finfo(np.float32).max)
    )
    special = np.array(
        [np.inf, -np.inf, 0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, fmt.max, fmt.min],
        np.float32,
    )
    hard = np.concatenate([special, oracle.hard_numbers(numbers)])
    assert len(hard) < SIZE
    return np.sort(np.concatenate([hard, random.astype(np.float32)])[:SIZE])


def decoded(fmt: Format, codes) -> np.ndarray:
    """Numbers of some codes, over and over up to one size for all formats."""
    return np.asarray(
        fmt.decode(
            jnp.asarray(
                np.resize(np.asarray(codes, fmt.code_dtype), max(SIZE, len(codes)))
            )
        )
    )


def run(
    fmt: Format, x, seed: int = 0
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(codes, numbers) of `x` in every mode. Not jitted: on arrays of one shape all formats share the operations."""
    codes = {
        r: fmt.encode(
            x, rounding=r, key=jax.random.key(seed) if r == "stochastic" else None
        )
        for r in ROUNDINGS
    }
    codes["overflow"] = fmt.encode(x, saturate=False)
    return codes, {name: fmt.decode(code) for name, code in codes.items()}


@functools.cache
def results(fmt: Format):
    """(codes, numbers) of `inputs`, one array a mode."""
    return jax.tree.map(np.asarray, run(fmt, inputs(fmt)))


def in_range(fmt: Format, x: np.ndarray) -> np.ndarray:
    return (x >= fmt.min) & (x <= fmt.max)


def test_the_table_has_every_registered_format():
    # Formats that examples in docstrings register may be there too, when those ran first in this process.
    assert set(FACTS) <= set(names()), (
        f"not registered: {sorted(set(FACTS) - set(names()))}"
    )
    extra = {
        name
        for name in set(names()) - set(FACTS) - WIDE
        if not name.startswith("float")
    }
    assert not extra, f"add a row for {sorted(extra)}"


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
def test_codes_are_all_there_is(fmt):
    codes = fmt.codes()
    assert codes.dtype == fmt.code_dtype
    patterns = codes.astype(np.int64) % 2**fmt.bits
    assert (np.diff(patterns) > 0).all(), (
        "codes come in the order of their bit patterns"
    )
    assert {np.asarray(c).item() for c in results(fmt)[0]["nearest_even"]} <= set(
        codes.tolist()
    )
    assert fmt.zero_code in codes.tolist()
    if 0 in values(fmt):
        assert decoded(fmt, [fmt.zero_code])[0] == 0


@over_formats
def test_every_number_is_its_own_nearest(fmt):
    # Only a second code of zero, where a table or the sign gives one, may come back as another code.
    codes = np.resize(fmt.codes()[:: max(1, len(fmt.codes()) // SIZE)], SIZE)
    numbers = np.asarray(fmt.decode(jnp.asarray(codes)))
    again, _ = run(fmt, numbers, seed=1)
    finite = np.isfinite(numbers) & ((numbers != 0) | (fmt.kind == "float"))
    for mode, code in again.items():
        np.testing.assert_array_equal(
            np.asarray(code)[finite], codes[finite], err_msg=mode
        )
        np.testing.assert_array_equal(
            np.asarray(fmt.decode(code))[np.isfinite(numbers)],
            numbers[np.isfinite(numbers)],
        )


@over_formats
def test_rounds_to_a_neighbour_and_to_the_nearer_one(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    inside = in_range(fmt, x)
    below, above = oracle.neighbours(x[inside], values(fmt))
    for mode in ROUNDINGS:
        rounded = numbers[mode][inside]
        assert ((rounded == below) | (rounded == above)).all(), mode
    if getattr(fmt, "boundaries", None) is not None:
        return  # a table with its own boundaries does not go to the nearer number
    half = (above - below) / 2
    for mode in ("nearest_even", "nearest_away"):
        # A table's boundaries are float32 midpoints, half a unit in the last place from the true ones.
        slack = (
            0
            if fmt.kind != "codebook"
            else np.spacing(np.abs(x[inside])).astype(np.float64)
        )
        error = np.abs(numbers[mode][inside].astype(np.float64) - x[inside])
        far = error > half + slack
        if fmt.name == "float8_e8m0fnu":  # below 2^-126 it goes up, as in ml_dtypes
            far &= x[inside] >= 2.0**-126
        assert not far.any(), (
            f"{mode}: {x[inside][far][:5]} became {numbers[mode][inside][far][:5]}"
        )


@over_formats
def test_toward_zero_does_not_grow(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    has_zero = in_range(fmt, x) & (0 in values(fmt))
    assert (np.abs(numbers["toward_zero"])[has_zero] <= np.abs(x)[has_zero]).all()


@over_formats
def test_monotone(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    if fmt.name == "float8_e8m0fnu":  # zero and what is below it are NaN
        numbers = {mode: number[x > 0] for mode, number in numbers.items()}
    for mode in ("nearest_even", "nearest_away", "toward_zero"):
        assert (np.diff(numbers[mode].astype(np.float64)) >= 0).all(), mode


@over_formats
def test_saturates(fmt):
    x, (_, numbers) = inputs(fmt), results(fmt)
    for mode in ROUNDINGS:
        assert (numbers[mode][x > fmt.max] == np.float32(fmt.max)).all(), mode
        if fmt.name == "float8_e8m0fnu":
            assert np.isnan(numbers[mode][x <= 0]).all()
            assert (numbers[mode][(x > 0) & (x < fmt.min)] == np.float32(fmt.min)).all()
        else:
            assert (numbers[mode][x < fmt.min] == np.float32(fmt.min)).all(), mode


@over_formats
def test_nan_is_nan_where_there_is_one(fmt):
    nan = np.array([np.nan, -np.nan] * (SIZE // 2), np.float32)
    _, numbers = run(fmt, nan)
    has_nan = np.isnan(decoded(fmt, fmt.codes())).any()
    for mode, number in numbers.items():
        if has_nan:
            assert np.isnan(number).all(), mode
        else:  # one fixed number: zero for floats and integers, the lowest entry for tables
            assert (
                np.asarray(number) == (fmt.min if fmt.kind == "codebook" else 0)
            ).all(), mode


@over_formats
def test_idempotent(fmt):
    codes, numbers = results(fmt)
    for mode in ROUNDINGS:
        key = jax.random.key(2) if mode == "stochastic" else None
        again = np.asarray(fmt.encode(numbers[mode], rounding=mode, key=key))
        real = ~np.isnan(numbers[mode])
        np.testing.assert_array_equal(again[real], codes[mode][real], err_msg=mode)


@over_some_formats
def test_jit_is_eager(fmt):
    codes, numbers = jax.jit(lambda x: (codes := fmt.encode(x), fmt.decode(codes)))(
        inputs(fmt)
    )
    assert (codes.dtype, codes.shape) == (fmt.code_dtype, (SIZE,))
    assert (numbers.dtype, numbers.shape) == (np.float32, (SIZE,))
    np.testing.assert_array_equal(codes, results(fmt)[0]["nearest_even"])
    # By bits, so that the sign of zero counts.
    np.testing.assert_array_equal(
        np.asarray(numbers).view(np.uint32),
        results(fmt)[1]["nearest_even"].view(np.uint32),
    )


one_of_each_kind = pytest.mark.parametrize(
    "name", ["bfloat16", "float4_e2m1fn", "float8_e8m0fnu", "int4", "nf4", "nf8"]
)


@one_of_each_kind
def test_jit_is_eager_in_every_mode(name):
    x, fmt = inputs(get(name)), get(name)
    codes, numbers = jax.tree.map(np.asarray, jax.jit(functools.partial(run, fmt))(x))
    for mode, code in codes.items():
        np.testing.assert_array_equal(code, results(fmt)[0][mode], err_msg=mode)
        np.testing.assert_array_equal(
            numbers[mode].view(np.uint32), results(fmt)[1][mode].view(np.uint32)
        )


@one_of_each_kind
def test_vmap_scalars_and_lower_precision(name):
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

    mapped, scalar, from_half, from_widened = every_way(
        x, half, np.asarray(half).astype(np.float32)
    )
    np.testing.assert_array_equal(mapped.reshape(-1), results(fmt)[0]["nearest_even"])
    assert (scalar.shape, scalar) == ((), mapped[0, 5])
    np.testing.assert_array_equal(from_half, from_widened)  # subnormal ones too


@over_formats
def test_shapes(fmt):
    for shape in ((), (0, 3), (2, 1, 5)):
        codes = jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct(shape, np.float32))
        assert (codes.shape, codes.dtype) == (shape, fmt.code_dtype)
        numbers = jax.eval_shape(fmt.decode, codes)
        assert (numbers.shape, numbers.dtype) == (shape, np.float32)


@over_formats
def test_compared_by_value(fmt):
    copies = [pickle.loads(pickle.dumps(fmt)), copy.deepcopy(fmt)]
    for same in copies:
        assert same == fmt
        assert hash(same) == hash(fmt)
    assert str(fmt) == fmt.name
    assert [other for other in ALL if other == fmt] == [fmt]


def test_equal_formats_share_one_trace():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, fmt):
        traces.append(fmt)
        return fmt.encode(x)

    for fmt in (
        FloatFormat("f", 4, 3),
        FloatFormat("f", 4, 3, 7),
        pickle.loads(pickle.dumps(FloatFormat("f", 4, 3))),
    ):
        run(jnp.ones(3), fmt)
    assert len(traces) == 1


@over_formats
def test_rounding_and_key_are_checked(fmt):
    with pytest.raises(ValueError, match="rounding must be one of nearest_even"):
        fmt.encode(1.0, rounding="up")
    with pytest.raises(ValueError, match="needs a PRNG key"):
        fmt.encode(1.0, rounding="stochastic")
    with pytest.raises(ValueError, match="does not use it"):
        fmt.encode(1.0, key=jax.random.key(0))
