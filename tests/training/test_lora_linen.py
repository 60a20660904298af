"""LoRA on float and quantized linen modules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxq
from jaxq.training import linen as training
from tests.arrays import assert_close, assert_same, normal

X = normal(4, 64)
TARGET = normal(4, 64, seed=1)


class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(128, name="up")(x))
        x = linen.DenseGeneral((2, 32), name="heads")(x)
        x = linen.DenseGeneral(64, axis=(-2, -1), name="down")(x)
        return linen.Dense(64, name="lm_head")(linen.LayerNorm()(x))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(64, name="up")(x)), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        layers = linen.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


def model_of(cls=Model, preset=None):
    module = cls()
    variables = module.init(jax.random.key(0), X)
    if preset is None:
        return module, variables
    return jaxq.nn.linen.quantize_model(module, variables, preset)[:2]


def with_random_adapters(variables):
    adapters, frozen = training.partition_lora(variables)
    leaves, treedef = jax.tree.flatten(adapters)
    leaves = [0.2 * normal(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return jaxq.combine(jax.tree.unflatten(treedef, leaves), frozen)


def float_kernel(layer):
    kernel = layer["kernel"]
    is_quantized = isinstance(kernel, jaxq.QTensor)
    kernel = jaxq.dequantize(kernel) if is_quantized else kernel
    return np.asarray(kernel, np.float64)


@pytest.mark.parametrize("preset", [None, "nf4_dq"])
def test_outputs_are_those_of_the_sum_of_weights_in_float64(preset):
    base, frozen = model_of(preset=preset)
    module, variables = training.add_lora(base, frozen, rank=4, alpha=8)
    np.testing.assert_array_equal(module.apply(variables, X), base.apply(frozen, X))
    assert "lora_a" not in variables["params"]["lm_head"]
    variables = with_random_adapters(variables)
    witness = jax.tree.map(lambda a: a, model_of()[1])
    # Written out for each layer, without the code under test.
    products = {"up": "ir,ro->io", "heads": "ir,rhd->ihd", "down": "hdr,re->hde"}
    for name, subscripts in products.items():
        layer = variables["params"][name]
        a, b = (np.asarray(layer[n], np.float64) for n in ("lora_a", "lora_b"))
        total = float_kernel(layer) + 2 * np.einsum(subscripts, a, b)
        witness["params"][name]["kernel"] = jnp.asarray(total, jnp.float32)
    expected = Model().apply(witness, X)
    assert_close(module.apply(variables, X), expected, 1e-5)
    merged, merged_variables = training.merge_lora(module, variables)
    assert type(merged) is Model
    assert_close(merged.apply(merged_variables, X), expected, 1e-5)


def test_each_layer_of_a_scan_has_its_own_adapter():
    base, frozen = model_of(Scanned, "int8")
    module, variables = training.add_lora(base, frozen, rank=4)
    variables = with_random_adapters(variables)
    layer = variables["params"]["layers"]["up"]
    assert layer["lora_a"].shape == (3, 64, 4)
    weights = float_kernel(layer) + 4 * np.asarray(layer["lora_a"] @ layer["lora_b"])
    y = np.asarray(X, np.float64)
    for weight, bias in zip(weights, np.asarray(layer["bias"]), strict=True):
        y = y + np.tanh(y @ weight + bias)
    assert_close(module.apply(variables, X), y.astype(np.float32), 1e-5)


def test_training_changes_adapters_only(standard_promotion):
    module, variables = training.add_lora(*model_of(preset="nf4_dq"), targets="up")
    adapters, frozen = training.partition_lora(variables)
    tx = optax.adam(1e-2)
    state = tx.init(adapters)
    # Two moments for A and for B, and the counter.
    assert len(jax.tree.leaves(state)) == 5

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            y = module.apply(jaxq.combine(adapters, frozen), X)
            return jnp.mean((y - TARGET) ** 2)

        value, grads = jax.value_and_grad(loss)(adapters)
        changes, state = tx.update(grads, state)
        return optax.apply_updates(adapters, changes), state, value

    losses = []
    for _ in range(10):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    after = training.partition_lora(jaxq.combine(adapters, frozen))[1]
    assert_same(after, frozen)
    # Layers without an adapter stay quantized after merging.
    merged, merged_variables = training.merge_lora(
        module, jaxq.combine(adapters, frozen)
    )
    assert isinstance(merged_variables["params"]["heads"]["kernel"], jaxq.QTensor)
    trained = module.apply(jaxq.combine(adapters, frozen), X)
    assert_close(merged.apply(merged_variables, X), trained, 1e-5)


def test_the_mask_is_true_for_adapters():
    _, variables = training.add_lora(*model_of(preset="int8"), targets="up")
    flat, _ = jax.tree_util.tree_flatten_with_path(training.lora_mask(variables))
    names = [jax.tree_util.keystr(path) for path, is_adapter in flat if is_adapter]
    assert names == ["['params']['up']['lora_a']", "['params']['up']['lora_b']"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rank": 0}, "rank must be an integer above 0"),
        ({"targets": "nothing"}, "'nothing' matches no layer"),
    ],
)
def test_errors(change, text):
    with pytest.raises(ValueError, match=text):
        training.add_lora(*model_of(), **change)


def test_modules_that_cannot_have_adapters():
    conv = linen.Conv(4, (3,))
    x = jnp.ones((1, 8, 4))
    with pytest.raises(ValueError, match="the module: jaxq has no adapter for linen's"):
        training.add_lora(conv, conv.init(jax.random.key(0), x), example=x)
    with pytest.raises(TypeError, match="LoRAModule cannot have adapters"):
        training.add_lora(*training.add_lora(*model_of()))
    with pytest.raises(TypeError, match="module must come from"):
        training.merge_lora(*model_of())
