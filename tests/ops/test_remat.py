"""Policies of `jax.checkpoint` treat quantized products as they treat float products.

The witness is the same layer with float weights: a policy saves as many products of the
one as of the other.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxq
from jaxq.jaxprs import inner_jaxprs
from tests.arrays import assert_close, assert_same, normal

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("another"),
}
# How a program multiplies, in all the forms that the layers below can have.
PRODUCTS = (
    *("dot_general", "conv_general_dilated", "ragged_dot_general"),
    *("quantized_matmul", "codes_matmul", "quantized_ragged_dot"),
)

MATRIX = normal(64, 64)
STACK = normal(4, 64, 64)
SIZES = jnp.array([2, 2, 2, 2])


def matmul(x, w):
    return jaxq.matmul(x, w)


def stacked(x, w):
    return jaxq.einsum("ebk,ekn->ebn", x, w)


def convolution(x, w):
    dims = ("NWC", "WIO", "NWC")
    if isinstance(w, jax.Array):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=dims)
    return jaxq.ops.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=dims)


def two_layers(product, x, w):
    return jnp.tanh(product(jnp.tanh(product(x, w)), w))


def gradient(product, w, policy):
    def loss(x):
        layers = jax.checkpoint(
            lambda x: two_layers(product, x, w), policy=POLICIES[policy]
        )
        return layers(x).sum()

    return jax.grad(loss)


def count_products(function, *args):
    counts = collections.Counter()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            counts[equation.primitive.name] += 1
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return sum(counts[name] for name in PRODUCTS)


def num_saved(product, w, x, policy):
    """How many products a policy saves that would be computed again otherwise."""
    without = count_products(gradient(product, w, "nothing"), x)
    return without - count_products(gradient(product, w, policy), x)


def kernel_of(preset, activation=None):
    kernel = jaxq.quantize(KERNEL, preset, contracting=(0, 1))
    return kernel.with_activation(activation)


X, X_STACK = normal(8, 64), normal(4, 8, 64)
KERNEL, IMAGES = normal(3, 8, 8), normal(2, 16, 8)
PER_FLAT = jaxq.QuantSpec("int4", granularity=jaxq.PerFlat(48))
CASES = {
    "int4": (matmul, jaxq.quantize(MATRIX, "int4"), X, MATRIX),
    "nf4_dq": (matmul, jaxq.quantize(MATRIX, "nf4_dq"), X, MATRIX),
    "dequantized": (matmul, jaxq.quantize(MATRIX, PER_FLAT), X, MATRIX),
    "w8a8": (matmul, jaxq.quantize(MATRIX, "int8").with_activation("int8"), X, MATRIX),
    "fp8": (matmul, jaxq.quantize(MATRIX, "fp8").with_activation("fp8"), X, MATRIX),
    "int4 stack": (stacked, jaxq.quantize(STACK, "int4", batch=0), X_STACK, STACK),
    "w8a8 stack": (
        stacked,
        jaxq.quantize(STACK, "int8", batch=0).with_activation("int8"),
        X_STACK,
        STACK,
    ),
    "convolution": (convolution, kernel_of("int8"), IMAGES, KERNEL),
    "w8a8 convolution": (convolution, kernel_of("int8", "int8"), IMAGES, KERNEL),
}


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "nothing"])
@pytest.mark.parametrize("case", CASES)
def test_policies_save_what_they_save_of_a_float_layer(case, policy):
    product, weight, x, floats = CASES[case]
    expected = num_saved(product, floats, x, policy)
    assert num_saved(product, weight, x, policy) == expected
    if policy == "dots":
        assert expected == 2  # otherwise the comparison shows nothing


@pytest.mark.parametrize("case", ["int4", "dequantized", "w8a8", "w8a8 convolution"])
def test_gradients_do_not_depend_on_the_policy(case):
    product, weight, x, _ = CASES[case]
    expected = gradient(product, weight, "nothing")(x)
    for policy in ("dots", "no_batch"):
        assert_same(gradient(product, weight, policy)(x), expected)


def dimensions_of_dots(product, w, x, avals_of_dots):
    """Notes the operands of all dots that a policy is asked about."""

    def policy(primitive, *avals, **params):
        if primitive.name == "dot_general":
            lhs, rhs = avals
            shapes = lhs.shape, rhs.shape
            avals_of_dots.append((shapes, params["dimension_numbers"]))
        return False

    layers = jax.checkpoint(lambda x: two_layers(product, x, w), policy=policy)
    jax.make_jaxpr(jax.grad(lambda x: layers(x).sum()))(x)


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        ("int4", ((8, 64), (64, 64))),
        ("w8a8", ((8, 64), (64, 64))),
        ("int4 stack", ((4, 8, 64), (4, 64, 64))),
        ("w8a8 stack", ((4, 8, 64), (4, 64, 64))),
    ],
)
def test_a_policy_reads_the_operands_of_a_dot(case, shapes):
    product, weight, x, _ = CASES[case]
    dots = []
    dimensions_of_dots(product, weight, x, dots)
    assert dots
    for operands, dimension_numbers in dots:
        assert operands == shapes
        lhs, rhs = (jax.ShapeDtypeStruct(shape, "float32") for shape in operands)
        product = functools.partial(
            jax.lax.dot_general, dimension_numbers=dimension_numbers
        )
        assert jax.eval_shape(product, lhs, rhs).shape == (*x.shape[:-1], 64)


def test_products_of_experts():
    weights = jaxq.quantize(STACK, "int4", contracting=-2, batch=0)

    def product(x, w):
        return jaxq.ops.ragged_dot(x, w, SIZES)

    # It is a product with a batch axis: the experts.
    assert num_saved(product, weights, X, "dots") == 2
    assert num_saved(product, weights, X, "no_batch") == 0


def saved_shapes(product, weight, policy):
    """The shapes of what the backward pass reads beside the arguments."""

    def layer(x):
        return jnp.sin(product(x, weight))

    checkpointed = jax.checkpoint(layer, policy=POLICIES[policy])
    _, pull_back = jax.vjp(checkpointed, X)
    return sorted(leaf.shape for leaf in jax.tree.leaves(pull_back))


@pytest.mark.parametrize("recipe", ["int4", "int8", "w8a8"])
def test_a_trained_weight_saves_its_product_once(recipe):
    trained = jaxq.training.prepare({"w": normal(64, 48)}, recipe)["w"]

    def sizes(weight):
        return collections.Counter(saved_shapes(matmul, weight, "dots"))

    assert sizes(normal(64, 48))[8, 48] == 1
    assert sizes(trained)[8, 48] == 1


class TwoLayers(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(64, 64, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return jnp.tanh(self.second(jnp.tanh(self.first(x))))


def saved_in_nnx(model):
    graph, state = nnx.split(model)

    def gradient(policy):
        call = nnx.remat(lambda m, x: m(x), policy=POLICIES[policy])
        grad = nnx.grad(lambda m, x: call(m, x).sum(), argnums=1)
        return lambda state, x: grad(nnx.merge(graph, state), x)

    without = count_products(gradient("nothing"), state, X)
    return without - count_products(gradient("dots"), state, X)


@pytest.mark.parametrize("recipe", ["int8", "w8a8"])
def test_nnx_layers(recipe):
    model = TwoLayers()
    assert saved_in_nnx(model) == 2
    assert saved_in_nnx(jaxq.quantize_model(model, recipe)[0]) == 2
    assert saved_in_nnx(jaxq.training.prepare(model, recipe)) == 2


class LinenLayers(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(64)(x))
        return jnp.tanh(linen.Dense(64)(x))


def saved_in_linen(recipe):
    counts = {}
    for policy in ("nothing", "dots"):
        module = linen.remat(LinenLayers, policy=POLICIES[policy])()
        variables = module.init(jax.random.key(0), X)
        if recipe is not None:
            module, variables, _ = jaxq.nn.linen.quantize_model(
                module, variables, recipe
            )

        def loss(x, module=module, variables=variables):
            return module.apply(variables, x).sum()

        counts[policy] = count_products(jax.grad(loss), X)
    return counts["nothing"] - counts["dots"]


@pytest.mark.parametrize("recipe", [None, "int8", "w8a8"])
def test_linen_layers(recipe):
    assert saved_in_linen(recipe) == 2


def test_second_derivatives_of_a_checkpointed_product():
    weight = CASES["w8a8"][1]

    def loss(x, policy):
        layers = jax.checkpoint(
            lambda x: two_layers(matmul, x, weight), policy=POLICIES[policy]
        )
        return (layers(x) ** 2).sum()

    def second(x, policy):
        return jax.grad(lambda x: (jax.grad(loss)(x, policy) ** 2).sum())(x)

    assert_close(second(X, "dots"), second(X, "nothing"))


def test_vmap_and_emulation_of_a_derivative():
    weight = CASES["w8a8"][1]

    def loss(x):
        return jaxq.matmul(x, weight).sum()

    expected = jax.grad(lambda x: loss(x))(X)
    assert_same(jax.vmap(jax.grad(loss))(X), expected)
    exact = jaxq.emulation.Policy(operands="float32", result="float32")
    assert_same(jaxq.emulate(jax.grad(loss), exact)(X), expected)


def test_a_policy_that_offloads_computes_the_product_again():
    offload = jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    )
    product, weight, x, _ = CASES["int4"]
    layers = jax.checkpoint(lambda x: two_layers(product, x, weight), policy=offload)
    counted = count_products(jax.grad(lambda x: layers(x).sum()), x)
    assert counted == count_products(gradient(product, weight, "nothing"), x)
