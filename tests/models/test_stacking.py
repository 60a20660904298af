"""A list of layers and a stack of them are one model."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.methods import hadamard
from jaxq.models import rotate, stacked, unrolled
from tests.models.test_decoder import make, tokens
from tests.models.test_scale_groups import run, state


def assert_same_model(a, b):
    a, b = nnx.split(a), nnx.split(b)
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_there_and_back():
    model = rotate(
        make(scan_layers=True), np.eye(32, dtype=np.float32), online=hadamard
    )
    before, logits = state(model), np.asarray(run(model, tokens()))
    one_by_one = unrolled(model)
    assert (len(one_by_one.layers), one_by_one.config.scan_layers) == (2, False)
    np.testing.assert_allclose(
        run(one_by_one, tokens()), logits, atol=1e-5 * abs(logits).max()
    )
    assert_same_model(stacked(one_by_one), model)
    assert_same_model(unrolled(stacked(one_by_one)), one_by_one)
    for path, value in state(model).items():  # left as it is
        np.testing.assert_array_equal(value, before[path])


def test_as_they_are_made():
    model = make()
    assert_same_model(unrolled(model), model)
    assert unrolled(model) is not model
    assert_same_model(stacked(make(scan_layers=True)), make(scan_layers=True))


def test_calibrated_in_a_list_and_run_in_a_stack():
    model = make(scan_layers=True)
    observed = jaxq.observers.absmax()
    recipe = jaxq.Recipe(
        [jaxq.Rule("**/down_proj", weight="int8", activation="int8", observer=observed)]
    )
    quantized, _ = jaxq.quantize_model(unrolled(model), recipe, calibration=[tokens()])
    logits = np.asarray(run(quantized, tokens()))
    together = stacked(quantized)
    assert together.layers.mlp.down_proj.kernel.get_value().batch_shape == (2,)
    np.testing.assert_allclose(
        run(together, tokens()), logits, atol=1e-2 * abs(logits).max()
    )
    assert_same_model(unrolled(together), quantized)


def test_layers_of_two_kinds_stay_in_a_list():
    recipe = jaxq.Recipe([jaxq.Rule("layers/1/mlp/*", weight="int8")])
    quantized, _ = jaxq.quantize_model(make(), recipe)
    with pytest.raises(
        ValueError,
        match=r"layers/1 differs from layers/0 in mlp/down_proj/kernel",
    ):
        stacked(quantized)


def test_layers_without_scales_get_factors_of_one():
    """A method may keep scales at run time in some of the layers only."""
    model, recipe = make(), jaxq.Recipe([jaxq.Rule("**/o_proj", weight="int8")])
    quantized, _ = jaxq.quantize_model(model, recipe)
    kernel = quantized.layers[0].self_attn.o_proj.kernel
    channels = kernel[...].meta.geometry.contracted_size
    factors = np.linspace(0.5, 2, channels, dtype=np.float32)
    kernel.set_value(kernel[...].with_input_scale(factors))
    stack = stacked(quantized)
    scales = stack.layers.self_attn.o_proj.kernel[...].input_scale
    np.testing.assert_array_equal(scales, [factors, np.ones(channels)])
    logits = np.asarray(run(quantized, tokens()))
    np.testing.assert_allclose(
        run(stack, tokens()), logits, atol=1e-5 * abs(logits).max()
    )
