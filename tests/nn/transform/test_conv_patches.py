"""Methods that need data quantize a convolution by the matrix of its patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import methods
from tests import tables
from tests.arrays import assert_same, normal

WINDOW, CHANNELS, FEATURES = (3, 3), 4, 8


def images(seed: int, num: int = 4) -> jax.Array:
    """Images `[num, 10, 10, CHANNELS]` whose neighbours are alike."""
    noise = np.random.default_rng(seed).normal(size=(num, 10, 10, CHANNELS))
    return jnp.asarray(np.cumsum(noise, axis=1), jnp.float32)


BATCHES = [images(seed) for seed in range(3)]
GPTQ = jaxq.Recipe([jaxq.Rule(weight="int3", method="gptq")])

SETTINGS = {
    "plain": {},
    "strides": {"strides": 2},
    "valid": {"padding": "VALID"},
    "circular": {"padding": "CIRCULAR"},
    "dilation": {"kernel_dilation": 2},
    "input dilation": {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": CHANNELS, "strides": 2},
}


def convolution(**settings):
    return nnx.Conv(CHANNELS, FEATURES, WINDOW, rngs=nnx.Rngs(0), **settings)


def distance(model, other, x) -> float:
    return float(np.linalg.norm(np.asarray(model(x)) - np.asarray(other(x))))


def matrices(kernel: jax.Array, groups: int) -> jax.Array:
    """The matrices `[groups, K, out]` of a kernel `[*window, channels, features]`."""
    kernel = kernel.reshape(-1, groups, FEATURES // groups)
    return jnp.moveaxis(kernel, 1, 0)


@pytest.mark.parametrize("name", tables.thinned(SETTINGS, ["plain", "depthwise"]))
def test_gptq_of_a_convolution_beats_rounding_on_new_images(name):
    layer = convolution(**SETTINGS[name])
    qlayer, report = jaxq.quantize_model(layer, GPTQ, calibration=BATCHES)
    rounded, _ = jaxq.quantize_model(layer, "int3")
    new_images = images(99)
    error = distance(qlayer, layer, new_images)
    assert error < distance(rounded, layer, new_images)
    assert [row.method for row in report.quantized] == ["gptq"]
    assert report.quantized[0].loss < 1

    module = linen.Conv(FEATURES, WINDOW, **SETTINGS[name])
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    qmodule, qvars, _ = jaxq.nn.linen.quantize_model(
        module, {"params": params}, GPTQ, calibration=BATCHES
    )
    assert_same(qmodule.apply(qvars, new_images), qlayer(new_images))


def test_the_hessian_is_that_of_explicit_patches():
    """Few positions, so that the statistics keep every patch as a sample."""
    x = images(0, num=2)[:, :6, :6]
    layer = convolution(padding="VALID", feature_group_count=2)
    stats = jaxq.nn.calibrate(layer, [x], patches=True)[""].patches
    windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=(1, 2))
    for group in range(2):
        channels = windows[:, :, :, group * 2 : group * 2 + 2]
        patches = np.moveaxis(channels, 3, 5).reshape(-1, 18)  # [n h w, K]
        samples = np.asarray(stats.samples[group])[: int(stats.num_samples[group])]
        held_out = np.asarray(stats.held_out[group])
        held_out = held_out[: int(stats.num_held_out[group])]
        kept = np.concatenate([samples, held_out])
        np.testing.assert_array_equal(
            np.unique(kept, axis=0), np.unique(patches, axis=0)
        )
        assert len(kept) == len(patches)
        hessian = 2 / len(samples) * np.float64(samples).T @ np.float64(samples)
        np.testing.assert_allclose(stats.hessian[group], hessian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_gets_the_codes_of_its_matrices(groups):
    layer = convolution(feature_group_count=groups)
    stats = jaxq.nn.calibrate(layer, BATCHES, patches=True)
    qlayer, report = jaxq.quantize_model(
        layer, GPTQ, calibration=stats, fallback="none"
    )
    w = matrices(layer.kernel[...], groups)
    qt, _ = methods.gptq(w, stats[""].patches.hessian, "int3")
    kernel = jaxq.dequantize(qlayer.kernel.get_value())
    assert_same(matrices(kernel, groups), jaxq.dequantize(qt))
    # The report measures the output on patches that are held out.
    held_out = np.float64(stats[""].patches.held_out)
    exact = held_out @ np.float64(w)
    error = held_out @ np.float64(w - matrices(kernel, groups))
    sqnr = 10 * np.log10(np.sum(exact**2) / np.sum(error**2))
    assert report.quantized[0].output_sqnr == pytest.approx(sqnr, abs=0.01)


def test_statistics_without_patches_are_refused():
    stats = jaxq.nn.calibrate(convolution(), BATCHES[:1])
    with pytest.raises(ValueError, match="no patches.*patches=True"):
        jaxq.quantize_model(convolution(), GPTQ, calibration=stats)


def test_an_observer_sees_the_image_and_not_its_patches():
    """Patches repeat numbers, and hold the zeros of the padding."""
    observer = jaxq.observers.percentile(90.0)
    layer = convolution(padding=((2, 2), (2, 2)))
    stats, without = (
        jaxq.nn.calibrate(layer, BATCHES[:1], patches=patches, observer=observer)[""]
        for patches in (True, False)
    )
    assert stats.patches is not None
    assert_same(stats._replace(patches=None), without)


def test_a_static_range_and_a_method_share_the_statistics():
    rule = jaxq.Rule(weight="int8", activation="int8", observer="absmax", method="gptq")
    recipe = jaxq.Recipe([rule])
    layer = convolution()
    qlayer, report = jaxq.quantize_model(layer, recipe, calibration=BATCHES)
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    np.testing.assert_allclose(
        qlayer.kernel.get_value().input_range, [-largest, largest], rtol=1e-6
    )
    assert report.quantized[0].output_sqnr > 20


def test_blocks_over_several_groups_are_rounded_to_nearest():
    spec = jaxq.QuantSpec("int4", granularity=jaxq.PerTensor())
    recipe = jaxq.Recipe([jaxq.Rule(weight=spec, method="gptq")])
    layer = convolution(feature_group_count=2)
    qlayer, report = jaxq.quantize_model(layer, recipe, calibration=BATCHES)
    rounded, _ = jaxq.quantize_model(layer, jaxq.Recipe([jaxq.Rule(weight=spec)]))
    assert_same(qlayer.kernel.get_value(), rounded.kernel.get_value())
    assert report.quantized[0].method == "rtn"
    assert "2 groups of features" in report.quantized[0].note
    with pytest.raises(ValueError, match="kernel: .*2 groups of features"):
        jaxq.quantize_model(layer, recipe, calibration=BATCHES, fallback="raise")


class Stack(nnx.Module):
    """Two convolutions under nnx.scan."""

    def __init__(self):
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Conv(CHANNELS, CHANNELS, (3,), rngs=rngs)

        self.layers = make(nnx.Rngs(0).split(2))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return run(x, self.layers)


def test_a_stack_of_convolutions_is_quantized_layer_by_layer():
    stack, batches = Stack(), [x[:, 0] for x in BATCHES]
    qstack, report = jaxq.quantize_model(
        stack, GPTQ, calibration=batches, fallback="none"
    )
    stats = jaxq.nn.calibrate(stack, batches, patches=True)["layers"].patches
    qt = qstack.layers.kernel.get_value()
    for i in range(2):
        w = stack.layers.kernel[...][i].reshape(-1, CHANNELS)
        expected, _ = methods.gptq(w, stats.hessian[i, 0], "int3")
        kernel = jaxq.dequantize(qt)[i].reshape(-1, CHANNELS)
        assert_same(kernel, jaxq.dequantize(expected))
    assert report.quantized[0].method == "gptq"


class Network(nnx.Module):
    """Convolutions of both kinds and a dense layer."""

    def __init__(self):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=nnx.Rngs(0))
        self.up = nnx.ConvTranspose(CHANNELS, CHANNELS, (2, 2), rngs=nnx.Rngs(1))
        self.dense = nnx.Linear(CHANNELS, FEATURES, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.dense(nnx.relu(self.up(nnx.relu(self.conv(x)))))


class LinenNetwork(linen.Module):
    """`Network` in linen."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(CHANNELS, (3, 3), name="conv")(x))
        x = linen.relu(linen.ConvTranspose(CHANNELS, (2, 2), name="up")(x))
        return linen.Dense(FEATURES, name="dense")(x)


NAMED = {
    "int4_awq": {"conv": "rtn", "up": "rtn", "dense": "awq"},
    "int4_gptq": {"conv": "gptq", "up": "rtn", "dense": "gptq"},
    "llm_int8": {"conv": "rtn", "up": "rtn", "dense": "llm_int8"},
    "w8a8_smoothquant": {"conv": "rtn", "up": "rtn", "dense": "smoothquant"},
}


def check_methods(report, recipe):
    """Each layer has the method of the table, and a rounded one says why."""
    by_layer = {row.path.split("/")[-2]: row for row in report.quantized}
    used = {name: row.method for name, row in by_layer.items()}
    assert used == NAMED[recipe]
    for name, method in used.items():
        is_rounded = "rounded to nearest: method" in by_layer[name].note
        assert is_rounded == (method == "rtn")


@pytest.mark.parametrize("recipe", NAMED)
def test_named_recipes_round_the_layers_that_their_method_cannot_quantize(recipe):
    module = LinenNetwork()
    variables = module.init(jax.random.key(0), BATCHES[0])
    check_methods(jaxq.nn.plan(Network(), recipe), recipe)
    check_methods(jaxq.nn.plan(module, recipe, variables), recipe)


def test_int4_gptq_runs_on_a_network_of_convolutions():
    model = Network()
    qmodel, report = jaxq.quantize_model(
        model, "int4_gptq", calibration=BATCHES, fallback="none"
    )
    check_methods(report, "int4_gptq")
    x = images(99)
    assert distance(qmodel, model, x) < 0.2 * float(jnp.linalg.norm(model(x)))


@pytest.mark.parametrize("recipe", NAMED)
def test_recipes_of_users_refuse_these_layers_by_name(recipe):
    rule = jaxq.recipes.get(recipe).rules[-1]
    assert rule.or_nearest
    rule = dataclasses.replace(rule, or_nearest=False)
    with pytest.raises(ValueError, match=r"up \(ConvTranspose\): method ") as error:
        jaxq.quantize_model(Network(), jaxq.Recipe([rule]), calibration=BATCHES)
    # Batches were passed, so the error does not ask for them.
    assert "calibration=" not in str(error.value)
    allowed = jaxq.Recipe([dataclasses.replace(rule, or_nearest=True)])
    assert jaxq.Recipe.from_dict(allowed.to_dict()) == allowed
    check_methods(jaxq.nn.plan(Network(), allowed), recipe)


def test_a_named_recipe_of_a_tree_rounds_its_convolutions():
    params = {"kernel": normal(3, 4, 8), "dense": normal(8, 8)}

    def forward(params, x):
        numbers = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1,), "SAME", dimension_numbers=numbers
        )
        return x @ params["dense"]

    _, report = jaxq.quantize_params(
        params,
        "int4_gptq",
        forward=forward,
        calibration=[normal(2, 32, 4)],
        fallback="none",
    )
    rows = {row.path: row for row in report.quantized}
    assert rows["dense"].method == "gptq"
    assert rows["kernel"].method == "rtn"
    assert "calibration does not collect the windows of Array" in rows["kernel"].note
