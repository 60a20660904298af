"""Extremes and moving averages, against results computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import observers
from jaxq.observers import _numbers


def trace(obs, stream):
    """The upper end after each number of a stream, and the last state."""
    state, highs = obs.init(np.zeros(1, np.float32)), []
    for v in stream:
        state = obs.update(state, np.float32([v]))
        highs.append(float(state.high))
    return np.array(highs), state


def test_moving_average():
    highs, _ = trace(observers.moving_average(0.99), [1, 3, 2, 2])
    np.testing.assert_allclose(highs, [1, 1.02, 1.0298, 1.039502], rtol=1e-6)


def test_bias_corrected_moving_average():
    decay, stream = 0.9, [1, 3, 2, 2, -1]
    highs, state = trace(observers.moving_average(decay, bias_corrected=True), stream)
    average, expected = 0.0, []
    for t, v in enumerate(stream, 1):
        average = decay * average + (1 - decay) * v
        expected.append(average / (1 - decay**t))
    np.testing.assert_allclose(highs, expected, rtol=1e-6)
    np.testing.assert_allclose(float(state.weight), 1 - decay**5, rtol=1e-6)


@pytest.mark.parametrize("bias_corrected", [False, True])
def test_averages_stay_between_the_extremes(bias_corrected):
    obs = observers.moving_average(0.99, bias_corrected=bias_corrected)
    highs, _ = trace(obs, [0.1] * 20)
    assert (highs == np.float32(0.1)).all()
    stream = np.random.default_rng(0).uniform(0.5, 2, 20).astype(np.float32)
    highs, _ = trace(obs, stream)
    assert (highs >= stream.min()).all()
    assert (highs <= stream.max()).all()


def test_merged_averages_weigh_their_batches():
    obs = observers.moving_average(0.5)
    (_, a), (_, b) = trace(obs, [4.0]), trace(obs, [1.0, 1.0, 1.0])
    merged = obs.merge(a, b)
    assert float(obs.bounds(merged)[1]) == pytest.approx((4 + 3 * 1) / 4)
    assert float(merged.batches.low) == 4
    # A state without a batch has no weight. The mean of equal states is exact.
    assert float(obs.merge(a, obs.init(np.zeros(1, np.float32))).high) == 4
    _, tenth = trace(obs, [0.1, 0.1])
    assert float(obs.merge(tenth, tenth).high) == np.float32(0.1)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        observers.moving_average(decay)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 128 * 37 + 5])
def test_extremes_at_every_place_and_length(size):
    # `combine_halves` treats blocks of 128 numbers and the rest differently.
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    for place in {0, size // 2, size - 1}:
        y = x.copy()
        y[place] = -9.0
        state = observers.minmax().update(observers.minmax().init(y), y)
        assert (float(state.low), float(state.high)) == (y.min(), y.max())
        assert int(state.totals.finite.low) == size


def test_counts_have_64_bits():
    total = np.uint64(0)
    count = _numbers.zero_counts((2,))
    for words in ([2**32 - 1, 5], [2**32 - 1, 2**31], [7, 2**31], [2**24, 1]):
        count = _numbers.plus(count, _numbers.as_count(jnp.asarray(words, jnp.uint32)))
        total = total + np.array(words, np.uint64)
    whole = np.asarray(count.low).astype(np.uint64) + (
        np.asarray(count.high).astype(np.uint64) << np.uint64(32)
    )
    np.testing.assert_array_equal(whole, total)
    added = _numbers.sum_counts(count, jnp.sum)
    assert int(added.low) + (int(added.high) << 32) == int(total.sum())
    np.testing.assert_allclose(
        _numbers.as_float(count), total.astype(np.float32), rtol=1e-7
    )
    less = _numbers.minus(
        count, _numbers.as_count(jnp.asarray([2**32 - 1, 2**32 - 1], jnp.uint32))
    )
    np.testing.assert_array_equal(
        np.asarray(less.low), (total - np.uint64(2**32 - 1)).astype(np.uint32)
    )


def test_a_state_counts_beyond_32_bits():
    obs, x = observers.minmax(), jnp.ones(3)
    state = obs.update(obs.init(x), x)
    full = jnp.full_like(state.totals.finite.low, 2**32 - 2)
    state = state._replace(
        totals=state.totals._replace(finite=state.totals.finite._replace(low=full))
    )
    finite = jax.device_get(obs.merge(obs.update(state, x), obs.init(x)).totals.finite)
    assert (int(finite.high), int(finite.low)) == (1, 1)
