"""SmoothQuant: the paper's example, the formula, and the gain for activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.methods._folding import fold_scale_into_next
from jaxq.methods._smoothquant import smoothquant
from tests.arrays import normal

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((64, 32)).astype(np.float32)
X[:, [3, 17]] *= 80
W = RANDOM.standard_normal((32, 12)).astype(np.float32)
ABSMAX = abs(X).max(0)


def test_example_of_the_paper():
    # Figure 5 of the paper.
    x = np.array([[1, -16, 2, 6], [-2, 8, -1, -9]], np.float32)
    w = np.array([[2, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]], np.float32)
    s = np.asarray(smoothquant(abs(x).max(0), w)[0])
    assert s.tolist() == [1, 4, 1, 3]
    np.testing.assert_array_equal(x / s, [[1, -4, 2, 2], [-2, 2, -1, -3]])
    np.testing.assert_array_equal(
        fold_scale_into_next(s, w), [[2, 1, -2], [4, -4, -4], [2, -1, -2], [-3, -3, 3]]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_scales_follow_the_formula(alpha):
    s, info = smoothquant(ABSMAX, [W[:, :5], W[:, 5:]], alpha=alpha)
    s = np.asarray(s)
    exact = ABSMAX.astype(np.float64) ** alpha / abs(W).max(1).astype(np.float64) ** (
        1 - alpha
    )
    np.testing.assert_allclose(s, exact, rtol=1e-5)
    np.testing.assert_allclose(info.absmax_x, abs(X / s).max(0), rtol=1e-5)
    np.testing.assert_allclose(info.absmax_w, abs(W * s[:, None]).max(1), rtol=1e-5)
    np.testing.assert_allclose((X / s) @ (W * s[:, None]), X @ W, rtol=1e-4, atol=1e-3)
    if alpha == 0.5:
        np.testing.assert_allclose(info.absmax_x, info.absmax_w, rtol=1e-5)
    if alpha == 1:
        np.testing.assert_allclose(info.absmax_x, 1, rtol=1e-6)


def test_quantized_activations_are_ten_times_as_exact():
    s, _ = smoothquant(ABSMAX, W)

    def error(x, w):
        y = np.asarray(x @ jaxq.quantize(w, "int8").with_activation("int8"), np.float64)
        return np.mean((y - X.astype(np.float64) @ W) ** 2)

    assert (
        error(jnp.asarray(X) / s[None], fold_scale_into_next(s, W)) < error(X, W) / 10
    )


def test_dead_channels_keep_the_scale_one():
    absmax, w = ABSMAX.copy(), W.copy()
    absmax[4], w[9] = 0, 0
    s, info = smoothquant(absmax, w)
    assert s[4] == s[9] == 1
    assert np.flatnonzero(info.dead).tolist() == [4, 9]
    assert np.all(np.isfinite(s) & (np.asarray(s) > 0))
    # Under jit no error can be raised: a channel with a NaN counts as dead.
    broken = jax.jit(lambda a: smoothquant(a, w)[0])(
        jnp.asarray(absmax).at[7].set(jnp.nan)
    )
    assert broken[7] == 1
    np.testing.assert_allclose(np.delete(broken, 7), np.delete(s, 7), rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="alpha must be 0 to 1"):
        smoothquant(ABSMAX, W, alpha=1.5)
    with pytest.raises(ValueError, match=r"float32\[32,12\], float32\[31,12\]"):
        smoothquant(ABSMAX, [W, W[1:]])
    with pytest.raises(ValueError, match="weights is empty"):
        smoothquant(ABSMAX, [])
    with pytest.raises(
        ValueError, match=r"absmax_x must be .*\[32\]; got float32\[64,32\]"
    ):
        smoothquant(X, W)
    with pytest.raises(ValueError, match="smallest number is -"):
        smoothquant(-ABSMAX, W)
    with pytest.raises(ValueError, match="non-finite"):
        smoothquant(ABSMAX * np.float32(np.inf), W)


def test_a_stack_gives_the_scales_of_its_matrices():
    stack, x = np.asarray(normal(2, 8, 4)), np.abs(np.asarray(normal(2, 8, seed=1)))
    s, info = smoothquant(x, [stack, stack[..., :2]])
    tokens = np.asarray(normal(2, 16, 8, seed=2))
    awq_s, awq_info = jaxq.methods.awq_scale([stack, 2 * stack], tokens, "int3")
    for i in range(2):
        np.testing.assert_allclose(
            s[i], smoothquant(x[i], [stack[i], stack[i, :, :2]])[0], rtol=1e-6
        )
        single_s, single_info = jaxq.methods.awq_scale(
            [stack[i], 2 * stack[i]], tokens[i], "int3"
        )
        np.testing.assert_allclose(awq_s[i], single_s, rtol=1e-5)
        np.testing.assert_allclose(awq_info.losses[i], single_info.losses, rtol=1e-4)
    assert info.dead.shape == s.shape == (2, 8)
    with pytest.raises(ValueError, match="or stacks of them"):
        smoothquant(x, [stack, stack[0]])
