"""Rows sorted by expert, against one product for each expert; gradients and errors."""

import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.kernels import _rows
from jaxq.ops import ragged_dot
from tests.arrays import assert_same, normal_with_outliers
from tests.tables import thinned

SIZES = jnp.array([3, 0, 5], jnp.int32)
M, K, N = 9, 96, 40  # the last row belongs to no expert


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows: 40 rows are three blocks, and the last two share 8 rows."""
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 0)


def plain(x, w):
    """One product for each expert; rows of no expert are zero."""
    starts = np.cumsum([0, *np.asarray(SIZES)])
    parts = [x[a:b] @ w[i] for i, (a, b) in enumerate(itertools.pairwise(starts))]
    return jnp.concatenate([*parts, jnp.zeros((M - starts[-1], N), x.dtype)])


@pytest.mark.parametrize(
    ("preset", "layout"),
    thinned(
        itertools.product(["int4", "nf4_dq", "int8", "uint4"], ["rows", "columns"]),
        [("nf4_dq", "rows")],
    ),
)
def test_products_and_gradients(small_blocks, preset, layout):
    qt = jaxq.relayout(
        jaxq.quantize(normal_with_outliers(3, K, N), preset, contracting=-2, batch=0),
        layout,
    )
    x, dy = normal_with_outliers(M, K), normal_with_outliers(M, N, seed=2)
    w = jaxq.dequantize(qt)
    np.testing.assert_allclose(
        jax.jit(ragged_dot)(x, qt, SIZES), plain(x, w), 1e-5, 1e-4
    )

    def quantized_loss(x, qt):
        return jnp.sum(dy * ragged_dot(x, qt, SIZES))

    def float_loss(x, qt):
        return jnp.sum(dy * plain(x, jaxq.dequantize(qt)))

    gradients, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1), allow_int=True))(x, qt)
        for f in (quantized_loss, float_loss)
    )
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-4
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(
                a, b, rtol=tolerance, atol=tolerance * abs(b).max()
            )


def test_narrow_floats_and_dtypes():
    qt = jaxq.quantize(
        normal_with_outliers(3, K, N, dtype="bfloat16"), "int4", contracting=-2, batch=0
    )
    x = normal_with_outliers(M, K, dtype="bfloat16")
    y = ragged_dot(x, qt, SIZES)
    assert y.dtype == jnp.bfloat16
    exact = plain(x.astype(jnp.float32), jaxq.dequantize(qt, dtype=jnp.float32))
    assert np.linalg.norm(y.astype(jnp.float32) - exact) <= 5e-3 * np.linalg.norm(exact)
    assert (
        ragged_dot(x, qt, SIZES, preferred_element_type=jnp.float32).dtype
        == jnp.float32
    )


STATIC = {"bounds": (jnp.array([-1.0, -2.0, -3.0]), jnp.array([1.0, 2.0, 1.5]))}
UINT8 = jaxq.QuantSpec("uint8", jaxq.PerToken(), symmetric=False)


@pytest.mark.parametrize(
    ("preset", "spec", "options", "dtype"),
    [
        ("int8", "int8", {}, "float32"),
        ("int4", "int8", {}, "bfloat16"),
        ("int8", "int8", STATIC, "float32"),
        ("int4", UINT8, {}, "float32"),
        ("fp8", "fp8", {}, "float32"),
        ("nf4", jaxq.QuantSpec("int8", jaxq.PerGroup(32)), {}, "float32"),
    ],
)
def test_quantized_rows_are_those_of_a_loop(preset, spec, options, dtype):
    """The products and the gradients of `x_rows @ weights[i]`."""
    w = normal_with_outliers(3, K, N, dtype=dtype)
    qt = jaxq.quantize(w, preset, contracting=-2, batch=0)
    qt = qt.with_activation(spec, **options)
    factors = jnp.linspace(0.5, 2, K)
    qt = qt.with_input_scale(factors) if dtype == "bfloat16" else qt
    x = normal_with_outliers(M, K, dtype=dtype)

    def loop(x, qt):
        weights = [jax.tree.map(operator.itemgetter(i), qt) for i in range(3)]
        return plain(x, weights)

    def loss(product):
        return lambda x: jnp.sum(product(x).astype(jnp.float32) ** 2)

    results = []
    for product in (lambda x: ragged_dot(x, qt, SIZES), lambda x: loop(x, qt)):
        y, dx = jax.jit(product)(x), jax.jit(jax.grad(loss(product)))(x)
        results.append([np.asarray(a, np.float64) for a in (y, dx)])
    tolerance = 5e-6 if dtype == "float32" else 1e-2
    for a, b in zip(*results, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    floats = np.asarray(ragged_dot(x, qt.with_activation(None), SIZES), np.float64)
    change = np.linalg.norm(results[0][0] - floats) / np.linalg.norm(floats)
    assert change > 1e-3


FLOAT8_ROWS = jaxq.QuantSpec("float8_e4m3fn", jaxq.PerToken())


@pytest.mark.parametrize(
    ("preset", "spec"),
    thinned(
        itertools.product(
            ["int4", "uint4", "int8", "fp8"],
            ["int8", FLOAT8_ROWS, jaxq.QuantSpec("int8", jaxq.PerGroup(32)), UINT8],
        ),
        [("int4", "int8"), ("int8", FLOAT8_ROWS), ("int4", UINT8)],
    ),
)
def test_bfloat16_weights_are_not_rounded(preset, spec):
    """The product of codes against float64, as exact as a product with one weight."""
    w = normal_with_outliers(3, K, N, dtype="bfloat16")
    qt = jaxq.quantize(w, preset, contracting=-2, batch=0).with_activation(spec)
    x = normal_with_outliers(M, K, dtype="bfloat16")
    rows = jaxq.quantize(x, qt.meta.activation, contracting=-1)
    rows, weights = (
        np.asarray(jaxq.dequantize(codes, dtype="float32"), np.float64)
        for codes in (rows, qt)
    )
    expected = np.concatenate(
        [rows[:3] @ weights[0], rows[3:8] @ weights[2], np.zeros((1, N))]
    )
    y = ragged_dot(x, qt, SIZES, preferred_element_type=jnp.float32)
    error = np.abs(np.asarray(y, np.float64) - expected).max()
    assert error <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("spec", ["int8", FLOAT8_ROWS, STATIC])
def test_padding_of_quantized_rows_may_hold_anything(spec):
    """The result and the gradients of rows that belong to no expert are zero."""
    qt = jaxq.quantize(normal_with_outliers(3, K, N), "int8", contracting=-2, batch=0)
    is_static = spec is STATIC
    qt = qt.with_activation(
        "int8" if is_static else spec, **(STATIC if is_static else {})
    )
    x = normal_with_outliers(M, K)
    for padding in (jnp.nan, jnp.inf):
        padded = x.at[-1].set(padding)
        assert_same(ragged_dot(padded, qt, SIZES), ragged_dot(x, qt, SIZES))

        def loss(x):
            return jnp.sum(ragged_dot(x, qt, SIZES) ** 2)

        assert_same(jax.grad(loss)(padded), jax.grad(loss)(x))
    assert not ragged_dot(padded, qt, SIZES)[-1].any()


def test_a_quantized_row_has_a_forward_derivative():
    qt = jaxq.quantize(normal_with_outliers(3, K, N), "int8", contracting=-2, batch=0)
    x, x_dot = normal_with_outliers(M, K), normal_with_outliers(M, K, seed=3)
    product = jax.jit(lambda x: ragged_dot(x, qt.with_activation("int8"), SIZES))
    _, y_dot = jax.jvp(product, (x,), (x_dot,))
    np.testing.assert_allclose(y_dot, plain(x_dot, jaxq.dequantize(qt)), 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (jaxq.QuantSpec("int8", jaxq.PerTensor()), {}, r"share\. Use PerToken\(\)"),
        (jaxq.QuantSpec("int8", jaxq.PerBlock((3, 32))), {}, "share"),
        ("int8", {"outliers": 6.0}, "outlier threshold"),
    ],
)
def test_specs_that_do_not_fit_rows_raise(spec, options, message):
    qt = jaxq.quantize(normal_with_outliers(3, K, N), "int8", contracting=-2, batch=0)
    qt = qt.with_activation(spec, **options)
    with pytest.raises(ValueError, match=message):
        ragged_dot(jnp.ones((M, K)), qt, SIZES)
    with pytest.raises(ValueError, match=message):
        jaxq.explain(jnp.ones((M, K)), qt, group_sizes=SIZES)


def test_trained_weights_do_not_quantize_rows():
    w = normal_with_outliers(3, K, N)
    qt = jaxq.quantize(w, "int8", contracting=-2, batch=0).with_activation("int8")
    trained = jaxq.qtensor.TrainedWeight.start(w, qt)
    with pytest.raises(ValueError, match="use with_activation after conversion"):
        ragged_dot(jnp.ones((M, K)), trained, SIZES)


@pytest.mark.parametrize("kind", ["weights", "activations", "trained"])
def test_a_negative_size_counts_as_zero(kind):
    w = normal_with_outliers(3, K, N)
    qt = jaxq.quantize(w, "int8", contracting=-2, batch=0)
    if kind == "activations":
        qt = qt.with_activation("int8").with_input_scale(jnp.linspace(0.5, 2, K))
    if kind == "trained":
        qt = jaxq.qtensor.TrainedWeight.start(w, qt)
    x = normal_with_outliers(M, K)

    def derivatives(sizes):
        def loss(x):
            return jnp.sum(ragged_dot(x, qt, sizes) ** 2)

        return jax.jit(jax.value_and_grad(loss))(x)

    negative, zero = (derivatives(jnp.array([3, size, 5])) for size in (-4, 0))
    for actual, expected in zip(negative, zero, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_stack_is_never_decoded_as_a_whole():
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, "int4", contracting=-2, batch=0),
        jax.ShapeDtypeStruct((4, 1024, 4096), jnp.float32),
    )
    x, sizes = (
        jax.ShapeDtypeStruct((8, 1024), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    program = jax.jit(ragged_dot).lower(x, qt, sizes).compile()
    assert (
        program.memory_analysis().temp_size_in_bytes <= 12 * 2**20
    )  # the decoded stack takes 64 MB


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (jnp.ones((M, K)), jnp.ones((3, K, N)), SIZES),
            TypeError,
            "weights must be a QTensor",
        ),
        ((jnp.ones((M, K)), "matrix", SIZES), ValueError, "weights must be .* batch=0"),
        (
            (jnp.ones((M, 64)), "stack", SIZES),
            ValueError,
            r"x must be \[m, 96\] and group_sizes \[3\]",
        ),
        (
            (jnp.ones((M, K)), "stack", SIZES[:2]),
            ValueError,
            r"group_sizes: int32\[2\]",
        ),
        (
            (jnp.ones((M, K)), "stack", jnp.ones(3)),
            TypeError,
            "group_sizes must be integers",
        ),
        (
            (jnp.ones((M, K), jnp.int8), "stack", SIZES),
            TypeError,
            "x must be a float32",
        ),
    ],
)
def test_errors(arguments, error, message):
    weights = {
        "stack": jaxq.quantize(
            normal_with_outliers(3, K, N), "int4", contracting=-2, batch=0
        ),
        "matrix": jaxq.quantize(normal_with_outliers(K, N), "int4"),
    }
    with pytest.raises(error, match=message):
        ragged_dot(*(weights[a] if isinstance(a, str) else a for a in arguments))
