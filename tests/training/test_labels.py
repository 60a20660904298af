"""labels: weights, steps and constants for optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxq import Recipe, Rule, training
from tests.arrays import normal


def test_labels_of_a_tree_and_of_a_model():
    schedule = training.Schedule(start=3)
    params = {"w": normal(32, 8), "b": jnp.zeros(8), "scale": jnp.ones(8)}
    qat = training.prepare(params, "int4", ranges=training.lsq(), schedule=schedule)
    labels = training.labels(qat)
    assert labels["b"] == labels["scale"] == "weight"
    weight = labels["w"]
    labels_of_weight = (weight.floats, weight.scale, weight.switch)
    assert labels_of_weight == ("weight", "step", "constant")
    model = training.prepare(
        nnx.Linear(32, 8, rngs=nnx.Rngs(0)), "int4", ranges=training.lsq()
    )
    state = nnx.state(model, nnx.Param)
    expected = {"bias": "weight", "kernel": {"floats": "weight", "scale": "step"}}
    assert nnx.to_pure_dict(training.labels(state)) == expected
    assert nnx.to_pure_dict(training.labels(nnx.as_pure(state))) == expected


def test_steps_have_a_learning_rate_of_their_own(standard_promotion):
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    qat = training.prepare(model, "int4", ranges=training.lsq())
    scale, floats = qat.kernel.scale[...], qat.kernel.floats[...]
    tx = optax.multi_transform(
        {"weight": optax.sgd(1e-3), "step": optax.set_to_zero()}, training.labels
    )
    optimizer = nnx.Optimizer(qat, tx, wrt=nnx.Param)
    for _ in range(3):
        grads = nnx.grad(lambda qat: (qat(jnp.ones((2, 32))) ** 2).sum())(qat)
        optimizer.update(qat, grads)
    np.testing.assert_array_equal(qat.kernel.scale[...], scale)
    assert np.mean(qat.kernel.floats[...] != floats) > 0.8
    leaves = jax.tree.leaves(nnx.state(qat, nnx.Param))
    assert len(leaves) == 3


def test_constants_of_a_tree(standard_promotion):
    """Static ranges are constants with "dynamic", and steps with lsq()."""
    x = normal(40, 32, seed=1)
    recipe = Recipe([Rule(weight="int4", activation="int8", observer="absmax")])
    options = {"calibration": [x], "forward": lambda params, x: x @ params["w"]}
    for ranges, expected in (("dynamic", "constant"), (training.lsq(), "step")):
        params = {"w": normal(32, 8)}
        params = training.prepare(params, recipe, ranges=ranges, **options)
        weight = dataclasses.replace(params["w"], input_scale=jnp.ones(32))
        params = {"w": weight}
        labels = training.labels(params)
        assert (labels["w"].input_range, labels["w"].input_scale) == (
            expected,
            "constant",
        )
        transforms = {
            "weight": optax.adamw(1e-2, weight_decay=0.5),
            "step": optax.adam(1e-2),
            "constant": optax.set_to_zero(),
        }
        tx = optax.multi_transform(transforms, training.labels)
        grads = jax.grad(lambda params: (x @ params["w"]).sum())(params)
        assert not np.any(grads["w"].input_scale)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert not np.any(updates["w"].input_scale)
        assert np.any(updates["w"].input_range) == (expected == "step")
        assert np.all(updates["w"].floats)


def test_constants_of_a_state():
    x = normal(40, 32, seed=1)
    for ranges, expected in (("dynamic", "constant"), (training.lsq(), "step")):
        qat = training.prepare(
            nnx.Linear(32, 8, rngs=nnx.Rngs(0)),
            "w8a8_static",
            ranges=ranges,
            calibration=[x],
        )
        labels = nnx.to_pure_dict(training.labels(nnx.state(qat)))
        assert labels["kernel"]["input_range"] == expected


def test_floats_of_a_float_model():
    """Only trained weights have steps. The name "floats" alone means nothing."""
    params = {"floats": jnp.ones(3), "scale": jnp.ones(3), "kernel": jnp.ones(3)}
    assert set(training.labels({"block": params})["block"].values()) == {"weight"}

    class Named(nnx.Module):
        def __init__(self):
            self.floats = nnx.Param(jnp.ones(3))
            self.scale = nnx.Param(jnp.ones(3))

    labels = nnx.to_pure_dict(training.labels(nnx.state(Named())))
    assert labels == {"floats": "weight", "scale": "weight"}
