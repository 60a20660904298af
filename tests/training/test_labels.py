"""labels: weights, steps and switches for optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxq import training
from tests.arrays import normal


def test_labels_of_a_tree_and_of_a_model():
    schedule = training.Schedule(start=3)
    params = {"w": normal(32, 8), "b": jnp.zeros(8), "scale": jnp.ones(8)}
    qat = training.prepare(params, "int4", ranges=training.lsq(), schedule=schedule)
    labels = training.labels(qat)
    assert labels["b"] == labels["scale"] == "weight"
    weight = labels["w"]
    assert (weight.floats, weight.scale, weight.switch) == ("weight", "step", "switch")
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
