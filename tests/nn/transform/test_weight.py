"""One weight: static ranges of its input, and the note on how its product runs."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq import (
    PerGroup,
    PerTensor,
    QuantSpec,
    Recipe,
    Rule,
    methods,
    observers,
    ops,
)
from jaxq.methods import _gptq, _rtn
from jaxq.nn.report import _product_notes
from jaxq.nn.transform import _weight
from tests.arrays import assert_same, normal

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


@pytest.fixture
def num_explained(monkeypatch):
    """A list that grows with each product whose plan the report asks for."""
    plans = []
    explain = ops.explain

    def counted(*args, **options):
        plans.append(explain(*args, **options))
        return plans[-1]

    monkeypatch.setattr(_product_notes.ops, "explain", counted)
    return plans


def test_the_plan_of_a_product_is_asked_for_once(num_explained):
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    spec = QuantSpec("int8", PerGroup(16))
    rule = Rule(weight=spec, activation=spec.replace(granularity=PerGroup(8)))
    _, report = jaxq.quantize_model(layer, Recipe([rule]))
    assert "computes in floats" in report.quantized[0].note
    assert len(num_explained) == 1


def test_a_method_that_falls_back_has_the_note_of_its_result():
    # Tables prevent a product of codes. The rounded weight has no tables.
    def solve(w, stats, spec, *, key):
        return methods.get("kmeans").solve(0.1 * w, stats, spec, key=key)

    bad = dataclasses.replace(
        methods.get("kmeans"), name="bad", solve=solve, options={}
    )
    methods.register(bad)
    try:
        rule = Rule(weight="int4", activation="int8", method="bad")
        reports = [
            jaxq.quantize_model(
                nnx.Linear(32, 8, rngs=nnx.Rngs(0)),
                Recipe([rule]),
                calibration=[normal(48, 32)],
                fallback=fallback,
            )[1]
            for fallback in ("none", "rtn")
        ]
    finally:
        methods.unregister("bad")
    kept, rounded = (report.quantized[0] for report in reports)
    assert "has its own codebook" in kept.note
    assert "codebook" not in rounded.note


@pytest.mark.parametrize("spec", ["int4", "nf4_dq", QuantSpec("int8", PerTensor())])
def test_gptq_rounds_a_weight_of_three_axes_once(spec, monkeypatch):
    shapes = []
    for module in (_weight, _gptq, _rtn):

        def counted(w, *args, quantize=module.quantize, **kwargs):
            # Tracers are shapes of a plan, or groups within the method.
            if not isinstance(w, jax.core.Tracer):
                shapes.append(w.shape)
            return quantize(w, *args, **kwargs)

        monkeypatch.setattr(module, "quantize", counted)
    layer = nnx.LinearGeneral(64, (4, 8), rngs=nnx.Rngs(0))
    kernel, x = layer.kernel[...], normal(48, 64)
    recipe = Recipe([Rule(weight=spec, method="gptq")])
    qlayer, report = jaxq.quantize_model(
        layer, recipe, calibration=[x], fallback="none"
    )
    assert shapes == [(64, 4, 8)]
    assert report.quantized[0].loss is not None  # it was compared with rounding
    # The rounded weight that the method took is that of the matrix.
    stats = jaxq.nn.calibrate(layer, [x], hessian=True)[""]
    solved = methods.solve("gptq", kernel.reshape(64, 32), stats, spec, fallback="none")
    assert_same(
        jaxq.dequantize(qlayer.kernel[...]),
        jaxq.dequantize(solved.qt).reshape(64, 4, 8),
    )


@pytest.mark.parametrize("preset", ["int4", "nf4_dq", "nvfp4", "uint4"])
@pytest.mark.parametrize(
    ("shape", "contracting", "batch"),
    [
        ((64, 2, 8), (-3,), ()),
        ((2, 32, 16), (-3, -2), ()),
        ((3, 64, 2, 8), (-3,), (0,)),
    ],
    ids=["heads", "heads contracted", "stack"],
)
def test_a_rounded_weight_has_the_numbers_of_its_matrix(
    preset, shape, contracting, batch
):
    w = normal(*shape)
    matrix = w.reshape(*shape[: len(batch)], 64, 16)
    nearest = jaxq.quantize(w, preset, contracting=contracting, batch=batch)
    expected = jaxq.quantize(matrix, preset, contracting=-2, batch=batch)
    assert_same(_weight._nearest_matrix(nearest, matrix), expected)
