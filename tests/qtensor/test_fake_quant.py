"""fake_quant: the values of dequantize(quantize(x)), and its gradient."""

import dataclasses
import functools
import re

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

UPSTREAM = np.asarray(normal(*SHAPE, seed=7))
NUMBERS = np.asarray(normal(*SHAPE))


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


def powers_of_two(size):
    """Scales by which a division is exact."""
    return np.float32(2.0) ** -np.arange(size, dtype=np.float32)


def with_ends(x, low, high, scale):
    """`x`, whose first rows are the ends of its columns and numbers beside them."""
    rows = [low, high]
    for end in (low, high):
        rows += [end - scale / 1024, end + scale / 1024]
    return jnp.asarray(np.concatenate([np.float32(rows), x[len(rows) :]]))


def lsq(x, scale, offset, low, high):
    """The closed forms of LSQ and LSQ+ for integer codes, in float64.

    Returns:
      the derivatives of `scale * code + offset` with respect to x, scale and offset.
    """
    v = (np.asarray(x, np.float64) - offset) / scale
    inside = (low < v) & (v < high)
    to_scale = np.where(inside, np.rint(v) - v, np.clip(v, low, high))
    return inside, to_scale, np.where(inside, 0, 1)


@pytest.mark.parametrize(("fmt", "most"), [("int4", 7), ("int8", 127), ("int2", 1)])
def test_gradients_of_scales_are_those_of_lsq(fmt, most):
    scale = powers_of_two(SHAPE[1])
    x = with_ends(NUMBERS * most * scale, -most * scale, most * scale, scale)
    grid = jaxq.quantize(x, QuantSpec(fmt, jaxq.PerChannel()))
    grid = dataclasses.replace(grid, scale=scale.reshape(grid.scale.shape))
    to_x, to_grid = slopes(x, grid)
    inside, to_scale, _ = lsq(x, scale, 0, -most, most)
    assert 0.05 < inside.mean() < 0.95
    assert_close(to_grid.scale.reshape(-1), (to_scale * UPSTREAM).sum(0), 1e-5)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))


def test_gradients_of_the_scales_of_floats():
    """The same rule, with the values of the format: {0, .5, 1, 1.5, 2, 3, 4, 6}."""
    scale = powers_of_two(SHAPE[1])
    x = with_ends(NUMBERS * 5 * scale, -6 * scale, 6 * scale, scale)
    grid = jaxq.quantize(x, QuantSpec("float4_e2m1fn", jaxq.PerChannel()))
    grid = dataclasses.replace(grid, scale=scale.reshape(grid.scale.shape))
    to_x, to_grid = slopes(x, grid)
    v = np.asarray(x, np.float64) / scale
    inside = np.abs(v) < 6
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = np.abs(np.abs(v)[..., None] - magnitudes).argmin(-1)
    value = np.sign(v) * magnitudes[nearest]
    to_scale = np.where(inside, value - v, value)
    assert_close(to_grid.scale.reshape(-1), (to_scale * UPSTREAM).sum(0), 1e-5)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))


def test_gradients_of_offsets_are_those_of_lsq_plus():
    scale, offset = powers_of_two(SHAPE[1]), np.float32(-1)
    x = with_ends(NUMBERS * 8 * scale + 3, offset + 0 * scale, 15 * scale - 1, scale)
    spec = QuantSpec("uint4", jaxq.PerChannel(), offset="min")
    grid = jaxq.quantize(x, spec)
    grid = dataclasses.replace(
        grid,
        scale=scale.reshape(grid.scale.shape),
        offset=jnp.full_like(grid.offset, offset),
    )
    to_x, to_grid = slopes(x, grid)
    inside, to_scale, to_offset = lsq(x, scale, offset, 0, 15)
    assert 0.05 < inside.mean() < 0.95
    assert_close(to_grid.scale.reshape(-1), (to_scale * UPSTREAM).sum(0), 1e-5)
    assert_close(to_grid.offset.reshape(-1), (to_offset * UPSTREAM).sum(0), 1e-5)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))


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
    to_scale = np.where(np.abs(quotient) < 6, code - quotient, code) * UPSTREAM
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
    for option in ({"contracting": 0}, {"batch": (0,)}, {"bounds": (-1.0, 1.0)}):
        with pytest.raises(ValueError, match="and bounds= are those of the QTensor"):
            jaxq.fake_quant(normal(*SHAPE), grid, **option)
    with pytest.raises(TypeError, match="fake_quant: x must be float32, bfloat16 or"):
        jaxq.fake_quant(jnp.ones(SHAPE, jnp.int32), grid)
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


# A range with gradients.


@functools.partial(jax.jit, static_argnames=("spec", "range_gradient"))
def range_slopes(x, bounds, spec, range_gradient="lsq"):
    """The gradients of a weighted sum of `fake_quant(x, spec, bounds=bounds)`."""

    def loss(x, bounds):
        y = jaxq.fake_quant(x, spec, bounds=bounds, range_gradient=range_gradient)
        return (y * UPSTREAM).sum()

    return jax.grad(loss, argnums=(0, 1))(x, bounds)


def test_a_symmetric_range_is_trained_as_in_lsq():
    scale = powers_of_two(SHAPE[1])
    x = with_ends(NUMBERS * 5 * scale, -7 * scale, 7 * scale, scale)
    spec = QuantSpec("int4", jaxq.PerChannel())
    to_x, (to_low, to_high) = range_slopes(x, (-7 * scale, 7 * scale), spec)
    inside, to_scale, _ = lsq(x, scale, 0, -7, 7)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))
    # scale = high / 7 = -low / 7. Both ends take the same part of the gradient.
    assert_close((to_high - to_low) * 7, (to_scale * UPSTREAM).sum(0), 1e-5)
    np.testing.assert_array_equal(to_high, -to_low)
    # The end that is nearer to 0 does not change the range.
    to_x, (to_low, to_high) = range_slopes(x, (-3 * scale, 7 * scale), spec)
    np.testing.assert_array_equal(to_low, np.zeros(8))
    assert_close(to_high * 7, (to_scale * UPSTREAM).sum(0), 1e-5)


def test_a_range_with_an_offset_is_trained_as_in_lsq_plus():
    scale, offset = powers_of_two(SHAPE[1]), np.float32(-1)
    ends = offset + 0 * scale, offset + 15 * scale
    x = with_ends(NUMBERS * 8 * scale + 3, *ends, scale)
    spec = QuantSpec("uint4", jaxq.PerChannel(), offset="min")
    to_x, (to_low, to_high) = range_slopes(x, ends, spec)
    inside, to_scale, to_offset = lsq(x, scale, offset, 0, 15)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))
    # The range is (offset, offset + 15 scale). The scale stretches it, and the offset
    # shifts it.
    assert_close(15 * to_high, (to_scale * UPSTREAM).sum(0), 1e-5)
    assert_close(to_low + to_high, (to_offset * UPSTREAM).sum(0), 1e-5)


def test_a_range_with_a_zero_point_is_trained_as_in_lsq_plus():
    scale, zero = powers_of_two(SHAPE[1]), 5
    ends = -zero * scale, (15 - zero) * scale
    x = with_ends(NUMBERS * 6 * scale, *ends, scale)
    spec = QuantSpec("uint4", jaxq.PerChannel(), symmetric=False)
    to_x, (to_low, to_high) = range_slopes(x, ends, spec)
    inside, to_scale, to_offset = lsq(x, scale, 0, -zero, 15 - zero)
    np.testing.assert_array_equal(to_x, np.where(inside, UPSTREAM, 0))
    # Clipped numbers become an end. For rounded ones, scale = (high - low) / 15.
    above = ~inside & (np.asarray(x) > 0)
    error = np.where(inside, to_scale, 0) / 15
    assert_close(to_high, ((error + above) * UPSTREAM).sum(0), 1e-5)
    assert_close(to_low + to_high, (to_offset * UPSTREAM).sum(0), 1e-5)


@pytest.mark.parametrize("offset", [None, "min"])
def test_pact_trains_a_range_by_clipped_numbers_only(offset):
    scale = powers_of_two(SHAPE[1])
    ends = -5 * scale, 10 * scale
    x = with_ends(NUMBERS * 6 * scale, *ends, scale)
    spec = QuantSpec("uint4", jaxq.PerChannel(), symmetric=bool(offset), offset=offset)
    to_x, (to_low, to_high) = range_slopes(x, ends, spec, "pact")
    numbers = np.asarray(x)
    below, above = numbers <= ends[0], numbers >= ends[1]
    np.testing.assert_array_equal(to_x, np.where(below | above, 0, UPSTREAM))
    assert_close(to_low, (below * UPSTREAM).sum(0), 1e-5)
    assert_close(to_high, (above * UPSTREAM).sum(0), 1e-5)


def test_the_example_of_pact():
    x = jnp.array([-1.0, 0.2, 0.9, 1.5, 3.0])

    def clipped(x, threshold):
        return jaxq.fake_quant(
            x,
            QuantSpec("uint2", jaxq.PerTensor(), symmetric=False),
            bounds=(0.0, threshold),
            range_gradient="pact",
        )

    assert clipped(x, 1.5).tolist() == [0, 0, 1, 1.5, 1.5]
    to_x, to_threshold = jax.jit(jax.jacrev(clipped, argnums=(0, 1)))(x, 1.5)
    np.testing.assert_array_equal(to_x, np.diag([0, 1, 1, 0, 0]))
    assert to_threshold.tolist() == [0, 0, 0, 1, 1]


def test_an_end_at_zero_stays_there():
    """The range of numbers after a ReLU has no negative part to train."""
    x = jnp.maximum(normal(*SHAPE), 0)
    spec = QuantSpec("uint4", jaxq.PerTensor(), symmetric=False)
    for range_gradient in ("lsq", "pact"):
        bounds = (jnp.float32(0), jnp.float32(1.5))
        _, (to_low, to_high) = range_slopes(x, bounds, spec, range_gradient)
        assert to_low == 0
        assert to_high != 0
    # As an LSQ step of unsigned codes: the scale is high / 15.
    _, to_scale, _ = lsq(x, 0.1, 0, 0, 15)
    _, (_, to_high) = range_slopes(x, bounds, spec)
    assert_close(15 * to_high, (to_scale * UPSTREAM).sum(), 1e-4)


def test_ranges_of_a_stack():
    """vmap, a scan over layers and batch axes give the gradients of single layers."""
    x, spec = normal(3, *SHAPE), QuantSpec("int4", jaxq.PerTensor(), symmetric=False)
    bounds = jnp.float32([-1, -1.5, -2]), jnp.float32([2, 1.5, 1])
    single = [
        range_slopes(x[i], jax.tree.map(lambda a, i=i: a[i], bounds), spec)
        for i in range(3)
    ]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *single)
    mapped = jax.jit(jax.vmap(functools.partial(range_slopes, spec=spec)))(x, bounds)
    assert_close(mapped, expected)

    def of_batch(x, bounds):
        y = jaxq.fake_quant(x, spec, contracting=(-2, -1), batch=0, bounds=bounds)
        return (y * UPSTREAM[None]).sum()

    assert_close(jax.jit(jax.grad(of_batch, argnums=(0, 1)))(x, bounds), expected)

    def scanned(x, bounds):
        def layer(total, layer):
            y = jaxq.fake_quant(layer[0], spec, bounds=layer[1])
            return total + (y * UPSTREAM).sum(), None

        return jax.lax.scan(layer, jnp.float32(0), (x, bounds))[0]

    assert_close(jax.jit(jax.grad(scanned, argnums=(0, 1)))(x, bounds), expected)


def test_ranges_of_narrow_floats():
    spec = QuantSpec("int4", jaxq.PerTensor())
    x = jnp.asarray(normal(*SHAPE) * 2, jnp.bfloat16)
    bounds = (jnp.float32(-2), jnp.float32(2))
    wide = range_slopes(x.astype(jnp.float32), bounds, spec)

    @jax.jit
    def narrow_slopes(x, bounds):
        y, pull = jax.vjp(
            lambda *a: jaxq.fake_quant(a[0], spec, bounds=a[1:]), x, *bounds
        )
        return y, pull(UPSTREAM.astype(y.dtype))

    y, (to_x, to_low, to_high) = narrow_slopes(x, bounds)
    assert (y.dtype, to_x.dtype, to_low.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        "float32",
    )
    expected = jaxq.dequantize(jaxq.quantize(x, spec, bounds=bounds))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(to_x != 0, wide[0] != 0)
    assert_close((to_low, to_high), wide[1], 0.01)


def test_second_derivatives_of_a_range():
    spec, x = QuantSpec("uint4", jaxq.PerTensor(), offset="min"), normal(*SHAPE)

    def values(bounds):
        return jaxq.fake_quant(x, spec, bounds=(bounds[0], bounds[1]))

    bounds = jnp.float32([-1, 1.5])
    hessian = jax.jit(jax.hessian(lambda bounds: (values(bounds) ** 2).sum()))(bounds)
    # The values are linear in the ends, so the Hessian is that of least squares.
    slope = np.asarray(jax.jit(jax.jacfwd(values))(bounds), np.float64).reshape(-1, 2)
    assert_close(hessian, 2 * slope.T @ slope, 1e-5)


def test_a_range_must_fit():
    x = normal(*SHAPE)
    for bounds, spec, message in [
        ((1.0, -1.0), "int8", "fake_quant: bounds= must be (low, high) with low <="),
        ((np.nan, 1.0), "int8", "fake_quant: bounds= must be (low, high)"),
        ((np.zeros(3), 1.0), "int8", "fake_quant: bounds= has shape [3]"),
        ((-1.0, 1.0), TERNARY, "fake_quant: bounds= gives a range, but scale_rule="),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            jaxq.fake_quant(x, spec, bounds=bounds)
    with pytest.raises(ValueError, match="fake_quant: range_gradient"):
        jaxq.fake_quant(x, "int8", bounds=(-1.0, 1.0), range_gradient="lsq+")
