"""low_precision and dot_general_cls: linen modules whose products are quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxq
from jaxq import training
from tests.arrays import assert_same, normal

X, TARGET = normal(4, 6, 16), normal(4, 6, 16, seed=1)
KEY = jax.random.key(0)


class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(32, (3,), name="conv")(x))
        x = linen.MultiHeadDotProductAttention(4, name="attention")(x, x)
        x = linen.relu(linen.Dense(32, name="up")(x))
        return linen.Dense(16, name="lm_head")(x)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(16, name="dense")(x)), None


class Stack(linen.Module):
    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0, "quant_stats": 0},
            split_rngs={"params": True, "low_precision": True},
            length=3,
        )
        return scanned(name="blocks")(x, None)[0]


def dense(recipe):
    """A Dense layer with the identity as kernel, in low precision."""
    module = linen.Dense(16, use_bias=False)
    variables = {"params": {"kernel": jnp.eye(16)}}
    return training.linen.low_precision(module, variables, recipe)


@pytest.mark.parametrize("recipe", ["int8", "fp8_delayed"])
def test_a_module_trains(recipe, standard_promotion):
    module = Model()
    variables = module.init(KEY, X)
    module, variables = training.linen.low_precision(module, variables, recipe)
    params = variables["params"]
    stats = {k: v for k, v in variables.items() if k == "quant_stats"}
    tx = optax.adam(1e-2)
    opt_state = tx.init(params)

    @jax.jit
    def train(params, stats, opt_state, key):
        def loss(params):
            y, changed = module.apply(
                {"params": params, **stats},
                X,
                rngs={"low_precision": key},
                mutable=["quant_stats"],
            )
            return jnp.mean((y - TARGET) ** 2), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), changed, opt_state, value

    losses = []
    for step in range(8):
        key = jax.random.fold_in(KEY, step)
        params, stats, opt_state, value = train(params, stats, opt_state, key)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    assert ("quant_stats" in stats) == (recipe == "fp8_delayed")
    assert "lm_head" not in stats.get("quant_stats", {})


def test_the_layers_compute_what_dot_general_computes():
    module, variables = dense("mxfp8")
    dot = training.dot_general("mxfp8")
    expected = dot(X, jnp.eye(16), (((2,), (0,)), ((), ())))
    np.testing.assert_array_equal(module.apply(variables, X), expected)
    assert_same(variables, {"params": {"kernel": jnp.eye(16)}})
    # Flax's own hook.
    layer = linen.Dense(16, use_bias=False, dot_general=dot)
    np.testing.assert_array_equal(layer.apply(variables, X), expected)


def test_random_numbers_come_from_the_stream():
    module, variables = dense("int8")
    dy = normal(4, 6, 16, seed=2)

    def gradient(**kwargs):
        return jax.grad(lambda x: jnp.sum(module.apply(variables, x, **kwargs) * dy))(X)

    first, again, other = (
        gradient(rngs={"low_precision": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2
    assert module.apply(variables, X).shape == X.shape  # the forward pass needs none
    with pytest.raises(ValueError, match="rngs={'low_precision': key}"):
        gradient()


def test_a_history_changes_only_if_its_collection_is_mutable():
    module, variables = dense("fp8_delayed")
    x = jnp.full((2, 16), 2.0)
    _, changed = module.apply(variables, x, mutable=["quant_stats"])
    assert float(changed["quant_stats"]["x_bound"]) == 2
    assert float(changed["quant_stats"]["w_bound"]) == 1
    variables = {"params": variables["params"], **changed}
    y = module.apply(variables, 4 * x)
    np.testing.assert_allclose(y, np.full((2, 16), 2.0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"has no 'x_largest'.*low_precision returned"):
        module.apply({"params": variables["params"]}, x)


def test_dot_general_cls_has_the_history_of_its_layer():
    cls = training.linen.dot_general_cls("fp8_delayed")
    layer = linen.Dense(8, dot_general_cls=cls)
    variables = layer.init(KEY, X)
    _, changed = layer.apply(variables, X, mutable=["quant_stats"])
    (stats,) = changed["quant_stats"].values()
    assert float(stats["x_bound"]) == float(jnp.max(jnp.abs(X)))
    assert float(variables["quant_stats"].popitem()[1]["x_bound"]) == 0
    layer = linen.Dense(8, dot_general_cls=training.linen.dot_general_cls("nvfp4"))
    rngs = {"params": KEY, "low_precision": KEY}
    assert layer.init_with_output(rngs, X)[0].shape == (4, 6, 8)


@pytest.mark.parametrize("recipe", ["int8", "fp8_delayed"])
def test_scanned_layers_have_their_own_state(recipe):
    module = Stack()
    variables = module.init(KEY, X)
    module, variables = training.linen.low_precision(
        module, variables, recipe, example=X
    )
    rngs = {"low_precision": KEY}

    @jax.jit
    @jax.grad
    def gradient(params):
        y, _ = module.apply(
            {**variables, "params": params}, X, rngs=rngs, mutable=["quant_stats"]
        )
        return jnp.mean((y - TARGET) ** 2)

    kernel = gradient(variables["params"])["blocks"]["dense"]["kernel"]
    exact = jax.grad(
        lambda params: jnp.mean((Stack().apply({"params": params}, X) - TARGET) ** 2)
    )(variables["params"])["blocks"]["dense"]["kernel"]
    assert 1e-3 < np.linalg.norm(kernel - exact) / np.linalg.norm(exact) < 0.15
    if recipe == "fp8_delayed":
        _, changed = module.apply(variables, X, mutable=["quant_stats"])
        stats = changed["quant_stats"]["blocks"]["dense"]
        assert stats["x_largest"].shape == (3, 1024)
        assert len(set(np.asarray(stats["x_bound"]).tolist())) == 3


def test_which_layers_are_changed():
    module = Model()
    variables = module.init(KEY, X)
    with pytest.raises(ValueError, match="matches no layer"):
        training.linen.low_precision(module, variables, "fp8", keep=("convs",))
    keep = ("conv", "attention/*", "up")
    with pytest.raises(ValueError, match="no layer is left"):
        training.linen.low_precision(module, variables, "fp8", keep=keep)
    fast, _ = training.linen.low_precision(module, variables, "fp8", keep=keep[:2])
    assert fast._jaxq_layers == {("up",)}
    with pytest.raises(TypeError, match="quantized already"):
        training.linen.low_precision(fast, variables, "fp8")
    module = linen.Einsum((16, 8), "btd,dh->bth")
    variables = module.init(KEY, X)
    with pytest.raises(ValueError, match="no low-precision product for linen's Einsum"):
        training.linen.low_precision(module, variables, "fp8", example=X)


def test_a_wrapped_module_can_be_a_part_of_another():
    inner, variables = dense("fp8")

    class Outer(linen.Module):
        inner: linen.Module

        def __call__(self, x):
            return self.inner(x)

    expected = inner.apply(variables, X)
    actual = Outer(inner).apply({"params": {"inner": variables["params"]}}, X)
    np.testing.assert_array_equal(actual, expected)
    assert (np.asarray(expected) != np.asarray(X)).any()
    assert isinstance(inner, jaxq.nn.linen.Quantized)
