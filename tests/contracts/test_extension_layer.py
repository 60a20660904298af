"""A new kind of nnx layer is added in one file: this one.

`Gate` is a layer that jaxq does not know. Its record says where the weight is, which
axes are contracted, and which attribute holds the product. Everything else follows:
`quantize_model`, rules, the report, calibration and files.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.nn import LayerKind, QuantizedParam, Roles, register_layer, unregister_layer
from tests.arrays import assert_close, assert_same, normal


class Gate(nnx.Module):
    """Multiplies by a matrix `[in, 2 * out]`, and gates one half by the other."""

    def __init__(self, size, rngs):
        self.size = size
        self.matrix = nnx.Param(jax.random.normal(rngs.params(), (size, 2 * size)))
        self.product = jnp.matmul

    def __call__(self, x):
        value, gate = jnp.split(self.product(x, self.matrix[...]), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


def roles(layer):
    return Roles(contracting=(-2,), shape=(layer.size, 2 * layer.size))


def attach(layer):
    layer.product = jaxq.matmul


def problem(layer):
    return (
        None if layer.product in (jnp.matmul, jaxq.matmul) else "it has its own product"
    )


def read_rows(x, w):
    return x, 0


GATE = LayerKind(
    name="Gate",
    cls=Gate,
    weight="matrix",
    roles=roles,
    attach=attach,
    problem=problem,
    hook="product",
    read_rows=read_rows,
)


class Model(nnx.Module):
    def __init__(self):
        self.gate = Gate(64, nnx.Rngs(0))
        self.out = nnx.Linear(64, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(self.gate(x))


@pytest.fixture(autouse=True)
def registered():
    register_layer(GATE)
    yield
    unregister_layer("Gate")


def test_a_recipe_by_name_quantizes_it():
    model, x = Model(), normal(4, 64)
    qmodel, report = jaxq.quantize_model(model, "int8")
    assert isinstance(qmodel.gate.matrix, QuantizedParam)
    expected = jaxq.quantize(model.gate.matrix[...], "int8", contracting=(-2,))
    assert_same(qmodel.gate.matrix[...], expected)
    assert_close(qmodel(x), model(x), 0.05)
    assert_close(jax.jit(qmodel)(x), qmodel(x), 1e-6)
    row = next(row for row in report.rows if row.path == "gate/matrix")
    assert (row.kind, row.format, row.method) == ("Gate", "int8", "rtn")
    assert jaxq.nn.plan(model, "int8").bytes_after == report.bytes_after


def test_a_rule_can_name_its_kind():
    recipe = jaxq.Recipe([jaxq.Rule(weight="int4", kinds="Gate")])
    _, report = jaxq.quantize_model(Model(), recipe)
    assert [row.path for row in report.quantized] == ["gate/matrix"]


def test_calibration_sees_its_input():
    model, x = Model(), normal(16, 64)
    stats = jaxq.nn.calibrate(model, [x])
    assert list(stats) == ["gate", "out"]
    # Of two parts of eight rows, one row each is held out.
    rows = np.asarray(x)[np.arange(16) % 8 != 7]
    np.testing.assert_allclose(stats["gate"].absmax, abs(rows).max(0), rtol=1e-6)
    qmodel, report = jaxq.quantize_model(model, "w8a8_static", calibration=[x])
    assert report.rows[0].format == "int8 + int8 static"
    assert report.rows[0].note == ""
    low, high = qmodel.gate.matrix[...].input_range
    assert float(high) == -float(low) == pytest.approx(float(abs(x).max()), rel=0.01)
    qmodel, report = jaxq.quantize_model(model, "int4_gptq", calibration=[x])
    assert report.rows[0].kind == "Gate"


class Normed(nnx.Module):
    """A norm whose outputs a gate reads, so scales can be moved into the norm."""

    def __init__(self):
        self.norm = nnx.RMSNorm(64, rngs=nnx.Rngs(0))
        self.gate = Gate(64, nnx.Rngs(0))

    def __call__(self, x):
        return self.gate(self.norm(x))


class Group(NamedTuple):
    source: str = "norm"
    targets: tuple[str, ...] = ("gate",)
    kind: str = "norm"


def test_scales_can_be_moved_out_of_its_input():
    x = normal(64, 64).at[:, 3].multiply(50)
    moved = {}

    def fold(model, scales):
        moved.update(scales)
        model = nnx.clone(model)
        scale = scales["norm"]
        model.norm.scale.set_value(model.norm.scale[...] / scale)
        model.gate.matrix.set_value(model.gate.matrix[...] * scale[:, None])
        return model

    jaxq.nn.register_folding(Normed, lambda model: [Group()], fold)
    model = Normed()
    qmodel, report = jaxq.quantize_model(model, "w8a8_smoothquant", calibration=[x])
    row = next(row for row in report.rows if row.path == "gate/matrix")
    assert (row.kind, row.method) == ("Gate", "smoothquant")
    assert float(jnp.max(moved["norm"])) > 2 * float(jnp.min(moved["norm"]))
    assert_close(qmodel(x), model(x), 0.1)


def test_a_layer_without_a_bias_has_no_bias_to_correct():
    unregister_layer("Gate")
    register_layer(dataclasses.replace(GATE, corrects_bias=True))
    rule = jaxq.Rule("gate", weight="int4", correct_bias=True)
    _, report = jaxq.quantize_model(
        Model(), jaxq.Recipe([rule]), calibration=[normal(16, 64)]
    )
    assert report.quantized[0].note == "no bias to correct"


def test_at_the_top_of_a_model_it_may_be_an_output_head():
    class Classifier(nnx.Module):
        def __init__(self):
            self.body = Gate(64, nnx.Rngs(0))
            self.classifier = Gate(64, nnx.Rngs(1))

    _, report = jaxq.quantize_model(Classifier(), "int8")
    notes = {row.path: row.note for row in report.rows}
    assert [row.path for row in report.quantized] == ["body/matrix"]
    assert notes["classifier/matrix"] == "output head, left in floats by default"


def test_files_hold_it(tmp_path):
    qmodel, _ = jaxq.quantize_model(Model(), "int4")
    jaxq.save(tmp_path / "model", qmodel)
    loaded = jaxq.load(tmp_path / "model", into=Model())
    assert_same(nnx.state(loaded), nnx.state(qmodel))
    x = normal(4, 64)
    assert_same(loaded(x), qmodel(x))


def test_its_problem_is_named():
    model = Model()
    model.gate.product = lambda x, w: x @ w
    with pytest.raises(ValueError, match=r"gate \(Gate\): it has its own product"):
        jaxq.quantize_model(model, "int8")


def test_a_kind_is_registered_once_and_can_be_removed():
    with pytest.raises(ValueError, match="'Gate' exists already"):
        register_layer(GATE)
    unregister_layer("Gate")
    try:
        with pytest.raises(ValueError, match="kinds must be one of"):
            jaxq.Rule(weight="int4", kinds="Gate")
        with pytest.raises(ValueError, match="no layer kind 'Gate'"):
            unregister_layer("Gate")
        # Now the matrix belongs to a module that jaxq does not know.
        with pytest.raises(ValueError, match="gate/matrix"):
            jaxq.quantize_model(Model(), "int8")
    finally:
        register_layer(GATE)


def test_the_kind_of_a_subclass_comes_before_that_of_its_parent():
    class Half(Gate):
        def __call__(self, x):
            return super().__call__(x) / 2

    half = LayerKind("Half", Half, "matrix", roles, attach)
    register_layer(half)
    try:
        kind = jaxq.nn.layers.find_kind(Half(8, nnx.Rngs(0)))
        assert kind is half
        assert jaxq.nn.layers.find_kind(Gate(8, nnx.Rngs(0))) is GATE
    finally:
        unregister_layer("Half")
