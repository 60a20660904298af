"""Metrics against float64, on small and large numbers, and on errors of one block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import metrics

# One shape, so that eager operations compile once. A row has two blocks of 64 and a
# tail of 32. XLA's maximum drops NaN on CPU in arrays of this size.
SHAPE = (64, 160)
PAIRS = (
    metrics.mse,
    metrics.sqnr,
    metrics.cosine,
    metrics.worst_block,
    metrics.kl_divergence,
    metrics.top1_agreement,
)


def pair(size: float = 1.0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers times `size`, and the same with relative noise."""
    random = np.random.default_rng(0)
    a = random.standard_normal(SHAPE)
    b = a + noise * random.standard_normal(SHAPE)
    return (a * size).astype(np.float32), (b * size).astype(np.float32)


def sqnr64(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())


def cosine64(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def worst64(a, b, size):
    a, b = a.astype(np.float64), b.astype(np.float64)
    errors = []
    for start in range(0, a.shape[1], size):
        x, y = a[:, start : start + size], b[:, start : start + size]
        errors.append(np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1))
    return np.max(errors)


# 3e37 is near the largest float32. Numbers below 1.2e-38 are subnormal.
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 3e37, 1e-38, 1e-40])
def test_against_float64_at_every_magnitude(size):
    a, b = pair(size)
    assert float(metrics.sqnr(a, b)) == pytest.approx(sqnr64(a, b), abs=1e-3)
    assert float(metrics.cosine(a, b)) == pytest.approx(cosine64(a, b), rel=1e-5)
    worst_of_32, worst_of_64 = (
        metrics.worst_block(a, b, size=32),
        metrics.worst_block(a, b),
    )
    assert float(worst_of_32) == pytest.approx(worst64(a, b, 32), rel=1e-5)
    assert float(worst_of_64) == pytest.approx(worst64(a, b, 64), rel=1e-5)
    assert 15 < sqnr64(a, b) < 25  # noise of a tenth is -20 dB


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
def test_mse_against_float64(size):
    a, b = pair(size)
    expected = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    assert float(metrics.mse(a, b)) == pytest.approx(expected, rel=1e-5)


# 1e200 and 1e-300 are infinite and 0 in float32. 1e-310 is subnormal in float64.
@pytest.mark.parametrize("size", [1.0, 1e200, 1e-300, 1e-310])
@pytest.mark.parametrize("x64", [False, True])
def test_float64_arrays_beyond_the_range_of_float32(size, x64):
    a, b = (v.astype(np.float64) for v in pair())
    expected = sqnr64(a, b), cosine64(a, b), worst64(a, b, 64)
    with jax.enable_x64(x64):
        results = [
            float(metric(a * size, b * size))
            for metric in (metrics.sqnr, metrics.cosine, metrics.worst_block)
        ]
        mse = float(metrics.mse(a * size, b * size))
    np.testing.assert_allclose(results, expected, rtol=1e-5)
    exact = {1e200: np.inf}.get(size, 0.0 if size < 1 else ((a - b) ** 2).mean())
    assert mse == pytest.approx(exact, rel=1e-5)


def test_jax_arrays_of_float64():
    a, b = (v.astype(np.float64) for v in pair())
    with jax.enable_x64(True):
        for size in (1e200, 1e-300):
            x, y = jnp.asarray(a * size), jnp.asarray(b * size)
            sqnr = jax.jit(metrics.sqnr)(x, y)
            assert float(sqnr) == pytest.approx(sqnr64(a, b), rel=1e-5)
        # The noise is 1e45 times the signal: -900 dB.
        one, large = np.ones(SHAPE, np.float32), jnp.full(SHAPE, 1e45)
        assert float(metrics.sqnr(one, large)) == pytest.approx(-900, rel=1e-5)
        assert float(metrics.sqnr(0 * one, large)) == -np.inf


def test_a_cosine_is_at_most_1():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((200, 3)).astype(np.float32)
    cosines = np.asarray(jax.vmap(metrics.cosine)(vectors, vectors))
    opposite = np.asarray(jax.vmap(metrics.cosine)(vectors, -vectors))
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)
    assert cosines.max() == 1
    assert opposite.min() == -1


def test_large_and_small_numbers_in_one_array():
    mse, sqnr, cosine = map(jax.jit, (metrics.mse, metrics.sqnr, metrics.cosine))
    a, b = np.float32([1e30, 1.0]), np.float32([1e30, 3.0])
    assert float(mse(a, b)) == pytest.approx(2.0, rel=1e-5)
    assert float(sqnr(a, b)) == pytest.approx(sqnr64(a, b), rel=1e-5)
    large, small = np.float32([1e30, 1e30]), np.float32([1e-30, 0])
    assert float(cosine(large, small)) == pytest.approx(0.5**0.5, rel=1e-5)
    # The ratio is finite even if the noise is 1e40 times the signal.
    signal, noisy = np.float32([1e-20, 0]), np.float32([1e20, 0])
    assert float(sqnr(signal, noisy)) == pytest.approx(-800, rel=1e-5)


def test_equal_and_zero_arrays():
    a, zero = pair()[0], np.zeros(SHAPE, np.float32)
    assert float(metrics.sqnr(a, a)) == np.inf
    assert float(metrics.mse(a, a)) == 0
    assert float(metrics.worst_block(a, a)) == 0
    assert float(metrics.sqnr(zero, zero)) == np.inf
    assert float(metrics.sqnr(zero, a)) == -np.inf
    assert float(metrics.worst_block(zero, zero)) == 0
    assert float(metrics.worst_block(zero, a)) == np.inf
    assert float(metrics.worst_block(a, zero)) == pytest.approx(1, rel=1e-6)
    assert np.isnan(metrics.cosine(a, zero))
    assert float(metrics.cosine(a, -a)) == pytest.approx(-1, rel=1e-5)


def test_empty_arrays():
    empty = np.zeros((0, 4), np.float32)
    assert float(jax.jit(metrics.mse)(empty, empty)) == 0
    assert float(jax.jit(metrics.sqnr)(empty, empty)) == np.inf
    assert float(jax.jit(metrics.worst_block)(empty, empty)) == 0


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_worst_block_shows_one_block_with_a_large_error(size):
    a = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    a[17, 64:128] *= np.float32(size)
    x = a * np.float32(1.001)
    assert float(metrics.worst_block(a, x)) == pytest.approx(1e-3, rel=1e-2)
    x[17, 64:128] *= -1
    assert float(metrics.worst_block(a, x)) == pytest.approx(2, rel=1e-2)
    if size < 1:
        # A mean over the array does not show the block.
        assert float(metrics.sqnr(a, x)) == pytest.approx(60, abs=0.1)


@pytest.mark.parametrize("size", [1.0, 3.4e38, 1e-40])
def test_an_error_as_large_as_the_signal(size):
    a = np.random.default_rng(0).uniform(0.5, 1, SHAPE).astype(np.float32)
    a = a * np.float32(size)
    assert float(metrics.sqnr(a, 0 * a)) == pytest.approx(0, abs=1e-4)
    # The difference of a and -a is twice the largest float32.
    assert float(metrics.sqnr(a, -a)) == pytest.approx(-6.0206, abs=1e-3)
    assert float(metrics.worst_block(a, a / 2)) == pytest.approx(0.5, rel=1e-4)
    assert float(metrics.worst_block(a, -a)) == pytest.approx(2, rel=1e-4)
    assert float(metrics.cosine(a, -a)) == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize("metric", PAIRS)
def test_a_nan_gives_nan(metric):
    a = np.ones(SHAPE, np.float32)
    b = a.copy()
    b[33, 5] = np.nan
    assert np.isnan(metric(a, b))
    assert np.isnan(metric(b, a))


def test_an_infinity_gives_an_infinite_error():
    a, b = pair()
    b[2, 3] = np.inf
    assert float(metrics.sqnr(a, b)) == -np.inf
    assert float(metrics.mse(a, b)) == np.inf
    assert float(metrics.worst_block(a, b)) == np.inf


def test_kl_divergence_against_float64():
    a, b = (v.astype(np.float64) * 5 for v in pair())
    log_p, log_q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (a, b))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert expected > 0.01
    assert float(metrics.kl_divergence(a, b)) == pytest.approx(expected, rel=1e-4)
    # A constant added to all logits of a row changes nothing. 1e4 does not overflow.
    assert float(metrics.kl_divergence(a, b + 1e4)) == pytest.approx(expected, rel=2e-2)
    divergence = jax.jit(metrics.kl_divergence)
    masked, even = np.float32([[0, -np.inf]]), np.zeros((1, 2), np.float32)
    assert float(divergence(masked, masked)) == 0
    assert float(divergence(masked, even)) == pytest.approx(np.log(2), rel=1e-6)
    assert float(divergence(even, masked)) == np.inf


def test_top1_agreement():
    a, agreement = np.eye(4, dtype=np.float32), jax.jit(metrics.top1_agreement)
    assert float(agreement(a, a * 3)) == 1
    assert float(agreement(a, np.roll(a, 1, axis=1))) == 0
    assert float(agreement(a, np.concatenate([a[:3], a[:1]]))) == 0.75


@pytest.mark.parametrize("metric", PAIRS)
def test_jit_dtypes_and_shapes(metric):
    a, b = (jnp.asarray(v, jnp.bfloat16) for v in pair())
    eager, jitted = metric(a, b), jax.jit(metric)(a, b)
    assert (eager.shape, eager.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(eager, jitted, rtol=1e-5)
    np.testing.assert_allclose(eager, metric(a.astype(jnp.float32), b), rtol=1e-6)
    message = rf"{metric.__name__}: shapes differ, \[2\] and \[2, 1\]. Pass two arrays"
    with pytest.raises(ValueError, match=message):
        metric(np.ones(2, np.float32), np.ones((2, 1), np.float32))
