"""Shorthands take the arguments of optax and pass each one on."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxq
from jaxq import optim
from tests import tables
from tests.arrays import normal

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHORTHANDS = {
    "adam8bit": (optax.adam, 8),
    "adamw8bit": (optax.adamw, 8),
    "adamw4bit": (optax.adamw, 4),
    "lion8bit": (optax.lion, 8),
    "momentum8bit": (optax.sgd, 8),
    "muon8bit": (contrib.muon, 8),
}


@pytest.mark.parametrize("name", SHORTHANDS)
def test_arguments_and_defaults_are_those_of_optax(name):
    factory, _ = SHORTHANDS[name]
    expected = inspect.signature(factory).parameters
    actual = inspect.signature(getattr(optim, name)).parameters
    assert list(actual) == list(expected)
    # SGD of optax has no momentum by default. The coefficients of Muon have a name.
    own = {"momentum", "ns_coeffs"}
    for argument, parameter in actual.items():
        assert parameter.kind == expected[argument].kind
        assert argument in own or parameter.default == expected[argument].default


@pytest.mark.parametrize("name", SHORTHANDS)
def test_first_update_is_that_of_optax_and_moments_are_quantized(name):
    factory, bits = SHORTHANDS[name]
    arguments = {"learning_rate": 0.02}
    if "b1" in inspect.signature(factory).parameters:
        arguments |= {"b1": 0.8, "b2": 0.95}
    if "weight_decay" in inspect.signature(factory).parameters:
        arguments |= {"weight_decay": 0.1}
    tx = getattr(optim, name)(**arguments)
    if name == "momentum8bit":
        arguments["momentum"] = 0.9
    wide = factory(**arguments)
    params, grads = {"w": normal(16, 256)}, {"w": normal(16, 256, seed=1)}
    state = tx.init(params)
    actual, state = tx.update(grads, state, params)
    expected, _ = wide.update(grads, wide.init(params), params)
    np.testing.assert_array_equal(actual["w"], expected["w"])
    moments = [
        leaf
        for leaf in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, jaxq.QTensor)
        )
        if isinstance(leaf, jaxq.QTensor)
    ]
    assert moments
    assert all(moment.spec.fmt.bits == bits for moment in moments)


def test_sgd_without_momentum_has_nothing_to_quantize():
    with pytest.raises(ValueError, match="momentum8bit: momentum is None"):
        optim.momentum8bit(0.1, momentum=None)


@pytest.mark.parametrize(
    "name", tables.thinned(SHORTHANDS, ("adamw8bit", "adamw4bit", "muon8bit"))
)
def test_hyperparameters_can_be_injected(name):
    if name == "muon8bit":
        static = ("ns_steps",)
    else:
        static = ()
    tx = optax.inject_hyperparams(getattr(optim, name), static_args=static)(
        learning_rate=0.02
    )
    params = {"w": normal(16, 256)}
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert jnp.isfinite(updates["w"]).all()
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.02)
