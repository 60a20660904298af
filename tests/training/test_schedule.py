"""Schedule: quantization that starts after some steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import training
from tests.arrays import normal
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


def test_bad_schedules():
    with pytest.raises(ValueError, match="start must be at least 0"):
        training.Schedule(start=-1)
    params = training.prepare({"w": normal(32, 8)}, "int4")
    with pytest.raises(ValueError, match=r"w has no switch. Pass schedule="):
        training.Schedule(start=1).apply(params, 0)
