"""LLM.int8(): against the paper's steps in float64, and against plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec
from jaxq.methods._llm_int8 import llm_int8, llm_int8_matmul
from tests import tables

RANDOM = np.random.default_rng(0)
X = np.clip(RANDOM.standard_normal((12, 40)), -3, 3).astype(np.float32)
OUTLIERS = [5, 30]
X[:, OUTLIERS] *= 20
X[0, OUTLIERS] = 50
CALM = np.clip(X, -3, 3)
W = RANDOM.standard_normal((40, 9)).astype(np.float32)
QT = jaxq.quantize(W, "int8")
ZERO_POINT = QuantSpec("int8", jaxq.PerToken(), symmetric=False)
# One compiled `llm_int8_matmul` for all tests.
matmul = jax.jit(
    llm_int8_matmul, static_argnames=("threshold", "num_outliers", "activation")
)


def steps_of_the_paper(x, w, threshold, keep):
    """The numbered steps of section 3, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out = abs(x).max(0) >= threshold
    c_x = abs(np.where(out, 0, x)).max(1, keepdims=True)
    c_w = abs(w).max(0, keepdims=True)
    q_x = np.rint(127 * np.where(out, 0, x) / np.where(c_x > 0, c_x, 1))
    q_w = np.rint(127 * w / c_w)
    high = w if keep else q_w * c_w / 127
    return (q_x @ q_w) * c_x * c_w / 127**2 + x[:, out] @ high[out]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0, 1e9])
def test_steps_of_the_paper(threshold, keep):
    y, info = matmul(X, QT, threshold=threshold, keep=W if keep else None)
    exact = steps_of_the_paper(X, W, threshold, keep)
    # A tie in rounding may go either way: one step of one code.
    np.testing.assert_allclose(y, exact, atol=2e-2 if threshold > 100 else 2e-3)
    assert (
        np.flatnonzero(info.outliers).tolist()
        == np.flatnonzero(abs(X).max(0) >= threshold).tolist()
    )


LIMITS = [(dtype, k) for dtype in ("float32", "bfloat16") for k in (None, 4)]


@pytest.mark.parametrize(
    ("dtype", "num_outliers"),
    tables.thinned(LIMITS, [("float32", None), ("bfloat16", 4)]),
)
def test_without_outliers_it_is_the_plain_product(dtype, num_outliers):
    x, w = jnp.asarray(CALM, dtype), jnp.asarray(W, dtype)
    qt = jaxq.quantize(w, "int8")
    y, info = matmul(x, qt, num_outliers=num_outliers)
    np.testing.assert_array_equal(y, x @ qt.with_activation("int8"))
    assert y.dtype == jnp.dtype(dtype)
    assert (int(info.num_outliers), int(info.num_missed)) == (0, 0)
    # The same holds for any input if nothing reaches the threshold.
    x = jnp.asarray(X, dtype)
    np.testing.assert_array_equal(
        matmul(x, qt, threshold=1e9)[0], x @ qt.with_activation("int8")
    )


def test_is_the_product_of_layers():
    y, _ = matmul(X, QT, threshold=6.0)
    layer = jax.jit(lambda x: x @ QT.with_activation("int8", outliers=6.0))
    np.testing.assert_array_equal(y, layer(X))
    np.testing.assert_allclose(
        matmul(X, QT, keep=jaxq.dequantize(QT))[0], y, rtol=1e-5, atol=1e-4
    )


def test_threshold_zero_is_the_product_in_high_precision():
    y, info = matmul(X, QT, threshold=0.0)
    np.testing.assert_array_equal(y, X @ QT)
    assert np.all(info.outliers)
    kept, _ = matmul(X, QT, threshold=0.0, keep=W)
    np.testing.assert_allclose(kept, X.astype(np.float64) @ W, rtol=1e-5, atol=1e-4)
    straight, _ = llm_int8_matmul(X, W, threshold=0.0)  # a float weight is kept
    np.testing.assert_array_equal(straight, kept)


def test_outliers_no_longer_spoil_their_rows():
    exact = X.astype(np.float64) @ W

    def error(y):
        return np.mean((np.asarray(y, np.float64) - exact) ** 2)

    plain, mixed = error(X @ QT.with_activation("int8")), error(matmul(X, QT)[0])
    kept = error(matmul(X, QT, keep=W)[0])
    assert kept < mixed < plain / 2
    assert kept < plain / 20


@pytest.mark.parametrize("keep", [False, True])
def test_fixed_number_of_outliers(keep):
    floats = W if keep else None
    exact, _ = matmul(X, QT, keep=floats)
    for k in (2, 100):
        y, info = matmul(X, QT, keep=floats, num_outliers=k)
        np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-5)
        assert (int(info.num_outliers), int(info.num_missed)) == (2, 0)
        assert np.flatnonzero(info.outliers).tolist() == OUTLIERS
    _, info = matmul(X, QT, keep=floats, num_outliers=1)
    assert (int(info.num_outliers), int(info.num_missed), int(info.outliers.sum())) == (
        2,
        1,
        1,
    )
    y, info = matmul(X, QT, keep=floats, num_outliers=0)
    np.testing.assert_array_equal(y, X @ QT.with_activation("int8"))
    assert int(info.num_missed) == 2


@pytest.mark.parametrize("preset", tables.thinned(["int4", "uint8", "nf4"], ["int4"]))
def test_weights_of_other_geometries(preset):
    qt = jaxq.quantize(W, preset)
    exact, _ = matmul(X, qt)
    y, _ = matmul(X, qt, num_outliers=3)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)
    high = X[:, OUTLIERS] @ np.asarray(jaxq.dequantize(qt))[OUTLIERS]
    rest = np.where(np.isin(np.arange(40), OUTLIERS), 0, X).astype(np.float32)
    np.testing.assert_allclose(
        exact - high, rest @ qt.with_activation("int8"), atol=2e-4
    )


def test_scaling_a_row_scales_its_result():
    factor = np.where(np.arange(12) % 2, 0.25, 1.0).astype(np.float32)[:, None]
    y, info = matmul(X, QT)
    scaled, scaled_info = matmul(X * factor, QT)  # row 0 keeps the columns outliers
    np.testing.assert_array_equal(info.outliers, scaled_info.outliers)
    np.testing.assert_allclose(scaled, y * factor, rtol=1e-6, atol=1e-6)
    larger, _ = matmul(X * 8, QT, threshold=48.0)
    np.testing.assert_array_equal(larger, y * 8)


def test_zero_point_activations():
    # All positive, so a symmetric range would use only half of its codes.
    x = (abs(X) + 1).astype(np.float32)
    y, info = matmul(x, QT, threshold=8.0, activation=ZERO_POINT)
    out = np.asarray(info.outliers)
    rest = np.where(out, 0, x).astype(np.float64)
    low, high = np.minimum(rest.min(1, keepdims=True), 0), rest.max(1, keepdims=True)
    s = (high - low) / 255
    zero = np.clip(np.rint(-128 - low / s), -128, 127)
    q = np.clip(np.rint(rest / s) + zero, -128, 127)
    w_hat = np.asarray(jaxq.dequantize(QT), np.float64)
    exact = s * ((q - zero) @ w_hat) + x[:, out].astype(np.float64) @ w_hat[out]
    np.testing.assert_allclose(y, exact, atol=5e-3)
    qt, _ = llm_int8(W, activation=ZERO_POINT)
    # The activation attached to the QTensor is the default.
    np.testing.assert_array_equal(matmul(x, qt, threshold=8.0)[0], y)
    wide = x.astype(np.float64) @ w_hat
    assert np.mean((y - wide) ** 2) < np.mean(
        (matmul(x, QT, threshold=8.0)[0] - wide) ** 2
    )


def test_shapes_of_the_input():
    y, info = matmul(X, QT)
    batched, batched_info = matmul(X.reshape(3, 4, 40), QT)
    np.testing.assert_allclose(batched, y.reshape(3, 4, 9), rtol=1e-6)
    np.testing.assert_array_equal(batched_info.outliers, info.outliers)
    assert matmul(X[0], QT)[0].shape == (9,)
    empty, info = matmul(X[:0], QT)
    assert (empty.shape, int(info.num_outliers)) == ((0, 9), 0)


def test_all_other_columns_multiply_as_integers():
    text = (
        jax.jit(lambda x: llm_int8_matmul(x, QT, num_outliers=2)[0]).lower(X).as_text()
    )
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert any("tensor<40x9xi8>" in p or "xi8>" in p for p in products), products
    floats = [p for p in products if "xi8>" not in p]
    # The product in floats has the two columns alone.
    assert floats
    assert all("x2xf32>" in p or "<2x" in p for p in floats), floats


def test_a_nan_stays_in_its_row():
    x = jnp.asarray(X).at[3, 8].set(jnp.nan)
    y = np.asarray(matmul(x, QT)[0])
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


def test_calibration_counts_outliers():
    qt, info = llm_int8(W, absmax_x=abs(X).max(0))
    np.testing.assert_array_equal(qt.data, QT.data)
    assert qt.meta.activation == jaxq.presets()["int8"]
    assert (int(info.num_outliers), np.flatnonzero(info.outliers).tolist()) == (
        2,
        OUTLIERS,
    )
    stack, info = llm_int8(
        np.stack([W, W]), absmax_x=np.stack([abs(X).max(0), abs(CALM).max(0)])
    )
    assert stack.shape == (2, 40, 9)
    assert info.num_outliers.tolist() == [2, 0]
    assert llm_int8(W)[1].num_outliers == 0


def test_errors():
    with pytest.raises(ValueError, match=r"\[..., 40\].*float32\[12,39\]"):
        llm_int8_matmul(X[:, 1:], QT)
    with pytest.raises(TypeError, match="int32"):
        llm_int8_matmul(np.ones((2, 40), np.int32), QT)
    with pytest.raises(ValueError, match="contracting=-2"):
        llm_int8_matmul(X, jaxq.quantize(W, "int8", contracting=-1))
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        llm_int8_matmul(X, QT, threshold=-1.0)
    with pytest.raises(ValueError, match="num_outliers must be None or at least 0"):
        llm_int8_matmul(X, QT, num_outliers=-1)
    with pytest.raises(ValueError, match=r"keep must be the float weight \[40, 9\]"):
        llm_int8_matmul(X, QT, keep=W.T)
    with pytest.raises(ValueError, match=r"absmax_x must be .*\[40\]"):
        llm_int8(W, absmax_x=X)


def test_the_threshold_of_the_weight_is_used():
    x = jnp.asarray([[0.5, -4.0, 1.0]])
    qt, _ = llm_int8(jnp.eye(3), threshold=3.0)
    assert qt.meta.outliers == 3.0
    y, info = llm_int8_matmul(x, qt)
    assert info.outliers.tolist() == [False, True, False]
    np.testing.assert_array_equal(y, x @ qt)
    assert not llm_int8_matmul(x, qt, threshold=6.0)[1].outliers.any()
