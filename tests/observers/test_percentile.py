"""Percentiles against numpy: exact for one array, within a bucket for a stream."""

import fractions
import functools

import jax
import numpy as np
import pytest

import jaxq
from jaxq import observers
from jaxq.observers import _percentile
from tests.observers import oracle
from tests.tables import thinned

PERCENTS = [99.9, 50, 99, 100, 90, 0.001, 25, 99.999, 99.9999, 66.6, 1]
SIZE = 300
DATA = {
    "normal": np.random.default_rng(0).standard_normal(SIZE),
    "repeated": np.random.default_rng(1).integers(-3, 4, SIZE).astype(float),
    "heavy": np.random.default_rng(2).standard_cauchy(SIZE) * 1e3,
    "subnormal": np.random.default_rng(3).integers(-50, 50, SIZE) * 2.0**-149,
    "positive": np.random.default_rng(4).uniform(2, 3, SIZE),
    "huge": np.random.default_rng(5).standard_normal(SIZE) * 5e37,
}
over_percents = pytest.mark.parametrize("p", thinned(PERCENTS, PERCENTS[:1]))


def mostly_zero(row, p):
    """Whether the range of p percent would leave out half of what is not zero."""
    tail = 1 - p / 100
    return np.mean(row != 0) <= min(2 * tail, max(tail, 0.5))


@over_percents
def test_nearest_rank_is_exact(p):
    # One array with a channel for each distribution, so that all share a compilation.
    x = np.stack(list(DATA.values())).astype(np.float32)
    obs = observers.percentile(p, method="nearest_rank", axis=0)
    high = np.asarray(obs.bounds_of(x)[1])
    expected = [
        np.abs(row).max()
        if mostly_zero(row, p)
        else oracle.nearest_rank(np.abs(row), p)
        for row in x
    ]
    np.testing.assert_array_equal(high, expected)
    state = obs.update(obs.init(x), x)
    np.testing.assert_array_equal(np.asarray(obs.bounds(state)[1]), high)
    low, high = (np.asarray(v) for v in obs.bounds(state, symmetric=False))
    tail = (100 - p) / 2
    for row, a, b in zip(x, low, high, strict=True):
        ends = (
            -oracle.nearest_rank(-row, 100 - tail),
            oracle.nearest_rank(row, 100 - tail),
        )
        if mostly_zero(row, p):
            ends = row.min(), row.max()
        assert (a, b) == (min(ends[0], 0), max(ends[1], 0))


@over_percents
def test_linear_is_numpys(p):
    x = np.stack([v for k, v in DATA.items() if k != "subnormal"]).astype(np.float32)
    x = x[[not mostly_zero(row, p) for row in x]]
    obs = observers.percentile(p, axis=0)
    state = obs.update(obs.init(x), x)
    for bounds in (obs.bounds_of(x), obs.bounds(state)):
        expected = np.percentile(np.abs(x).astype(np.float64), p, axis=1)
        np.testing.assert_allclose(np.asarray(bounds[1]), expected, rtol=1e-5)
    low, high = obs.bounds(state, symmetric=False)
    ends = np.percentile(
        x.astype(np.float64), [(100 - p) / 2, 100 - (100 - p) / 2], axis=1
    )
    # Between numbers of both signs the rounding is relative to their magnitudes.
    slack = 3e-7 * np.abs(x).max(axis=1)
    assert (np.abs(np.asarray(low) - np.minimum(ends[0], 0)) <= slack).all()
    assert (np.abs(np.asarray(high) - np.maximum(ends[1], 0)) <= slack).all()


# By percentile and method: the shares of numbers that are not zero, and whether the
# extremes are the range. 2 * (100 - p) percent is the limit for p of 75 and above.
MOSTLY_ZERO = [
    (99.9, "linear", {0.001: True, 0.003: False}),
    (90, "nearest_rank", {0.19: True, 0.21: False}),
    (60, "nearest_rank", {0.49: True, 0.51: False}),
    (20, "linear", {0.79: True, 0.81: False}),
]


@pytest.mark.parametrize(("p", "method", "shares"), MOSTLY_ZERO)
def test_the_extremes_of_what_is_not_zero(p, method, shares):
    size = 20000
    numbers = np.random.default_rng(0).standard_normal(size)
    order = np.random.default_rng(1).permutation(size)
    # A channel for each share and sign, so that all share a compilation.
    kinds = [(share, sign) for share in shares for sign in (0, -1)]
    x = np.stack(
        [
            np.where(
                np.arange(size) < round(share * size),
                sign * np.abs(numbers) if sign else numbers,
                0,
            )[order]
            for share, sign in kinds
        ]
    ).astype(np.float32)
    is_extreme = np.array([shares[share] for share, _ in kinds])
    is_negative = np.array([sign == -1 for _, sign in kinds])
    everything, first = np.ones(size, bool)[None], (np.arange(size) < 9000)[None]
    obs = observers.percentile(p, method=method, axis=0)

    def updated(state, x, where):
        return obs.update(state, x, where=where)

    one = updated(obs.init(x), x, everything)
    two = updated(updated(obs.init(x), x, first), x, ~first)
    zeros = updated(obs.init(x), np.zeros_like(x), first)
    masked = updated(zeros, np.zeros_like(x), ~everything)
    for bounds in (
        functools.partial(obs.bounds_of, x),
        functools.partial(obs.bounds, one),
        functools.partial(obs.bounds, two),
    ):
        low, high = map(np.asarray, bounds("int8"))
        np.testing.assert_array_equal(low, -high)
        np.testing.assert_array_equal(high == np.abs(x).max(axis=1), is_extreme)
        low, high = map(np.asarray, bounds("int8", symmetric=False))
        assert (high[~is_negative] > 0).all()
        assert (low < 0).all()
        ends = x.min(axis=1), np.maximum(x.max(axis=1), 0)
        np.testing.assert_array_equal(low[is_extreme], ends[0][is_extreme])
        np.testing.assert_array_equal(high[is_extreme], ends[1][is_extreme])
    np.testing.assert_array_equal(obs.bounds(masked), np.zeros((2, len(kinds))))


def test_interpolation_with_the_only_number_that_is_not_zero():
    # 99.9 percent is between the last zero and the number, a thousandth of the way.
    x = np.zeros(1000, np.float32)
    x[3] = -5
    obs = observers.percentile(99.9)
    assert [float(bound) for bound in obs.bounds_of(x)] == [-5, 5]
    weight = np.zeros((50, 2), np.float32)
    weight[:3, 0] = [1, -3, 2]
    spec = jaxq.QuantSpec("int8", clipping=observers.percentile(90))
    qt = jaxq.quantize(weight, spec)
    np.testing.assert_allclose(jaxq.dequantize(qt), weight, atol=1.5 / 127)


EXAMPLE = [(50, 0.55, 0.5), (90, 0.91, 0.9), (99, 0.991, 1.0)]


@pytest.mark.parametrize(
    ("p", "linear", "nearest_rank"), thinned(EXAMPLE, EXAMPLE[1:2])
)
def test_the_published_example(p, linear, nearest_rank):
    x = np.arange(1, 11, dtype=np.float32) / 10
    for method, expected in (("linear", linear), ("nearest_rank", nearest_rank)):
        assert float(
            observers.percentile(p, method=method).bounds_of(x)[1]
        ) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mantissa_bits", thinned([4, 2, 7], [2]))
def test_a_stream_is_exact_to_a_bucket(mantissa_bits):
    x = np.random.default_rng(0).standard_cauchy((4, 500)).astype(np.float32)
    for p in (99.05, 100):  # 99.05 is between two ranks
        obs = observers.percentile(p, mantissa_bits=mantissa_bits)
        state = obs.init(x[0])
        for row in x:
            state = obs.update(state, row)
        threshold = float(obs.bounds(state)[1])
        exact = np.percentile(np.abs(x), p, method="inverted_cdf")
        assert abs(threshold - exact) <= 2.0**-mantissa_bits * exact
        assert p != 100 or threshold == exact
        low, high = (float(v) for v in obs.bounds(state, symmetric=False))
        ends = np.percentile(x, [(100 - p) / 2, 50 + p / 2], method="inverted_cdf")
        np.testing.assert_allclose([low, high], ends, rtol=2.0 ** -(mantissa_bits - 1))


def test_outliers_cost_no_accuracy():
    # Bins of equal width would put all numbers but one into the first bin.
    x = np.random.default_rng(0).standard_normal((4, 500)).astype(np.float32)
    x[0, 0] = 1e9
    obs = observers.percentile(99.05)
    state = obs.init(x[0])
    for row in x:
        state = obs.update(state, row)
    assert float(obs.bounds(state)[1]) == pytest.approx(
        np.percentile(np.abs(x), 99.05), rel=0.04
    )


def test_shares_are_exact_for_any_count():
    numbers = np.array(
        [0, 1, 9, 10, 999, 1000, 2**24 + 1, 2**31 + 7, 2**32 - 1], np.uint64
    )
    texts = (
        "0",
        "1/10",
        "1/1000",
        "1/2",
        "1/1000000",
        "33333333/100000000",
        "99999999/100000000",
        "1/3",
    )
    parts = [fractions.Fraction(text) for text in texts]
    shares = jax.jit(lambda n: [_percentile._share(n, part) for part in parts])(
        numbers.astype(np.uint32)
    )
    for part, (whole, rest) in zip(parts, shares, strict=True):
        results = zip(numbers.tolist(), whole.tolist(), rest.tolist(), strict=True)
        for number, *result in results:
            expected = divmod(number * part.numerator, part.denominator)
            assert tuple(result) == expected


@pytest.mark.parametrize("p", [0, -1, 100.1, float("nan"), 99.12345678])
def test_p_is_checked(p):
    with pytest.raises(ValueError, match="p must be above 0 and at most 100"):
        observers.percentile(p)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="method must be one of linear, nearest_rank"):
        observers.percentile(99, method="nearest")
    with pytest.raises(
        ValueError, match="mantissa_bits must be a whole number from 0 to 8"
    ):
        observers.percentile(99, mantissa_bits=9)
