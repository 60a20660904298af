"""fake_quant: the values of dequantize(quantize(x)), and its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from tests import tables
from tests.arrays import assert_close, normal

SHAPE = (64, 8)


@functools.partial(jax.jit, static_argnames="spec")
def both(x, spec):
    return jaxq.fake_quant(x, spec), jaxq.dequantize(jaxq.quantize(x, spec))


@tables.over_presets
def test_equals_dequantize_of_quantize(preset):
    x = normal(*SHAPE)
    fake, expected = both(x, preset)
    np.testing.assert_array_equal(fake, expected)
    assert np.any(np.asarray(fake) != x)
    if preset in ("int8", "nf4_dq"):
        np.testing.assert_array_equal(jaxq.fake_quant(x, preset), expected)


MX = QuantSpec(
    "float4_e2m1fn", PerGroup(32), scale="float8_e8m0fnu", scale_rule="mx_floor"
)
TERNARY = QuantSpec("ternary", scale_rule="absmean")


@functools.partial(jax.jit, static_argnames="spec")
def gradient_of_sum(x, spec):
    return jax.grad(lambda x: jaxq.fake_quant(x, spec).astype(jnp.float32).sum())(x)


def test_gradient_is_one_inside_and_zero_outside():
    # The block's largest number, 7.5, has the scale 1. A number is inside if it is
    # rounded and not clipped: up to half a step beyond the largest element, 6 + 2/2,
    # with the boundary.
    x = np.zeros((32, 1), np.float32)
    x[:9, 0] = [
        7.5,
        -7.5,
        7.0,
        -7.0,
        np.nextafter(np.float32(7), np.float32(8)),
        6.5,
        0.1,
        0.0,
        -7.1,
    ]
    gradient = gradient_of_sum(x, MX)
    assert gradient[:9, 0].tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0]
    assert np.all(gradient[9:] == 1)
    # The mean magnitude is the scale. The values are {-1, 0, 1} * scale, so a number
    # is inside up to 1.5 * scale.
    x = np.float32([1.0, -1.0, 4.0, -0.2, 0.3, -2.5])
    scale = abs(x).mean()
    assert scale == 1.5
    gradient = gradient_of_sum(x, TERNARY)
    assert (
        gradient.tolist()
        == (abs(x) <= 1.5 * scale).astype(float).tolist()
        == [1, 1, 0, 1, 1, 0]
    )


@pytest.mark.parametrize(
    "preset", ["int8", "uint4", "nf4", "fp8", "nvfp4", "int4_absmax"]
)
def test_gradient_is_one_where_nothing_clips(preset):
    @jax.jit
    def pulled(x, weight):
        value, pull = jax.vjp(lambda x: jaxq.fake_quant(x, preset), x)
        return value, pull(weight)[0]

    x, weight = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    value, gradient = pulled(x, weight)
    np.testing.assert_array_equal(value, both(x, preset)[0])
    np.testing.assert_array_equal(gradient, weight)


def test_signed_scales_clip_the_number_opposite_to_the_extreme():
    """The extreme has the code -8, and 7 is the largest code on the other side."""
    x = jnp.array([-8.0, 7.0, 7.4, 7.6, 8.0, 0.0]) / 8
    expected = [1, 1, 1, 0, 0, 1]
    for sign in (1, -1):
        assert gradient_of_sum(sign * x.at[0].mul(1.01), "int4").tolist() == expected


def test_jit_vmap_grad_and_jvp_compose():
    stack, weight = normal(3, 32, 2, seed=3) * 4, normal(3, 32, 2, seed=4)

    fake = jax.jit(lambda x: jaxq.fake_quant(x, MX))

    def loss(x, w):
        return (jaxq.fake_quant(x, MX) ** 2 * w).sum()

    slope = jax.jit(jax.value_and_grad(loss))
    losses, single = zip(
        *(slope(x, w) for x, w in zip(stack, weight, strict=True)), strict=True
    )
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(stack, weight)
    np.testing.assert_allclose(mapped, np.stack(single), rtol=1e-6)
    assert 0 < np.mean(np.asarray(mapped) == 0) < 0.9
    expected = np.stack([fake(x) for x in stack])
    np.testing.assert_array_equal(jax.jit(jax.vmap(fake))(stack), expected)
    np.testing.assert_array_equal(
        jaxq.fake_quant(stack, MX, contracting=-2, batch=0), expected
    )

    directional = jax.jit(lambda x, w, t: jax.jvp(lambda x: loss(x, w), (x,), (t,)))
    value, tangent = directional(stack[0], weight[0], np.ones_like(stack[0]))
    np.testing.assert_allclose(value, losses[0], rtol=1e-6)
    np.testing.assert_allclose(tangent, single[0].sum(), rtol=1e-4)
    # The gradient is a constant: a second derivative of fake_quant alone is zero.
    second = jax.jit(
        jax.grad(lambda x: jax.grad(lambda y: jaxq.fake_quant(y, MX).sum())(x).sum())
    )(stack[0])
    assert not np.any(second)


def test_grad_of_a_layer_inside_scan():
    weights, x = normal(3, 8, 8, seed=5), normal(2, 8, seed=6)

    def scanned(weights):
        def layer(x, w):
            return jnp.tanh(x @ jaxq.fake_quant(w, "int8")), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    def plain(weights):
        y = jnp.asarray(x)
        for w in weights:
            y = jnp.tanh(y @ jaxq.dequantize(jaxq.quantize(w, "int8")))
        return y.sum()

    value, gradient = jax.jit(jax.value_and_grad(scanned))(weights)
    np.testing.assert_allclose(value, jax.jit(plain)(weights), rtol=1e-5)
    rounded = np.stack([jaxq.dequantize(jaxq.quantize(w, "int8")) for w in weights])

    def float_model(weights):
        y = jnp.asarray(x)
        for w in weights:
            y = jnp.tanh(y @ w)
        return y.sum()

    np.testing.assert_allclose(
        gradient, jax.jit(jax.grad(float_model))(rounded), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats(dtype):
    x = jnp.asarray(normal(*SHAPE, seed=7), dtype)
    fake, expected = both(x, "int4_absmax")
    assert fake.dtype == dtype
    np.testing.assert_array_equal(fake, expected)
    gradient = gradient_of_sum(x, "int4_absmax")
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, np.ones(SHAPE))


def test_stochastic_rounding_passes_its_key_and_gradient():
    spec = QuantSpec("int4", rounding="stochastic")
    x, key = normal(*SHAPE, seed=8), jax.random.key(0)
    expected = jaxq.dequantize(jaxq.quantize(x, spec, key=key))
    np.testing.assert_array_equal(jaxq.fake_quant(x, spec, key=key), expected)
    assert np.any(expected != jaxq.fake_quant(x, spec, key=jax.random.key(1)))
    gradient = jax.jit(
        jax.grad(lambda x, key: jaxq.fake_quant(x, spec, key=key).sum())
    )(x, key)
    np.testing.assert_array_equal(gradient, np.ones(SHAPE))
    with pytest.raises(ValueError, match="needs a PRNG key"):
        jaxq.fake_quant(x, spec)


def test_a_non_finite_number_makes_its_block_nan():
    x = np.array(normal(*SHAPE, seed=9))
    x[3, 2] = np.nan
    fake = np.asarray(jaxq.fake_quant(x, "int8"))
    assert np.isnan(fake[:, 2]).all()
    assert np.isfinite(np.delete(fake, 2, axis=1)).all()


def test_training_reaches_another_code():
    # A weight reaches the code of the target only if the gradient passes through the
    # rounding.
    target = jnp.asarray(jaxq.fake_quant(normal(*SHAPE, seed=10), "int4"))

    @jax.jit
    def step(w):
        return w - 0.2 * jax.grad(
            lambda w: ((jaxq.fake_quant(w, "int4") - target) ** 2).sum()
        )(w)

    w = target + 0.3 * normal(*SHAPE, seed=11)
    start = float(((jaxq.fake_quant(w, "int4") - target) ** 2).mean())
    for _ in range(20):
        w = step(w)
    end = float(((jaxq.fake_quant(w, "int4") - target) ** 2).mean())
    assert end < 0.2 * start


def test_second_derivatives():
    slope = jax.jit(jax.hessian(lambda x: jnp.sum(jaxq.fake_quant(x, "int8") ** 2)))(
        np.float32([1.3, 0.2])
    )
    np.testing.assert_array_equal(slope, 2 * np.eye(2))


# The scales of a QTensor.

UPSTREAM = normal(*SHAPE, seed=7)


@jax.jit
def slopes(x, grid):
    """The gradients of a weighted sum of `fake_quant(x, grid)`."""

    def loss(x, grid):
        return (jaxq.fake_quant(x, grid) * UPSTREAM).sum()

    return jax.grad(loss, argnums=(0, 1), allow_int=True)(x, grid)


@tables.over_presets
def test_a_grid_gives_its_own_values(preset):
    x = normal(*SHAPE)
    grid = jaxq.quantize(x, preset)
    other = normal(*SHAPE, seed=1)
    expected = jaxq.dequantize(jaxq.qtensor.requantize(other, grid))
    np.testing.assert_array_equal(jaxq.fake_quant(other, grid), expected)


@pytest.mark.parametrize(
    ("spec", "most"), [("int4", 7), ("int8", 127), ("int2", 1), ("float4_e2m1fn", 6)]
)
def test_gradients_of_scales_are_those_of_lsq(spec, most):
    spec = QuantSpec(spec, jaxq.PerChannel(), clipping="absmax")
    x = 2 * normal(*SHAPE)
    grid = jaxq.quantize(x, spec, bounds=(-1.5, 1.5))
    to_x, to_grid = slopes(x, grid)
    scale = np.asarray(grid.scale, np.float64).reshape(-1)
    quotient = np.asarray(x, np.float64) / scale
    code = np.asarray(jaxq.dequantize(grid), np.float64) / scale
    half = 1 if spec.fmt.kind == "float" else 0.5  # the last step of e2m1 is 2
    is_rounded = np.abs(quotient) <= most + half
    assert 0.05 < is_rounded.mean() < 0.95
    upstream = np.asarray(UPSTREAM, np.float64)
    expected = (np.where(is_rounded, code - quotient, code) * upstream).sum(0)
    assert_close(to_grid.scale.reshape(-1), expected, 1e-5)
    np.testing.assert_array_equal(to_x, np.where(is_rounded, UPSTREAM, 0))


def test_gradients_of_offsets_are_those_of_lsq_plus():
    spec = QuantSpec("uint4", jaxq.PerChannel(), offset="min")
    x = 2 * normal(*SHAPE)
    grid = jaxq.quantize(x, spec, bounds=(-1.0, 2.0))
    to_x, to_grid = slopes(x, grid)
    scale = np.asarray(grid.scale, np.float64).reshape(-1)
    quotient = (np.asarray(x, np.float64) + 1) / scale
    is_rounded = (quotient >= -0.5) & (quotient <= 15.5)
    code = np.clip(np.rint(quotient), 0, 15)
    upstream = np.asarray(UPSTREAM, np.float64)
    expected = (np.where(is_rounded, code - quotient, code) * upstream).sum(0)
    assert_close(to_grid.scale.reshape(-1), expected, 1e-5)
    expected = np.where(is_rounded, 0, upstream).sum(0)
    assert_close(to_grid.offset.reshape(-1), expected, 1e-5)
    np.testing.assert_array_equal(to_x, np.where(is_rounded, UPSTREAM, 0))


def test_gradients_of_centroids_are_sums_over_their_members():
    x = normal(*SHAPE)
    grid = jaxq.methods.kmeans(x, 3, granularity=jaxq.PerChannel())[0]
    to_grid = slopes(x, grid)[1]
    codes = np.asarray(grid.codes()).astype(int)
    codes = codes - codes.min()
    scale = np.asarray(jaxq.qtensor.scale_values(grid), np.float64).reshape(-1)
    expected = np.zeros((SHAPE[1], grid.codebook.shape[-1]))
    for (row, column), code in np.ndenumerate(codes):
        expected[column, code] += float(UPSTREAM[row, column]) * scale[column]
    assert_close(to_grid.codebook.reshape(expected.shape), expected, 1e-5)


def test_gradients_reach_the_scales_of_scales():
    x = normal(*SHAPE)
    grid = jaxq.quantize(x, "nvfp4")
    to_grid = slopes(x, grid)[1]
    # The scale of the scales multiplies all numbers.
    quotient = np.asarray(x, np.float64) / np.asarray(
        jnp.repeat(jaxq.qtensor.scale_values(grid).T, 16, axis=0), np.float64
    )
    code = np.asarray(jaxq.dequantize(grid), np.float64) / (np.asarray(x) / quotient)
    to_scale = np.where(np.abs(quotient) <= 7, code - quotient, code) * UPSTREAM
    to_scale = to_scale.reshape(4, 16, 8).sum(1).T  # [kept, blocks]
    stored = jaxq.dequantize(grid.scale.with_meta()) / grid.scale.scale.reshape(())
    expected = (to_scale * np.asarray(stored, np.float64)).sum()
    assert_close(to_grid.scale.scale.reshape(()), expected, 1e-4)


def test_a_grid_must_fit():
    grid = jaxq.quantize(normal(*SHAPE), "int8")
    with pytest.raises(
        ValueError, match=r"shape \[64, 8\] of the QTensor, got float32\[8"
    ):
        jaxq.fake_quant(normal(8, 8), grid)
    with pytest.raises(ValueError, match="contracting= and batch= are those of"):
        jaxq.fake_quant(normal(*SHAPE), grid, contracting=0)
    with pytest.raises(ValueError, match="fake_quant: key= was given but"):
        jaxq.fake_quant(normal(*SHAPE), grid, key=jax.random.key(0))


def test_a_grid_works_under_vmap_and_second_derivatives():
    x = normal(3, *SHAPE)
    spec = jaxq.presets()["int4"].replace(scale="float32")
    grid = jaxq.quantize(x, spec, contracting=-2, batch=0)
    mapped = jax.vmap(slopes)(x, grid)
    single = slopes(x[1], jax.tree.map(lambda leaf: leaf[1], grid))
    assert_close(mapped[1].scale[1], single[1].scale)
    np.testing.assert_array_equal(mapped[0][1], single[0])

    def loss(scale):
        one = jax.tree.map(lambda leaf: leaf[0], grid)
        moved = dataclasses.replace(one, scale=scale)
        return (jaxq.fake_quant(x[0], moved) ** 2).sum()

    scale = grid.scale[0]
    hessian = jax.hessian(loss)(scale).reshape(scale.size, -1)
    error = jax.jacfwd(
        lambda s: jaxq.fake_quant(
            x[0],
            dataclasses.replace(jax.tree.map(lambda leaf: leaf[0], grid), scale=s),
        )
    )(scale)
    # Each number is linear in its scale, so the Hessian is that of least squares.
    expected = 2 * (error**2).sum((0, 1)).reshape(-1)
    assert_close(np.diag(hessian), np.asarray(expected), 1e-4)
