"""Stochastic rounding of bfloat16 parameters keeps updates that nearest loses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxq.optim import adamw8bit, stochastic_rounding
from tests.arrays import assert_same, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")


def drift(tx, num_steps=50):
    """The mean change of parameters of 1 whose gradients are 1."""
    params = jnp.ones(4096, jnp.bfloat16)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jnp.ones_like(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    assert params.dtype == jnp.bfloat16
    return float(np.mean(np.asarray(params, np.float64))) - 1


def test_small_updates_are_kept_on_average():
    rate = 2e-4  # a tenth of half a step below 1
    assert drift(optax.sgd(rate)) == 0
    expected = -50 * rate
    # The standard error of 4096 sums of 50 roundings is 0.8 % of the distance.
    assert abs(drift(stochastic_rounding(optax.sgd(rate))) / expected - 1) < 0.04


def test_new_parameters_are_the_neighbours_of_the_exact_sum():
    params = normal(64, 64, dtype="bfloat16")
    tx = stochastic_rounding(optax.sgd(0.01))
    updates, state = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float32
    new = np.asarray(optax.apply_updates(params, updates), np.float64)
    exact = np.asarray(params, np.float64) * (1 - 0.01)
    # A step of bfloat16 is at most 2^-7 of a number.
    assert (np.abs(new - exact) <= 2**-7 * np.abs(exact) * 1.001).all()
    assert int(state.step) == 1


def test_each_step_and_seed_has_its_own_random_numbers():
    params = jnp.ones(4096, jnp.bfloat16)
    tx, other = (stochastic_rounding(optax.sgd(1e-3), seed=seed) for seed in (0, 1))
    first, state = tx.update(params, tx.init(params), params)
    second, _ = tx.update(params, state, params)
    third, _ = other.update(params, other.init(params), params)
    again, _ = tx.update(params, tx.init(params), params)
    assert (np.asarray(first) != np.asarray(second)).any()
    assert (np.asarray(first) != np.asarray(third)).any()
    assert_same(again, first)


def test_float32_parameters_are_not_changed():
    params = {"w": normal(64, 128), "frozen": None}
    tx = stochastic_rounding(optax.adam(0.01))
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = optax.adam(0.01).update(params, optax.adam(0.01).init(params), params)
    assert_same(updates, expected)


def test_masked_parameters_are_not_changed():
    params = {"w": normal(64, 128, dtype="bfloat16"), "frozen": jnp.ones(3)}
    inner = stochastic_rounding(optax.sgd(0.01))
    tx = optax.masked(inner, {"w": True, "frozen": False})
    grads = {"w": params["w"], "frozen": jnp.zeros(3)}
    updates, state = tx.update(grads, tx.init(params), params)
    expected, _ = inner.update(params["w"], inner.init(params["w"]), params["w"])
    assert_same(updates, {"w": expected, "frozen": grads["frozen"]})
    assert int(state.inner_state.step) == 1


def test_quantized_moments_of_bfloat16_parameters_are_computed_in_float32():
    tx = stochastic_rounding(adamw8bit(0.01))
    params = normal(64, 128, dtype="bfloat16")
    state = tx.init(params)
    assert state.inner_state[0].nu.dtype == jnp.float32
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params.dtype == jnp.bfloat16


def test_errors():
    tx = stochastic_rounding(optax.sgd(0.1))
    params = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"Call update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        stochastic_rounding(0.1)
