"""Narrow accumulators against a running sum in float64 that is rounded by division."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.emulation import Policy, Precision
from tests.emulation import oracle
from tests.tables import thinned

random = np.random.default_rng(0)


def bfloat16_normal(*shape: int) -> np.ndarray:
    """Normal numbers, rounded to bfloat16, as float32."""
    numbers = random.standard_normal(shape)
    return oracle.to_grid(numbers, *oracle.GRIDS["bfloat16"]).astype(np.float32)


A = bfloat16_normal(3, 6, 40)
B = bfloat16_normal(3, 40, 5)

SUMS = list(
    itertools.product(["bfloat16", "float16", "tfloat32"], [None, 1, 7, 8, 40, 100])
)
EVERY_CHUNK = [
    ("bfloat16", None),
    ("float16", 1),
    ("bfloat16", 7),
    ("tfloat32", 8),
    ("float16", 40),
    ("tfloat32", 100),
]


@pytest.mark.parametrize(("name", "chunk"), thinned(SUMS, EVERY_CHUNK))
def test_dot_general(name, chunk):
    policy = Policy(accumulate=name, chunk=chunk)
    product = jax.jit(jaxq.emulate(jnp.matmul, policy))(A, B)
    a = np.moveaxis(A, 2, 0).astype(np.float64)  # [k, batch, m]
    b = np.moveaxis(B, 1, 0)  # [k, batch, n]
    terms = a[..., None] * b[:, :, None, :]
    if chunk is not None and chunk >= 40:
        chunk = None  # one chunk holds all terms
    expected = oracle.running_sum(terms, oracle.GRIDS[name], chunk)
    np.testing.assert_array_equal(product, expected)


def test_contracted_axes_are_summed_in_their_listed_order():
    a, b = A, B.reshape(3, 5, 40)
    policy = Policy(accumulate="bfloat16")
    positions = list(itertools.product(range(3), range(40)))  # of axes 0 and 2
    by_last_axis = sorted(positions, key=lambda position: position[::-1])
    for axes, order in (((0, 2), positions), ((2, 0), by_last_axis)):

        def dot(a, b, axes=axes):
            return lax.dot_general(a, b, ((axes, axes), ((), ())))

        product = jax.jit(jaxq.emulate(dot, policy))(a, b)
        wide = a.astype(np.float64)
        terms = [wide[i, :, k, None] * b[i, :, k] for i, k in order]
        expected = oracle.running_sum(terms, oracle.GRIDS["bfloat16"])
        np.testing.assert_array_equal(product, expected)


def test_an_addition_is_rounded_once():
    # 1 + 2^-8 is a tie and goes to the even number 1. A little more must go up, but the
    # float32 sum is still a tie.
    total = jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate="bfloat16")))
    assert total(np.float32([1, 2.0**-8 * (1 + 2.0**-23)])) == 1 + 2.0**-7
    assert total(np.float32([1, 2.0**-8 * (1 - 2.0**-24)])) == 1
    assert total(np.float32([-1, -(2.0**-8) * (1 + 2.0**-23)])) == -1 - 2.0**-7


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_sum_of_ones_stops_growing(name):
    # At n = 2^(mantissa bits + 1) the sum n + 1 is not in the format. It rounds to n.
    top = 2 ** (oracle.GRIDS[name][0] + 1)
    ones = np.ones((1, 4 * top), np.float32)
    narrow, chunked = Policy(accumulate=name), Policy(accumulate=name, chunk=64)
    assert jax.jit(jaxq.emulate(jnp.sum, narrow))(ones[0]) == top
    assert jax.jit(jaxq.emulate(jnp.sum, chunked))(ones[0]) == 4 * top
    assert jax.jit(jaxq.emulate(jnp.dot, narrow))(ones, ones.T).item() == top


def test_1024_ones_in_bfloat16_give_256():
    ones = np.ones(1024, np.float32)
    for fn, arguments in ((jnp.sum, (ones,)), (jnp.dot, (ones, ones))):
        policy = Policy(operands="bfloat16", accumulate="bfloat16", result="bfloat16")
        assert jax.jit(jaxq.emulate(fn, policy))(*arguments) == 256
        policy = Policy(operands="bfloat16", accumulate="float32", result="bfloat16")
        assert jax.jit(jaxq.emulate(fn, policy))(*arguments) == 1024


@pytest.mark.parametrize("chunk", [None, 16])
def test_reduce_sum_adds_the_axes_in_ascending_order(chunk):
    policy = Policy(accumulate="bfloat16", chunk=chunk)
    total = jax.jit(jaxq.emulate(lambda x: jnp.sum(x, axis=(0, 2)), policy))(A)
    terms = A.transpose(0, 2, 1).reshape(120, 6)
    expected = oracle.running_sum(terms, oracle.GRIDS["bfloat16"], chunk)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(reverse):
    def cumsum(x):
        return lax.cumsum(x, axis=2, reverse=reverse)

    sums = jax.jit(jaxq.emulate(cumsum, Policy(accumulate="bfloat16")))(A)
    x = A[..., ::-1] if reverse else A
    expected, total = [], np.zeros((3, 6))
    for k in range(40):
        total = oracle.to_grid(total + x[..., k], *oracle.GRIDS["bfloat16"])
        expected.append(total)
    expected = np.stack(expected, -1)
    np.testing.assert_array_equal(sums, expected[..., ::-1] if reverse else expected)
    chunked = jaxq.emulate(cumsum, Policy(accumulate="bfloat16", chunk=8))
    with pytest.raises(NotImplementedError, match="cumsum has no chunked form"):
        jax.eval_shape(chunked, A)


def test_reduce_window_sum():
    def pooled(x):
        return lax.reduce_window(
            x,
            0.0,
            lax.add,
            (1, 2, 3),
            (1, 2, 4),
            ((0, 0), (1, 0), (0, 2)),
            window_dilation=(1, 1, 2),
        )

    sums = np.asarray(jax.jit(jaxq.emulate(pooled, Policy(accumulate="bfloat16")))(A))
    assert sums.shape == jax.eval_shape(pooled, A).shape
    padded = np.pad(A, ((0, 0), (1, 0), (0, 2)))
    for i, j, k in itertools.product(*map(range, sums.shape)):
        window = padded[i, 2 * j : 2 * j + 2, 4 * k : 4 * k + 5 : 2].reshape(-1)
        assert sums[i, j, k] == oracle.running_sum(window, oracle.GRIDS["bfloat16"])


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    image = bfloat16_normal(2, 5, 6, 4)
    kernel = bfloat16_normal(3, 2, 4 // groups, 6)

    def conv(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            window_strides=(2, 1),
            padding="SAME",
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    emulated = jax.jit(jaxq.emulate(conv, Policy(accumulate="bfloat16")))
    y = np.asarray(emulated(image, kernel))
    assert y.shape == jax.eval_shape(conv, image, kernel).shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
    # The order of the terms: channel, then kernel row, then kernel column.
    order = list(itertools.product(range(4 // groups), range(3), range(2)))
    for n, i, j, o in itertools.product(*map(range, y.shape)):
        first = o // (6 // groups) * (4 // groups)  # first channel of the group
        terms = [
            padded[n, 2 * i + r, j + 2 * c, first + channel] * kernel[r, c, channel, o]
            for channel, r, c in order
        ]
        expected = oracle.running_sum(terms, oracle.GRIDS["bfloat16"])
        assert y[n, i, j, o] == expected, (n, i, j, o)


def test_accumulator_that_truncates():
    # Some FP8 units truncate sums to about 14 bits.
    precision = Precision(8, 13, rounding="toward_zero")
    terms = np.float32([1, 2.0**-14, 2.0**-13, 2.0**-13 - 2.0**-30])
    total = jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate=precision)))(terms)
    assert total == 1 + 2.0**-13


def test_a_sum_of_no_terms_is_zero():
    policy = Policy(accumulate="bfloat16")
    empty = np.ones((2, 0), np.float32)
    product = jax.jit(jaxq.emulate(jnp.dot, policy))(empty, empty.T)
    assert product.tolist() == [[0, 0], [0, 0]]
    assert jax.jit(jaxq.emulate(jnp.sum, policy))(empty[0]) == 0


def test_gradient_of_a_narrow_sum_equals_that_of_a_wide_sum():
    a, b = A[0], B[0]
    policy = Policy(operands="bfloat16", accumulate="bfloat16", chunk=8)
    dot = jaxq.emulate(jnp.dot, policy)

    def loss(a, b):
        return jnp.sum(dot(a, b) ** 2)

    a_gradient, b_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
    y = np.asarray(jax.jit(dot)(a, b))
    np.testing.assert_allclose(a_gradient, 2 * y @ b.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(b_gradient, a.T @ (2 * y), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["cumprod", "prod", "scatter_add", "scatter_sub", "cholesky"]
)
def test_sums_without_a_narrow_form_raise(name):
    fn = {
        "cumprod": jnp.cumprod,
        "prod": jnp.prod,
        "scatter_add": lambda x: x.at[0].add(1.0),
        "scatter_sub": lambda x: x.at[0].subtract(1.0),
        "cholesky": lambda x: jnp.linalg.cholesky(jnp.outer(x, x) + jnp.eye(3)),
    }[name]
    ones = np.ones(3, np.float32)
    message = "has no form with a narrow accumulator.*primitives="
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(jaxq.emulate(fn, Policy(accumulate="bfloat16")), ones)
    wide = Policy("bfloat16", "float32", "bfloat16")
    assert np.isfinite(jax.jit(jaxq.emulate(fn, wide))(ones)).all()


def test_sums_across_devices_raise():
    total = jaxq.emulate(lambda x: lax.psum(x, "i"), Policy(accumulate="bfloat16"))
    message = "'psum' has no form with a narrow accumulator"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(jax.vmap(total, axis_name="i"), np.ones(3, np.float32))


WIDTHS = list(
    itertools.product([10, 21, 22, 23], ["nearest_even", "nearest_away", "toward_zero"])
)
EVERY_ROUNDING = [
    (10, "nearest_even"),
    (21, "toward_zero"),
    (22, "nearest_even"),
    (22, "nearest_away"),
    (23, "toward_zero"),
    (23, "nearest_even"),
]


@pytest.mark.parametrize(("mantissa_bits", "rounding"), thinned(WIDTHS, EVERY_ROUNDING))
def test_every_width_rounds_the_true_sum(mantissa_bits, rounding):
    # The expected sums are exact in float64 before they are rounded. Some widths leave
    # float32 few or no bits to spare.
    terms = np.random.default_rng(mantissa_bits).standard_normal(400).astype(np.float32)
    terms[::7] *= np.float32(2.0**-20)
    terms[5::40] = np.float32(2.0**-24)  # halves and quarters of a last place
    precision = Precision(8, mantissa_bits, rounding=rounding)
    total = 0.0
    for term in terms.astype(np.float64):
        total += term  # float64 has 29 bits more than float32
        exponent = np.floor(np.log2(abs(total))) if total else 0
        unit = 2.0 ** (exponent - mantissa_bits)
        steps = abs(total) / unit
        whole = {
            "nearest_even": np.rint(steps),
            "nearest_away": np.floor(steps + 0.5),
            "toward_zero": np.floor(steps),
        }[rounding]
        total = float(np.copysign(whole * unit, total))
    if (mantissa_bits, rounding) != (23, "nearest_even"):
        # The excluded case is a plain float32 sum, in an order that XLA chooses.
        narrow_sum = jaxq.emulate(jnp.sum, Policy(accumulate=precision))
        assert jax.jit(narrow_sum)(terms) == np.float32(total)

    @jax.jit
    def with_traced_width(mantissa_bits):
        precision = Precision(8, mantissa_bits, rounding=rounding)
        return jaxq.emulate(jnp.sum, Policy(accumulate=precision))(terms)

    assert with_traced_width(mantissa_bits) == np.float32(total)


@pytest.mark.parametrize("chunk", [None, 8])
def test_convolution_over_groups_of_the_batch(chunk):
    # Gradients of grouped convolutions are such convolutions. Each group of examples
    # has its own output channels.
    x = random.standard_normal((4, 6, 3)).astype(np.float32)
    w = random.standard_normal((3, 3, 8)).astype(np.float32)
    policy = Policy("bfloat16", "bfloat16", chunk=chunk)

    def convolve(x, w, groups=1):
        numbers = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, batch_group_count=groups
        )

    narrow = jax.jit(jaxq.emulate(convolve, policy))
    parts = [narrow(x[2 * i : 2 * i + 2], w[..., 4 * i : 4 * i + 4]) for i in range(2)]
    y = jax.jit(jaxq.emulate(lambda x, w: convolve(x, w, 2), policy))(x, w)
    np.testing.assert_array_equal(y, np.concatenate(parts, axis=-1))
    plain = convolve(x, w, 2)
    np.testing.assert_allclose(y, plain, rtol=0.05, atol=0.1)
    assert (np.asarray(y) != plain).any()
