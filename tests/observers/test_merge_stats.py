"""Merged statistics of two parts of data, against numpy on all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import observers
from jaxq.observers import empty_stats, merge_stats, update_stats

K = 5


def rows(seed, size):
    return np.random.default_rng(seed).normal(size=(size, K)).astype(np.float32)


def stats_of(x, observer=None):
    counts, parts = jnp.ones(len(x), bool), jnp.zeros(len(x), int)
    empty = empty_stats(K, observer=observer)
    return update_stats(empty, jnp.asarray(x), counts, parts, observer)


def test_numbers_are_those_of_all_rows():
    a, b = rows(0, 40), rows(1, 300)
    both = np.concatenate([a, b]).astype(np.float64)
    got = merge_stats(stats_of(a), stats_of(b))
    assert float(got.count) == 340
    np.testing.assert_allclose(got.mean, both.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.absmean, np.abs(both).mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.hessian, 2 * both.T @ both / 340, rtol=1e-3)
    np.testing.assert_array_equal(got.low, both.min(0))
    np.testing.assert_array_equal(got.high, both.max(0))
    assert int(got.num_calls) == 2


def test_samples_are_rows_of_both_parts():
    a, b = rows(0, 600), rows(1, 600)
    got = merge_stats(stats_of(a), stats_of(b))
    samples = {row.tobytes() for row in np.asarray(got.samples)}
    of_a = samples & {row.tobytes() for row in a}
    of_b = samples & {row.tobytes() for row in b}
    assert len(samples) == len(of_a) + len(of_b) == observers.NUM_SAMPLES
    # Both parts have as many rows. Half of 512 have a standard deviation of 11.
    assert 200 < len(of_a) < 312
    ranks = np.asarray(got.sample_ranks)
    assert (np.diff(ranks) <= 0).all()


def test_few_rows_are_all_kept():
    a, b = rows(0, 3), rows(1, 4)
    got = merge_stats(stats_of(a), stats_of(b))
    assert int(got.num_samples) == 7
    kept = {row.tobytes() for row in np.asarray(got.samples[:7])}
    assert kept == {row.tobytes() for row in np.concatenate([a, b])}
    assert not np.asarray(got.samples[7:]).any()


@pytest.mark.parametrize("name", ["absmax", "mse"])
def test_ranges_are_those_of_all_rows(name):
    observer = observers.from_dict({"type": name})
    a, b = rows(0, 40), 3 * rows(1, 30)
    got = merge_stats(stats_of(a, observer), stats_of(b, observer), observer)
    expected = observer.merge(
        stats_of(a, observer).observed, stats_of(b, observer).observed
    )
    assert observer.bounds(got.observed, "int8") == observer.bounds(expected, "int8")
    if name == "absmax":
        largest = np.abs(np.concatenate([a, b])).max()
        assert float(observer.bounds(got.observed, "int8")[1]) == largest
    with pytest.raises(ValueError, match="the state of an observer"):
        merge_stats(stats_of(a, observer), stats_of(b, observer))


def test_stacks_merge_layer_by_layer():
    observer = observers.absmax()

    def stack(*seeds):
        parts = [stats_of(rows(seed, 20 + seed), observer) for seed in seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    got = merge_stats(stack(0, 1), stack(2, 3), observer)
    for layer in (0, 1):
        expected = merge_stats(
            stats_of(rows(layer, 20 + layer), observer),
            stats_of(rows(2 + layer, 22 + layer), observer),
            observer,
        )
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], got)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_a_part_without_rows_changes_nothing():
    a, empty = stats_of(rows(0, 40)), empty_stats(K)
    for got in (merge_stats(a, empty), merge_stats(empty, a)):
        np.testing.assert_array_equal(got.mean, a.mean)
        np.testing.assert_array_equal(got.hessian, a.hessian)
        np.testing.assert_array_equal(got.samples, a.samples)
    both = merge_stats(empty, empty)
    assert float(both.count) == 0
    assert np.isfinite(both.mean).all()


def test_other_shapes_are_an_error():
    with pytest.raises(ValueError, match="different shapes or fields"):
        merge_stats(empty_stats(K), empty_stats(K + 1))
    with pytest.raises(ValueError, match="different shapes or fields"):
        merge_stats(empty_stats(K), empty_stats(K, hessian=False))
