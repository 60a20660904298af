"""TrainedWeight: quantized values of float leaves, and the gradients of all leaves."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, PerGroup, QuantSpec
from jaxq.qtensor import TrainedWeight
from tests import tables
from tests.arrays import assert_close, assert_same, normal

SHAPE = (64, 8)
UPSTREAM = np.asarray(normal(*SHAPE, seed=7))
NUMBERS = np.asarray(normal(*SHAPE))


# Compiled as a whole, because many small programs take long to compile.
started = jax.jit(TrainedWeight.start)


@jax.jit
def both(w):
    """The fake-quantized values, and those of the QTensor."""
    return w.fake_quant(), jaxq.dequantize(w.quantize())


@jax.jit
def slopes(w):
    """The gradients of a weighted sum of the fake-quantized values."""
    return jax.grad(lambda w: (w.fake_quant() * UPSTREAM).sum())(w)


def moved(w):
    """A weight as training leaves it. Scales have more digits than stored scales."""
    factors = {"scale": 1.13, "offset": 1.1, "codebook": 0.9}
    changes = {"floats": w.floats + 0.1 * normal(*w.shape, seed=3)}
    for name, factor in factors.items():
        leaf = getattr(w, name)
        if leaf is not None:
            changes[name] = jax.tree.map(lambda x, factor=factor: x * factor, leaf)
    if w.zero_point is not None:
        changes["zero_point"] = w.zero_point + 0.8
    return dataclasses.replace(w, **changes)


# The start.


@tables.over_presets
def test_start_has_the_values_of_the_quantized_weight(preset):
    floats = normal(*SHAPE)
    qt = jaxq.quantize(floats, preset)
    expected = jaxq.dequantize(qt)
    w = started(floats, qt)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(w))
    for values in both(w):
        assert_same(values, expected)
    if not qt.spec.rule.has_threshold:
        assert_same(w.floats, floats)  # each number has the nearest code already
    # After a step of training, both still agree.
    values, expected = both(moved(w))
    assert_same(values, expected)
    assert np.any(np.asarray(values) != np.asarray(both(w)[0]))


def gptq(floats):
    x = normal(128, 64, seed=5) @ normal(64, 64, seed=6)
    return jaxq.methods.gptq(floats, x.T @ x, QuantSpec("int4", PerGroup(32)))[0]


def hqq(floats):
    spec = QuantSpec("uint4", PerGroup(32), symmetric=False, scale="bfloat16")
    return jaxq.methods.hqq(floats, spec, num_steps=2)[0]


def kmeans(floats):
    return jaxq.methods.kmeans(floats, 3, granularity=PerChannel(), num_steps=5)[0]


def awq(floats):
    factors = jnp.exp(normal(64, 1, seed=8))
    return jaxq.quantize(floats / factors, "uint4").with_input_scale(factors[:, 0])


@pytest.mark.parametrize("method", [gptq, hqq, kmeans, awq])
def test_start_has_the_values_of_a_method(method):
    floats = normal(*SHAPE)
    qt = method(floats)
    expected = jaxq.dequantize(qt)
    w = started(floats, qt)
    for values in both(w):
        assert_same(values, expected)
    # Only the numbers that the method rounds to another code than the nearest move.
    nearest = np.asarray(jaxq.qtensor.requantize(floats, qt).codes() == qt.codes())
    np.testing.assert_array_equal(w.floats, np.where(nearest, floats, expected))
    if method is gptq:
        assert 0.02 < 1 - nearest.mean() < 0.9
    values, expected = both(moved(w))
    assert_same(values, expected)


def test_narrow_floats():
    floats = normal(*SHAPE, dtype="bfloat16")
    qt = jaxq.quantize(floats, "int4")
    w = started(floats, qt)
    assert w.floats.dtype == w.dtype == jnp.bfloat16
    assert w.scale.dtype == jnp.float32
    for values in both(w):
        assert_same(values, jaxq.dequantize(qt))
    # Float32 masters of a bfloat16 layer.
    masters = dataclasses.replace(w, floats=w.floats.astype(jnp.float32))
    for values in both(masters):
        assert_same(values, jaxq.dequantize(qt))
    assert jax.grad(lambda w: w.fake_quant().sum())(masters).floats.dtype == jnp.float32


@pytest.mark.parametrize("preset", ["int4", "ttq"])
def test_computed_scales_are_those_of_fake_quant(preset):
    floats = normal(*SHAPE)
    qt = jaxq.quantize(floats, preset)
    w = TrainedWeight.start(floats, qt, trained_scales=False)
    assert len(jax.tree.leaves(w)) == 1
    w = dataclasses.replace(w, floats=2 * normal(*SHAPE, seed=1))
    expected, pull_back = jax.vjp(lambda x: jaxq.fake_quant(x, preset), w.floats)
    for values in both(w):
        assert_same(values, expected)
    assert_same(slopes(w).floats, pull_back(UPSTREAM)[0])


def test_computed_scales_with_an_input_scale():
    floats = normal(*SHAPE)
    qt = awq(floats)
    w = TrainedWeight.start(floats, qt, trained_scales=False)
    factors = qt.input_scale[:, None]
    w = dataclasses.replace(w, floats=2 * floats)
    expected, pull_back = jax.vjp(
        lambda x: jaxq.fake_quant(x / factors, "uint4") * factors, w.floats
    )
    values, same_values = both(w)
    assert_same(values, same_values)
    assert_close(values, expected, 1e-6)
    gradients = slopes(w)
    assert_close(gradients.floats, pull_back(UPSTREAM)[0], 1e-6)
    assert not np.any(gradients.input_scale)


# Gradients. The closed forms are in float64.


def start(spec, x, **leaves):
    """A trained weight of the floats `x`, with leaves that have a number a column."""
    x = jnp.asarray(x)
    w = TrainedWeight.start(x, jaxq.quantize(x, spec))
    changes = {
        name: jnp.asarray(leaf.reshape(w.scale.shape)) for name, leaf in leaves.items()
    }
    return dataclasses.replace(w, floats=x, **changes)


# The scales of the columns are powers of two, so that no division is rounded.
COLUMNS = np.float32(2.0) ** -np.arange(SHAPE[1], dtype=np.float32)


@pytest.mark.parametrize("gradient_scale", [False, True])
def test_gradients_of_scales(gradient_scale):
    x = NUMBERS * 5 * COLUMNS
    x[:2] = 7 * COLUMNS, -7 * COLUMNS
    spec = QuantSpec("int4", PerChannel(), scale="bfloat16")
    # The trained scale has more digits than the stored one.
    w = start(spec, x, scale=COLUMNS * np.float32(1.0005))
    w = dataclasses.replace(w, gradient_scale=gradient_scale)
    assert w.quantize().scale.astype(jnp.float32).reshape(-1).tolist() == list(COLUMNS)
    v = np.asarray(x, np.float64) / COLUMNS
    inside = np.abs(v) < 7
    error = np.where(inside, np.rint(v) - v, np.clip(v, -7, 7))
    expected = (error * UPSTREAM).sum(0)
    if gradient_scale:
        expected = expected / np.sqrt(64 * 7)
    gradients = slopes(w)
    assert_close(gradients.scale.reshape(-1), expected, 1e-5)
    np.testing.assert_array_equal(gradients.floats, np.where(inside, UPSTREAM, 0))


def test_gradients_of_offsets():
    x = NUMBERS * 8 * COLUMNS + 3
    spec = QuantSpec("uint4", PerChannel(), offset="min")
    offset = np.full(SHAPE[1], -1, np.float32)
    gradients = slopes(start(spec, x, scale=COLUMNS, offset=offset))
    v = (np.asarray(x, np.float64) + 1) / COLUMNS
    inside = (v > 0) & (v < 15)
    error = np.where(inside, np.rint(v) - v, np.clip(v, 0, 15))
    assert_close(gradients.scale.reshape(-1), (error * UPSTREAM).sum(0), 1e-5)
    clipped = np.where(inside, 0, UPSTREAM).sum(0)
    assert_close(gradients.offset.reshape(-1), clipped, 1e-5)


@pytest.mark.parametrize("has_input_scale", [False, True])
def test_gradients_of_zero_points(has_input_scale):
    zero = 5.3  # is rounded to 5
    factors = np.exp2(np.arange(64) % 3).astype(np.float32)[:, None]
    x = NUMBERS * 6 * COLUMNS
    x[:2] = -5 * COLUMNS, 10 * COLUMNS
    spec = QuantSpec("uint4", PerChannel(), symmetric=False)
    zero_point = np.full(SHAPE[1], zero, np.float32)
    w = start(spec, x, scale=COLUMNS, zero_point=zero_point)
    upstream = np.asarray(UPSTREAM, np.float64)
    if has_input_scale:
        w = dataclasses.replace(
            w, floats=jnp.asarray(x * factors), input_scale=factors[:, 0]
        )
        upstream = upstream * factors
    gradients = slopes(w)
    v = np.asarray(x, np.float64) / COLUMNS
    inside = (v > -5) & (v < 10)
    error = np.where(inside, np.rint(v) - v, np.clip(v, -5, 10))
    assert 0.5 < inside.mean() < 0.95
    assert_close(gradients.scale.reshape(-1), (error * upstream).sum(0), 1e-5)
    clipped = np.where(inside, 0, -COLUMNS * upstream).sum(0)
    assert_close(gradients.zero_point.reshape(-1), clipped, 1e-5)
    np.testing.assert_array_equal(gradients.floats, np.where(inside, UPSTREAM, 0))
    if has_input_scale:
        assert not np.any(gradients.input_scale)


def test_gradients_of_centroids_are_segment_sums():
    qt = kmeans(normal(*SHAPE))
    w = TrainedWeight.start(normal(*SHAPE), qt)
    gradients = slopes(w)
    codes = np.asarray(qt.codes(), int)
    codes = codes - codes.min()
    expected = np.zeros((SHAPE[1], qt.codebook.shape[-1]))
    for (row, column), code in np.ndenumerate(codes):
        expected[column, code] += float(UPSTREAM[row, column])  # the scale is 1
    assert_close(gradients.codebook.reshape(expected.shape), expected, 1e-5)
    assert not np.any(gradients.scale)


def test_a_ternary_weight_keeps_its_zero():
    """TTQ trains the positive and the negative value of the whole matrix."""
    floats = normal(*SHAPE)
    qt = jaxq.quantize(floats, "ttq")
    gradients = slopes(TrainedWeight.start(floats, qt))
    codes, scale = np.asarray(qt.codes(), int), float(qt.scale.reshape(()))
    sums = [np.asarray(UPSTREAM, np.float64)[codes == code].sum() for code in (-1, 1)]
    expected = np.array([sums[0] * scale, 0, sums[1] * scale])
    assert qt.codebook.reshape(-1)[1] == 0
    assert_close(gradients.codebook.reshape(-1), expected, 1e-5)


def test_gradients_of_quantized_scales():
    """Both levels of nvfp4 follow LSQ: scale of 16 numbers, and scale of the scales."""
    floats = normal(*SHAPE)
    w = TrainedWeight.start(floats, jaxq.quantize(floats, "nvfp4"))
    # So that numbers and the largest scale are clipped.
    larger = dataclasses.replace(w.scale, floats=1.01 * w.scale.floats)
    w = dataclasses.replace(w, floats=1.2 * floats, scale=larger)
    qt, gradients = w.quantize(), slopes(w)
    scale = np.asarray(jaxq.qtensor.scale_values(qt), np.float64)  # [8, 4]
    of_numbers = np.repeat(scale.T, 16, axis=0)
    v = np.asarray(w.floats, np.float64) / of_numbers
    value = np.asarray(jaxq.dequantize(qt), np.float64) / of_numbers
    inside = np.abs(v) < 6
    error = np.where(inside, value - v, value) * UPSTREAM
    to_scale = error.reshape(4, 16, 8).sum(1).T
    # float8_e4m3fn ends at 448.
    unit = float(w.scale.scale.reshape(()))
    quotient = scale / unit
    unrounded = np.asarray(w.scale.floats, np.float64) / unit
    is_largest = unrounded > 448
    assert is_largest.sum() == 1
    assert_close(gradients.scale.floats, np.where(is_largest, 0, to_scale), 1e-4)
    change = np.where(is_largest, quotient, quotient - unrounded)
    assert_close(gradients.scale.scale.reshape(()), (to_scale * change).sum(), 1e-4)


def test_new_scales_of_a_weight_with_quantized_scales():
    floats = normal(*SHAPE)
    w = TrainedWeight.start(floats, jaxq.quantize(floats, "nvfp4"))
    scale = jaxq.qtensor.scale_values(w.quantize())
    wider = jaxq.qtensor.scale_values(w.with_scale(1.5 * scale).quantize())
    np.testing.assert_allclose(wider, 1.5 * scale, rtol=1 / 16)


def test_a_switch_has_no_gradient():
    w = TrainedWeight.start(normal(*SHAPE), jaxq.quantize(normal(*SHAPE), "int4"))
    w = dataclasses.replace(w, switch=jnp.float32(1))
    assert slopes(w).switch == 0


# Blocks of zeros.


def with_zeros(where):
    """Floats with zeros: all of them, the column 3, or the second layer of a stack."""
    if where == "stack":
        return normal(2, *SHAPE).at[1].set(0)
    floats = normal(*SHAPE)
    return jnp.zeros(SHAPE) if where == "all" else floats.at[:, 3].set(0)


PRESETS_AND_ZEROS = [
    ("int4", "all"),
    ("int4", "column"),
    ("int4", "stack"),
    ("uint4", "column"),
    ("mxfp4", "all"),
    ("nvfp4", "all"),
    ("nf4_dq", "column"),
    ("ternary", "column"),
    ("ttq", "all"),
    ("ttq", "stack"),
]


@pytest.mark.parametrize(("preset", "where"), PRESETS_AND_ZEROS)
def test_a_block_of_zeros_can_be_trained(preset, where):
    floats = with_zeros(where)
    batch = 0 if where == "stack" else ()
    qt = jaxq.quantize(floats, preset, contracting=-2, batch=batch)
    w = started(floats, qt)
    for values in both(w):
        assert_same(values, jaxq.dequantize(qt))
    upstream = normal(*floats.shape, seed=7)
    gradients = jax.jit(jax.grad(lambda w: (w.fake_quant() * upstream).sum()))(w)
    is_zero = np.asarray(floats == 0)
    np.testing.assert_allclose(gradients.floats[is_zero], upstream[is_zero], rtol=1e-6)


def test_steps_of_blocks_of_zeros():
    spec = QuantSpec("int4", PerChannel())
    scale = started(with_zeros("column"), jaxq.quantize(with_zeros("column"), spec))
    others = np.delete(np.abs(NUMBERS).max(0) / 7, 3)
    np.testing.assert_allclose(scale.scale[3, 0], others.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.delete(scale.scale[:, 0], 3), others, rtol=1e-6)
    zeros = jnp.zeros(SHAPE)
    for spec, largest in (("int8", 127), ("nf4", 1), ("fp8", 448), ("uint8", 255)):
        w = started(zeros, jaxq.quantize(zeros, spec))
        np.testing.assert_allclose(w.scale, 1 / (8 * largest), rtol=1e-6)
    assert_same(w.zero_point, jnp.full((8, 1), 128.0))
    ternary = started(zeros, jaxq.quantize(zeros, "ttq"))
    values = np.ravel(ternary.codebook) * float(ternary.scale.reshape(()))
    np.testing.assert_allclose(values, [-1 / 8, 0, 1 / 8])


def test_a_constant_block_with_an_offset_can_be_trained():
    spec = QuantSpec("uint4", PerChannel(), offset="min")
    floats = normal(*SHAPE).at[:, 3].set(0).at[:, 4].set(0.25)
    w = started(floats, jaxq.quantize(floats, spec))
    for values in both(w):
        assert_same(values[:, 3], floats[:, 3])
        assert_close(values[:, 4], floats[:, 4], 1e-6)
    assert np.all(slopes(w).floats[:, 3:5] == UPSTREAM[:, 3:5])


def test_equal_centroids_are_spread():
    floats = normal(*SHAPE).at[:, 3].set(0).at[:, 4].set(0.25)
    qt = kmeans(floats)
    w = started(floats, qt)
    for values in both(w):
        assert_same(values, jaxq.dequantize(qt))
    half_width = np.delete(np.ptp(np.asarray(qt.codebook)[:, 0], axis=-1), [3, 4]) / 2
    spread = half_width.mean() * (np.arange(8) / 4 - 1)
    np.testing.assert_allclose(w.codebook[3, 0], spread, rtol=1e-5)
    np.testing.assert_allclose(w.codebook[4, 0], 0.25 + spread, rtol=1e-5)
    assert np.all(slopes(w).floats[:, 3:5] == UPSTREAM[:, 3:5])


@pytest.mark.parametrize("preset", ["int4", "uint4", "nvfp4", "ttq"])
def test_computed_steps_are_those_of_the_floats(preset):
    w = started(normal(*SHAPE), jaxq.quantize(normal(*SHAPE), preset))
    floats = 3 * normal(*SHAPE, seed=9)
    w = dataclasses.replace(w, floats=floats).with_computed_steps()
    assert_same(w.floats, floats)
    expected = started(floats, jaxq.quantize(floats, preset))
    assert_same(w.quantize().scale, expected.quantize().scale)
    for name in ("zero_point", "codebook"):
        assert_same(getattr(w, name), getattr(expected, name))


def test_steps_that_are_not_computed():
    w = started(normal(*SHAPE), kmeans(normal(*SHAPE)))
    moved = dataclasses.replace(w, floats=2 * w.floats)
    assert_same(moved.with_computed_steps().codebook, w.codebook)


# A stack, and what it is not.


def stack():
    floats = normal(3, *SHAPE)
    qt = jaxq.quantize(floats, "uint4", contracting=-2, batch=0)
    return started(floats, qt)


def test_a_stack_is_indexed_along_its_batch_axes():
    w = stack()
    assert (w.shape, w.batch_shape, w.ndim, len(w)) == ((3, *SHAPE), (3,), 3, 3)
    values = np.asarray(both(w)[0])
    for i, layer in enumerate(w):
        assert_same(both(layer)[0], values[i])
    assert w[1:].shape == (2, *SHAPE)
    assert w[...] is w
    gradients = jax.vmap(slopes)(w)
    assert_same(jax.tree.map(lambda leaf: leaf[2], gradients), slopes(w[2]))
    with pytest.raises(
        IndexError, match=r"has 1\. .*For other axes index w\.fake_quant"
    ):
        w[0, 1]
    with pytest.raises(TypeError, match="Iterate over w.fake_quant()"):
        list(w[0])


def test_astype_and_repr():
    w = stack()[0]
    half = w.astype(jnp.bfloat16)
    assert (half.dtype, half.floats.dtype) == (jnp.bfloat16, jnp.float32)
    for values in both(half):
        assert_same(values, both(w)[0].astype(jnp.bfloat16))
    assert repr(w) == "TrainedWeight(float32[64, 8], uint4, trained scales)"
    with pytest.raises(TypeError, match="dtype must be a float dtype, got int8"):
        w.astype(jnp.int8)


def test_other_operations_name_the_remedy():
    w = stack()[0]
    qt, x = w.quantize(), normal(*SHAPE)
    for refused in (
        lambda: w + 1,
        lambda: x * w,
        lambda: -w,
        lambda: w == 1.0,
        lambda: np.asarray(w),
        lambda: jnp.asarray(w),
        lambda: jaxq.dequantize(w),
        lambda: jaxq.quantize(w, "int8"),
        lambda: jaxq.fake_quant(w, "int8"),
        lambda: jaxq.qtensor.requantize(w, qt),
        lambda: jaxq.cast(w, "float8_e4m3fn"),
    ):
        with pytest.raises(TypeError, match=re.escape(".fake_quant()")):
            refused()
    for refused in (
        lambda: jaxq.fake_quant(x, w),
        lambda: jaxq.relayout(w, "columns"),
        lambda: jaxq.qtensor.requantize(x, w),
    ):
        with pytest.raises(TypeError, match=re.escape("quantize() of a TrainedWeight")):
            refused()


def test_what_cannot_be_trained():
    x = normal(*SHAPE)
    spec = QuantSpec("int4", rounding="stochastic")
    qt = jaxq.quantize(x, spec, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rounds stochastically.*nearest_even"):
        TrainedWeight.start(x, qt)
    with pytest.raises(ValueError, match="codebook, which cannot be computed"):
        TrainedWeight.start(x, kmeans(x), trained_scales=False)
