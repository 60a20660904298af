"""AWQ and SmoothQuant where no previous layer can take their scales.

The oracle is numpy: the scales are computed by the methods' own functions from the
calibration rows, and the product is `(x / s) @ Q(s * w)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import Recipe, Rule, methods
from tests.arrays import assert_close, normal

RECIPES = ("int4_awq", "w8a8_smoothquant")
PLAIN = {"int4_awq": "int4", "w8a8_smoothquant": "w8a8"}
IN, HIDDEN, OUT = 32, 24, 8
# The channels of the input differ by factors of up to a few hundred.
CHANNELS = np.exp(2 * np.asarray(normal(IN, seed=9)))


def inputs(*shape, seed):
    return jnp.asarray(np.asarray(normal(*shape, IN, seed=seed)) * CHANNELS)


BATCHES = [inputs(64, seed=seed) for seed in range(2)]
X = BATCHES[0]


class Net(nnx.Module):
    """A class without registered folding."""

    def __init__(self, rngs):
        self.first = nnx.Linear(IN, HIDDEN, rngs=rngs)
        self.second = nnx.LinearGeneral(HIDDEN, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.gelu(self.first(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(HIDDEN, name="first")(x))
        return linen.DenseGeneral((2, 4), name="second")(x)


def relative_error(y, expected):
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


def found_scale(recipe, w, stats):
    """The scales of a matrix, by the function of the method."""
    if recipe == "int4_awq":
        return methods.awq_scale(w, stats.samples, "int4")[0]
    return methods.smoothquant(stats.absmax, w)[0]


def product(recipe, x, w, s, samples):
    """`(x / s) @ Q(s * w)` for `x [m, in]`, with Q of the recipe, in float64."""
    x, samples, s = np.asarray(x), np.asarray(samples), np.asarray(s)
    scaled_w, scaled_x = jnp.asarray(np.asarray(w) * s[:, None]), x / s
    if recipe == "int4_awq":
        # The method clips the ranges after the scales.
        qt, _ = methods.clip(scaled_w, "int4", x=samples / s, num=20, max_shrink=0.5)
    else:
        qt = jaxq.quantize(scaled_w, "int8")
        codes = jaxq.quantize(jnp.asarray(scaled_x), "int8", contracting=-1)
        scaled_x = jaxq.dequantize(codes)
    return np.asarray(scaled_x, np.float64) @ np.asarray(jaxq.dequantize(qt))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def first_stats(net):
    return jaxq.nn.calibrate(net, BATCHES, layers=["first"])["first"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_nnx_without_registered_folding(net, first_stats, recipe, tmp_path):
    qmodel, report = jaxq.quantize_model(
        net, recipe, calibration=BATCHES, fallback="none"
    )
    method = recipe.rpartition("_")[2]
    assert {row.method for row in report.quantized} == {method}
    assert all("scales at run time" in row.note for row in report.quantized)
    w = net.first.kernel[...]
    s = found_scale(recipe, w, first_stats)
    assert_close(1 / qmodel.first.kernel[...].input_scale, s)
    expected = product(recipe, X, w, s, first_stats.samples)
    expected += np.asarray(net.first.bias[...])
    assert_close(qmodel.first(X), expected, 2e-4)
    # The plan has the same bytes, and says the same.
    plan = jaxq.nn.plan(net, recipe)
    assert plan.bytes_after == report.bytes_after
    assert all("scales at run time" in row.note for row in plan.quantized)

    plain, _ = jaxq.quantize_model(net, PLAIN[recipe])
    new = inputs(64, seed=5)
    y, hidden = net(new), net.first(new)
    # The channels of the first layer's input differ, so scales help there. AWQ has 0.64
    # times the error of plain int4, and 0.86 times without scales: it also clips.
    plain_error = relative_error(plain.first(new), hidden)
    assert relative_error(qmodel.first(new), hidden) < 0.75 * plain_error
    assert relative_error(qmodel(new), y) < relative_error(plain(new), y)
    jitted = nnx.jit(lambda model, x: model(x))(qmodel, new)
    assert_close(jitted, qmodel(new), 1e-5)
    jaxq.save(tmp_path / "q.safetensors", qmodel)
    loaded = jaxq.load(tmp_path / "q.safetensors", into=net)
    np.testing.assert_array_equal(loaded(new), qmodel(new))


@pytest.mark.parametrize("recipe", RECIPES)
def test_linen_gives_the_weights_of_nnx(net, recipe, tmp_path):
    params = {
        name: {key: getattr(getattr(net, name), key)[...] for key in ("kernel", "bias")}
        for name in ("first", "second")
    }
    module, variables = LinenNet(), {"params": params}
    qmodule, qvariables, report = jaxq.nn.linen.quantize_model(
        module, variables, recipe, calibration=BATCHES
    )
    assert all("scales at run time" in row.note for row in report.quantized)
    qmodel, _ = jaxq.quantize_model(net, recipe, calibration=BATCHES)
    for name in ("first", "second"):
        kernel = qvariables["params"][name]["kernel"]
        expected = getattr(qmodel, name).kernel[...]
        assert_close(kernel.input_scale, expected.input_scale)
    y = jax.jit(qmodule.apply)(qvariables, X)
    assert_close(y, qmodel(X), 1e-4)
    jaxq.save(tmp_path / "q.safetensors", qvariables)
    loaded = jaxq.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(
        qmodule.apply(loaded, X), qmodule.apply(qvariables, X)
    )


@pytest.mark.parametrize("observer", [None, "minmax"])
def test_a_tree(net, observer, tmp_path):
    """A plain tree, with its model as a function."""
    params = {"first": net.first.kernel[...], "second": net.second.kernel[...]}

    def forward(params, x):
        hidden = nnx.gelu(jaxq.matmul(x, params["first"]))
        return jaxq.einsum("bk,khd->bhd", hidden, params["second"])

    rule = Rule(
        weight="int8",
        activation="int8",
        method="smoothquant",
        observer=observer,
    )
    qparams, report = jaxq.quantize_params(
        params, Recipe([rule]), calibration=BATCHES, forward=forward
    )
    assert all("scales at run time" in row.note for row in report.quantized)
    qt = qparams["first"]
    assert qt.input_scale.shape == (IN,)
    y = forward(params, X)
    assert relative_error(forward(qparams, X), y) < 0.02
    if observer is not None:
        largest = abs(np.concatenate(BATCHES) * np.asarray(qt.input_scale)).max()
        assert_close(qt.input_range, np.array([-largest, largest]))
    jaxq.save(tmp_path / "q.safetensors", qparams)
    loaded = jaxq.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(forward(loaded, X), forward(qparams, X))


class Scanned(nnx.Module):
    """Layers that nnx.vmap stacks and nnx.scan calls."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(IN, IN, use_bias=False, rngs=rngs)

        self.layers = layers(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            # Every layer reads channels of different magnitude.
            return jnp.tanh(layer(x)) * jnp.asarray(CHANNELS)[None]

        return run(self.layers, x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stack_has_scales_for_each_layer(recipe, tmp_path):
    model = Scanned()
    qmodel, report = jaxq.quantize_model(
        model, recipe, calibration=BATCHES, fallback="none"
    )
    assert "scales at run time" in report.quantized[0].note
    qt = qmodel.layers.kernel[...]
    assert qt.input_scale.shape == (3, IN)
    stats = jaxq.nn.calibrate(model, BATCHES)["layers"]
    for i in range(3):
        w, own = model.layers.kernel[...][i], jax.tree.map(lambda a, i=i: a[i], stats)
        s = found_scale(recipe, w, own)
        assert_close(1 / qt[i].input_scale, s)
        assert_close(X @ qt[i], product(recipe, X, w, s, own.samples), 2e-4)
    plain, _ = jaxq.quantize_model(model, PLAIN[recipe])
    y = model(X)
    assert relative_error(qmodel(X), y) < relative_error(plain(X), y)
    jaxq.save(tmp_path / "q.safetensors", qmodel)
    loaded = jaxq.load(tmp_path / "q.safetensors", into=model)
    np.testing.assert_array_equal(loaded(X), qmodel(X))


def smoothed(**fields):
    rule = Rule(weight="int8", activation="int8", method="smoothquant", **fields)
    return Recipe([rule])


def test_a_static_range_is_that_of_the_multiplied_input(net):
    qmodel, _ = jaxq.quantize_model(
        net, smoothed(observer="minmax"), calibration=BATCHES
    )
    qt = qmodel.first.kernel[...]
    rows = np.concatenate(BATCHES) * np.asarray(qt.input_scale)
    largest = abs(rows).max()
    assert_close(qt.input_range, np.array([-largest, largest]))
    params = {
        name: {key: getattr(getattr(net, name), key)[...] for key in ("kernel", "bias")}
        for name in ("first", "second")
    }
    _, qvariables, _ = jaxq.nn.linen.quantize_model(
        LinenNet(),
        {"params": params},
        smoothed(observer="minmax"),
        calibration=BATCHES,
    )
    kernel = qvariables["params"]["first"]["kernel"]
    assert_close(kernel.input_range, qt.input_range)
    stats = jaxq.nn.calibrate(net, BATCHES, observer=jaxq.observers.minmax())
    jaxq.quantize_model(net, smoothed(), calibration=stats)
    with pytest.raises(ValueError, match="a static range of scaled inputs needs the b"):
        jaxq.quantize_model(net, smoothed(observer="minmax"), calibration=stats)


def test_a_static_range_of_a_stack():
    model = Scanned()
    qmodel, _ = jaxq.quantize_model(
        model, smoothed(observer="minmax"), calibration=BATCHES
    )
    qt = qmodel.layers.kernel[...]
    rows = np.concatenate(BATCHES) * np.asarray(qt.input_scale)[0]
    largest = abs(rows).max()
    assert_close(qt.input_range[0], np.array([-largest, largest]))


def test_scales_that_increase_the_error_are_left_out(net, monkeypatch):
    """A large scale of one channel makes the steps of the others coarse."""

    def bad(absmax, weights, **_):
        channels = np.arange(weights[0].shape[0])
        return jnp.asarray(np.where(channels == 0, 1000, 1), jnp.float32), None

    monkeypatch.setattr("jaxq.methods._smoothquant.smoothquant", bad)
    qmodel, report = jaxq.quantize_model(net, smoothed(), calibration=BATCHES)
    plain, _ = jaxq.quantize_model(net, "w8a8")
    row = next(row for row in report.quantized if row.path == "first/kernel")
    assert "smoothquant's scales increase the error on held-out inputs" in row.note
    assert row.method == "rtn"
    assert qmodel.first.kernel[...].input_scale is None
    np.testing.assert_array_equal(qmodel.first(X), plain.first(X))
    with pytest.raises(ValueError, match="first: smoothquant's scales increase"):
        jaxq.quantize_model(net, smoothed(), calibration=BATCHES, fallback="raise")
    params = {"first": net.first.kernel[...]}
    with pytest.raises(ValueError, match="^quantize_params: first: smoothquant's sc"):
        jaxq.quantize_params(
            params,
            smoothed(),
            calibration=BATCHES,
            forward=lambda params, x: jaxq.matmul(x, params["first"]),
            fallback="raise",
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_convolution_is_rounded_and_says_so(recipe):
    conv, x = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)), normal(2, 8, 4)
    qmodel, report = jaxq.quantize_model(conv, recipe, calibration=[x])
    (row,) = report.quantized
    assert row.method == "rtn"
    assert "scales rows of a matrix, not the windows of a conv" in row.note
    plain, _ = jaxq.quantize_model(conv, PLAIN[recipe])
    np.testing.assert_array_equal(qmodel(x), plain(x))


def test_experts():
    """Each expert has scales of its own. Experts that do not lead have none."""
    x = inputs(64, 2, seed=0)
    model = nnx.Einsum("bek,ekn->ben", (2, IN, OUT), rngs=nnx.Rngs(0))
    recipe = smoothed()
    qmodel, report = jaxq.quantize_model(model, recipe, calibration=[x])
    assert "scales at run time" in report.quantized[0].note
    assert qmodel.kernel[...].input_scale.shape == (2, IN)
    plain, _ = jaxq.quantize_model(model, "w8a8")
    assert relative_error(qmodel(x), model(x)) < relative_error(plain(x), model(x))

    model = nnx.Einsum("bek,ken->ben", (IN, 2, OUT), rngs=nnx.Rngs(0))
    qmodel, report = jaxq.quantize_model(model, recipe, calibration=[x])
    assert "its product dequantizes the weight" in report.quantized[0].note
    assert qmodel.kernel[...].input_scale is None


def test_statistics_of_a_multiplied_input():
    x, factors = normal(64, 8), jnp.exp(normal(8, seed=1))
    counts, parts = jnp.ones(64, bool), jnp.arange(64) // 8

    def stats_of(x):
        empty = jaxq.observers.empty_stats(8)
        return jaxq.observers.update_stats(empty, x, counts, parts)

    scaled = jaxq.observers.scaled_stats(stats_of(x), factors)
    assert_close(scaled, stats_of(x * factors[None]))


def test_extremes_include_the_held_out_rows():
    x = normal(2, 64, 8)
    x = x.at[:, 7, 3].set(9.0).at[1, 7, 5].set(-8.0)  # row 7 is held out
    counts = jnp.ones(64, bool).at[15].set(False)  # row 15 is padding
    x = x.at[:, 15].set(99.0)
    stats = jax.vmap(
        lambda x: jaxq.observers.update_stats(
            jaxq.observers.empty_stats(8), x, counts, jnp.arange(64)
        )
    )(x)
    rows = np.delete(np.asarray(x), 15, axis=1)
    low, high = stats.extremes
    np.testing.assert_array_equal(low, rows.min(axis=1))
    np.testing.assert_array_equal(high, rows.max(axis=1))
    assert stats.high[0, 3] < 9
