"""The error of every observer's range on data of many shapes.

The least error of a grid of ranges, computed in float64, is the witness.
"""

import numpy as np
import pytest

from jaxq import formats, observers

SIZE = 20000
NORMAL = np.random.default_rng(0).standard_normal(SIZE)
_RANDOM = np.random.default_rng(1)
DATA = {
    "normal": NORMAL,
    "negative": -np.abs(NORMAL),
    "positive": np.abs(NORMAL),
    "around_10": NORMAL + 10,
    "pixels": _RANDOM.integers(100, 256, SIZE),
    "two_bands": _RANDOM.uniform(1, 5, SIZE) * _RANDOM.choice([-1, 1], SIZE),
    "relu": np.maximum(NORMAL, 0),
    "sparse": np.where(_RANDOM.uniform(size=SIZE) < 0.8, 0, np.abs(NORMAL)),
    "very_sparse": np.where(np.arange(SIZE) % 1000 == 0, NORMAL, 0),
    "constant": np.full(SIZE, 3.25),
    "zero": np.zeros(SIZE),
    "outlier": np.where(np.arange(SIZE) == 5, 100.0, NORMAL),
}
X = np.stack(list(DATA.values())).astype(np.float32)
OBSERVERS = {
    "absmax": observers.absmax(axis=0),
    "entropy": observers.entropy(axis=0),
    "histogram": observers.histogram(axis=0),
    "minmax": observers.minmax(axis=0),
    "moving_average": observers.moving_average(axis=0),
    "mse": observers.mse(axis=0),
    "percentile": observers.percentile(99.995, axis=0),  # clips one number in 20000
}
CODES = [("int8", True), ("int8", False), ("uint8", False)]
# They may clip a single outlier, or spend half of the codes on its mirror image.
NO_LIMIT_WITH_AN_OUTLIER = ("absmax", "entropy", "percentile")


def sqnr(x, low, high, fmt, symmetric):
    """In dB, of codes for a range; 200 dB if all numbers are exact."""
    x = x.astype(np.float64)
    if symmetric:
        scale = max(high, -low) / fmt.max
        codes = np.clip(np.rint(x / (scale or 1)), -fmt.max, fmt.max)
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (fmt.max - fmt.min)
        zero = np.rint(fmt.min - low / (scale or 1))
        codes = np.clip(np.rint(x / (scale or 1)) + zero, fmt.min, fmt.max) - zero
    error = np.sum((codes * scale - x) ** 2)
    signal = np.sum(x**2)
    return 200.0 if error <= 1e-20 * signal else 10 * np.log10(signal / error)


def best_sqnr(x, fmt, symmetric):
    """The best of many ranges, from the extremes down."""
    ends = -np.abs(x).max(), np.abs(x).max()
    if not symmetric:
        ends = x.min(), x.max()
    factors = 1 - np.arange(50) / 50
    return max(sqnr(x, *(end * f for end in ends), fmt, symmetric) for f in factors)


@pytest.mark.parametrize(("name", "symmetric"), CODES)
@pytest.mark.parametrize("kind", OBSERVERS)
def test_no_range_loses_more_than_half_of_the_accuracy(kind, name, symmetric):
    obs, fmt = OBSERVERS[kind], formats.get(name)
    state = obs.init(X)
    for batch in (X, X[:, ::-1]):
        state = obs.update(state, batch)
    low, high = np.asarray(obs.bounds(state, name, symmetric=symmetric), np.float64)
    for row, (label, x) in enumerate(zip(DATA, X, strict=True)):
        if label == "outlier" and kind in NO_LIMIT_WITH_AN_OUTLIER:
            continue
        if label == "very_sparse" and kind == "percentile":
            continue  # it clips one of the 20 numbers that are not zero
        loss = best_sqnr(x, fmt, symmetric) - sqnr(
            x, low[row], high[row], fmt, symmetric
        )
        assert loss < (4 if kind == "percentile" else 3), f"{label}: {loss:.1f} dB"
    index = list(DATA).index("outlier")
    if kind == "absmax":
        assert (low[index], high[index]) == (-100, 100)
    zero = list(DATA).index("zero")
    assert (low[zero], high[zero]) == (0, 0)


def test_the_range_of_absmax_for_a_zero_point():
    x = np.float32([[-1, 2, 0], [-3, -1, -2], [1, 2, 0], [0, 0, 0], [-1e-40, 0, 0]])
    obs = observers.absmax(axis=0)
    low, high = (np.asarray(v) for v in obs.bounds_of(x, "uint8", symmetric=False))
    np.testing.assert_array_equal(low, np.float32([-2, -3, 0, 0, -1e-40]))
    np.testing.assert_array_equal(high, np.float32([2, 0, 2, 0, 0]))
    low, high = obs.bounds_of(x, "uint8")  # without a zero point
    np.testing.assert_array_equal(low, np.zeros(5))
    np.testing.assert_array_equal(high, np.float32([2, 3, 2, 0, 1e-40]))
