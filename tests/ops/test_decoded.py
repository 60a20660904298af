"""Products with a weight that is dequantized as a whole: memory and derivatives."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.arrays import assert_close, normal

NUM_LAYERS = 5
NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel):
    return jaxq.ops.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=NUMBERS
    )


def kernels(activation=None):
    """Convolution kernels and the bytes of one of them in float32."""
    floats = [normal(3, 3, 64, 64, seed=seed) / 24 for seed in range(NUM_LAYERS)]
    quantized = [jaxq.quantize(k, "int8", contracting=(0, 1, 2)) for k in floats]
    return [qt.with_activation(activation) for qt in quantized], 4 * floats[0].size


def flat_blocks():
    """Matrices whose blocks cross rows: they are dequantized as a whole."""
    spec = jaxq.QuantSpec("int8", jaxq.PerFlat(100))
    weights = [
        jaxq.quantize(normal(192, 192, seed=seed) / 14, spec)
        for seed in range(NUM_LAYERS)
    ]
    return weights, 4 * 192 * 192


CASES = {
    "convolution": (convolve, kernels, (1, 4, 4, 64)),
    "w8a8 convolution": (convolve, lambda: kernels("int8"), (1, 4, 4, 64)),
    "flat blocks": (operator.matmul, flat_blocks, (4, 192)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_program_holds_one_dequantized_weight_at_a_time(name):
    multiply, make, shape = CASES[name]
    weights, layer_bytes = make()

    def model(x, weights):
        for w in weights:
            x = jnp.tanh(multiply(x, w))
        return x

    def loss(x, weights):
        return jnp.sum(model(x, weights))

    def temporary_bytes(f):
        program = jax.jit(f).lower(normal(*shape), weights).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(model) < 2 * layer_bytes
    # The backward pass decodes again: a float weight, and its transpose in XLA:CPU.
    assert temporary_bytes(jax.grad(loss)) < 4 * layer_bytes


def test_derivatives_are_those_of_the_dequantized_weight():
    (qt, *_), _ = kernels()
    x = normal(1, 4, 4, 64)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel)))

    def float_loss(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, jaxq.dequantize(kernel), (1, 1), "SAME", dimension_numbers=NUMBERS
        )
        return jnp.sum(jnp.sin(y))

    def derivatives(f, x):
        return (
            jax.jvp(lambda x: f(x, qt), (x,), (x,))[1],
            jax.grad(f)(x, qt),
            jax.grad(f, argnums=1, allow_int=True)(x, qt).scale,
        )

    expected = jax.jit(lambda x: derivatives(float_loss, x))(x)
    for compiled in (jax.jit(lambda x: derivatives(loss, x)), None):
        actual = derivatives(loss, x) if compiled is None else compiled(x)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, 1e-4)
    np.testing.assert_array_equal(jax.jit(loss)(x, qt), jax.jit(float_loss)(x, qt))
