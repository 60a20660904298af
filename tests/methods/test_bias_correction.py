"""Bias correction restores the mean of the outputs."""

import jax
import numpy as np
import pytest

import jaxq
from jaxq.methods._bias_correction import bias_correction

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((32, 6)).astype(np.float32)
X = (RANDOM.standard_normal((200, 32)) + RANDOM.uniform(-3, 3, 32)).astype(np.float32)


@pytest.mark.parametrize("preset", ["int3", "uint4", "nf4"])
def test_mean_output_is_that_of_the_original(preset):
    qt = jaxq.quantize(W, preset)
    shift = bias_correction(W, qt, X.mean(0))
    w_hat = np.asarray(jaxq.dequantize(qt), np.float64)
    x = X.astype(np.float64)
    gap = (x @ W).mean(0) - (x @ w_hat).mean(0)
    np.testing.assert_allclose(shift, gap, atol=1e-5)
    before, after = (
        np.mean((x @ W - x @ w_hat - s) ** 2) for s in (0, np.asarray(shift))
    )
    assert after < before
    np.testing.assert_array_equal(
        jax.jit(bias_correction)(W, qt.with_activation("int8"), X.mean(0)), shift
    )


def test_inputs_of_the_quantized_model_have_another_mean():
    qt, moved = jaxq.quantize(W, "int3"), X.mean(0) + np.float32(0.1)
    shift = bias_correction(W, qt, X.mean(0), x_mean_quantized=moved)
    w_hat = np.asarray(jaxq.dequantize(qt), np.float64)
    np.testing.assert_allclose(
        shift, X.mean(0).astype(np.float64) @ W - moved @ w_hat, atol=1e-5
    )


def test_an_exact_weight_needs_no_correction():
    whole = np.rint(W * 3).astype(np.float32)
    whole[0] = 127
    assert not np.any(bias_correction(whole, jaxq.quantize(whole, "int8"), X.mean(0)))


def test_stacks():
    stack = np.stack([W, 2 * W])
    qt = jaxq.quantize(stack, "int4", contracting=-2, batch=0)
    shift = bias_correction(stack, qt, np.stack([X.mean(0), X[0]]))
    assert shift.shape == (2, 6)
    np.testing.assert_allclose(
        shift[1], bias_correction(2 * W, qt[1], X[0]), rtol=1e-5, atol=1e-6
    )


def test_errors():
    qt = jaxq.quantize(W, "int8")
    np.testing.assert_allclose(
        bias_correction(W, jaxq.dequantize(qt), X.mean(0)),
        bias_correction(W, qt, X.mean(0)),
    )
    with pytest.raises(TypeError, match="qt must be float32"):
        bias_correction(W, W.astype(int), X.mean(0))
    with pytest.raises(ValueError, match=r"float32\[16,6\]"):
        bias_correction(W[:16], qt, X.mean(0))
    with pytest.raises(ValueError, match=r"x_mean must be .*float32\[200,32\]"):
        bias_correction(W, qt, X)
    with pytest.raises(ValueError, match="non-finite"):
        bias_correction(W, qt, np.full(32, np.nan, np.float32))
