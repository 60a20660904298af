"""check: steps that training has ruined."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

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
        ValueError, match="kernel: input_range: 1 of 1 ranges are empty"
    ):
        training.check(qat)


def test_it_needs_values():
    qat = training.prepare({"w": normal(64, 8)}, "int4")
    with pytest.raises(TypeError, match="Call it outside jit"):
        jax.jit(training.check)(qat)
