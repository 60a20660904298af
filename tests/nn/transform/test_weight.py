"""Static ranges of activations whose codes have a zero point or an offset."""

import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import PerTensor, QuantSpec, observers
from tests.arrays import normal

ZERO_POINT = QuantSpec("uint8", PerTensor(), symmetric=False)
OFFSET = QuantSpec("uint8", PerTensor(), offset="min")
W = normal(32, 16)


def recipe(activation, observer):
    rule = jaxq.Rule(weight="int8", activation=activation, observer=observer)
    return jaxq.Recipe([rule])


def nnx_output(x, activation, observer):
    layer = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = W
    qlayer, _ = jaxq.quantize_model(
        layer, recipe(activation, observer), calibration=[x]
    )
    return qlayer(x)


def linen_output(x, activation, observer):
    module, variables = linen.Dense(16, use_bias=False), {"params": {"kernel": W}}
    module, variables, _ = jaxq.nn.linen.quantize_model(
        module, variables, recipe(activation, observer), calibration=[x]
    )
    return module.apply(variables, x)


@pytest.mark.parametrize("output", [nnx_output, linen_output])
def test_negative_inputs_with_a_zero_point(output):
    for x in (normal(64, 32), -abs(normal(64, 32))):
        y = output(x, ZERO_POINT, "absmax")
        assert float(jaxq.metrics.sqnr(np.asarray(x) @ np.asarray(W), y)) > 35


@pytest.mark.parametrize("observer", ["absmax", observers.mse(), "minmax"])
def test_inputs_far_from_zero_with_an_offset(observer):
    x = 100 + normal(64, 32)
    y = np.asarray(nnx_output(x, OFFSET, observer), np.float64)
    # Without the common 100, so that the error is not hidden beside it.
    exact = np.asarray(x - 100, np.float64) @ np.asarray(W, np.float64)
    qt = jaxq.quantize(W, "int8")
    common = 100 * np.asarray(jaxq.dequantize(qt), np.float64).sum(0)
    assert float(jaxq.metrics.sqnr(exact, y - common)) > 35


@pytest.mark.parametrize("num_batches", [1, 2])
def test_mostly_zeros_are_not_called_zeros(num_batches):
    x = np.zeros((64, 32), np.float32)
    x[5, 3] = 2.0  # one of 2048 numbers
    layer = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
    qlayer, _ = jaxq.quantize_model(
        layer,
        recipe("int8", observers.percentile(99.9)),
        calibration=[x] * num_batches,
    )
    np.testing.assert_array_equal(qlayer.kernel[...].input_range, [-2, 2])


def test_inputs_without_a_range_are_refused():
    for activation, value in ((ZERO_POINT, 0), (OFFSET, 3)):
        text = "equal" if value else "zero"
        x = np.full((8, 32), value, np.float32)
        with pytest.raises(
            ValueError, match=f"inputs of this weight are {text}, so a static range"
        ):
            nnx_output(x, activation, "minmax")
    # A constant other than 0 has a range with a zero point.
    x = np.full((8, 32), 3, np.float32)
    y = nnx_output(x, ZERO_POINT, "minmax")
    assert float(jaxq.metrics.sqnr(x @ np.asarray(W), y)) > 30
