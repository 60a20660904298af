"""Given ranges, static ranges of activations, and ranges from observers."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, PerGroup, PerTensor, QuantSpec, observers
from tests.arrays import normal
from tests.tables import thinned

W = normal(100, 8)


def test_given_bounds_set_the_scale_and_clip():
    qt = jaxq.quantize(jnp.array([1.0, 5.0, -3.0]), "int8", bounds=(-2.0, 2.0))
    np.testing.assert_array_equal(qt.scale, np.float32(2.0) * np.float32(1 / 127))
    assert qt.codes().tolist() == [64, 127, -127]
    spec = QuantSpec("uint8", PerTensor(), symmetric=False)
    qt = jaxq.quantize(jnp.array([0.5, 5.0, -3.0]), spec, bounds=(-1.0, 3.0))
    scale = np.float32(4.0) * np.float32(1 / 255)
    zero = np.float32(0) - np.rint(np.float32(-1.0) * (np.float32(1) / scale))
    np.testing.assert_array_equal(qt.zero_point.ravel(), zero)
    assert qt.codes().tolist() == [int(np.rint(0.5 / scale) + zero), 255, 0]


def test_bounds_for_each_scale():
    high = jnp.abs(W).max(0)
    qt = jaxq.quantize(W, "int8", bounds=(-high, high))
    np.testing.assert_array_equal(qt.codes(), jaxq.quantize(W, "int8").codes())
    stacked = jnp.stack([W, 2 * W])
    qt = jaxq.quantize(
        stacked,
        QuantSpec("int8", PerTensor()),
        contracting=-2,
        batch=0,
        bounds=(jnp.zeros(2), jnp.array([4.0, 8.0])),
    )
    np.testing.assert_array_equal(
        qt.scale.ravel(), np.float32([4, 8]) * np.float32(1 / 127)
    )


@pytest.mark.parametrize(
    ("spec", "bounds", "message"),
    [
        (
            "int8",
            (jnp.zeros(3), jnp.ones(3)),
            r"bounds= has shape \[3\]; expected one number",
        ),
        ("int8", (1.0, -1.0), "low <= high"),
        ("int8", (0.0, float("nan")), "low <= high"),
        (QuantSpec("ternary", scale_rule="absmean"), (0.0, 1.0), "do not use a range"),
    ],
)
def test_bounds_that_do_not_fit(spec, bounds, message):
    with pytest.raises(ValueError, match=message):
        jaxq.quantize(W, spec, bounds=bounds)


def test_a_non_finite_number_makes_its_block_nan():
    x = jnp.array([1.0, jnp.nan, -3.0])
    qt = jaxq.quantize(
        x, QuantSpec("int8", PerTensor()), bounds=(-2.0, 2.0), on_nonfinite="propagate"
    )
    assert np.isnan(jaxq.dequantize(qt)).all()


# Activations.


@pytest.mark.parametrize("weight", thinned(["int8", "fp8"], ["int8"]))
def test_products_with_static_activations_equal_their_definition(weight):
    x, w = normal(5, 64), normal(64, 16)
    qt = jaxq.quantize(w, weight).with_activation(weight, bounds=(-2.0, 2.0))
    qx = jaxq.quantize(
        x,
        QuantSpec(jaxq.presets()[weight].fmt, PerTensor()),
        contracting=-1,
        bounds=(-2.0, 2.0),
    )
    expected = np.asarray(jaxq.dequantize(qx), np.float64) @ np.asarray(
        jaxq.dequantize(qt), np.float64
    )
    for y in (x @ qt, jax.jit(jaxq.matmul)(x, qt)):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert "static" in jaxq.explain(x, qt).reason
    gradient = jax.grad(lambda x: (x @ qt).sum())(x)
    # A number up to half a step beyond the range is rounded and not clipped.
    half_a_step = {"int8": 1 / 127, "fp8": 2 * 16 / 448}[weight]
    is_clipped = np.abs(np.asarray(x)) > 2 + half_a_step
    assert ((np.asarray(gradient) == 0) == is_clipped).all()


def test_each_layer_of_a_stack_has_its_static_range():
    x, w = normal(2, 5, 64), normal(2, 64, 16)
    bounds = (jnp.array([-3.0, -1.0]), jnp.array([3.0, 1.0]))
    stack = jaxq.quantize(w, "int8", batch=0).with_activation("int8", bounds=bounds)
    together = jaxq.matmul(x, stack)
    for i in range(2):
        alone = jaxq.quantize(w[i], "int8").with_activation(
            "int8", bounds=(bounds[0][i], bounds[1][i])
        )
        np.testing.assert_array_equal(together[i], x[i] @ alone)
        np.testing.assert_array_equal(together[i], x[i] @ stack[i])
    scanned = jax.lax.scan(lambda _, layer: (None, x[0] @ layer), None, stack)[1]
    np.testing.assert_array_equal(scanned[0], together[0])


def test_scales_of_blocks_cannot_be_static():
    qt = jaxq.quantize(normal(64, 8), "mxfp8")
    with pytest.raises(ValueError, match="cannot be static"):
        qt.with_activation("mxfp8", bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match="needs an activation"):
        qt.with_activation(None, bounds=(-1.0, 1.0))
    assert (
        qt.with_activation("int8", bounds=(-1.0, 1.0)).with_activation(None).input_range
        is None
    )


def test_static_ranges_are_saved(tmp_path):
    qt = jaxq.quantize(normal(64, 8), "int8").with_activation(
        "int8", bounds=(-1.0, 2.0)
    )
    jaxq.save(tmp_path / "w", {"w": qt})
    back = jaxq.load(tmp_path / "w")["w"]
    np.testing.assert_array_equal(back.input_range, [-1.0, 2.0])
    assert back.meta == qt.meta
    assert pickle.loads(pickle.dumps(qt)).meta == qt.meta


# Observers as clipping.


@pytest.mark.parametrize(
    "granularity",
    thinned(
        [PerChannel(), PerGroup(32, pad=True), PerTensor()], [PerGroup(32, pad=True)]
    ),
    ids=str,
)
def test_clipping_by_extremes_changes_nothing(granularity):
    for fmt, symmetric in (("int4", True), ("uint4", False)):
        plain = QuantSpec(fmt, granularity, symmetric=symmetric)
        qt = jaxq.quantize(W, plain.replace(clipping=observers.minmax()))
        expected = jaxq.quantize(W, plain)
        np.testing.assert_array_equal(qt.codes(), expected.codes())
        np.testing.assert_array_equal(qt.scale, expected.scale)


CLIPPINGS = {
    "absmax": observers.absmax(),
    "entropy": observers.entropy(),
    "minmax": observers.minmax(),
    "moving_average": observers.moving_average(),
    "mse": observers.mse(),
    "percentile": observers.percentile(99.9),
}


@pytest.mark.parametrize("name", CLIPPINGS)
def test_observers_of_numbers_far_from_zero(name):
    x = np.random.default_rng(0).uniform(100, 101, 2000).astype(np.float32)
    spec = QuantSpec("uint4", PerTensor(), offset="min", clipping=CLIPPINGS[name])
    half_a_step = 1 / 15 / 2
    for sign in (1, -1):
        y = jaxq.dequantize(jaxq.quantize(sign * x, spec))
        assert np.abs(np.asarray(y) - sign * x).max() <= 1.01 * half_a_step
    # A static range of an activation.
    obs = CLIPPINGS[name]
    state = obs.update(obs.init(x), x)
    bounds = obs.bounds(state, "uint4", **jaxq.qtensor.range_options(spec))
    plain = spec.replace(clipping="absmax")
    y = jaxq.dequantize(jaxq.quantize(x, plain, bounds=bounds))
    assert np.abs(np.asarray(y) - x).max() <= 1.01 * half_a_step


@pytest.mark.parametrize(("fmt", "least"), [("uint4", 16.0), ("uint8", 40.0)])
def test_absmax_as_clipping_keeps_negative_numbers(fmt, least):
    spec = QuantSpec(fmt, PerChannel(), symmetric=False, clipping=observers.absmax())
    w = normal(512, 3)
    y = jaxq.dequantize(jaxq.quantize(w, spec))
    assert float(jaxq.metrics.sqnr(w, y)) > least
    y = jaxq.dequantize(jaxq.quantize(-jnp.abs(w), spec))
    assert float(jaxq.metrics.sqnr(-jnp.abs(w), y)) > least + 4


def test_each_block_has_its_own_percentile():
    spec = QuantSpec("int8", PerGroup(25), clipping=observers.percentile(90.0))
    qt = jaxq.quantize(W, spec)
    groups = np.abs(np.asarray(W)).reshape(4, 25, 8)
    expected = np.percentile(groups, 90.0, axis=1).T.astype(np.float32) * np.float32(
        1 / 127
    )
    np.testing.assert_allclose(qt.scale, expected, rtol=1e-6)


def test_mse_clipping_reduces_the_error():
    plain = QuantSpec("int3", PerChannel())
    errors = [
        float(jaxq.metrics.mse(W, jaxq.dequantize(jaxq.quantize(W, spec))))
        for spec in (plain, plain.replace(clipping=observers.mse()))
    ]
    assert errors[1] < 0.95 * errors[0]


def test_clipping_survives_json_and_jit():
    spec = QuantSpec("int4", clipping=observers.mse())
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(pickle.loads(pickle.dumps(spec))) == hash(spec)
    eager, jitted = jaxq.quantize(W, spec), jax.jit(lambda w: jaxq.quantize(w, spec))(W)
    np.testing.assert_array_equal(eager.codes(), jitted.codes())
    with pytest.raises(ValueError, match="clipping must be one of"):
        QuantSpec("int4", clipping="mse")
    with pytest.raises(ValueError, match="Leave out axis="):
        QuantSpec("int4", clipping=observers.mse(axis=0))
    gradient = jax.grad(
        lambda w: jaxq.fake_quant(
            w, QuantSpec("int4", clipping=observers.percentile(50.0))
        ).sum()
    )(W)
    assert 0.3 < float(gradient.mean()) < 0.8
