"""Schedule: quantization that starts after some steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxq
from jaxq import training
from tests.arrays import assert_same, normal
from tests.training.models import Stack


def test_a_tree_switches_under_one_trace():
    schedule = training.Schedule(start=2)
    w, x = normal(32, 8), normal(4, 32, seed=1)
    params = training.prepare({"w": w}, "int4", schedule=schedule)

    @jax.jit
    def run(params, step):
        params = schedule.apply(params, step)
        return jax.value_and_grad(lambda params: (x @ params["w"]).sum())(params)

    results = [run(params, step) for step in range(4)]
    assert run._cache_size() == 1
    exact, rounded = (x @ w).sum(), (x @ jaxq.quantize(w, "int4")).sum()
    values = np.asarray([value for value, _ in results])
    np.testing.assert_allclose(values, [exact, exact, rounded, rounded], rtol=1e-5)
    # Below the start, all weights have a gradient, also those that would be clipped.
    np.testing.assert_allclose(
        results[0][1]["w"].floats, np.tile(x.sum(0)[:, None], 8), rtol=1e-5
    )


def test_a_scanned_model_switches():
    schedule = training.Schedule(start=1)
    model, x = Stack(nnx.Rngs(0)), normal(3, 32)
    qat = training.prepare(model, "w8a8", schedule=schedule)

    @nnx.jit
    def run(qat, step):
        schedule.apply(qat, step)
        return qat(x)

    np.testing.assert_allclose(run(qat, jnp.int32(0)), model(x), rtol=1e-5, atol=1e-6)
    qmodel, _ = jaxq.quantize_model(model, "w8a8")
    expected = nnx.jit(lambda model, x: model(x))(qmodel, x)
    np.testing.assert_array_equal(run(qat, jnp.int32(1)), expected)
    np.testing.assert_array_equal(qat.layers.kernel.switch[...], np.ones(4))


# Trained scales.

START = training.Schedule(start=2)
X, Y = normal(16, 32), normal(16, 8, seed=1)


def loss_of(y):
    return jnp.mean(jnp.square(y - Y))


def tree_run(recipe):
    params = {"w": normal(32, 8, seed=2) / 6}
    params = training.prepare(params, recipe, ranges=training.lsq(), schedule=START)

    @jax.jit
    def step(params, i):
        params = START.apply(params, i)
        grads = jax.grad(lambda params: loss_of(X @ params["w"]))(params)
        new_params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return params["w"], new_params

    for i in range(4):
        used, params = step(params, i)
        yield used, params["w"]
    assert step._cache_size() == 1


def linen_run(recipe):
    module = linen.Dense(8, use_bias=False)
    variables = module.init(jax.random.key(0), X)
    module, variables = training.linen.prepare(
        module, variables, recipe, ranges=training.lsq(), schedule=START
    )

    @jax.jit
    def step(params, i):
        params = START.apply(params, i)
        grads = jax.grad(lambda p: loss_of(module.apply({"params": p}, X)))(params)
        new_params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return params["kernel"], new_params

    params = variables["params"]
    for i in range(4):
        used, params = step(params, i)
        yield used, params["kernel"]


def nnx_run(recipe):
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    qat = training.prepare(model, recipe, ranges=training.lsq(), schedule=START)
    optimizer = nnx.Optimizer(qat, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(qat, optimizer, i):
        START.apply(qat, i)
        used = qat.kernel[...]
        grads = nnx.grad(lambda qat: loss_of(qat(X)))(qat)
        optimizer.update(qat, grads)
        return used

    for i in range(4):
        used = step(qat, optimizer, jnp.int32(i))
        yield used, qat.kernel[...]


def make_step_run(recipe):
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    qat = training.prepare(model, recipe, ranges=training.lsq(), schedule=START)
    step = jaxq.distillation.make_step(
        qat, None, optax.adam(1e-2), lambda y, target: loss_of(y)
    )
    state = step.init()
    for i in range(4):
        state = START.apply(state, i)
        used = step.student(state).kernel[...]
        state, _ = step(state, (X, Y))
        yield used, step.student(state).kernel[...]


def train_state_loss(apply, params):
    return loss_of(apply({"params": params}, X))


def train_state_run(recipe):
    module, variables = training.linen.prepare(
        linen.Dense(8),
        linen.Dense(8).init(jax.random.key(0), X),
        recipe,
        ranges=training.lsq(),
        schedule=START,
        example=X,
    )
    tx = optax.sgd(1e-3, momentum=0.9)
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)
    for i in range(4):
        moments = state.opt_state
        state = START.apply(state, i)
        # The moments have the structure of the trained weights, but they stay.
        assert_same(state.opt_state, moments)
        used = state.params["kernel"]
        loss = functools.partial(train_state_loss, state.apply_fn)
        grads = jax.grad(loss)(state.params)
        state = state.apply_gradients(grads=grads)
        training.check(state)
        yield used, state.params["kernel"]


RUNS = [
    (tree_run, "uint4"),
    (tree_run, "nvfp4"),
    (linen_run, "int8"),
    (train_state_run, "int8"),
    (nnx_run, "int8"),
    (make_step_run, "int8"),
]


@pytest.mark.parametrize(("run", "recipe"), RUNS)
def test_trained_scales_are_set_at_the_start(run, recipe, standard_promotion):
    (first, _), (_, _), (third, trained), (fourth, _) = run(recipe)
    # The step `start` uses the scales of its own floats.
    assert_same(third.quantize(), jaxq.quantize(third.floats, recipe))
    assert np.any(third.quantize().codes() != first.quantize().codes())
    # Later steps use the trained scales.
    assert_same(fourth, trained)
    assert np.any(np.asarray(fourth.fake_quant()) != third.fake_quant())
    assert [float(w.switch) for w in (first, third, fourth)] == [0, 1, 1]
    scale = fourth.scale if recipe != "nvfp4" else fourth.scale.floats
    computed = fourth.with_computed_steps().scale
    computed = computed if recipe != "nvfp4" else computed.floats
    assert np.any(np.asarray(scale) != computed)


def test_a_schedule_from_step_0_keeps_the_scales_of_the_method():
    layer, schedule = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), training.Schedule()
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", method="hqq")])
    qat = training.prepare(layer, recipe, ranges=training.lsq(), schedule=schedule)
    expected = qat.kernel[...]
    assert_same(schedule.apply(qat, 0).kernel[...], expected)


def test_states_of_a_folded_batch_norm():
    model = nnx.Sequential(
        nnx.Linear(32, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    )
    options = {"calibration": [X], "fold_batch_norm": True, "schedule": START}
    qat = training.prepare(model, "int4", **options)
    state = START.apply(nnx.state(qat), 2)
    nnx.update(qat, state)
    assert float(qat.layers[0].kernel.switch[...]) == 1
    qat = training.prepare(model, "int4", ranges=training.lsq(), **options)
    with pytest.raises(ValueError, match="layers/0/kernel follow from a batch norm"):
        START.apply(nnx.state(qat), 2)
    kernel = qat.layers[0].kernel
    kernel.floats.set_value(2 * kernel.floats[...])
    START.apply(qat, 2)
    weight = kernel[...]
    assert_same(weight.quantize(), jaxq.quantize(weight.floats, "int4"))


def test_bad_schedules():
    for bad in (-1, np.int32(-1)):
        with pytest.raises(ValueError, match="Schedule: start must be at least 0"):
            training.Schedule(start=bad)
    for bad in ("a", float("nan"), 1.5, True, None):
        with pytest.raises(TypeError, match="Schedule: start must be a whole number"):
            training.Schedule(start=bad)
    with pytest.raises(TypeError, match="Schedule: freeze must be a whole number"):
        training.Schedule(freeze=1.5)
    qat = training.prepare(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), "int4", schedule=START)
    with pytest.raises(ValueError, match=r"kernel has no switch.*all Variables"):
        START.apply(nnx.state(qat, nnx.Param), 0)
    for model in (
        {"w": X},
        nnx.state(qat, jaxq.nn.QuantStats),
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match="Schedule.apply: the model has no train"):
            START.apply(model, 0)
    params = training.prepare({"w": normal(32, 8)}, "int4")
    with pytest.raises(ValueError, match=r"w has no switch. Pass schedule="):
        training.Schedule(start=1).apply(params, 0)
