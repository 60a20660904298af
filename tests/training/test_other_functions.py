"""Functions of other rooms that get a prepared model: the right value, or a remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from tests.arrays import assert_same, normal


def prepared_tree(recipe="nvfp4"):
    params = {"up": {"w": normal(64, 8)}, "b": jnp.ones(8)}
    return jaxq.training.prepare(params, recipe, ranges=jaxq.training.lsq())


def prepared_model(recipe="nvfp4"):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    return jaxq.training.prepare(model, recipe, ranges=jaxq.training.lsq())


@pytest.mark.parametrize("prepared", [prepared_tree, prepared_model])
def test_quantizing_again_names_the_remedy(prepared):
    model = prepared()
    quantize = (
        jaxq.quantize_params if prepared is prepared_tree else jaxq.quantize_model
    )
    for function in (quantize, jaxq.nn.plan):
        with pytest.raises(ValueError, match="(up/w|kernel).*jaxq.training.convert"):
            function(model, "int8")


def test_dequantize_params_gives_floats_with_gradients():
    params = prepared_tree("int4")
    values = jaxq.dequantize_params(params)
    assert_same(values["up"]["w"], params["up"]["w"].fake_quant())
    assert_same(values["b"], params["b"])
    half = jaxq.dequantize_params(params, dtype="bfloat16")["up"]["w"]
    assert_same(half, values["up"]["w"].astype(jnp.bfloat16))

    def loss(params):
        return (jnp.ones((1, 64)) @ jaxq.dequantize_params(params)["up"]["w"]).sum()

    gradients = jax.jit(jax.grad(loss))(params)["up"]["w"]
    assert np.any(gradients.floats)
    assert np.any(gradients.scale)


def test_a_tree_can_be_saved(tmp_path):
    params = prepared_tree()
    path = tmp_path / "params.safetensors"
    jaxq.save(path, params)
    other = jax.tree.map(jnp.zeros_like, params)
    assert_same(jaxq.load(path, into=other), params)
    quantized, _ = jaxq.training.convert(params)
    jaxq.save(tmp_path / "quantized.safetensors", quantized)
    loaded = jaxq.load(tmp_path / "quantized.safetensors")
    assert_same(loaded["up"]["w"], params["up"]["w"].quantize())


def test_a_prepared_module_can_be_saved(tmp_path):
    qat, x = prepared_model(), normal(2, 64)
    path = tmp_path / "qat.safetensors"
    jaxq.save(path, qat)
    zeros = prepared_model()
    nnx.update(zeros, jax.tree.map(jnp.zeros_like, nnx.state(zeros)))
    assert_same(jaxq.load(path, into=zeros)(x), qat(x))


def test_scales_of_scales_are_trained_too():
    """One nested weight: its label is "step", and `check` and `convert` see it."""
    params = prepared_tree()
    labels = jaxq.training.labels(params)["up"]["w"]
    assert (labels.floats, labels.scale.floats, labels.scale.scale) == (
        "weight",
        "step",
        "step",
    )
    qat, x = prepared_model(), normal(2, 64)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(qat))}
    assert {"kernel/floats", "kernel/scale/floats", "kernel/scale/scale"} <= names
    jaxq.training.check(qat)
    qmodel, report = jaxq.training.convert(qat)
    assert_same(qmodel(x), qat(x))
    assert [row.path for row in report.quantized] == ["kernel"]
    qat.kernel.scale.scale.set_value(
        jnp.full_like(qat.kernel.scale.scale[...], jnp.nan)
    )
    with pytest.raises(ValueError, match="kernel: scale.scale: 1 of 1 numbers are NaN"):
        jaxq.training.check(qat)


def test_the_scales_of_lsq_of_a_weight_with_quantized_scales():
    params = {"w": normal(64, 8)}
    ranges = jaxq.training.lsq(initial="lsq")
    w = jaxq.training.prepare(params, "nvfp4", ranges=ranges)["w"]
    blocks = np.abs(np.asarray(params["w"])).reshape(4, 16, 8)
    expected = 2 * blocks.mean(1).T / np.sqrt(6)
    np.testing.assert_allclose(w.scale.floats, expected, rtol=1e-5)
    stored = jaxq.qtensor.scale_values(w.quantize())
    np.testing.assert_allclose(stored, expected, rtol=1 / 15)
