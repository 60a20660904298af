"""prepare and convert, for nnx models and trees."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxq
from jaxq import Recipe, Rule, training
from tests import tables
from tests.arrays import assert_same, normal
from tests.training.models import Mixed, Stack

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
TARGET = normal(2, 6, 16, seed=3)
RULES = (
    Rule("own", weight="int8", kinds=("Param",)),
    Rule("embed", weight="int8"),
    Rule("conv", weight="int4"),
)


def recipe_of(weight="int4", **options):
    return Recipe([*RULES, Rule(weight=weight, **options)])


def loss_of(model, x, y):
    return jnp.mean((model(x).astype(jnp.float32) - y) ** 2)


@nnx.jit
def train(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss


def decayed(params):
    return jax.tree.map(lambda label: label == "weight", training.labels(params))


RECIPES = {
    "int4 lsq": (recipe_of("int4"), training.lsq()),
    "int2 computed": (recipe_of("int2"), "dynamic"),
    "ternary": (recipe_of("ternary"), training.lsq()),
    "w8a8": (recipe_of("int8", activation="int8"), training.lsq()),
    "w4a8": (recipe_of("int4", activation="int8"), "dynamic"),
    "fp8": (recipe_of("fp8", activation="fp8"), "dynamic"),
    "nf4": (recipe_of("nf4"), training.lsq()),
}


@pytest.mark.parametrize(
    "name", tables.thinned(RECIPES, ("int4 lsq", "ternary", "w4a8", "nf4"))
)
def test_a_trained_model_converts_to_the_same_numbers(name, standard_promotion):
    recipe, ranges = RECIPES[name]
    model = Mixed(nnx.Rngs(0))
    qat = training.prepare(model, recipe, ranges=ranges)
    before = nnx.to_pure_dict(nnx.state(model))
    tx = optax.adamw(3e-3, mask=decayed)
    optimizer = nnx.Optimizer(qat, tx, wrt=nnx.Param)
    losses = [float(train(qat, optimizer, TOKENS, TARGET)) for _ in range(4)]
    assert losses[-1] < losses[0]
    qmodel, report = training.convert(qat)
    np.testing.assert_array_equal(qmodel(TOKENS), qat(TOKENS))
    quantized = {row.path for row in report.quantized}
    kernels = {"up/kernel", "heads/kernel", "mix/kernel", "conv/kernel"}
    assert quantized == {*kernels, "own", "embed/embedding"}
    assert_same(nnx.to_pure_dict(nnx.state(model)), before)  # no argument changes


def test_the_start_is_the_quantized_model():
    model = Mixed(nnx.Rngs(0))
    qat = training.prepare(model, recipe_of("int4"), ranges=training.lsq())
    qmodel, report = jaxq.quantize_model(model, recipe_of("int4"))
    converted, own_report = training.convert(qat)
    np.testing.assert_array_equal(qat(TOKENS), qmodel(TOKENS))
    state, expected = nnx.state(converted), nnx.state(qmodel)
    assert_same(nnx.to_pure_dict(state), nnx.to_pure_dict(expected))
    rows = {row.path: (row.format, row.sqnr) for row in report.rows}
    assert {row.path: (row.format, row.sqnr) for row in own_report.rows} == rows


def test_gptq_gives_the_start():
    layer, batches = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), [normal(40, 32, seed=5)]
    recipe = Recipe([Rule(weight="int3", method="gptq")])
    for ranges in (training.lsq(), "dynamic"):
        data = {"calibration": batches, "fallback": "none"}
        qat = training.prepare(layer, recipe, ranges=ranges, **data)
        qmodel, _ = jaxq.quantize_model(layer, recipe, **data)
        codes = qmodel.kernel[...].codes()
        start = qat.kernel.floats[...]
        nearest = jaxq.quantize(layer.kernel[...], "int3")
        assert np.any(codes != nearest.codes())
        if ranges != "dynamic":
            np.testing.assert_array_equal(qat.kernel[...].quantize().codes(), codes)
        # Weights that GPTQ rounds to nearest keep their floats.
        kept = np.asarray(start == layer.kernel[...])
        assert 0.5 < kept.mean() < 1


def test_gradients_are_those_of_fake_quant():
    layer, x = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), normal(4, 32)
    recipe = Recipe([Rule(weight="int4", activation="int8")])
    qat = training.prepare(layer, recipe)
    grads = nnx.grad(lambda qat: (qat(x) ** 2).sum())(qat)

    def by_hand(kernel, x):
        fake_x = jaxq.fake_quant(x, "int8", contracting=-1)
        return ((fake_x @ jaxq.fake_quant(kernel, "int4")) ** 2).sum()

    expected = jax.grad(by_hand)(layer.kernel[...], x)
    np.testing.assert_allclose(grads.kernel.floats[...], expected, rtol=1e-4, atol=1e-4)


def test_a_stack_in_a_scan(standard_promotion):
    model, x = Stack(nnx.Rngs(0)), normal(3, 32)
    qat = training.prepare(model, recipe_of_stack(), ranges=training.lsq())
    optimizer = nnx.Optimizer(qat, optax.adam(1e-3), wrt=nnx.Param)
    for _ in range(3):
        train(qat, optimizer, x, normal(3, 32, seed=2))
    assert qat.layers.kernel.scale.shape[0] == 4
    qmodel, _ = training.convert(qat)
    np.testing.assert_array_equal(qmodel(x), qat(x))


def recipe_of_stack():
    return Recipe([Rule(weight="int4", activation="int8")])


def test_masters_stay_in_float32_in_a_bfloat16_layer():
    layer = nnx.Linear(32, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    qat = training.prepare(layer, "int4", ranges=training.lsq())
    x = normal(4, 32, dtype="bfloat16")
    assert qat(x).dtype == jnp.bfloat16
    grads = nnx.grad(lambda qat: qat(x).astype(jnp.float32).sum())(qat)
    assert grads.kernel.floats[...].dtype == jnp.float32
    np.testing.assert_array_equal(training.convert(qat)[0](x), qat(x))


def test_remat_gives_the_same_gradients():
    layer, x = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), normal(4, 32)
    qat = training.prepare(layer, "int4", ranges=training.lsq())

    def loss(qat):
        return (nnx.remat(lambda qat: qat(x))(qat) ** 2).sum()

    plain = nnx.grad(lambda qat: (qat(x) ** 2).sum())(qat)
    assert_same(nnx.to_pure_dict(nnx.grad(loss)(qat)), nnx.to_pure_dict(plain))


def test_shared_layers_share_their_weight():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(32, 32, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    qat = training.prepare(Twice(nnx.Rngs(0)), "int4", ranges=training.lsq())
    assert qat.first.kernel is qat.second.kernel
    assert len(jax.tree.leaves(nnx.state(qat, nnx.Param))) == 3
    qmodel, _ = training.convert(qat)
    assert qmodel.first.kernel is qmodel.second.kernel


def test_preparing_again_keeps_the_trained_floats(standard_promotion):
    model, x = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), normal(4, 32)
    qat = training.prepare(model, "int8", ranges=training.lsq())
    optimizer = nnx.Optimizer(qat, optax.adam(1e-2), wrt=nnx.Param)
    train(qat, optimizer, x, jnp.ones((4, 8)))
    lower = training.prepare(qat, "int4")
    assert lower.kernel[...].spec.fmt.name == "int4"
    np.testing.assert_array_equal(lower.kernel.floats[...], qat.kernel.floats[...])
    expected, _ = jaxq.quantize_model(
        nnx.merge(nnx.graphdef(model), float_state(model, qat)), "int4"
    )
    np.testing.assert_array_equal(lower(x), expected(x))


def float_state(model, qat):
    """The state of the float model, with the floats of a prepared layer."""
    state = nnx.state(model)
    state["kernel"].set_value(qat.kernel.floats[...])
    state["bias"].set_value(qat.bias[...])
    return state


# Layers that start at zero.


class ZeroOutput(nnx.Module):
    """A block whose output starts at zero, with a column of zeros in front of it."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 8, kernel_init=jax.nn.initializers.zeros, rngs=rngs)
        self.up.kernel.set_value(self.up.kernel[...].at[:, 3].set(0))
        self.up.bias.set_value(jnp.full(64, 0.1))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


ZERO_STARTS = tables.thinned(
    itertools.product(("int4", "ttq"), ("recipe", "lsq")),
    [("int4", "lsq"), ("ttq", "recipe")],
)


@pytest.mark.parametrize(("recipe", "initial"), ZERO_STARTS)
def test_a_layer_that_starts_at_zero_trains(recipe, initial, standard_promotion):
    x, y = normal(16, 32), normal(16, 8, seed=1)
    model, losses = ZeroOutput(nnx.Rngs(0)), {}
    for ranges in ("dynamic", training.lsq(initial=initial)):
        qat = training.prepare(model, recipe, ranges=ranges)
        training.check(qat)
        optimizer = nnx.Optimizer(qat, optax.adam(1e-2), wrt=nnx.Param)
        losses[ranges] = [float(train(qat, optimizer, x, y)) for _ in range(40)]
        np.testing.assert_array_equal(training.convert(qat)[0](x), qat(x))
        assert np.all(np.any(qat.up.kernel.floats[...] != 0, axis=0))
    computed, learned = losses.values()
    assert learned[0] == computed[0]
    assert learned[-1] < max(1.1 * computed[-1], 0.5 * learned[0])


# Trees.


def test_a_tree_trains(standard_promotion):
    params = {
        "up": {"w": normal(32, 64) / 6, "b": jnp.zeros(64)},
        "down": normal(64, 4),
    }
    x, y = normal(8, 32, seed=1), normal(8, 4, seed=2)
    qat = training.prepare(params, "int2", ranges=training.lsq())
    tx = optax.adam(3e-3)

    def loss_of(params):
        hidden = jnp.tanh(x @ params["up"]["w"] + params["up"]["b"][None])
        return jnp.mean((hidden @ params["down"] - y) ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(qat), []
    for _ in range(20):
        qat, state, loss = step(qat, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert step._cache_size() == 1
    qparams, report = training.convert(qat)
    assert isinstance(qparams["down"], jaxq.QTensor)
    assert [row.path for row in report.quantized] == ["down", "up/w"]
    np.testing.assert_allclose(loss_of(qparams), loss_of(qat), rtol=1e-6)


def test_a_tree_with_calibration(standard_promotion):
    params, x = {"w": normal(32, 16)}, normal(40, 32, seed=1)
    recipe = Recipe([Rule(weight="int4", activation="int8", observer="absmax")])
    qat = training.prepare(
        params,
        recipe,
        ranges=training.lsq(),
        calibration=[x],
        forward=lambda params, x: x @ params["w"],
    )
    grads = jax.grad(lambda params: (x @ params["w"]).sum())(qat)
    assert np.any(grads["w"].input_range != 0)
    qparams, _ = training.convert(qat)
    np.testing.assert_array_equal(x @ qparams["w"], x @ qat["w"])


# Bad input.


def test_a_recipe_that_quantizes_nothing():
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    recipe = Recipe([Rule(skip=True)])
    with pytest.raises(ValueError, match="quantizes no weight of the model"):
        training.prepare(layer, recipe)
    with pytest.raises(ValueError, match="quantizes no weight of the model"):
        training.prepare({"w": normal(32, 8)}, recipe)


def test_stochastic_weights_need_a_key_in_every_product():
    spec = jaxq.QuantSpec("int4", rounding="stochastic")
    with pytest.raises(ValueError, match=r"rounds\s+stochastically"):
        training.prepare({"w": normal(32, 8)}, spec, key=jax.random.key(0))


def test_models_of_another_kind():
    for model in (3, None, {}, {"w": "kernel"}):
        with pytest.raises(TypeError, match="prepare: model must be a flax nnx module"):
            training.prepare(model, "int4")
    for model in (linen.Dense(8), (linen.Dense(8), {"params": normal(4, 4)})):
        with pytest.raises(TypeError, match=r"jaxq.training.linen.prepare\(module"):
            training.prepare(model, "int4")


def test_pact_needs_static_ranges():
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    for prepare in (
        lambda: training.prepare(model, "w8a8", ranges=training.pact()),
        lambda: training.prepare({"w": normal(4, 4)}, "int4", ranges=training.pact()),
        lambda: training.linen.prepare(None, None, "int4", ranges=training.pact()),
    ):
        with pytest.raises(ValueError, match=r"prepare: ranges=pact\(\).*w8a8_static"):
            prepare()


def test_unknown_ranges():
    with pytest.raises(TypeError, match="ranges must be 'dynamic'"):
        training.prepare({"w": normal(32, 8)}, "int4", ranges="lsq")


def test_only_prepared_models_convert():
    for model in (nnx.Linear(4, 4, rngs=nnx.Rngs(0)), {"w": normal(4, 4)}):
        with pytest.raises(ValueError, match="has no trained weight"):
            training.convert(model)


def test_floats_cannot_replace_a_trained_weight():
    qat = training.prepare(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), "int4")
    with pytest.raises(TypeError, match="expected a TrainedWeight"):
        qat.kernel.set_value(normal(32, 8))


@functools.cache
def prepared_tree():
    return training.prepare(
        {"w": normal(32, 8)}, "int4", ranges=training.lsq(initial="lsq")
    )


def test_initial_steps_of_the_paper():
    weight = prepared_tree()["w"]
    groups = np.abs(np.asarray(normal(32, 8), np.float64)).mean(0)
    expected = 2 * groups / np.sqrt(7)
    np.testing.assert_allclose(weight.scale[:, 0], expected, rtol=1e-6)
