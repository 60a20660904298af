"""Table formats: published numbers, constructions, ties, tables in any order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import (
    CodebookFormat,
    decode_by_table,
    dynamic_map,
    get,
    normal_float,
    powers_of_two,
)
from tests.formats import oracle

# bitsandbytes' "fp4" in the order of its codes. It is not the E2M1 of the microscaling
# formats, and it has both zeros.
FP4 = tuple(np.float32(v) / np.float32(12) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
FP4 = (*FP4, *(-v for v in FP4))


def quantile(p: float) -> float:
    """The quantile of the standard normal distribution, by bisection."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < p:
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_is_even_in_probability(bits):
    # The probabilities are evenly spaced from `offset` to 1/2. The negative side has
    # one fewer.
    half = 2 ** (bits - 1)
    offset = (2 - 1 / (4 * half - 2) - 1 / (4 * half)) / 2
    up = [quantile(offset + (0.5 - offset) * i / half) for i in range(half)]
    down = [quantile(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    expected = np.array([*(-q for q in down), 0.0, *up[::-1]]) / up[0]
    table = np.asarray(normal_float(bits))
    np.testing.assert_allclose(table, expected, rtol=2**-23, atol=1e-12)
    assert table.tolist() == sorted(table.tolist())


def test_nf4_is_the_published_table():
    # Appendix E of "QLoRA" (2023), to the digits that decide a float32.
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_array_equal(get("nf4").table, np.float32(published))
    np.testing.assert_allclose(normal_float(4), published, atol=2**-23)


def test_tables_equal_those_of_bitsandbytes():
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    for signed, name in ((True, "dynamic8"), (False, "udynamic8")):
        expected = functional.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_array_equal(
            np.asarray(dynamic_map(signed), np.float32), expected
        )
        np.testing.assert_array_equal(get(name).values(), expected)
    expected = functional.create_dynamic_map(True, max_exponent_bits=3, total_bits=4)
    np.testing.assert_array_equal(get("dynamic4").values(), expected.unique().numpy())
    np.testing.assert_array_equal(
        get("nf4").table, functional.get_4bit_type("nf4", device="cpu").numpy()
    )
    # bitsandbytes divides by its largest entry in float32. So the last bit of an entry
    # may differ.
    np.testing.assert_allclose(
        FP4, functional.get_4bit_type("fp4", device="cpu").numpy(), rtol=2**-22
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_follows_its_definition(signed, bits):
    # Each of 7 decades (with 8 bits) is cut into equal pieces. Its numbers are the
    # middles of them.
    positive = []
    num_decades = bits - 1
    for i in range(num_decades):
        num_pieces = 2**i if signed else 2 ** (i + 1)
        middles = 0.1 + 0.9 * (np.arange(num_pieces) + 0.5) / num_pieces
        positive += (10.0 ** (i + 1 - num_decades) * middles).tolist()
    negative = [-v for v in positive] if signed else []
    expected = sorted([0.0, 1.0, *positive, *negative])
    # The table is computed in float32, as in bitsandbytes.
    table = dynamic_map(signed, bits)
    assert len(table) == 2**bits
    np.testing.assert_allclose(table, expected, rtol=2**-21)


def test_powers_of_two_round_in_the_logarithm():
    fmt = get("log4")
    assert fmt.values().tolist() == [
        *(-(2.0**-e) for e in range(7)),
        0.0,
        *(2.0**-e for e in range(6, -1, -1)),
    ]
    x = np.random.default_rng(0).uniform(2**-6, 1, 1 << 12).astype(np.float32)
    rounded = np.asarray(fmt.decode(fmt.encode(x)))
    np.testing.assert_array_equal(
        rounded, 2.0 ** np.rint(np.log2(x.astype(np.float64)))
    )
    # The boundary of zero is half of the smallest power. It goes to zero.
    edge = np.float32(2.0**-7)
    above = np.nextafter(edge, np.float32(1))
    assert fmt.round([edge, above, -edge / 2]).tolist() == [0, 2.0**-6, 0]
    table, boundaries = powers_of_two(3)
    assert (len(table), len(boundaries)) == (7, 6)


@pytest.mark.parametrize(
    "name", ["nf2", "nf3", "nf4", "nf8", "af4", "dynamic8", "udynamic8", "fp4"]
)
def test_encode_takes_the_nearest_entry_and_the_lower_one_of_a_tie(name):
    fmt = CodebookFormat("fp4", FP4) if name == "fp4" else get(name)
    numbers = fmt.values()
    # bitsandbytes compares with midpoints in float32.
    middles = (numbers[:-1] + numbers[1:]) / np.float32(2)
    around = [np.nextafter(middles, np.float32(s)) for s in (-9, 9)]
    uniform = np.random.default_rng(0).uniform(-1.2, 1.2, 4096).astype(np.float32)
    x = np.concatenate([middles, *around, uniform])
    x = np.resize(x, 1 << 13)  # one shape for all tables
    expected = numbers[(x[:, None] > middles).sum(1)]
    np.testing.assert_array_equal(np.asarray(fmt.decode(fmt.encode(x))), expected)


def test_a_table_may_be_in_any_order():
    fmt = CodebookFormat("fp4", FP4)
    assert fmt.decode(jnp.arange(16)).tolist() == [float(v) for v in FP4]
    assert (fmt.bits, fmt.zero_code, len(fmt.values())) == (4, 0, 15)
    for mode in oracle.ROUNDINGS:
        # Every number gets its own code, except -0, which gets the code of +0.
        codes = fmt.encode(np.float32(FP4), rounding=mode).tolist()
        assert codes == [0 if c == 8 else c for c in range(16)], mode
    assert CodebookFormat("minus_first", (-0.0, 1.0, 0.0)).zero_code == 2


def test_stochastic_mean_is_the_number():
    # In n draws the share of the upper neighbour has the standard deviation
    # sqrt(p (1 - p) / n). Five standard deviations are allowed. The seed is fixed.
    draws = 1 << 12
    for fmt in (get("nf4"), get("log4"), CodebookFormat("fp4", FP4)):
        x = np.float32([-0.95, -0.3, -0.01, 0.0, 0.02, 0.05, 0.6, 0.875, 1.0])
        below, above = oracle.neighbours(x, fmt.values())
        many = np.broadcast_to(x[:, None], (x.size, draws))
        rounded = np.asarray(
            fmt.decode(fmt.encode(many, rounding="stochastic", key=jax.random.key(0)))
        )
        p = (x - below) / np.where(above > below, above - below, 1)
        share = (rounded == above[:, None].astype(np.float32)).mean(1)
        between = above > below
        assert (share[~between] == 1).all()
        bound = 5 * np.sqrt(p * (1 - p) / draws)
        assert (np.abs(share - p) <= bound)[between].all(), fmt


@pytest.mark.parametrize(
    ("table", "boundaries", "message"),
    [
        ((1.0,), None, "2 to 256 numbers"),
        (tuple(range(257)), None, "2 to 256 numbers"),
        ((1.0, math.nan), None, "entry 1 is not finite"),
        ((1.0, 1.0 + 1e-12), None, "repeats an entry"),
        ((0.0, 1.0, 2.0), (0.5,), "boundaries must be 2 numbers"),
        ((0.0, 1.0, 2.0), (1.5, 0.5), r"each between two .* got \(1.5, 0.5\)"),
    ],
)
def test_invalid_tables_raise(table, boundaries, message):
    with pytest.raises(ValueError, match=message):
        CodebookFormat("mine", table, boundaries)


def test_normal_float_of_an_invalid_width_raises():
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        normal_float(9)


def test_fp4_codes_equal_those_of_bitsandbytes():
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    bnb = pytest.importorskip("bitsandbytes", reason="compares codes with bitsandbytes")
    x = np.random.default_rng(0).uniform(-1, 1, 64 * 512).astype(np.float32)
    x = x.reshape(-1, 64)
    x[:, 0] = 1  # the largest magnitude of every block, so that its scale is 1
    packed, state = bnb.functional.quantize_4bit(
        torch.from_numpy(x), blocksize=64, quant_type="fp4"
    )
    bytes_ = packed.numpy().ravel()
    bnb_codes = np.stack([bytes_ >> 4, bytes_ & 15], -1).ravel()
    bnb_numbers = bnb.functional.dequantize_4bit(packed, state).numpy().ravel()
    fmt = get("float4_bitsandbytes")
    codes = np.asarray(fmt.encode(x.ravel()))
    np.testing.assert_array_equal(fmt.decode(jnp.asarray(codes)), bnb_numbers)
    # bitsandbytes also writes -0, which is code 8.
    np.testing.assert_array_equal(codes[codes != 0], bnb_codes[codes != 0])
    assert set(bnb_codes[codes == 0].tolist()) <= {0, 8}


def test_fp4_rounds_ties_to_the_smaller_magnitude():
    fmt = get("float4_bitsandbytes")
    positive = fmt.values()[fmt.values() >= 0]
    middle = (positive[1:] + positive[:-1]) / np.float32(2)
    for sign in (1, -1):
        np.testing.assert_array_equal(
            np.asarray(fmt.round(sign * middle)), sign * positive[:-1]
        )


@pytest.mark.parametrize("size", [3, 16, 256])
def test_decode_by_a_table_for_each_row(size):
    # Tables are in ascending order of the codes. Short tables use selects, long ones a
    # gather.
    random = np.random.default_rng(size)
    fmt = get("ternary") if size == 3 else get(f"uint{size.bit_length() - 1}")
    codebook = random.standard_normal((5, 1, size)).astype(np.float32)
    codes = random.choice(fmt.codes(), (5, 40))
    decode = functools.partial(decode_by_table, fmt)
    numbers = jax.jit(decode)(codebook, codes)
    expected = codebook[np.arange(5)[:, None], 0, codes.astype(int) - int(fmt.min)]
    if size == 3:  # code 0 of a signed integer format stays 0
        expected = np.where(codes == 0, 0, expected)
    np.testing.assert_array_equal(numbers, expected)
    # The gradient of the sum counts how often each entry is used.
    gradient = jax.jit(jax.grad(lambda table: decode(table, codes).sum()))(codebook)
    counts = [(codes == code).sum(1) for code in sorted(fmt.codes())]
    counts = np.stack(counts, axis=-1)
    if size == 3:
        counts[:, 1] = 0
    np.testing.assert_array_equal(gradient[:, 0], counts)
