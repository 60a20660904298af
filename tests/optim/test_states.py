"""Moments of optax states are chosen by field; all other leaves pass through."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxq import QTensor
from jaxq.optim import quantize_state
from tests import tables
from tests.arrays import assert_same, normal

# Adam in optax promotes dtypes silently.
pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (16, 256)
ADAM = {"mu": "dynamic8", "nu": "udynamic8"}
# name: (transformation, format of each quantized field)
KNOWN = {
    "adabelief": (optax.adabelief(0.01), ADAM),
    "adadelta": (optax.adadelta(0.1), {"e_g": "udynamic8", "e_x": "udynamic8"}),
    "adam": (optax.adam(0.01), ADAM),
    "adamax": (optax.adamax(0.01), ADAM),
    "adan": (optax.adan(0.01), {"m": "dynamic8", "v": "dynamic8", "n": "udynamic8"}),
    "ademamix": (contrib.ademamix(0.01), {"m1": "dynamic8", "nu": "udynamic8"}),
    "amsgrad": (optax.amsgrad(0.01), {**ADAM, "nu_max": "udynamic8"}),
    "dadapt": (
        contrib.dadapt_adamw(),
        {"exp_avg": "dynamic8", "exp_avg_sq": "udynamic8"},
    ),
    "lion": (optax.lion(0.01), {"mu": "dynamic8"}),
    "muon": (contrib.muon(0.01), {"mu": "dynamic8"}),
    "novograd": (optax.novograd(0.01), {"mu": "dynamic8"}),
    "prodigy": (contrib.prodigy(), {"exp_avg": "dynamic8", "exp_avg_sq": "udynamic8"}),
    "rmsprop": (optax.rmsprop(0.01, bias_correction=True), {"nu": "udynamic8"}),
    "rmsprop_plain": (optax.rmsprop(0.01), {"nu": "udynamic8"}),
    "sgd": (optax.sgd(0.01, momentum=0.9), {"trace": "dynamic8"}),
    "sophia": (contrib.sophia(0.01), {"mu": "dynamic8"}),
    "yogi": (optax.yogi(0.01), ADAM),
}
# These states hold no moment of the table, or only in a wrapped state.
OTHERS = {
    "adagrad": optax.adagrad(0.01),
    "centered rmsprop": optax.rmsprop(0.01, centered=True),
    "ema": optax.ema(0.9),
    "no state": optax.sgd(0.1),
    "lookahead": optax.lookahead(optax.sgd(0.1), 5, 0.5),
    "Momo": contrib.momo_adam(0.01),
    "masked": optax.masked(optax.adam(0.01), {"w": False}),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
    "schedule free": contrib.schedule_free(optax.sgd(0.1), 0.1),
}


def qtensors(state):
    """Name of the format of each QTensor by the field that holds it."""
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, QTensor)
    )
    return {
        path[-2].name: leaf.spec.fmt.name
        for path, leaf in leaves
        if isinstance(leaf, QTensor)
    }


def gradients(params, step):
    """Gradients of one sign in the mean, with noise."""
    return jax.tree.map(lambda p: p + normal(*p.shape, seed=step), params)


def updates_of(tx, num_steps):
    """All updates of a transformation for the same gradients."""
    params = {"w": normal(*SHAPE)}
    state, updates = tx.init(params), []
    for step in range(num_steps):
        new, state = tx.update(gradients(params, step), state, params)
        updates.append(new["w"])
    return updates, state


@pytest.mark.parametrize("name", KNOWN)
def test_moments_of_known_states_are_quantized_by_field(name):
    tx, formats = KNOWN[name]
    state = quantize_state(tx).init({"w": normal(*SHAPE)})
    assert qtensors(state) == formats


@pytest.mark.parametrize(
    "name",
    tables.thinned(
        [name for name in KNOWN if name != "sophia"],
        ("adam", "ademamix", "dadapt", "lion", "muon", "rmsprop_plain", "sgd"),
    ),
)
def test_updates_follow_those_of_floats(name):
    tx, _ = KNOWN[name]
    expected, _ = updates_of(tx, 4)
    actual, state = updates_of(quantize_state(tx), 4)
    np.testing.assert_array_equal(actual[0], expected[0])
    assert qtensors(state) == KNOWN[name][1]
    errors = [
        float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old))
        for new, old in zip(actual[1:], expected[1:], strict=True)
    ]
    # Lion's signs flip where its momentum is nearly 0.
    assert max(errors) < (0.3 if name == "lion" else 0.06), errors
    assert max(errors) > 0, "the moments were not quantized"


@pytest.mark.parametrize("name", OTHERS)
def test_other_leaves_pass_through(name):
    params = {"w": normal(*SHAPE)}
    if name == "lookahead":
        params = optax.LookaheadParams(params, params)
    expected = OTHERS[name].init(params)
    # `quantize_state` needs a moment to quantize.
    tx = optax.chain(optax.trace(0.9), OTHERS[name])
    trace, actual = quantize_state(tx).init(params)
    assert qtensors(trace)
    assert_same(actual, expected)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "masked"])
def test_transformations_without_moments(name):
    params = {"w": normal(*SHAPE)}
    if name == "lookahead":
        params = optax.LookaheadParams(params, params)
    with pytest.raises(ValueError, match=r"known states are .*AdamState.* by where="):
        quantize_state(OTHERS[name]).init(params)


class OwnState(NamedTuple):
    mu: Any
    nu: Any


def test_states_of_users_need_where():
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return OwnState(zeros, zeros)

    tx = optax.GradientTransformation(init, lambda grads, state, params: (grads, state))
    params = {"w": normal(*SHAPE)}
    with pytest.raises(ValueError, match="The leaves of this state are 'mu/w', 'nu/w'"):
        quantize_state(tx).init(params)
    assert qtensors(quantize_state(tx, where="mu/**").init(params)) == {
        "mu": "dynamic8"
    }
