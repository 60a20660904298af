"""Hadamard matrices are exactly orthogonal; the fast transform is their product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.methods._rotation import (
    hadamard,
    hadamard_matrix,
    random_hadamard,
    rotate_in,
    rotate_out,
)
from tests import tables

# Powers of two; both constructions of Paley, over primes and over powers of primes (9,
# 25, 27, 49); their doubled orders.
ORDERS = [
    1,
    2,
    4,
    8,
    64,
    12,
    20,
    24,
    28,
    36,
    40,
    44,
    48,
    52,
    56,
    60,
    68,
    72,
    76,
    80,
    84,
    88,
    96,
    100,
    104,
    108,
    120,
]
ORDERS += [124, 128, 140, 148, 156, 160, 164, 172, 256, 312, 344, 428, 896]
SHORT = [1, 2, 8, 12, 20, 28, 36, 40, 52, 156, 172, 344, 428]


@pytest.mark.parametrize("n", tables.thinned(ORDERS, SHORT))
def test_rows_are_orthogonal_to_the_integer(n):
    h = hadamard_matrix(n)
    assert h.dtype == np.int8
    assert set(np.unique(h)) <= {-1, 1}
    wide = h.astype(np.int64)
    np.testing.assert_array_equal(wide @ wide.T, n * np.eye(n, dtype=np.int64))


def test_powers_of_two_are_sylvesters():
    np.testing.assert_array_equal(
        hadamard_matrix(4),
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]],
    )
    indices = np.arange(64)
    parity = np.array([[bin(i & j).count("1") % 2 for j in indices] for i in indices])
    np.testing.assert_array_equal(hadamard_matrix(64), 1 - 2 * parity)


@pytest.mark.parametrize("n", tables.thinned(ORDERS, [1, 8, 12, 40]))
def test_transform_is_the_product(n):
    h = hadamard_matrix(n).astype(np.float64)
    whole = np.random.default_rng(n).integers(-9, 10, (5, n)).astype(np.float32)
    # Sums of whole numbers are exact. Only 1 / sqrt(n) and one product are rounded.
    np.testing.assert_allclose(
        hadamard(whole), whole @ h / np.sqrt(n), rtol=2e-7, atol=0
    )
    np.testing.assert_allclose(
        hadamard(whole, inverse=True), whole @ h.T / np.sqrt(n), rtol=2e-7, atol=0
    )
    np.testing.assert_allclose(
        hadamard(hadamard(whole), inverse=True), whole, atol=1e-5
    )


@pytest.mark.parametrize("n", [13696, 27392])
def test_hidden_sizes_that_need_the_order_428(n):
    spikes = np.zeros((2, n), np.float32)
    spikes[[0, 1], [3, n - 1]] = 1
    rows = np.asarray(hadamard(spikes, inverse=True))
    np.testing.assert_allclose(np.abs(rows), n**-0.5, rtol=1e-6)
    signs = np.sign(rows).astype(np.int64)
    assert signs[0] @ signs[1] == 0
    np.testing.assert_allclose(hadamard(rows), spikes, atol=1e-5)


def test_axes_dtypes_and_norm():
    x = np.random.default_rng(0).standard_normal((3, 24, 4)).astype(np.float32)
    y = np.asarray(hadamard(x, 1))
    np.testing.assert_allclose(
        np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(y.swapaxes(1, 2), hadamard(x.swapaxes(1, 2)), rtol=1e-6)
    narrow = hadamard(jnp.asarray(x, jnp.bfloat16), 1)
    assert narrow.dtype == jnp.bfloat16  # computed in float32 and rounded once
    exact = hadamard(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), 1).astype(
        jnp.bfloat16
    )
    np.testing.assert_array_equal(narrow, exact)
    np.testing.assert_allclose(
        jax.jit(lambda v: hadamard(v, 1))(x), y, rtol=1e-6, atol=1e-6
    )
    gradient = jax.grad(lambda v: hadamard(v, 1)[0, 0, 0])(x)  # a row of the matrix
    np.testing.assert_allclose(abs(gradient[0, :, 0]), 24**-0.5, rtol=1e-6)


def test_a_spike_becomes_flat():
    x = np.zeros(96, np.float32)
    x[17] = -5
    np.testing.assert_allclose(abs(np.asarray(hadamard(x))), 5 / np.sqrt(96), rtol=1e-6)


@pytest.mark.parametrize("n", tables.thinned([16, 20], [20]))
def test_rotations_cancel_between_layers(n):
    random = np.random.default_rng(1)
    x, w, before = (
        random.standard_normal(s).astype(np.float32) for s in ((7, n), (n, 5), (3, n))
    )
    signs = random_hadamard(jax.random.key(2), n)
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_allclose(
        rotate_out(x, signs) @ rotate_in(w, signs), x @ w, atol=2e-5
    )
    np.testing.assert_allclose(rotate_out(x) @ rotate_in(w), x @ w, atol=2e-5)
    # A linear layer before: its outputs are rotated.
    y = x[:, :3] @ rotate_out(before, signs) @ rotate_in(w, signs)
    np.testing.assert_allclose(y, x[:, :3] @ before @ w, atol=5e-5)
    np.testing.assert_allclose(rotate_out(x, signs), x @ q(signs), atol=2e-5)
    np.testing.assert_allclose(rotate_in(w, signs), q(signs).T @ w, atol=2e-5)
    np.testing.assert_allclose(q(signs) @ q(signs).T, np.eye(n), atol=1e-6)
    stack = np.stack([w, 2 * w])
    np.testing.assert_allclose(
        rotate_in(stack, signs)[1], 2 * rotate_in(w, signs), rtol=1e-6
    )


def q(signs):
    n = len(signs)
    return np.asarray(signs)[:, None] * hadamard_matrix(n) / np.sqrt(n)


def test_outliers_are_spread():
    # A channel of 12 sigma in a wide vector. In a narrow vector, which is nearly all
    # spike, a rotation would not help.
    x = np.random.default_rng(3).standard_normal((200, 64)).astype(np.float32)
    x[:, 9] = 12
    spec = jaxq.QuantSpec("int4", jaxq.PerToken())

    def error(v):
        return float(
            jaxq.metrics.mse(v, jaxq.dequantize(jaxq.quantize(v, spec, contracting=-1)))
        )

    assert error(hadamard(x)) < error(x) / 4


def test_widths_of_known_models():
    # Hidden and inner sizes of Llama 2 and 3, Mistral, Qwen2 and Gemma.
    for n in (
        11008,
        13824,
        14336,
        28672,
        8960,
        4864,
        18944,
        29568,
        3072,
        5120,
        8192,
        2816,
    ):
        assert jax.eval_shape(
            lambda key, n=n: random_hadamard(key, n), jax.random.key(0)
        ).shape == (n,)


def test_errors():
    for n in (0, 3, 6, 92, 10, 78):
        with pytest.raises(ValueError, match=f"order {n} "):
            hadamard_matrix(n)
    with pytest.raises(ValueError, match="hadamard: no Hadamard matrix of order 6"):
        hadamard(np.ones((2, 6), np.float32))
    with pytest.raises(ValueError, match="axis 2"):
        hadamard(np.ones((2, 4), np.float32), 2)
    with pytest.raises(TypeError, match="int32"):
        hadamard(np.ones(4, np.int32))
    with pytest.raises(ValueError, match=r"signs: float32\[4\], w: float32\[8,2\]"):
        rotate_in(np.ones((8, 2), np.float32), np.ones(4, np.float32))
