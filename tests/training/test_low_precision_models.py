"""low_precision: models of flax nnx whose products are quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxq
from jaxq import training
from jaxq.nn import QuantStats
from tests.arrays import assert_close, assert_same, normal

X, TARGET = normal(4, 6, 16), normal(4, 6, 16, seed=1)


class Model(nnx.Module):
    """One layer of each kind, with a head."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(16, 32, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, rngs=rngs, decode=False)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (32, 4, 8), rngs=rngs)
        self.down = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)
        self.lm_head = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = self.attention(x)
        return self.lm_head(nnx.relu(self.down(self.einsum(x))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.linear(x))


def loss_of(model):
    return jnp.mean((model(X) - TARGET) ** 2)


@nnx.jit
def train(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss, grads


def products(model):
    """The low-precision products of a model, by path."""
    kind = training._low_precision_layers.LowPrecisionProduct
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, kind)
    }


@pytest.mark.parametrize(
    ("cls", "recipe"), [(Model, "fp8_delayed"), (Block, "int8"), (Block, "nvfp4")]
)
def test_a_model_trains(cls, recipe, standard_promotion):
    model = training.low_precision(cls(nnx.Rngs(0)), recipe)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(train(model, optimizer)[0]) for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]


def test_which_layers_are_changed():
    float_model = Model(nnx.Rngs(0))
    model = training.low_precision(float_model, "fp8")
    assert list(products(model)) == [
        "attention/key/dot_general",
        "attention/out/dot_general",
        "attention/query/dot_general",
        "attention/value/dot_general",
        "conv/conv_general_dilated",
        "down/dot_general",
        "einsum/einsum_op",
    ]
    assert not products(float_model)
    kept = training.low_precision(float_model, "fp8", keep=("attention/*", "conv"))
    assert list(products(kept)) == ["down/dot_general", "einsum/einsum_op"]
    every = training.low_precision(float_model, "fp8", keep_defaults=False)
    assert "lm_head/dot_general" in products(every)


def test_gradients_are_near_those_of_the_float_model():
    float_model = Model(nnx.Rngs(0))
    exact = nnx.state(nnx.grad(loss_of)(float_model))
    model = training.low_precision(float_model, "fp8")
    actual = nnx.state(nnx.grad(loss_of)(model), nnx.Param)
    # All gradients together: that of the keys' bias is 0 but for rounding.
    actual, exact = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])
        for state in (actual, exact)
    )
    error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
    assert 0.005 < error < 0.15


def test_a_layer_computes_what_dot_general_computes():
    layer = nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0))
    dot = training.dot_general("mxfp8")
    expected = dot(X, layer.kernel[...], (((2,), (0,)), ((), ())))
    np.testing.assert_array_equal(training.low_precision(layer, "mxfp8")(X), expected)


def test_parameters_and_optimizer_states_do_not_change():
    float_model = Model(nnx.Rngs(0))
    model = training.low_precision(float_model, "fp8_delayed")
    assert_same(nnx.state(model, nnx.Param), nnx.state(float_model, nnx.Param))
    states = [
        nnx.Optimizer(m, optax.adam(1e-3), wrt=nnx.Param).opt_state
        for m in (model, float_model)
    ]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(s)] for s in states]
    assert shapes[0] == shapes[1]
    assert len(jax.tree.leaves(nnx.state(model, QuantStats))) == 4 * 7


# Random numbers.


def gradient_of_input(layer, dy):
    """dx of a layer whose kernel is the identity: the rounded dy."""
    return nnx.grad(lambda x, layer: jnp.sum(layer(x) * dy))(jnp.ones_like(dy), layer)


def test_random_numbers_differ_for_each_layer_and_step():
    model = nnx.Sequential(*[nnx.Linear(32, 32, rngs=nnx.Rngs(0)) for _ in range(2)])
    for layer in model.layers:
        layer.kernel[...] = jnp.eye(32)
    model = training.low_precision(model, "int8")
    dy = normal(16, 32)
    run = nnx.jit(gradient_of_input)
    draws = [run(layer, dy) for _ in range(2) for layer in model.layers]
    for i in range(4):
        for j in range(i):
            assert (draws[i] != draws[j]).mean() > 0.2
    assert model.layers[0].dot_general.stream.count[...] == 2
    model.eval()
    np.testing.assert_array_equal(run(model.layers[0], dy), run(model.layers[0], dy))
    assert model.layers[0].dot_general.stream.count[...] == 2


def test_the_key_determines_the_random_numbers():
    layer = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    dy = normal(16, 32)
    first, again, other = (
        gradient_of_input(
            training.low_precision(layer, "int8", key=jax.random.key(seed)), dy
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# Delayed scaling.


def delayed(**fields):
    recipe = training.low_precision_recipes()["fp8_delayed"]
    return training.LowPrecision(
        recipe.forward,
        recipe.input_gradient,
        recipe.weight_gradient,
        training.DelayedScaling(**fields),
    )


def test_the_history_of_a_layer():
    layer = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer = training.low_precision(layer, delayed(length=3))
    product = layer.dot_general
    for amax in (1.0, 4.0, 2.0):
        layer(jnp.full((2, 4), amax))
    assert product.x_largest[...].tolist() == [2, 4, 1]
    assert float(product.x_bound[...]) == 4
    layer.eval()
    layer(jnp.full((2, 4), 8.0))
    assert product.x_largest[...].tolist() == [2, 4, 1]


@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e-6])
def test_the_first_step_does_not_saturate(factor):
    layer = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] *= factor
    y = training.low_precision(layer, "fp8_delayed")(X)
    exact = X @ layer.kernel[...][None]
    assert np.linalg.norm(y - exact) < 0.05 * np.linalg.norm(exact)
    assert_same(y, training.low_precision(layer, "fp8")(X))


def test_a_later_step_clips_to_the_bound():
    layer = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.eye(4)
    layer = training.low_precision(layer, "fp8_delayed")
    layer(jnp.ones((2, 4)))
    y = layer(jnp.full((2, 4), 3.0))
    np.testing.assert_allclose(y, np.ones((2, 4)), rtol=1e-6)


# Transformations.


class Stack(nnx.Module):
    """Three blocks that are scanned, or called one after the other."""

    def __init__(self, is_scanned, rngs):
        self.is_scanned = is_scanned

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def scanned(x, block):
            return block(x)

        return scanned(x, self.blocks)


@pytest.mark.parametrize("recipe", ["int8", "fp8_delayed"])
def test_scanned_layers_are_those_of_a_list(recipe):
    stack = training.low_precision(Stack(True, nnx.Rngs(0)), recipe)
    graph, state = nnx.split(stack.blocks)
    layers = [
        nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        for i in range(3)
    ]

    def unrolled(layers):
        x = X
        for layer in layers:
            x = layer(x)
        return jnp.mean((x - TARGET) ** 2)

    expected = nnx.grad(unrolled)(layers)
    actual = nnx.grad(loss_of)(stack)
    for i in range(3):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(actual.blocks))
        assert_close(part, nnx.state(expected[i]), 1e-4)
    if recipe == "fp8_delayed":
        product = stack.blocks.linear.dot_general
        assert product.x_largest.shape == (3, 1024)
        bounds = [float(layer.linear.dot_general.x_bound[...]) for layer in layers]
        np.testing.assert_allclose(product.x_bound[...], bounds, rtol=1e-6)
    else:
        assert stack.blocks.linear.dot_general.stream.count[...].tolist() == [1, 1, 1]


# Attention.


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_without_rounding_is_that_of_flax(is_causal):
    """A recipe of float products shows that only the rounding differs."""
    floats = training.ProductSpec(None, None)
    recipe = training.LowPrecision(floats, floats, floats)
    layer = nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), decode=False)
    fast = training.low_precision(layer, recipe, attention=True)
    mask = jnp.ones((4, 1, 6, 6), bool).at[..., 4:].set(False)
    if is_causal:
        mask &= jnp.tril(jnp.ones((6, 6), bool))[None, None]
    run = nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(m(X, mask=mask) ** 2)))
    actual, expected = run(fast), run(layer)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    gradients = (nnx.state(actual[1], nnx.Param), nnx.state(expected[1]))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_attention_products_are_quantized():
    layer = nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), decode=False)
    paths = ("query", "key", "value", "out")
    fast = training.low_precision(layer, "int8", attention=True, keep=paths)
    assert list(products(fast)) == ["attention_fn"]
    error = np.linalg.norm(fast(X) - layer(X)) / np.linalg.norm(layer(X))
    assert 1e-4 < error < 0.03
    assert fast.attention_fn.stream.count[...] == 1
    with pytest.raises(ValueError, match="without delayed scaling"):
        training.low_precision(layer, "fp8_delayed", attention=True)
    with pytest.raises(ValueError, match=r"no nnx.MultiHeadAttention"):
        training.low_precision(Block(nnx.Rngs(0)), "fp8", attention=True)


# Meshes.


SHARDINGS = {
    "data": (PartitionSpec("a"), PartitionSpec()),
    "fsdp": (PartitionSpec("a"), PartitionSpec("a")),
    "tensor": (PartitionSpec(), PartitionSpec(None, "a")),
    "tensor, contracted": (PartitionSpec(None, None, "a"), PartitionSpec("a")),
}


@pytest.mark.parametrize(
    ("recipe", "name", "axis_type"),
    [
        ("int8", "fsdp", "Auto"),
        ("int8", "tensor, contracted", "Explicit"),
        ("fp8_delayed", "data", "Explicit"),
        ("fp8_delayed", "tensor, contracted", "Auto"),
        ("nvfp4", "tensor", "Auto"),
    ],
)
def test_sharded_training_is_that_of_one_device(recipe, name, axis_type):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    layer = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, x):
        def loss(layer, x):
            return jnp.mean(layer(x).astype(jnp.float32) ** 2)

        return nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)

    single = training.low_precision(layer, recipe)
    expected = [step(single, X) for _ in range(2)][-1]
    axis_type = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(axis_type,))
    x_spec, w_spec = SHARDINGS[name]
    sharded = training.low_precision(layer, recipe)
    with jax.set_mesh(mesh):
        kernel = sharded.kernel[...]
        sharded.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, w_spec)))
        x = jax.device_put(X, NamedSharding(mesh, x_spec))
        actual = [step(sharded, x) for _ in range(2)][-1]
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    histories = [nnx.state(m, QuantStats) for m in (sharded, single)]
    assert_same(*[jax.tree.map(np.asarray, history) for history in histories])


# Convolutions.


def conv_products(recipe, groups, x, w, dy):
    """(y, dx, dw) of a convolution by a recipe."""
    product = functools.partial(
        training._low_precision_conv.convolve_arrays,
        recipe,
        window_strides=(2,),
        padding=((1, 1),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
        key=jax.random.key(0),
    )
    y, pull_back = jax.vjp(product, x, w)
    return y, *pull_back(dy)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp8"])
def test_convolutions_are_those_of_the_quantized_operands(name, groups):
    recipe = training.low_precision_recipes()[name]
    if name == "int8":  # with rounding to nearest, to compare
        spec = recipe.forward.lhs
        product = training.ProductSpec(spec, spec)
        recipe = training.LowPrecision(product, product, product)
    x, w = normal(3, 9, 8), normal(3, 8 // groups, 12)
    dy = normal(3, 5, 12, seed=2)

    def rounded(a, spec, kept):
        moved = jnp.moveaxis(a, kept, 0).reshape(a.shape[kept], -1)
        qt = jaxq.quantize(moved, spec, contracting=-1)
        values = jaxq.dequantize(qt).reshape(jnp.moveaxis(a, kept, 0).shape)
        return jnp.moveaxis(values, 0, kept)

    def exact(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (2,),
            ((1, 1),),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
            precision=jax.lax.Precision.HIGHEST,
        )

    forward = recipe.forward
    back, weight = recipe.input_gradient, recipe.weight_gradient
    expected = (
        exact(rounded(x, forward.lhs, 0), rounded(w, forward.rhs, 2)),
        jax.vjp(lambda x: exact(x, rounded(w, back.rhs, 1)), x)[1](
            rounded(dy, back.lhs, 0)
        )[0],
        jax.vjp(lambda w: exact(rounded(x, weight.lhs, 2), w), w)[1](
            rounded(dy, weight.rhs, 2)
        )[0],
    )
    assert_close(conv_products(recipe, groups, x, w, dy), expected, 1e-5)


# Errors.


def test_errors_name_what_is_wrong():
    model = Model(nnx.Rngs(0))
    with pytest.raises(TypeError, match="jaxq.training.linen.low_precision"):
        training.low_precision({"w": jnp.eye(4)}, "fp8")
    with pytest.raises(ValueError, match=r"keep='atention' matches no layer.*conv"):
        training.low_precision(model, "fp8", keep=("atention",))
    with pytest.raises(ValueError, match="no layer is left"):
        training.low_precision(model, "fp8", keep=("**",))
    fast = training.low_precision(model, "fp8")
    with pytest.raises(ValueError, match="conv: it is in low precision already"):
        training.low_precision(fast, "int8")
    quantized, _ = jaxq.quantize_model(model, "int8")
    with pytest.raises(ValueError, match="its weight is quantized"):
        training.low_precision(quantized, "int8")
    with pytest.raises(ValueError, match="ConvTranspose"):
        training.low_precision(nnx.ConvTranspose(4, 4, (3,), rngs=nnx.Rngs(0)), "fp8")


def test_a_jax_transform_around_a_stateful_model_is_explained():
    model = training.low_precision(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), "int8")
    with pytest.raises(ValueError, match=r"Use nnx.jit, nnx.grad"):
        jax.jit(lambda x: model(x))(X)
    model.eval()
    assert jax.jit(lambda x: model(x))(X).shape == X.shape
