"""Cross-layer equalization: the function stays the same, the ranges become equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.methods._equalization import equalize

RANDOM = np.random.default_rng(0)
W1 = (RANDOM.standard_normal((10, 16)) * 10.0 ** RANDOM.uniform(-2, 2, 16)).astype(
    np.float32
)
W2 = (RANDOM.standard_normal((16, 7)) * 10.0 ** RANDOM.uniform(-2, 2, (16, 1))).astype(
    np.float32
)
BIAS = RANDOM.standard_normal(16).astype(np.float32)
X = RANDOM.standard_normal((50, 10)).astype(np.float32)


def two_layers(w1, w2, bias, slope=0.0):
    w1, w2, bias = (np.asarray(v, np.float64) for v in (w1, w2, bias))
    hidden = X.astype(np.float64) @ w1 + bias
    return np.where(hidden > 0, hidden, slope * hidden) @ w2


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_function_is_unchanged_and_ranges_meet(slope):
    (w1, w2, bias), info = equalize(W1, W2, BIAS)
    before = two_layers(W1, W2, BIAS, slope)
    np.testing.assert_allclose(
        two_layers(w1, w2, bias, slope), before, atol=1e-5 * abs(before).max()
    )
    np.testing.assert_allclose(
        abs(np.asarray(w1)).max(0), abs(np.asarray(w2)).max(1), rtol=1e-6
    )
    np.testing.assert_allclose(
        info.range1 * info.range2, abs(np.asarray(w1)).max(0) ** 2, rtol=1e-5
    )


def test_powers_of_two_are_exact():
    (w1, w2, bias), info = equalize(W1, W2, BIAS, power_of_two=True)
    np.testing.assert_array_equal(np.log2(np.asarray(info.scale)) % 1, 0)
    np.testing.assert_array_equal(two_layers(w1, w2, bias), two_layers(W1, W2, BIAS))
    ratio = abs(np.asarray(w1)).max(0) / abs(np.asarray(w2)).max(1)
    assert np.all((ratio >= 0.4999) & (ratio <= 2.0001))


def test_per_tensor_scales_gain():
    spec = jaxq.QuantSpec("int8", jaxq.PerTensor())
    apart = (10.0 ** RANDOM.uniform(-2, 2, 16)).astype(np.float32)
    first, second = (
        RANDOM.standard_normal(s).astype(np.float32) for s in ((10, 16), (16, 7))
    )
    first, second = (
        first * apart,
        second / apart[:, None],
    )  # large where the other is small

    def error(w1, w2, bias):
        rounded = [jaxq.dequantize(jaxq.quantize(w, spec)) for w in (w1, w2)]
        return np.mean(
            (two_layers(*rounded, bias) - two_layers(first, second, 0 * BIAS)) ** 2
        )

    assert (
        error(*equalize(first, second, 0 * BIAS)[0])
        < error(first, second, 0 * BIAS) / 100
    )


def test_dead_channels_and_extreme_ranges():
    w1, w2 = W1.copy(), W2.copy()
    w1[:, 0], w2[3] = 0, 0
    w1[:, 5] *= np.float32(1e-30)
    w2[5] *= np.float32(1e30)
    (_, _, bias), info = equalize(w1, w2)
    assert bias is None
    assert info.scale[0] == info.scale[3] == 1
    assert np.all(np.isfinite(info.scale) & (np.asarray(info.scale) > 0))


def test_convolutions_and_dtypes():
    w1, w2 = (
        RANDOM.standard_normal(s).astype(np.float32)
        for s in ((3, 3, 2, 4), (3, 3, 4, 5))
    )
    w1[..., 1] *= 20
    (a, b, _), _ = equalize(jnp.asarray(w1, jnp.bfloat16), w2)
    assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.float32)
    x = RANDOM.standard_normal((1, 6, 6, 2)).astype(np.float32)

    def net(first, second):
        dims = ("NHWC", "HWIO", "NHWC")
        first = jnp.asarray(first, jnp.float32)
        hidden = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, first, (1, 1), "SAME", dimension_numbers=dims
            )
        )
        return jax.lax.conv_general_dilated(
            hidden, second, (1, 1), "SAME", dimension_numbers=dims
        )

    (a, b, _), _ = equalize(w1, w2)
    np.testing.assert_allclose(net(a, b), net(w1, w2), atol=2e-4)
    np.testing.assert_allclose(
        abs(np.asarray(a)).max((0, 1, 2)), abs(np.asarray(b)).max((0, 1, 3)), rtol=1e-6
    )


def test_errors():
    with pytest.raises(ValueError, match=r"w1: float32\[10,16\], w2: float32\[7,16\]"):
        equalize(W1, W2.T)
    with pytest.raises(ValueError, match=r"bias1 must be .*\[16\]"):
        equalize(W1, W2, BIAS[:3])
    with pytest.raises(ValueError, match="non-finite"):
        equalize(W1 * np.float32(np.nan), W2)
