"""Models that are quantized inside jit, or without numbers inside eval_shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from jaxq.models import Llama
from jaxq.nn import linen as jaxq_linen
from tests.arrays import assert_same, normal
from tests.nn.transform.test_by_method import CONFIG
from tests.tables import thinned


class Net(nnx.Module):
    """A convolution, an embedding, a norm and linear layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(32, 64, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.first = nnx.Linear(64, 96, rngs=rngs)
        self.second = nnx.Linear(96, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.second(self.first(self.norm(self.conv(self.table(tokens)))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(64)(linen.relu(linen.Dense(96)(x)))


class TwoLinears(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(32, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))


def quantized_net(recipe):
    model, report = jaxq.quantize_model(Net(), recipe)
    return nnx.state(model), report


def linen_variables():
    return LinenNet().init(jax.random.key(0), jnp.ones((1, 64)))


def quantized_linen(variables, recipe):
    return jaxq_linen.quantize_model(LinenNet(), variables, recipe)[1:]


PARAMS = {"a": {"kernel": normal(64, 96)}, "b": normal(96, 64, seed=1)}


def shapes_of(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def assert_abstract(shapes, concrete):
    """Shapes without numbers that have the structure of a concrete tree."""
    leaves = jax.tree.leaves(shapes)
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert jax.tree.structure(shapes) == jax.tree.structure(concrete)
    assert shapes_of(shapes) == shapes_of(concrete)


NEEDS_DATA = {"gptq", "awq", "adaround", "smoothquant"}
DATA_FREE = [
    name
    for name in jaxq.recipes.names()
    if not name.endswith(("static", "rotated", *NEEDS_DATA))
]
EVERY_DAY = [
    *(("int8", kind) for kind in ("nnx", "linen", "tree")),
    ("nf4_dq", "tree"),
    ("w4a8", "linen"),
]
MODELS = {
    "nnx": (lambda state, recipe: quantized_net(recipe), lambda: None),
    "linen": (quantized_linen, linen_variables),
    "tree": (jaxq.quantize_params, lambda: PARAMS),
}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    thinned(
        [(recipe, kind) for recipe in DATA_FREE for kind in MODELS],
        EVERY_DAY,
    ),
)
def test_abstract_and_jitted_results_are_those_of_a_model(recipe, kind):
    if recipe == "llm_int8" and kind == "nnx":
        pytest.skip("its method refuses convolutions")
    quantize, arrays = MODELS[kind]
    eager, eager_report = quantize(arrays(), recipe)
    shapes, report = jax.eval_shape(lambda a: quantize(a, recipe), arrays())
    assert_abstract(shapes, eager)
    jitted, jitted_report = jax.jit(lambda a: quantize(a, recipe))(arrays())
    assert_same(jitted, eager)
    assert report == jitted_report
    # Under jit, dicts are sorted.
    formats = {row.path: row.format for row in report.rows}
    assert formats == {row.path: row.format for row in eager_report.rows}
    assert report.bytes_after == eager_report.bytes_after


@pytest.mark.parametrize("recipe", ["w8a8_rotated", "equalize"])
def test_rotated_and_folded_models(recipe):
    if recipe == "equalize":
        rest = jaxq.Rule(weight="int8", method="equalize")
        recipe = jaxq.Recipe([*jaxq.recipes.get("int8").rules[:-1], rest])

    def quantized():
        model = Llama(CONFIG, rngs=nnx.Rngs(0))
        return nnx.state(jaxq.quantize_model(model, recipe)[0])

    assert_abstract(jax.eval_shape(quantized), quantized())


def test_nnx_transforms_return_a_quantized_model():
    eager, _ = jaxq.quantize_model(TwoLinears(), "w8a8")
    x = normal(4, 64)
    jitted, _ = nnx.jit(lambda model: jaxq.quantize_model(model, "w8a8"))(TwoLinears())
    np.testing.assert_array_equal(jitted(x), eager(x))
    shapes, _ = nnx.eval_shape(lambda: jaxq.quantize_model(TwoLinears(), "w8a8"))
    assert isinstance(shapes, TwoLinears)
    assert_abstract(nnx.state(shapes), nnx.state(eager))
    assert nnx.eval_shape(lambda m: m(x), shapes).shape == (4, 8)


@pytest.mark.parametrize("recipe", ["int8", "nf4_dq", "w8a8"])
def test_the_abstract_model_is_a_template_for_load(recipe, tmp_path):
    path = tmp_path / "weights.safetensors"
    qmodel, _ = jaxq.quantize_model(TwoLinears(), recipe)
    jaxq.save(path, qmodel)
    template, _ = nnx.eval_shape(lambda: jaxq.quantize_model(TwoLinears(), recipe))
    loaded = jaxq.load(path, into=template)
    # The treedefs differ: files do not have the names of weights.
    assert_same(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(qmodel)))
    x = normal(4, 64)
    np.testing.assert_array_equal(loaded(x), qmodel(x))
    wide, _ = nnx.eval_shape(lambda: jaxq.quantize_model(TwoLinears(), "fp8"))
    with pytest.raises(ValueError, match="first/kernel"):
        jaxq.load(path, into=wide)


@pytest.mark.parametrize("kind", ["linen", "tree"])
def test_abstract_variables_are_a_template_for_load(kind, tmp_path):
    quantize, arrays = MODELS[kind]
    path = tmp_path / "weights.safetensors"
    quantized, _ = quantize(arrays(), "w4a8")
    jaxq.save(path, quantized)
    template, _ = jax.eval_shape(lambda a: quantize(a, "w4a8"), arrays())
    loaded = jaxq.load(path, into=template)
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(quantized))


def test_an_abstract_model_is_prepared_and_converted():
    def converted():
        prepared = jaxq.training.prepare(TwoLinears(), "w8a8")
        return nnx.state(jaxq.training.convert(prepared)[0])

    assert_abstract(jax.eval_shape(converted), converted())


def test_the_report_says_what_was_not_measured():
    _, report = jax.eval_shape(lambda p: jaxq.quantize_params(p, "int8"), PARAMS)
    assert "no error was measured" in str(report)
    assert all(row.sqnr is None for row in report.rows)
    assert report.worst is None
    _, report = jaxq.quantize_params(PARAMS, "int8")
    assert "no error was measured" not in str(report)


def test_traced_weights_are_not_checked_for_nan():
    lost = {"w": jnp.full((64, 8), jnp.nan)}
    with pytest.raises(ValueError, match="non-finite"):
        jaxq.quantize_params(lost, "int8")
    qparams, _ = jax.jit(lambda p: jaxq.quantize_params(p, "int8"))(lost)
    assert np.isnan(jaxq.dequantize(qparams["w"])).all()


def test_donate_frees_no_traced_weight():
    quantize = jax.jit(lambda p: jaxq.quantize_params(p, "int8", donate=True)[0])
    assert_same(quantize(PARAMS), jaxq.quantize_params(PARAMS, "int8")[0])
    assert not PARAMS["b"].is_deleted()


X = normal(8, 64)


def calibrated_nnx(weights, x):
    model = TwoLinears()
    model.first.kernel.set_value(weights)
    return nnx.state(jaxq.quantize_model(model, "w8a8_static", calibration=[x])[0])


def calibrated_linen(weights, x):
    variables = {"params": {"Dense_0": {"kernel": weights, "bias": jnp.ones(32)}}}
    return jaxq_linen.quantize_model(
        linen.Sequential([linen.Dense(32, name="Dense_0")]),
        variables,
        "w8a8_static",
        calibration=[x],
    )[1]


def calibrated_tree(weights, x):
    return jaxq.quantize_params(
        {"w": weights},
        "w8a8_static",
        calibration=[x],
        forward=lambda params, x: x @ params["w"],
    )[0]


@pytest.mark.parametrize(
    "quantize", [calibrated_nnx, calibrated_linen, calibrated_tree]
)
def test_calibration_inside_jit_is_an_error(quantize):
    weights = normal(64, 32)
    with pytest.raises(ValueError, match="the weights are traced.*outside of jit"):
        jax.eval_shape(lambda w: quantize(w, X), weights)
    with pytest.raises(ValueError, match="the calibration data are traced"):
        jax.jit(lambda x: quantize(weights, x))(X)


def test_shapes_in_place_of_weights_are_an_error():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match="inside jax.eval_shape or nnx.eval_shape"):
        jaxq.quantize_params(shapes, "int8")
    with pytest.raises(TypeError, match="inside jax.eval_shape or nnx.eval_shape"):
        jaxq.quantize_model(nnx.eval_shape(TwoLinears), "int8")
    variables = jax.eval_shape(linen_variables)
    with pytest.raises(TypeError, match="inside jax.eval_shape or nnx.eval_shape"):
        jaxq_linen.quantize_model(LinenNet(), variables, "int8")
