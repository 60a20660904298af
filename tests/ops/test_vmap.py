"""`vmap(lambda v: qt @ v)` compiles to the product of the whole batch by one weight.

Equinox applies a layer to one vector and maps it over the batch. The weight is on the
left, `[out, in]`. No program may hold a copy of the weight for each vector.
"""

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq.jaxprs import inner_jaxprs
from tests.arrays import assert_close, assert_same, normal

OUT, IN, BATCH = 96, 64, 128
WEIGHT, VECTORS = normal(OUT, IN), normal(BATCH, IN, seed=1)
# Groups of 40 numbers cross rows, so such a weight is dequantized as a whole.
PER_FLAT = jaxq.QuantSpec("int4", granularity=jaxq.PerFlat(40))


def quantized(spec, activation=None, **arguments):
    qt = jaxq.quantize(WEIGHT, spec, contracting=(1,))
    return qt.with_activation(activation, **arguments)


WEIGHTS = {
    "int8": quantized("int8"),
    "nf4": quantized("nf4"),
    "dequantized": quantized(PER_FLAT),
    "w8a8": quantized("int8", "int8"),
    "w4a8": quantized("int4", "int8"),
    "static": quantized("int8", "int8", bounds=(-4.0, 4.0)),
    "fp8": quantized("fp8", "fp8"),
    "mxfp8": quantized("mxfp8", "mxfp8"),
    "nvfp4": quantized("nvfp4", "nvfp4"),
    "int8 and fp8": quantized("int8", "fp8"),
    "flat w8a8": quantized(PER_FLAT, "int8"),
    "outliers": quantized("int8", "int8", outliers=2.0),
    "per tensor": quantized("int8", jaxq.QuantSpec("int8", jaxq.PerTensor())),
}


def matrix_vector(weight, vectors):
    return jax.vmap(lambda v: weight @ v)(vectors)


def with_einsum(weight, vectors):
    return jax.vmap(lambda v: jaxq.einsum("oi,i->o", weight, v))(vectors)


def nested(weight, vectors):
    grid = vectors.reshape(8, -1, IN)
    y = jax.vmap(jax.vmap(lambda v: weight @ v))(grid)
    return y.reshape(-1, OUT)


def over_axis_1(weight, vectors):
    return jax.vmap(lambda v: weight @ v, in_axes=1, out_axes=1)(vectors.T).T


def matrices(weight, vectors):
    columns = vectors.reshape(8, -1, IN).swapaxes(1, 2)  # [8, in, n]
    y = jax.vmap(lambda m: weight @ m)(columns)
    return y.swapaxes(1, 2).reshape(-1, OUT)


def on_the_right(weight, vectors):
    return jax.vmap(lambda v: jaxq.einsum("i,oi->o", v, weight))(vectors)


FORMS = [matrix_vector, with_einsum, nested, over_axis_1, matrices, on_the_right]


def product_of_the_batch(weight, vectors):
    return jaxq.einsum("ti,oi->to", vectors, weight)


def largest_array(function, *args):
    """The most numbers that an array of a program has, outside of kernels' forms."""
    sizes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(var.aval.size for var in equation.outvars)
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return max(sizes)


def temporary_bytes(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_mapped_product_copies_no_weight(name):
    weight = WEIGHTS[name]
    # The operands and the result have at most this many numbers.
    bound = max(WEIGHT.size, VECTORS.size, BATCH * OUT)
    bound = max(bound, largest_array(product_of_the_batch, weight, VECTORS))
    assert bound < BATCH * WEIGHT.size / 8
    for form in FORMS:
        assert largest_array(form, weight, VECTORS) <= bound, form.__name__


@pytest.mark.parametrize("name", ["int8", "w8a8", "w4a8", "fp8", "mxfp8", "flat w8a8"])
def test_it_needs_the_memory_of_the_product_of_the_batch(name):
    weight = WEIGHTS[name]
    expected = temporary_bytes(product_of_the_batch, weight, VECTORS)
    mapped = temporary_bytes(matrix_vector, weight, VECTORS)
    # A float32 copy of the weight for each vector would take 3 MB.
    assert mapped <= 1.5 * expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "static", "fp8", "mxfp8"])
def test_numbers_are_those_of_one_vector_after_the_other(name, form):
    weight = WEIGHTS[name]
    expected = jnp.stack([weight @ v for v in VECTORS[:16]])
    assert_close(form(weight, VECTORS[:16]), expected, tolerance=1e-6)
    floats = VECTORS[:16] @ jaxq.dequantize(weight.with_activation(None)).T
    assert_close(expected, floats, tolerance=0.1)


def test_one_scale_for_the_whole_input():
    """Each mapped input has a scale of its own."""
    weight = WEIGHTS["per tensor"]
    columns = normal(4, IN, 6) * jnp.array([1.0, 10.0, 100.0, 1000.0])[:, None, None]
    expected = jnp.stack([weight @ matrix for matrix in columns])
    assert_close(jax.vmap(lambda m: weight @ m)(columns), expected, tolerance=1e-6)


def test_a_stack_of_weights_and_a_stack_of_vectors():
    stack = jaxq.quantize(normal(3, OUT, IN), "fp8", contracting=(2,), batch=(0,))
    stack = stack.with_activation("fp8")
    vectors = normal(3, IN)
    expected = jnp.stack(
        [jax.tree.map(lambda a, i=i: a[i], stack) @ vectors[i] for i in range(3)]
    )
    assert_close(jax.vmap(lambda w, v: w @ v)(stack, vectors), expected, 1e-6)
    one = jax.vmap(lambda w: w @ vectors[0])(stack)
    assert_close(one[0], expected[0], tolerance=1e-6)


@pytest.mark.parametrize("name", ["int8", "w8a8", "fp8"])
def test_gradients(name):
    weight = WEIGHTS[name]
    dy = normal(BATCH, OUT, seed=2)

    def gradient(form):
        return jax.grad(lambda v: (form(weight, v) * dy).sum())

    mapped = gradient(matrix_vector)(VECTORS)
    assert_close(mapped, gradient(product_of_the_batch)(VECTORS))
    # XLA leaves out the gradients of the weight, which nobody reads.
    expected = temporary_bytes(gradient(product_of_the_batch), VECTORS)
    assert temporary_bytes(gradient(matrix_vector), VECTORS) <= 1.2 * expected


def test_sides_of_a_product_with_batch_axes():
    weights = jaxq.quantize(normal(3, OUT, IN), "int8", contracting=(2,), batch=(0,))
    weights = weights.with_activation("int8")
    x = normal(3, 5, IN, 2)
    y = jaxq.einsum("eoi,eaib->eoab", weights, x)
    expected = jaxq.einsum("eaib,eoi->eabo", x, weights)
    assert_same(y, expected.transpose(0, 3, 1, 2))
