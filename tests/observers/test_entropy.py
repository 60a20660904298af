"""TensorRT's steps against a loop-by-loop oracle."""

import numpy as np
import pytest

from jaxq import formats, observers
from tests.observers import oracle
from tests.tables import thinned

BINS = 64
SIZE = 3000


def data() -> np.ndarray:
    """Rows of one shape: distributions with and without outliers, gaps and repeated numbers."""
    random = np.random.default_rng(0)
    rows = [
        random.standard_normal(SIZE),
        random.laplace(size=SIZE) * 1e-20,
        np.where(np.arange(SIZE) < 4, 40.0, random.standard_normal(SIZE)),
        random.uniform(-1, 1, SIZE),
        np.where(random.uniform(size=SIZE) < 0.5, 0.0, np.abs(random.standard_normal(SIZE))),
        random.integers(-9, 10, SIZE) * 1e30,
        np.full(SIZE, -3.3),
    ]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("name", thinned(["int4", "int5"], ["int4"]))
def test_thresholds(name):
    x, levels = data(), int((formats.get(name).values() >= 0).sum())
    assert levels == {"int4": 8, "int5": 16}[name]
    obs = observers.entropy(BINS, axis=0)
    found = np.asarray(obs.bounds(obs.update(obs.init(x), x), name)[1])
    expected = [oracle.entropy_threshold(row, BINS, levels) for row in x]
    np.testing.assert_array_equal(found, np.float32(expected))
    assert (found < np.abs(x).max(axis=1)).any(), "no row is clipped: this says little"
    np.testing.assert_array_equal(np.asarray(obs.bounds_of(x, name)[1]), found)


def test_divergences_are_the_oracles():
    import jax.numpy as jnp

    from jaxq.observers import _entropy, _numbers

    # The histogram of the published example's size: 16 bins, 4 levels; gaps, and mass beyond them.
    h = np.array([90, 60, 41, 30, 22, 14, 9, 0, 4, 3, 1, 2, 0, 0, 0, 1], np.uint32)
    divergences = oracle.entropy_divergences(h.tolist(), 4)
    best, used = _entropy._best(_numbers.as_count(jnp.asarray(h)), 4)
    assert (int(best), int(used)) == (int(np.argmin(divergences)), 16)
    assert np.isinf(divergences[13])  # its last bin holds nothing, and there is mass beyond it
    # Sizes of counts do not matter: 2^33 times as many.
    many = _numbers.Count(jnp.zeros(16, jnp.uint32), jnp.asarray(h * 2))
    assert int(_entropy._best(many, 4)[0]) == int(best)


def test_asymmetric_bounds_are_cut_and_stay_inside():
    x = data()[4]
    obs = observers.entropy(BINS)
    state = obs.update(obs.init(x), x)
    low, high = (float(v) for v in obs.bounds(state, "int4", symmetric=False))
    assert (low, high) == (0.0, float(obs.bounds(state, "int4")[1]))


def test_levels_need_bins():
    with pytest.raises(ValueError, match="int8 has more levels than the histogram has bins, 64"):
        observers.entropy(64).bounds_of(np.ones(3, np.float32), "int8")
