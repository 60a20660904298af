"""Batch norms that are trained together with the quantized kernels before them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxq
from tests.arrays import assert_close, assert_same, normal
from tests.nn.transform.test_batch_norm import ConvNet, in_float64, with_statistics


class Network(nnx.Module):
    """A linear layer with a batch norm, and a head: [b, 16] -> [b, 2]."""

    def __init__(self, **kwargs):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(16, 4, rngs=rngs, **kwargs)
        if self.linear.bias is not None:
            bias = normal(4, seed=5).astype(self.linear.bias.dtype)
            self.linear.bias.set_value(bias)
        self.norm = with_statistics(nnx.BatchNorm(4, momentum=0.9, rngs=rngs))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.linear(x))))


def hidden(model, x):
    return model.norm(model.linear(x))


def prepared(model, x, recipe="int8", **kwargs):
    return jaxq.training.prepare(
        model, recipe, calibration=[x], fold_batch_norm=True, **kwargs
    )


def rounded_to_int8(w):
    """Symmetric int8 with a float32 scale for each column: [in, out]."""
    w = np.asarray(w, np.float32)
    scale = np.max(np.abs(w), axis=0) * np.float32(1 / 127)
    return np.float64(np.rint(w * (np.float32(1) / scale))) * np.float64(scale)


def test_train_mode_is_that_of_the_paper():
    model, x = Network(), normal(32, 16)
    qat = prepared(model, x)
    y = hidden(qat, x)
    linear, norm = model.linear, model.norm
    factor = in_float64(norm.scale) / np.sqrt(in_float64(norm.var) + norm.epsilon)
    folded = rounded_to_int8(np.float32(linear.kernel[...]) * np.float32(factor))
    product = np.asarray(x, np.float64) @ folded / factor
    mean, var = product.mean(0), product.var(0)
    scaled = (product - mean) / np.sqrt(var + norm.epsilon) * in_float64(norm.scale)
    assert_close(y, scaled + in_float64(norm.bias), 1e-5)
    # The bias of the layer is in the running mean.
    old_mean = in_float64(norm.mean) - in_float64(linear.bias)
    assert_close(qat.norm.mean[...], 0.9 * old_mean + 0.1 * mean, 1e-5)
    assert_close(qat.norm.var[...], 0.9 * in_float64(norm.var) + 0.1 * var, 1e-5)


def test_gradients_are_those_of_the_straight_through_estimator():
    model, x = Network(), normal(32, 16)
    target = normal(32, 4, seed=1)
    qat = prepared(model, x)
    mean, var = qat.norm.mean[...][None], qat.norm.var[...][None]
    deviation = jnp.sqrt(var + qat.norm.epsilon)
    rounded = jnp.asarray(rounded_to_int8(qat.linear.kernel[...].floats), jnp.float32)

    def expected(kernel, scale, bias, is_train):
        scale, bias = scale[None], bias[None]
        folded = kernel * scale / deviation
        folded = folded + jax.lax.stop_gradient(rounded - folded)
        if not is_train:
            return x @ folded + bias - mean * scale / deviation
        product = x @ folded * deviation / scale
        centered = product - product.mean(0, keepdims=True)
        spread = jnp.mean(centered**2, 0, keepdims=True)
        spread = jnp.sqrt(spread + qat.norm.epsilon)
        return centered / spread * scale + bias

    for is_train in (False, True):
        qat.norm.use_running_average = not is_train
        own = nnx.grad(lambda qat: jnp.sum(hidden(qat, x) * target))(qat)
        wanted = jax.grad(
            lambda *args: jnp.sum(expected(*args, is_train) * target),  # noqa: B023
            argnums=(0, 1, 2),
        )(model.linear.kernel[...], model.norm.scale[...], model.norm.bias[...])
        kernel = own["linear"]["kernel"]
        norm = kernel["norm"]
        actual = kernel["floats"][...], norm["scale"][...], norm["bias"][...]
        for mine, other in zip(actual, wanted, strict=True):
            assert_close(mine, other, 1e-3)
            assert np.abs(other).max() > 0.1


def test_a_trained_network_computes_what_it_becomes(standard_promotion):
    model, x = ConvNet(), normal(8, 5, 5, 3)
    qat = prepared(model, x, "w8a8")
    start = jax.tree.map(jnp.copy, nnx.state(qat))
    optimizer = nnx.Optimizer(qat, optax.adam(1e-2), wrt=nnx.Param)
    num_traces = 0

    @nnx.jit
    def step(qat, optimizer, x):
        nonlocal num_traces
        num_traces += 1
        loss, grads = nnx.value_and_grad(lambda qat: jnp.mean((qat(x) - 1) ** 2))(qat)
        optimizer.update(qat, grads)
        return loss

    losses = [float(step(qat, optimizer, x)) for _ in range(4)]
    assert num_traces == 1
    assert losses[-1] < losses[0]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), start, nnx.state(qat))
    assert all(jax.tree.leaves(changed))

    qat.eval()
    qmodel, report = jaxq.training.convert(qat)
    assert_same(qmodel(x), qat(x))
    assert len(report.quantized) == 3
    assert not any("norm" in row.path for row in report.rows)
    assert isinstance(qmodel.conv_norm, jaxq.nn.FoldedBatchNorm)
    run = nnx.jit(lambda model, x: model(x))
    assert_same(run(qmodel, x), run(qat, x))


def test_folding_rounds_alike_with_and_without_jit():
    # The compiler could replace a division by a product, or round a product and a sum
    # only once. Many numbers would change.
    norm = with_statistics(nnx.BatchNorm(4096, rngs=nnx.Rngs(0)))
    layer = nnx.Linear(1, 4096, rngs=nnx.Rngs(0))
    norm = jaxq.nn.TrainedBatchNorm.of(norm, layer, jnp.float32)

    def folded(norm):
        return norm.factor(), norm.folded_bias()

    assert_same(nnx.jit(folded)(norm), folded(norm))


def test_the_start_is_the_folded_model_quantized():
    model, x = Network(), normal(64, 16)
    folded = jaxq.nn.fold_batch_norm(model, x)
    qmodel, _ = jaxq.quantize_model(folded, "int4_gptq", calibration=[x])
    qat = prepared(model, x, "int4_gptq", ranges=jaxq.training.lsq())
    converted, _ = jaxq.training.convert(qat)
    assert_same(converted.linear.kernel[...].codes(), qmodel.linear.kernel[...].codes())
    assert_close(converted(x), qmodel(x), 1e-6)
    # GPTQ moves some floats. The others are those of the model to the bit.
    is_same = qat.linear.kernel.floats[...] == model.linear.kernel[...]
    assert 0.2 < float(is_same.mean()) < 1


def test_a_corrected_bias_is_in_the_batch_norm():
    model, x = Network(), 2 + normal(64, 16)
    rule = jaxq.Rule("linear", weight="int2", correct_bias=True)
    recipe = jaxq.Recipe([rule, jaxq.Rule("**", skip=True)])
    folded = jaxq.nn.fold_batch_norm(model, x)
    qmodel, _ = jaxq.quantize_model(folded, recipe, calibration=[x])
    assert jnp.abs(qmodel.linear.bias[...] - folded.linear.bias[...]).max() > 0.01
    qat = prepared(model, x, recipe)
    qat.eval()
    assert_close(qat(x), qmodel(x), 1e-5)


def test_bfloat16(standard_promotion):
    model, x = Network(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), normal(32, 16)
    qat = prepared(model, x)
    for _ in range(2):
        y = hidden(qat, x)
    assert y.dtype == hidden(model, x).dtype == jnp.float32
    assert_close(y, hidden(model, x), 0.03)
    qat.eval()
    qmodel, _ = jaxq.training.convert(qat)
    assert qmodel.linear.bias[...].dtype == jnp.bfloat16
    assert_same(qmodel(x), qat(x))


def test_a_float_layer_keeps_its_batch_norm():
    model, x = ConvNet(), normal(4, 5, 5, 3)
    recipe = jaxq.Recipe([jaxq.Rule("conv", skip=True), jaxq.Rule("**", weight="int8")])
    qat = prepared(model, x, recipe)
    assert_same(nnx.state(qat.conv), nnx.state(model.conv))
    assert_same(nnx.state(qat.conv_norm), nnx.state(model.conv_norm))
    assert type(qat.conv_norm) is nnx.BatchNorm
    qat.eval()
    qmodel, _ = jaxq.training.convert(qat)
    assert type(qmodel.conv_norm) is nnx.BatchNorm
    assert_same(qmodel(x), qat(x))


def test_a_prepared_model_is_prepared_again():
    model, x = Network(), normal(32, 16)
    qat = prepared(model, x)
    again = prepared(qat, x, "int4")
    assert again.linear.kernel[...].spec.fmt.name == "int4"
    assert_same(again.linear.kernel.floats[...], model.linear.kernel[...])
    assert_same(nnx.state(again.norm), nnx.state(qat.norm))
    # Without folding, the batch norm is an ordinary one of the same function.
    unfolded = jaxq.training.prepare(qat, "int8")
    assert type(unfolded.norm) is nnx.BatchNorm
    model.eval()
    unfolded.eval()
    assert_close(unfolded(x), model(x), 0.03)


def test_the_other_functions_of_training_take_the_model():
    model, x = Network(), normal(32, 16)
    schedule = jaxq.training.Schedule(start=2)
    qat = prepared(model, x, ranges=jaxq.training.lsq(), schedule=schedule)
    qat.eval()
    model.eval()
    schedule.apply(qat, 1)
    assert_close(qat(x), model(x), 1e-5)
    schedule.apply(qat, 2)
    assert_same(qat.linear.kernel.floats[...], model.linear.kernel[...])
    assert jnp.abs(qat(x) - model(x)).max() > 0
    jaxq.training.check(qat)
    labels = jaxq.training.labels(nnx.state(qat, nnx.Param))
    # A kernel and its scales, a batch norm, and the head in floats.
    assert sorted(jax.tree.leaves(labels)) == ["step", *["weight"] * 5]


def test_a_scale_of_zero_leaves_zero():
    model, x = Network(), normal(32, 16)
    model.norm.scale.set_value(jnp.zeros(4))
    qat = prepared(model, x)
    grads = nnx.grad(lambda qat: jnp.sum(hidden(qat, x) ** 3))(qat)
    assert bool(jnp.isfinite(hidden(qat, x)).all())
    scale = grads["linear"]["kernel"]["norm"]["scale"]
    assert float(jnp.abs(scale[...]).min()) > 0


def test_bad_arguments():
    x = normal(8, 16)
    with pytest.raises(ValueError, match=r"Pass calibration=\[batch\]"):
        jaxq.training.prepare(Network(), "int8", fold_batch_norm=True)
    with pytest.raises(TypeError, match="needs a flax nnx Module, got dict"):
        jaxq.training.prepare({"w": normal(8, 8)}, "int8", fold_batch_norm=True)
    with pytest.raises(ValueError, match="match no batch norm"):
        jaxq.training.prepare(
            Network(), "int8", calibration=[x], fold_batch_norm=["linear"]
        )
