"""The growing histogram: its counts and edges, and that growing loses nothing."""

import jax
import numpy as np
import pytest

from jaxq import observers
from tests.observers import oracle
from tests.tables import thinned


def observed(obs, *xs):
    state = obs.init(xs[0])
    for x in xs:
        state = obs.update(state, x)
    return state


@pytest.mark.parametrize("bins", thinned([16, 7, 2, 2048], [7]))
def test_growth_gives_the_counts_of_the_widest_bins(bins):
    random = np.random.default_rng(0)
    xs = [
        (random.standard_normal(50) * size).astype(np.float32)
        for size in (1e-30, 1e-3, 0.1, 100, 1e20, 1)
    ]
    obs, state = observers.histogram(bins), None
    table = jax.jit(obs.table)
    for i, x in enumerate(xs):
        state = obs.update(obs.init(x) if state is None else state, x)
        every = np.concatenate(xs[: i + 1])
        width, counts = oracle.counted(every, bins)
        words = np.asarray(state.counts.low)
        assert words.sum() == every.size
        np.testing.assert_array_equal(words.sum(axis=0), counts)
        edges = np.asarray(table(state)[0], np.float64)
        np.testing.assert_array_equal(edges, np.arange(-bins, bins + 1) * width)
        # At least half of the bins are used.
        assert np.flatnonzero(counts)[-1] >= (bins - 1) // 2


def test_signs_and_edges():
    x = np.float32([0.0, -0.0, 0.5, 1.0, -1.0, -1.5, 3.0, -3.999])
    obs = observers.histogram(4)
    edges, counts = (np.asarray(v) for v in jax.jit(obs.table)(observed(obs, x)))
    assert edges.tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert counts.tolist() == [1, 0, 2, 0, 3, 1, 0, 1]


def test_subnormals_have_bins():
    x = np.arange(-7, 8).astype(np.float64) * 2.0**-149
    obs = observers.histogram(16)
    state = observed(obs, x.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(state.counts.low)[0, :8], [1] * 8)
    np.testing.assert_array_equal(np.asarray(state.counts.low)[1, :8], [0] + [1] * 7)


@pytest.mark.parametrize("bins", [1, 0, 2.0, 1 << 16])
def test_bins_are_checked(bins):
    with pytest.raises(ValueError, match="bins must be a whole number from 2 to 32768"):
        observers.histogram(bins)


def test_too_large_a_state_is_refused():
    obs = observers.histogram(1 << 15, axis=0)
    with pytest.raises(ValueError, match="too many for one state.*Use fewer bins"):
        obs.bounds_of(np.zeros((1 << 15, 1), np.float32))
