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
A = oracle.to_grid(
    random.standard_normal((3, 6, 40)), *oracle.GRIDS["bfloat16"]
).astype(np.float32)
B = oracle.to_grid(
    random.standard_normal((3, 40, 5)), *oracle.GRIDS["bfloat16"]
).astype(np.float32)


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
    got = jax.jit(jaxq.emulate(jnp.matmul, policy))(A, B)
    terms = (
        np.moveaxis(A, 2, 0)[..., None].astype(np.float64)
        * np.moveaxis(B, 1, 0)[:, :, None, :]
    )
    whole = None if chunk is not None and chunk >= 40 else chunk
    np.testing.assert_array_equal(
        got, oracle.running_sum(terms, oracle.GRIDS[name], whole)
    )


def test_two_contracted_axes_run_in_the_order_they_are_listed():
    a, b = A, B.reshape(3, 5, 40)
    policy = Policy(accumulate="bfloat16")
    for dims in ((((0, 2), (0, 2)), ((), ())), (((2, 0), (2, 0)), ((), ()))):
        got = jax.jit(
            jaxq.emulate(lambda a, b, dims=dims: lax.dot_general(a, b, dims), policy)
        )(a, b)
        order = dims[0][0]
        terms = [
            a[i, :, k].astype(np.float64)[:, None] * b[i, :, k]
            for i, k in (
                itertools.product(range(3), range(40))
                if order == (0, 2)
                else ((i, k) for k in range(40) for i in range(3))
            )
        ]
        np.testing.assert_array_equal(
            got, oracle.running_sum(terms, oracle.GRIDS["bfloat16"])
        )


def test_an_addition_is_rounded_once():
    # 1 + 2^-8 is half-way and goes to even, 1. With 2^-40 more it must go up, though float32 cannot see those.
    total = jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate="bfloat16")))
    assert total(np.float32([1, 2.0**-8 * (1 + 2.0**-23)])) == 1 + 2.0**-7
    assert total(np.float32([1, 2.0**-8 * (1 - 2.0**-24)])) == 1
    assert total(np.float32([-1, -(2.0**-8) * (1 + 2.0**-23)])) == -1 - 2.0**-7


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_ones_stick(name):
    # The largest n for which n + 1 is in the format: 2^(mantissa bits + 1).
    top = 2 ** (oracle.GRIDS[name][0] + 1)
    ones = np.ones((1, 4 * top), np.float32)
    assert jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate=name)))(ones[0]) == top
    assert (
        jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate=name, chunk=64)))(ones[0])
        == 4 * top
    )
    assert (
        jax.jit(jaxq.emulate(jnp.dot, Policy(accumulate=name)))(ones, ones.T).item()
        == top
    )


def test_1024_ones_in_bfloat16_give_256():
    ones = np.ones(1024, np.float32)
    for fn, arguments in ((jnp.sum, (ones,)), (jnp.dot, (ones, ones))):
        policy = Policy(operands="bfloat16", accumulate="bfloat16", result="bfloat16")
        assert jax.jit(jaxq.emulate(fn, policy))(*arguments) == 256
        policy = Policy(operands="bfloat16", accumulate="float32", result="bfloat16")
        assert jax.jit(jaxq.emulate(fn, policy))(*arguments) == 1024


@pytest.mark.parametrize("chunk", [None, 16])
def test_reduce_sum_runs_over_axes_in_order(chunk):
    policy = Policy(accumulate="bfloat16", chunk=chunk)
    got = jax.jit(jaxq.emulate(lambda x: jnp.sum(x, axis=(0, 2)), policy))(A)
    terms = A.transpose(0, 2, 1).reshape(120, 6)
    np.testing.assert_array_equal(
        got, oracle.running_sum(terms, oracle.GRIDS["bfloat16"], chunk)
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(reverse):
    got = jax.jit(
        jaxq.emulate(
            lambda x: lax.cumsum(x, axis=2, reverse=reverse),
            Policy(accumulate="bfloat16"),
        )
    )(A)
    x = A[..., ::-1] if reverse else A
    expected, total = [], np.zeros((3, 6))
    for k in range(40):
        total = oracle.to_grid(total + x[..., k], *oracle.GRIDS["bfloat16"])
        expected.append(total)
    expected = np.stack(expected, -1)
    np.testing.assert_array_equal(got, expected[..., ::-1] if reverse else expected)
    with pytest.raises(NotImplementedError, match="cumsum has no chunked form"):
        jax.eval_shape(
            jaxq.emulate(jnp.cumsum, Policy(accumulate="bfloat16", chunk=8)), A
        )


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

    got = jax.jit(jaxq.emulate(pooled, Policy(accumulate="bfloat16")))(A)
    padded = np.pad(A, ((0, 0), (1, 0), (0, 2)))
    assert got.shape == jax.eval_shape(pooled, A).shape
    got = np.asarray(got)
    for i, j, k in itertools.product(*map(range, got.shape)):
        window = padded[i, 2 * j : 2 * j + 2, 4 * k : 4 * k + 5 : 2].reshape(-1)
        assert got[i, j, k] == oracle.running_sum(window, oracle.GRIDS["bfloat16"])


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    image = oracle.to_grid(random.standard_normal((2, 5, 6, 4)), 7, -126).astype(
        np.float32
    )
    kernel = oracle.to_grid(
        random.standard_normal((3, 2, 4 // groups, 6)), 7, -126
    ).astype(np.float32)

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    got = jax.jit(jaxq.emulate(conv, Policy(accumulate="bfloat16")))(image, kernel)
    assert got.shape == jax.eval_shape(conv, image, kernel).shape
    got = np.asarray(got)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
    for n, i, j, o in itertools.product(*map(range, got.shape)):
        first = (
            o // (6 // groups) * (4 // groups)
        )  # channel, then kernel row, then kernel column
        terms = [
            padded[n, 2 * i + r, j + 2 * c, first + channel] * kernel[r, c, channel, o]
            for channel, r, c in itertools.product(
                range(4 // groups), range(3), range(2)
            )
        ]
        assert got[n, i, j, o] == oracle.running_sum(terms, oracle.GRIDS["bfloat16"]), (
            n,
            i,
            j,
            o,
        )


def test_truncating_adder():
    precision = Precision(
        8, 13, rounding="toward_zero"
    )  # as some FP8 units keep about 14 bits
    terms = np.float32([1, 2.0**-14, 2.0**-13, 2.0**-13 - 2.0**-30])
    got = jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate=precision)))(terms)
    assert got == 1 + 2.0**-13


def test_no_terms():
    policy = Policy(accumulate="bfloat16")
    none = np.ones((2, 0), np.float32)
    assert (
        jax.jit(jaxq.emulate(jnp.dot, policy))(none, none.T).tolist() == [[0] * 2] * 2
    )
    assert jax.jit(jaxq.emulate(jnp.sum, policy))(none[0]) == 0


def test_gradient_of_a_narrow_sum_is_that_of_the_sum():
    a, b = A[0], B[0]
    policy = Policy(operands="bfloat16", accumulate="bfloat16", chunk=8)
    got = jax.jit(
        jax.grad(
            lambda a, b: jnp.sum(jaxq.emulate(jnp.dot, policy)(a, b) ** 2),
            argnums=(0, 1),
        )
    )(a, b)
    y = np.asarray(jax.jit(jaxq.emulate(jnp.dot, policy))(a, b))
    np.testing.assert_allclose(got[0], 2 * y @ b.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[1], a.T @ (2 * y), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["cumprod", "prod", "scatter_add", "scatter_sub", "cholesky"]
)
def test_sums_without_a_narrow_form_say_so(name):
    fn = {
        "cumprod": jnp.cumprod,
        "prod": jnp.prod,
        "scatter_add": lambda x: x.at[0].add(1.0),
        "scatter_sub": lambda x: x.at[0].subtract(1.0),
        "cholesky": lambda x: jnp.linalg.cholesky(jnp.outer(x, x) + jnp.eye(3)),
    }[name]
    ones = np.ones(3, np.float32)
    with pytest.raises(
        NotImplementedError, match="has no form with a narrow accumulator.*primitives="
    ):
        jax.eval_shape(jaxq.emulate(fn, Policy(accumulate="bfloat16")), ones)
    assert np.isfinite(
        jax.jit(jaxq.emulate(fn, Policy("bfloat16", "float32", "bfloat16")))(ones)
    ).all()


def test_sums_across_devices_say_so():
    total = jaxq.emulate(lambda x: lax.psum(x, "i"), Policy(accumulate="bfloat16"))
    with pytest.raises(
        NotImplementedError, match="'psum' has no form with a narrow accumulator"
    ):
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
]
EVERY_ROUNDING += [(23, "nearest_even")]


@pytest.mark.parametrize(("mantissa_bits", "rounding"), thinned(WIDTHS, EVERY_ROUNDING))
def test_every_width_rounds_the_true_sum(mantissa_bits, rounding):
    # Also where float32 leaves no bits to spare: the sums are exact in float64, and rounded there.
    terms = np.random.default_rng(mantissa_bits).standard_normal(400).astype(np.float32)
    terms[::7] *= np.float32(2.0**-20)
    terms[5::40] = np.float32(2.0**-24)  # halves and quarters of a last place
    precision = Precision(8, mantissa_bits, rounding=rounding)
    total = 0.0
    for term in terms.astype(np.float64):
        total += (
            term  # at most 53 bits: what is lost lies 29 places below float32's last
        )
        exponent = np.floor(np.log2(abs(total))) if total else 0
        unit = 2.0 ** (exponent - mantissa_bits)
        y = abs(total) / unit
        whole = {
            "nearest_even": np.rint(y),
            "nearest_away": np.floor(y + 0.5),
            "toward_zero": np.floor(y),
        }[rounding]
        total = float(np.copysign(whole * unit, total))
    if (
        mantissa_bits < 23 or rounding != "nearest_even"
    ):  # which is float32, added as XLA adds it
        assert jax.jit(jaxq.emulate(jnp.sum, Policy(accumulate=precision)))(
            terms
        ) == np.float32(total)
    swept = jax.jit(
        lambda m: jaxq.emulate(
            jnp.sum, Policy(accumulate=Precision(8, m, rounding=rounding))
        )(terms)
    )
    assert swept(mantissa_bits) == np.float32(total)


@pytest.mark.parametrize("chunk", [None, 8])
def test_convolution_over_groups_of_the_batch(chunk):
    # What the gradient of a grouped convolution is made of: each group of examples meets its own output channels.
    x, w = (
        random.standard_normal((4, 6, 3)).astype(np.float32),
        random.standard_normal((3, 3, 8)).astype(np.float32),
    )

    def convolve(x, w, groups=1):
        numbers = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, batch_group_count=groups
        )

    narrow = jax.jit(
        jaxq.emulate(convolve, Policy("bfloat16", "bfloat16", chunk=chunk))
    )
    parts = [narrow(x[2 * i : 2 * i + 2], w[..., 4 * i : 4 * i + 4]) for i in range(2)]
    found = jax.jit(
        jaxq.emulate(
            lambda x, w: convolve(x, w, 2), Policy("bfloat16", "bfloat16", chunk=chunk)
        )
    )(x, w)
    np.testing.assert_array_equal(found, np.concatenate(parts, axis=-1))
    plain = convolve(x, w, 2)
    np.testing.assert_allclose(found, plain, rtol=0.05, atol=0.1)
    assert (np.asarray(found) != plain).any()
