"""Rows of zeros: data in dense layers, nothing in experts behind a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import normal

NUM_EXPERTS, WIDTH, INNER = 4, 16, 8
OBSERVER = jaxq.observers.percentile(99)


class Experts(nnx.Module):
    """Experts as one einsum: rows [b, 16] and a one-hot mask [e, b] -> [e, b, 8]."""

    def __init__(self):
        shape = (NUM_EXPERTS, WIDTH, INNER)
        bias = (NUM_EXPERTS, 1, INNER)
        self.up = nnx.Einsum("ebd,edf->ebf", shape, bias, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.up(x[None] * mask[..., None])


class MappedExperts(nnx.Module):
    """The same experts as linear layers under `nnx.vmap`."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), NUM_EXPERTS)
        self.up = nnx.vmap(
            lambda key: nnx.Linear(WIDTH, INNER, rngs=nnx.Rngs(params=key))
        )(keys)

    def __call__(self, x, mask):
        return nnx.vmap(lambda layer, x: layer(x))(self.up, x[None] * mask[..., None])


class LinenExperts(linen.Module):
    """The same experts in linen."""

    @linen.compact
    def __call__(self, x, mask):
        shape = (NUM_EXPERTS, WIDTH, INNER)
        return linen.Einsum(shape, "ebd,edf->ebf", use_bias=False, name="up")(
            x[None] * mask[..., None]
        )


def routed(seed=0, num=512):
    """Rows, and the mask that sends each to one expert. No row reaches the last."""
    x = normal(num, WIDTH, seed=seed)
    expert = np.random.default_rng(seed).choice(
        NUM_EXPERTS, num, p=[0.9, 0.08, 0.02, 0]
    )
    return x, jnp.asarray(expert == np.arange(NUM_EXPERTS)[:, None], jnp.float32)


def calibrated(network, batch):
    if network is not LinenExperts:
        return jaxq.nn.calibrate(network(), [batch], observer=OBSERVER)["up"]
    variables = LinenExperts().init(jax.random.key(0), *batch)
    return jaxq.nn.linen.calibrate(
        LinenExperts(), variables, [batch], observer=OBSERVER
    )["up"]


@pytest.mark.parametrize("network", [Experts, MappedExperts, LinenExperts])
def test_statistics_of_an_expert_are_those_of_its_own_rows(network):
    batch = routed()
    stats = calibrated(network, batch)
    x, mask = np.asarray(batch[0], np.float64), np.asarray(batch[1], bool)
    is_used = np.arange(512) % 8 != 7  # the others are held out
    for expert in range(NUM_EXPERTS):
        rows, held_out = x[mask[expert] & is_used], x[mask[expert] & ~is_used]
        assert int(stats.count[expert]) == int(stats.num_samples[expert]) == len(rows)
        assert int(stats.num_held_out[expert]) == len(held_out)
        if not len(rows):
            continue
        np.testing.assert_allclose(stats.mean[expert], rows.mean(0), atol=1e-5)
        second = 2 * rows.T @ rows / len(rows)
        np.testing.assert_allclose(stats.hessian[expert], second, rtol=1e-3, atol=1e-3)
        state = jax.tree.map(lambda leaf, e=expert: leaf[e], stats.observed)
        # One shape for all experts, so that they share a compiled program.
        own = OBSERVER.update(
            OBSERVER.init(batch[0]), batch[0], where=mask[expert, :, None]
        )
        expected = OBSERVER.bounds(own)
        np.testing.assert_allclose(OBSERVER.bounds(state), expected)


def test_rows_of_zeros_are_data_in_a_dense_layer():
    x = normal(64, WIDTH).at[::2].set(0)
    layer = nnx.Linear(WIDTH, INNER, rngs=nnx.Rngs(0))
    stats = jaxq.nn.calibrate(layer, [x])[""]
    rows = np.asarray(x)[np.arange(64) % 8 != 7]
    assert float(stats.count) == len(rows)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    recipe = jaxq.Recipe([jaxq.Rule(weight="int3", correct_bias=True)])
    qlayer, _ = jaxq.quantize_model(layer, recipe, calibration=[x], fallback="none")
    error = np.asarray(qlayer(rows)) - np.asarray(layer(rows))
    assert np.abs(error.mean(0)).max() < 1e-5


def test_layers_that_read_one_input_are_not_experts():
    """An ensemble reads the same rows, and rows of zeros are data for each member."""
    members = nnx.vmap(lambda key: nnx.Linear(WIDTH, INNER, rngs=nnx.Rngs(params=key)))

    class Ensemble(nnx.Module):
        def __init__(self):
            self.up = members(jax.random.split(jax.random.key(0), 2))

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.up, x)

    x = normal(64, WIDTH).at[::2].set(0)
    assert jaxq.nn.calibrate(Ensemble(), [x])["up"].count.tolist() == [56, 56]


def test_only_rows_of_zeros_are_an_error():
    x, mask = routed()
    with pytest.raises(ValueError, match="experts read only rows of zeros"):
        jaxq.nn.calibrate(Experts(), [(x, 0 * mask)])


def test_the_bias_of_an_expert_is_corrected_on_its_own_rows():
    x, mask = routed()
    x = x + 1  # the rounding error of the weights then changes the mean of the outputs
    model = MappedExperts()
    recipe = jaxq.Recipe([jaxq.Rule(weight="int3", correct_bias=True)])
    qmodel, report = jaxq.quantize_model(model, recipe, calibration=[(x, mask)])
    expected = "but not for element 3, which no calibration row reached"
    assert expected in report.quantized[0].note
    error = np.asarray(qmodel(x, mask) - model(x, mask))[0]
    counted = (np.asarray(mask[0]) > 0) & (np.arange(512) % 8 != 7)
    assert np.abs(error[counted].mean(0)).max() < 1e-4
    assert np.array_equal(qmodel.up.bias[3], model.up.bias[3])


def test_adaround_gains_on_the_rows_of_each_expert():
    # AdaRound gains only where input channels are correlated.
    mixing = normal(WIDTH, WIDTH).at[3:].multiply(0.1)
    x, mask = routed()
    x = x @ mixing
    rule = jaxq.Rule(weight="int3", method="adaround", options={"num_steps": 300})
    model = Experts()
    qmodel, report = jaxq.quantize_model(
        model, jaxq.Recipe([rule]), calibration=[(x, mask)]
    )
    nearest, _ = jaxq.quantize_model(model, jaxq.Recipe([jaxq.Rule(weight="int3")]))
    assert "1 of 4 matrices never reached" in report.quantized[0].note
    x, mask = routed(seed=1)
    x = x @ mixing
    exact = np.asarray(model(x, mask))
    errors = [np.asarray(m(x, mask)) - exact for m in (qmodel, nearest)]
    squares = [np.sum(e**2, axis=(1, 2)) for e in errors]
    assert squares[0][0] < 0.7 * squares[1][0]


@pytest.mark.parametrize("fallback", ["rtn", "none"])
def test_the_static_range_of_an_expert_that_nothing_reached_is_named(fallback):
    x, mask = routed()
    rule = jaxq.Rule(weight="int8", activation="int8", observer="absmax")
    qmodel, report = jaxq.quantize_model(
        Experts(), jaxq.Recipe([rule]), calibration=[(x, mask)], fallback=fallback
    )
    assert "no calibration input reached element 3" in report.quantized[0].note
    ranges = np.asarray(qmodel.up.kernel[...].input_range)
    largest = [
        np.abs(np.asarray(x)[np.asarray(row) > 0]).max() for row in np.asarray(mask)[:3]
    ]
    if fallback == "none":
        np.testing.assert_allclose(ranges[:3, 1], largest)
    np.testing.assert_allclose(ranges[3], [-max(largest), max(largest)])


@pytest.mark.parametrize("recipe", ["w8a8_smoothquant", "w8a8_static"])
def test_recipes_run_with_an_expert_that_nothing_reached(recipe):
    x, mask = routed()
    exact = Experts()(x, mask)
    qmodel, _ = jaxq.quantize_model(Experts(), recipe, calibration=[(x, mask)])
    assert jaxq.metrics.sqnr(exact, qmodel(x, mask)) > 35
    module = LinenExperts()
    variables = module.init(jax.random.key(0), x, mask)
    quantized = jaxq.nn.linen.quantize_model(
        module, variables, recipe, calibration=[(x, mask)]
    )
    exact = module.apply(variables, x, mask)
    assert jaxq.metrics.sqnr(exact, quantized[0].apply(quantized[1], x, mask)) > 35
