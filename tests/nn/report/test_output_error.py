"""The error of a layer's output rows, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.nn.report import _output_error, row_sqnr_of
from jaxq.nn.report._output_error import Inputs
from jaxq.observers import empty_stats, update_stats
from tests.arrays import assert_close, normal


def stats_of(x):
    """Statistics of rows `[t, K]`, or of each element of `[batch, t, K]`."""
    if x.ndim == 3:
        return jax.tree.map(lambda *each: jnp.stack(each), *map(stats_of, x))
    counts, parts = jnp.ones(len(x), bool), jnp.arange(len(x))
    return update_stats(empty_stats(x.shape[-1]), x, counts, parts)


def row_decibels(exact, error):
    """The mean squared error of rows, each divided by the norm of the row's output."""
    signal, noise = (exact**2).sum(-1), (error**2).sum(-1)
    mean = signal.mean(-1, keepdims=True)
    norms = np.sqrt(np.maximum(signal, 1e-3 * mean) * mean)
    return -10 * np.log10((noise / norms).mean(-1))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_large_rows_count_less(batch):
    # One row in eight is a hundred times as large as the others, and one is tiny.
    x = normal(*batch, 64, 16) + 0.01
    x = x.at[..., ::8, :].multiply(100).at[..., 1::8, :].multiply(1e-4)
    w = normal(*batch, 16, 8)
    batch_axes = tuple(range(len(batch)))
    stats = stats_of(x)
    spec = jaxq.QuantSpec("int4", jaxq.PerTensor())
    contracted = len(batch)
    qt = jaxq.quantize(w, spec, contracting=contracted, batch=batch_axes)
    # The filled ones: 56 sampled and 8 held-out rows.
    parts = [stats.samples[..., :56, :], stats.held_out[..., :8, :]]
    rows = np.concatenate(parts, axis=-2).astype(np.float64)
    exact = rows @ np.asarray(w, np.float64)
    actual = rows @ np.asarray(jaxq.dequantize(qt), np.float64)
    expected = row_decibels(exact, actual - exact)
    assert row_sqnr_of(w, qt, stats, Inputs(windowed=False)).shape == batch
    assert_close(row_sqnr_of(w, qt, stats, Inputs(windowed=False)), expected, 1e-4)


def test_layers_of_a_shape_and_all_observers_share_a_program():
    x, programs = normal(64, 16), _output_error._jit_row_sqnr
    before = programs._cache_size()
    for name, observer in (("a", jaxq.observers.minmax()), ("b", None)):
        stats = empty_stats(16, observer=observer)
        stats = update_stats(
            stats, x, jnp.ones(64, bool), jnp.arange(64), observer=observer
        )
        qt = jaxq.quantize(normal(16, 8), "int8", name=name)
        assert qt.meta.name == name
        row_sqnr_of(normal(16, 8), qt, stats, Inputs(windowed=False))
    assert programs._cache_size() <= before + 1


def test_huge_numbers_do_not_overflow():
    x, w = 1e25 * normal(64, 16), normal(16, 8)
    stats = stats_of(x)
    qt = jaxq.quantize(w, "int8")
    small = stats_of(x / 1e25)
    decibels = [
        float(row_sqnr_of(w, qt, each, Inputs(windowed=False)))
        for each in (small, stats)
    ]
    assert decibels[0] == pytest.approx(decibels[1], abs=0.1)
    assert decibels[0] > 30


def test_a_small_element_of_a_stack_is_measured_too():
    x, w = normal(2, 64, 16), normal(2, 16, 8)
    x = x.at[1].multiply(1e-25)
    qt = jaxq.quantize(w, "int8", contracting=1, batch=0)
    together = row_sqnr_of(w, qt, stats_of(x), Inputs(windowed=False))
    small = jax.tree.map(lambda leaf: leaf[1], qt)
    alone = row_sqnr_of(w[1], small, stats_of(x[1]), Inputs(windowed=False))
    assert 30 < float(alone) < 60
    assert float(together[1]) == pytest.approx(float(alone), abs=0.01)
