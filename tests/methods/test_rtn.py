"""rtn with formats and scale rules of papers: powers of two, signs, ternary."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, QuantSpec
from jaxq.methods._rtn import rtn
from tests.arrays import assert_same, normal

SHAPE = (96, 12)


def weight(seed: int) -> np.ndarray:
    """A random weight that a test may change."""
    return np.array(normal(*SHAPE, seed=seed))


def values(w, spec) -> np.ndarray:
    return np.asarray(jaxq.dequantize(rtn(w, spec)[0]))


@pytest.mark.parametrize("spec", ["int4", "nf4_dq"])
def test_is_quantize(spec):
    w = normal(3, *SHAPE)
    qt, info = rtn(w, spec)
    expected = jaxq.quantize(w, spec, contracting=-2, batch=0)
    assert_same(qt, expected)
    assert info.sqnr.shape == (3,)
    assert float(info.sqnr[1]) == pytest.approx(
        float(jaxq.metrics.sqnr(w[1], jaxq.dequantize(expected)[1]))
    )


def test_log4_rounds_in_the_logarithm():
    # Miyashita et al., 2016: sign * 2^rint(log2 |x|), where x is relative to the
    # largest magnitude of its channel.
    w = weight(1)
    w[0] = 0
    size = np.abs(w).astype(np.float64) / np.abs(w).max(0)
    with np.errstate(divide="ignore"):
        exponent = np.clip(np.rint(np.log2(size)), -6, 0)
    expected = np.where(
        size >= 2.0**-7, np.sign(w) * 2.0**exponent * np.abs(w).max(0), 0
    )
    got = values(w, "log4")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    inside = size >= 2.0**-6
    assert np.all(
        (abs(got - w) / np.where(inside, abs(w), 1))[inside] <= np.sqrt(2) - 1 + 1e-6
    )
    # The threshold of two octaves is sqrt(2), not 1.5.
    near = np.float32([[4.0, 2.82, 2.83, 1.41, 1.42]]).T
    assert values(near, "log4").ravel().tolist() == [4, 2, 4, 1, 2]


def test_binary_is_the_best_sign_and_scale():
    # Rastegari et al., 2016: sign(0) = 1, alpha = mean |w|, and
    # ||w - alpha b||^2 = ||w||^2 - n alpha^2.
    w = np.float32([[0.5], [-1], [0.25], [-0.25]])
    assert values(w, "binary").ravel().tolist() == [0.5, -0.5, 0.5, -0.5]
    assert np.sum((w - values(w, "binary")) ** 2) == np.float32(0.375)
    w = weight(2)
    w[5, 3] = 0
    got, alpha = values(w, "binary"), np.abs(w).mean(0)
    np.testing.assert_allclose(got, np.where(w >= 0, alpha, -alpha), rtol=1e-6)
    np.testing.assert_allclose(
        ((w - got) ** 2).sum(0), (w**2).sum(0) - len(w) * alpha**2, rtol=1e-4
    )


def test_ternary_rounds_over_the_mean_magnitude():
    # BitNet b1.58 (Ma et al., 2024): clip(rint(w / mean |w|), -1, 1) * mean |w|.
    w = weight(3)
    mean = np.abs(w).mean(0)
    np.testing.assert_allclose(
        values(w, "ternary"), np.clip(np.rint(w / mean), -1, 1) * mean, rtol=1e-6
    )


def test_twn_has_a_threshold_and_the_mean_above_it():
    # Li et al., 2016: the threshold 0.7 mean |w|, and the mean magnitude above it.
    w = weight(4)
    above = np.abs(w) > 0.7 * np.abs(w).mean(0)
    alpha = np.sum(np.abs(w) * above, 0) / above.sum(0)
    got = values(w, QuantSpec("ternary", PerChannel(), scale_rule="twn"))
    np.testing.assert_allclose(got, np.sign(w) * above * alpha, rtol=1e-6)


def test_ttq_has_a_number_for_each_sign():
    # Zhu et al., 2017: the threshold 0.05 max |w|, and one trained magnitude for each
    # sign. It starts at the mean.
    w = np.where(weight(5) > 0, 2, 1).astype(np.float32) * weight(5)
    kept = np.abs(w) > 0.05 * np.abs(w).max()
    expected = np.select(
        [kept & (w > 0), kept], [w[kept & (w > 0)].mean(), w[kept & (w < 0)].mean()], 0
    )
    np.testing.assert_allclose(values(w, "ttq"), expected, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"rtn: w must be a matrix \[in, out\]"):
        rtn(np.ones(4, np.float32), "int8")
    with pytest.raises(ValueError, match=r"rtn: head\[1, 0\] is inf"):
        rtn(jnp.array([[0.0], [jnp.inf]]), "int8", name="head")
