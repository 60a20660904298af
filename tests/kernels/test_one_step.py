"""A decoded weight is in memory only during its product, on one CPU device.

`memory_analysis` of compiled programs shows it. No test measures time.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq import kernels
from tests.arrays import normal

D, NUM_LAYERS, TOKENS = 256, 6, 8
LAYER_BYTES = 4 * D * D

PRODUCTS = {
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "nf4": ("nf4", {}),
    "fp8": ("fp8", {}),
    "int8 x int4": ("int4", {"activation": "int8"}),
    "fp8 x fp8": ("fp8", {"activation": "fp8"}),
    "llm_int8": ("int8", {"activation": "int8", "outliers": 6.0}),
}


def layers(preset, activation=None, outliers=None):
    """Different weights, so that XLA cannot merge their decoding."""
    weights = [
        jaxq.quantize(normal(D, D, seed=seed) / 16, preset)
        for seed in range(NUM_LAYERS)
    ]
    if activation is None:
        return weights
    return [qt.with_activation(activation, outliers=outliers) for qt in weights]


def chain(x, weights, multiply=operator.matmul):
    for w in weights:
        x = jnp.tanh(multiply(x, w))
    return x


def side_by_side(x, weights):
    return sum(jnp.tanh(x @ w) for w in weights)


def temporary_bytes(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_a_program_holds_one_decoded_weight_at_a_time(name):
    preset, options = PRODUCTS[name]
    weights, x = layers(preset, **options), normal(TOKENS, D)

    def loss(x, weights):
        return jnp.sum(chain(x, weights))

    for f in (chain, side_by_side, jax.grad(loss)):
        assert temporary_bytes(f, x, weights) < 2 * LAYER_BYTES


OTHER_FORMS = {
    "weight on the left": lambda x, w: (w @ x.T).T,
    "transposed": lambda x, w: x @ w.T,
    "emulated": jaxq.emulate(
        lambda x, w: x @ w, jaxq.emulation.Policy(operands="bfloat16")
    ),
    "mapped": jax.vmap(lambda x, w: x[None] @ w, in_axes=(0, None)),
}


@pytest.mark.parametrize("name", list(OTHER_FORMS))
def test_other_forms_hold_one_decoded_weight_too(name):
    def multiply(x, w):
        return OTHER_FORMS[name](x, w).reshape(x.shape)

    f = functools.partial(chain, multiply=multiply)
    assert temporary_bytes(f, normal(TOKENS, D), layers("int8")) < 2 * LAYER_BYTES


def test_experts_hold_one_decoded_stack_at_a_time():
    weights = [
        jaxq.quantize(normal(4, D // 4, D, seed=seed), "int8", contracting=-2, batch=0)
        for seed in range(NUM_LAYERS)
    ]
    sizes = jnp.full(4, TOKENS // 4)

    def multiply(x, w):
        return jaxq.ops.ragged_dot(x[:, : D // 4], w, sizes)

    f = functools.partial(chain, multiply=multiply)
    assert temporary_bytes(f, normal(TOKENS, D), weights) < 2 * LAYER_BYTES


# `as_one_step` itself.


def doubled(x):
    return kernels.as_one_step(
        jnp.asarray(x).astype(jnp.int8), lambda x: 2 * x, lambda x: 0 * x, x
    )


def test_the_step_is_a_plain_call_for_every_transformation():
    x = normal(3, 4)
    expected = 2 * np.asarray(x)
    np.testing.assert_array_equal(doubled(x), expected)
    np.testing.assert_array_equal(jax.jit(doubled)(x), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(doubled))(x), expected)
    _, tangent = jax.jit(lambda x: jax.jvp(doubled, (x,), (x,)))(x)
    np.testing.assert_array_equal(tangent, expected)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(doubled(x))))(x)
    np.testing.assert_array_equal(gradient, np.full((3, 4), 2.0))
    _, rows = jax.jit(lambda x: lax.scan(lambda c, row: (c, doubled(row)), 0, x))(x)
    np.testing.assert_array_equal(rows, expected)
    assert jax.jit(doubled)(jnp.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_the_condition_is_true_for_all_codes(dtype):
    info = jnp.iinfo(dtype)
    condition = jax.jit(lambda codes: kernels.as_one_step(codes, lambda: 1, lambda: 0))
    for code in (info.min, -1, 0, 1, info.max):
        assert condition(jnp.asarray([code]).astype(dtype)) == 1


def test_accelerators_get_a_constant_condition():
    def lowered(platform):
        traced = jax.jit(doubled).trace(jnp.ones((2, 2)))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "popcnt" in lowered("cpu")
    for platform in ("cuda", "tpu", "rocm"):
        assert "popcnt" not in lowered(platform)
