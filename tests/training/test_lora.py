"""LoRA on float and quantized weights of flax nnx models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxq
from jaxq import training
from tests.arrays import assert_close, assert_same, normal
from tests.training.models import Stack

X = normal(4, 6, 64)
TARGET = normal(4, 6, 64, seed=1)
ADAPTERS = nnx.DiffState(0, nnx.LoRAParam)


class Model(nnx.Module):
    """One layer of each kind that can have an adapter."""

    def __init__(self, rngs, dtype=None):
        self.up = nnx.Linear(64, 128, dtype=dtype, rngs=rngs)
        self.heads = nnx.LinearGeneral(128, (2, 32), dtype=dtype, rngs=rngs)
        self.mix = nnx.Einsum("...hd,hde->...e", (2, 32, 64), dtype=dtype, rngs=rngs)
        self.lm_head = nnx.Linear(64, 64, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.lm_head(nnx.relu(self.mix(self.heads(nnx.gelu(self.up(x))))))


class Experts(nnx.Module):
    """A batch axis in a LinearGeneral, and one that is not in front in an einsum."""

    def __init__(self, rngs):
        self.first = nnx.LinearGeneral(
            64, 64, axis=-1, batch_axis={0: 4}, use_bias=False, rngs=rngs
        )
        self.second = nnx.Einsum("eti,ieo->eto", (64, 4, 64), rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x))


def loss_of(model, x=X, target=TARGET):
    y = model(x).astype(jnp.float32)
    return jnp.mean((y - target.astype(jnp.float32)) ** 2)


@nnx.jit
def train(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_of, argnums=ADAPTERS)(model)
    optimizer.update(model, grads)
    return loss


@functools.cache
def quantized(preset="nf4_dq", cls=Model):
    return jaxq.quantize_model(cls(nnx.Rngs(0)), preset)[0]


def contracted(qt):
    """The axes that the product with a QTensor contracts."""
    return qt.meta.geometry.contracted


def with_random_adapters(lora, scale=0.05):
    """A copy whose adapters are random numbers, so that they change the results."""
    lora = nnx.clone(lora)
    state = nnx.state(lora, nnx.LoRAParam)
    for seed, (_, param) in enumerate(nnx.to_flat_state(state)):
        value = param.get_value()
        numbers = scale * normal(*value.shape, seed=seed)
        param.set_value(numbers.astype(value.dtype))
    nnx.update(lora, state)
    return lora


def adapter_paths(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return ["/".join(map(str, path)) for path, _ in state]


@pytest.mark.parametrize("preset", [None, "int8", "nf4_dq", "w8a8"])
def test_a_new_adapter_changes_nothing(preset):
    model = Model(nnx.Rngs(0)) if preset is None else quantized(preset)
    lora = training.add_lora(model, rank=4)
    np.testing.assert_array_equal(lora(X), model(X))
    frozen = nnx.state(lora, nnx.Not(nnx.LoRAParam))
    assert_same(nnx.to_pure_dict(frozen), nnx.to_pure_dict(nnx.state(model)))


def test_which_layers_get_adapters():
    model = quantized()
    names = [
        path.rpartition("/")[0] for path in adapter_paths(training.add_lora(model))
    ]
    expected = ["heads/dot_general", "mix/einsum_op", "up/dot_general"]
    assert sorted({*names}) == expected
    head = training.add_lora(model, targets=("lm_head", "u*"))
    assert adapter_paths(head) == [
        "lm_head/dot_general/lora_a",
        "lm_head/dot_general/lora_b",
        "up/dot_general/lora_a",
        "up/dot_general/lora_b",
    ]
    assert adapter_paths(model) == []


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("cls", [Model, Experts])
def test_products_equal_those_of_the_merged_weight_in_float64(cls, dora):
    """The witness multiplies by W + s A B in numpy."""
    model = cls(nnx.Rngs(0))
    targets = ("up", "heads", "first") if dora else None
    targets = [t for t in targets if hasattr(model, t)] if targets else None
    lora = with_random_adapters(
        training.add_lora(model, rank=3, alpha=6, targets=targets, dora=dora)
    )
    x = normal(4, 6, 64)
    merged = nnx.clone(model)
    for path, layer in nnx.iter_modules(lora):
        if not hasattr(layer, "kernel"):
            continue
        name = "einsum_op" if isinstance(layer, nnx.Einsum) else "dot_general"
        product = getattr(layer, name)
        if not hasattr(product, "lora_a"):
            continue
        weight = np.asarray(layer.kernel[...], np.float64)
        a, b = (
            np.asarray(p[...], np.float64) for p in (product.lora_a, product.lora_b)
        )
        # Written out for each layer, without the code under test.
        subscripts = {
            "up": "ir,ro->io",
            "heads": "ir,rhd->ihd",
            "mix": "hdr,re->hde",
            "first": "eir,ero->eio",
            "second": "ir,reo->ieo",
        }[path[-1]]
        total = weight + 2 * np.einsum(subscripts, a, b)
        if dora:
            inside = 1 if path[-1] == "first" else 0
            norm = np.linalg.norm(total, axis=inside, keepdims=True)
            magnitude = np.asarray(product.magnitude[...], np.float64)
            total = total / norm * np.expand_dims(magnitude, inside)
        getattr(merged, path[-1]).kernel[...] = jnp.asarray(total, jnp.float32)
    assert_close(lora(x), merged(x), 1e-5)
    assert np.abs(lora(x) - model(x)).max() > 1e-2
    assert_close(training.merge_lora(lora)(x), merged(x), 1e-5)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dropout": 0.1}])
def test_training_changes_adapters_only(options, standard_promotion):
    lora = training.add_lora(quantized(), rank=4, **options)
    before = nnx.to_pure_dict(nnx.state(lora, nnx.Not((nnx.LoRAParam, nnx.RngState))))
    optimizer = nnx.Optimizer(lora, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = [float(train(lora, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    after = nnx.to_pure_dict(nnx.state(lora, nnx.Not((nnx.LoRAParam, nnx.RngState))))
    assert_same(after, before)
    # Adam has two moments for each adapter matrix, and a counter.
    moments = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
    num_adapters = len(adapter_paths(lora))
    assert len([leaf for leaf in moments if leaf.ndim]) == 2 * num_adapters


def test_gradients_equal_those_of_float_weights():
    """The witness is a float model with the dequantized weights."""
    lora = with_random_adapters(training.add_lora(quantized("int8"), rank=4))
    floats = nnx.clone(Model(nnx.Rngs(0)))
    for name in ("up", "heads", "mix"):
        qt = getattr(quantized("int8"), name).kernel[...]
        getattr(floats, name).kernel[...] = jaxq.dequantize(qt)
    reference = training.add_lora(floats, rank=4)
    nnx.update(reference, nnx.state(lora, nnx.LoRAParam))
    gradients = [
        nnx.to_pure_dict(nnx.grad(loss_of, argnums=ADAPTERS)(model))
        for model in (lora, reference)
    ]
    assert_close(*gradients, 1e-4)
    of_input = [jax.grad(lambda x, m=m: loss_of(m, x))(X) for m in (lora, reference)]
    assert_close(*of_input, 1e-4)


def test_scales():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    plain = training.add_lora(model, rank=4, alpha=32)
    stable = training.add_lora(model, rank=4, alpha=32, rslora=True)
    assert (plain.dot_general.scale, stable.dot_general.scale) == (8, 16)


def test_bfloat16_layers_keep_their_dtype():
    model = Model(nnx.Rngs(0), dtype=jnp.bfloat16)
    lora = with_random_adapters(training.add_lora(model, rank=4))
    assert lora.up.dot_general.lora_a[...].dtype == jnp.float32
    assert lora(X).dtype == jnp.bfloat16
    half = training.add_lora(model, rank=4, param_dtype=jnp.bfloat16)
    assert half.up.dot_general.lora_a[...].dtype == jnp.bfloat16


def test_dropout_differs_by_step_and_stops_in_eval_mode():
    model = training.add_lora(quantized(), rank=4, dropout=0.5)
    model = with_random_adapters(model, 1.0)
    first, second = model(X), model(X)
    assert (first != second).any()
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    plain = training.add_lora(quantized(), rank=4)
    nnx.update(plain, nnx.state(model, nnx.LoRAParam))
    np.testing.assert_array_equal(model(X), plain(X))


def test_dropout_keeps_the_mean():
    layer = nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0))
    lora = training.add_lora(layer, rank=4, dropout=0.25)
    lora = with_random_adapters(lora, 1.0)
    x = jnp.ones((40_000, 64))
    mean = jnp.mean(lora(x), axis=0)
    lora.eval()
    exact = lora(x)[0]
    spread = float(jnp.abs(exact).max())
    assert np.abs(mean - exact).max() < 0.02 * spread


def test_dropout_under_plain_jit_is_explained():
    lora = training.add_lora(quantized(), rank=4, dropout=0.5)
    with pytest.raises(ValueError, match="Use nnx.jit"):
        jax.jit(lambda x: lora(x))(X)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer above 0, got 0"),
        ({"alpha": -1}, ValueError, "alpha must be finite and above 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"targets": "down"}, ValueError, "'down' matches no layer that can have"),
        ({"targets": ()}, ValueError, "is empty"),
        ({"initial": "gaussian"}, TypeError, "initial must be"),
        ({"dora": True}, ValueError, "mix: jaxq has no DoRA for Einsum"),
    ],
)
def test_errors(change, error, text):
    with pytest.raises(error, match=text):
        training.add_lora(quantized(), **change)


def test_layers_of_other_kinds_are_left_out():
    model = nnx.Sequential(
        nnx.Conv(64, 64, (3,), rngs=nnx.Rngs(0)), nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    )
    lora = training.add_lora(model)
    names = ["layers/1/dot_general/lora_a", "layers/1/dot_general/lora_b"]
    assert adapter_paths(lora) == names
    with pytest.raises(ValueError, match="layers/0: jaxq has no adapter for Conv"):
        training.add_lora(model, targets="layers/0")


def test_layers_that_cannot_have_an_adapter():
    with pytest.raises(TypeError, match=r"use jaxq.training.linen.add_lora"):
        training.add_lora({"w": X})
    lora = training.add_lora(quantized(), targets="up")
    with pytest.raises(ValueError, match="up: it has an adapter already"):
        training.add_lora(lora)
    more = training.add_lora(lora, targets="heads")
    assert len(adapter_paths(more)) == 4
    conv = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model itself: jaxq has no adapter for"):
        training.add_lora(conv)
    qat = training.prepare(Model(nnx.Rngs(0)), "int4")
    with pytest.raises(ValueError, match="up: it is in quantization-aware training"):
        training.add_lora(qat)


def test_a_low_precision_product_keeps_its_recipe():
    float_model = Model(nnx.Rngs(0))
    fast = training.low_precision(float_model, "fp8")
    lora = training.add_lora(fast, rank=4)
    np.testing.assert_array_equal(lora(X), fast(X))
    merged = training.merge_lora(lora)
    np.testing.assert_array_equal(merged(X), fast(X))


# Stacks and shared layers.


def test_each_layer_of_a_stack_has_its_own_adapter():
    model = Stack(nnx.Rngs(0))
    qmodel, _ = jaxq.quantize_model(model, "nf4_dq")
    lora = training.add_lora(qmodel, rank=4, dropout=0.5)
    lora = with_random_adapters(lora, 0.3)
    product = lora.layers.dot_general
    assert product.lora_a.shape == (4, 32, 4)
    assert product.stream.key[...].shape == (4,)
    x = normal(2, 32)
    assert (lora(x) != lora(x)).any()  # the random streams advance
    lora.eval()
    y = x
    kernel = jaxq.dequantize(qmodel.layers.kernel[...])
    for layer in range(4):
        change = product.lora_a[...][layer] @ product.lora_b[...][layer]
        weight = kernel[layer] + 4 * change
        y = y + jnp.tanh(y @ weight + model.layers.bias[...][layer][None])
    assert_close(lora(x), y, 1e-5)
    assert_close(training.merge_lora(lora)(x), y, 1e-5)


def test_a_layer_in_two_places_has_one_adapter():
    layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer, nnx.relu, layer)
    lora = training.add_lora(model, rank=4)
    assert len(adapter_paths(lora)) == 2
    assert lora.layers[0] is lora.layers[2]


def test_layers_that_share_a_weight_have_their_own_adapters():
    first, second = (nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2))
    second.kernel = first.kernel
    model = nnx.Sequential(first, nnx.relu, second)
    qmodel, _ = jaxq.quantize_model(model, "int8")
    lora = with_random_adapters(training.add_lora(qmodel, rank=4))
    assert lora.layers[0].kernel is lora.layers[2].kernel
    merged = training.merge_lora(lora)
    assert_close(merged(X), lora(X), 1e-5)
    start = training.loftq(model)
    with pytest.raises(ValueError, match="other layers share its weight"):
        training.add_lora(qmodel, initial=start)


# Merging.


def test_merging_to_floats_returns_ordinary_layers():
    lora = with_random_adapters(training.add_lora(quantized(), targets="up"))
    merged = training.merge_lora(lora)
    assert isinstance(merged.up.kernel, nnx.Param)
    assert isinstance(merged.heads.kernel, jaxq.nn.QuantizedParam)
    assert_close(merged(X), lora(X), 1e-5)
    assert not adapter_paths(merged)
    with pytest.raises(ValueError, match="the model has no adapter"):
        training.merge_lora(merged)
    assert training.add_lora(merged, targets="up")(X).shape == X.shape
    # Without quantized layers, the merged model can be quantized as any float model.
    floats = training.merge_lora(training.add_lora(quantized()))
    again, _ = jaxq.quantize_model(floats, "int8")
    for name in ("up", "heads", "mix"):
        assert getattr(again, name).kernel[...].spec.fmt.name == "int8"


@pytest.mark.parametrize("preset", ["nf4_dq", "w8a8", "uint4"])
def test_merging_and_quantizing_again(preset):
    qmodel = quantized(preset)
    lora = with_random_adapters(training.add_lora(qmodel, rank=4))
    merged, report = training.merge_lora(lora, requantize=True)
    floats = training.merge_lora(lora)
    for name in ("up", "heads", "mix"):
        qt, old = (getattr(m, name).kernel[...] for m in (merged, qmodel))
        float_kernel = getattr(floats, name).kernel[...]
        assert jax.tree.structure(qt) == jax.tree.structure(old)
        assert_same(
            qt.codes(),
            jaxq.quantize(float_kernel, old.spec, contracting=contracted(old)).codes(),
        )
        row = next(row for row in report.quantized if row.path == f"{name}/kernel")
        error = jaxq.dequantize(qt) - float_kernel
        change = float_kernel - jaxq.dequantize(old)
        share = float(jnp.linalg.norm(error) / jnp.linalg.norm(change))
        assert f"rank 4; the error is {share:.2f} times" in row.note
        expected = 10 * np.log10(float((float_kernel**2).sum() / (error**2).sum()))
        assert row.sqnr == pytest.approx(expected, abs=0.01)
    untouched = [row for row in report.rows if row.path == "lm_head/kernel"]
    assert len(untouched) == 1
    lora = training.add_lora(floats)
    with pytest.raises(ValueError, match="these weights are floats: "):
        training.merge_lora(lora, requantize=True)
    _, report = training.merge_lora(lora, requantize="int8")
    assert {row.format for row in report.quantized} == {"int8"}


# Starts from the quantization error.


def test_loftq_reduces_the_error_of_the_weights():
    """The witness is the algorithm of the paper in numpy, with jaxq's codes."""
    model, rank = Model(nnx.Rngs(0)), 8
    qmodel = quantized("int3")
    start = training.loftq(model, steps=3)
    lora = training.add_lora(qmodel, rank=rank, alpha=4, initial=start)
    errors = []
    for name in ("up", "heads", "mix"):
        weight = np.asarray(getattr(model, name).kernel[...], np.float64)
        quantized_weight = getattr(qmodel, name).kernel[...]
        spec, contracting = quantized_weight.spec, contracted(quantized_weight)
        num_in = 64 if name != "heads" else 128
        low_rank = np.zeros_like(weight)
        for _ in range(3):
            qt = jaxq.quantize(
                jnp.asarray(weight - low_rank, jnp.float32),
                spec,
                contracting=contracting,
            )
            error = weight - np.asarray(jaxq.dequantize(qt), np.float64)
            errors.append(np.linalg.norm(error - low_rank))
            u, s, vt = np.linalg.svd(error.reshape(num_in, -1), full_matrices=False)
            low_rank = (u[:, :rank] * s[:rank] @ vt[:rank]).reshape(weight.shape)
        expected = np.asarray(jaxq.dequantize(qt), np.float64) + low_rank
        merged = training.merge_lora(lora)
        actual = np.asarray(getattr(merged, name).kernel[...], np.float64)
        # A weight at the middle of two codes may be rounded either way.
        far = np.abs(actual - expected) > 1e-3 * np.abs(expected).max()
        assert far.mean() < 0.01
        plain = jaxq.dequantize(getattr(qmodel, name).kernel[...])
        assert np.linalg.norm(actual - weight) < 0.9 * np.linalg.norm(plain - weight)


def test_lqer_keeps_the_codes_of_any_method():
    model = Model(nnx.Rngs(0))
    statistics = jaxq.nn.calibrate(model, [X], hessian=True)
    recipe = jaxq.Recipe([jaxq.Rule("**", weight="int3", method="gptq")])
    qmodel, _ = jaxq.quantize_model(model, recipe, calibration=statistics)
    lora = training.add_lora(qmodel, rank=8, initial=training.lqer(model))
    assert_same(lora.up.kernel[...].codes(), qmodel.up.kernel[...].codes())
    error = np.asarray(model.up.kernel[...] - jaxq.dequantize(qmodel.up.kernel[...]))
    left = error - np.asarray(lora.up.dot_general.delta())
    singular_values = np.linalg.svd(error.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(left), np.linalg.norm(singular_values[8:]), rtol=1e-4
    )


def test_lqer_with_statistics_is_the_best_for_independent_inputs():
    """The error of the outputs is that of the rows times the sizes of the inputs."""
    model = nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0))
    sizes = np.exp(normal(1, 64, seed=3))
    x = normal(4096, 64) * sizes
    qmodel, _ = jaxq.quantize_model(model, "int3")
    statistics = jaxq.nn.calibrate(model, [x])
    plain, weighted = (
        training.add_lora(qmodel, rank=8, initial=training.lqer(model, **options))
        for options in ({}, {"statistics": statistics})
    )
    test = normal(512, 64, seed=9) * sizes
    error = {
        name: float(jnp.linalg.norm(m(test) - model(test)))
        for name, m in {"q": qmodel, "plain": plain, "weighted": weighted}.items()
    }
    assert error["weighted"] < 0.97 * error["plain"] < error["q"]


def test_errors_of_starts():
    model, qmodel = Model(nnx.Rngs(0)), quantized("int3")
    with pytest.raises(ValueError, match="the model has no float weight"):
        training.loftq(nnx.Dropout(0.1))
    with pytest.raises(ValueError, match="steps must be an integer above 0"):
        training.loftq(model, steps=0)
    with pytest.raises(ValueError, match="has no layers mix, heads, up|no layers"):
        training.add_lora(qmodel, initial=training.lqer(model.lm_head))
    statistics = {"up": jaxq.nn.calibrate(model, [X])["up"]}
    start = training.lqer(model, statistics=statistics)
    with pytest.raises(ValueError, match="there are no statistics of"):
        training.add_lora(qmodel, initial=start)
