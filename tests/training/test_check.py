"""check: steps that training has ruined."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxq
from jaxq import Recipe, Rule, training
from tests.arrays import normal


def test_ruined_steps_are_named():
    params = {"up": {"w": normal(64, 8)}, "down": normal(64, 8, seed=1)}
    recipe = Recipe([Rule("down", weight="int8"), Rule(weight="int4_absmax")])
    qat = training.prepare(params, recipe, ranges=training.lsq())
    training.check(qat)
    scale = qat["up"]["w"].scale
    bad = scale.at[0, 0].set(0.0).at[1, 0].set(-scale[1, 0])
    qat["up"]["w"] = dataclasses.replace(qat["up"]["w"], scale=bad)
    floats = qat["down"].floats.at[3, 3].set(jnp.nan)
    qat["down"] = dataclasses.replace(qat["down"], floats=floats)
    with pytest.raises(ValueError, match="ruined") as error:
        training.check(qat)
    message = str(error.value)
    assert "down: floats: 1 of 512 numbers are NaN or infinite" in message
    assert f"up/w: scale: 1 of {scale.size} scales are zero" in message
    assert f"up/w: scale: 1 of {scale.size} scales are negative" in message


def test_scales_with_a_sign_may_be_negative():
    qat = training.prepare({"w": normal(64, 8)}, "int4", ranges=training.lsq())
    assert (qat["w"].scale < 0).any()
    training.check(qat)


def test_an_empty_range_of_a_layer():
    layer, x = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), normal(16, 32)
    ranges = training.lsq()
    qat = training.prepare(layer, "w8a8_static", ranges=ranges, calibration=[x])
    training.check(qat)
    qat.kernel.input_range.set_value(jnp.array([1.0, -1.0]))
    with pytest.raises(
        ValueError, match="kernel: input_range: 1 of 1 ranges are empty or crossed"
    ):
        training.check(qat)


def test_it_needs_values():
    qat = training.prepare({"w": normal(64, 8)}, "int4")
    with pytest.raises(TypeError, match="Call it outside jit"):
        jax.jit(training.check)(qat)


def test_codebooks_and_zero_points():
    params = {"ttq": normal(64, 8), "uint4": normal(64, 8, seed=1)}
    recipe = Recipe([Rule("ttq", weight="ttq"), Rule(weight="uint4")])
    qat = training.prepare(params, recipe, ranges=training.lsq())
    ttq, uint4 = qat["ttq"], qat["uint4"]
    # A zero point a little outside the format is clipped, and training goes on.
    near = dataclasses.replace(uint4, zero_point=uint4.zero_point.at[0].set(-3.0))
    training.check({**qat, "uint4": near})
    far = uint4.zero_point.at[0].set(-16.0).at[1].set(31.0)
    far = dataclasses.replace(uint4, zero_point=far)
    message = r"uint4: zero_point: 2 of 8 are far outside the range of uint4, 0 to 15"
    with pytest.raises(ValueError, match=message):
        training.check({**qat, "uint4": far})
    for codebook, message in (
        ([-1.0, 0.0, 0.0], "ttq: codebook: 1 of 2 values are zero"),
        ([0.0, 0.0, 0.0], "ttq: codebook: the entries of 1 of 1 are all equal"),
        ([-1.0, 0.0, jnp.nan], "ttq: codebook: 1 of 3 numbers are NaN or infinite"),
    ):
        codebook = jnp.asarray(codebook).reshape(ttq.codebook.shape)
        bad = dataclasses.replace(ttq, codebook=codebook)
        with pytest.raises(ValueError, match=message):
            training.check({**qat, "ttq": bad})


@pytest.mark.parametrize("recipe", ["int8", "nvfp4"])
def test_states(recipe, standard_promotion):
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    qat = training.prepare(layer, recipe, ranges=training.lsq())
    step = jaxq.distillation.make_step(
        qat, None, optax.adam(1e-4), lambda y, t: y.sum()
    )
    state, _ = step(step.init(), (normal(4, 32), normal(4, 8)))
    training.check(state)
    training.check(state.params)
    floats = state.params["kernel"]["floats"]
    floats.set_value(floats.get_value().at[0, 0].set(jnp.nan))
    for bad in (state, state.params):
        with pytest.raises(ValueError, match="kernel: floats: 1 of 256 numbers are"):
            training.check(bad)


def test_the_state_of_a_step_with_a_tree(standard_promotion):
    params = training.prepare({"w": normal(32, 8)}, "int8", ranges=training.lsq())
    student = (lambda params, x: x @ params["w"], params)
    step = jaxq.distillation.make_step(
        student, None, optax.adam(1e-2), lambda y, t: y.sum()
    )
    state, _ = step(step.init(), (normal(4, 32), normal(4, 8)))
    training.check(state)  # the moments of Adam may be negative


def test_a_model_without_trained_weights():
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    for model in ({"w": normal(4, 4)}, layer, nnx.state(layer)):
        with pytest.raises(ValueError, match=r"training.check: the model has no train"):
            training.check(model)
