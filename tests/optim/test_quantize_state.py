"""`quantize_state`: numbers, memory, wrappers, jit, nnx, sharding, files and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import PerGroup, QTensor, QuantSpec
from jaxq.optim import adamw4bit, adamw8bit, quantize_state
from tests.arrays import assert_same, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
    "embedding": (512, 64),
    "kernel": (64, 300),
    "heads": (64, 4, 32),
    "classifier": (512, 10),
    "bias": (300,),
}


def is_qtensor(x):
    return isinstance(x, QTensor)


def make_params(seed=0, dtype="float32"):
    return {
        name: normal(*shape, seed=seed, dtype=dtype) for name, shape in PARAMS.items()
    }


def train(tx, num_steps, params=None, state=None, first=0):
    """Minimizes the distance to targets, with noise in the gradients."""
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    targets = make_params(seed=1)

    @jax.jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda p, t, n: p - t + n, params, targets, noise)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(first, first + num_steps):
        params, state = step(params, state, make_params(seed=10 + i))
    return params, state


# Numbers.


@pytest.mark.parametrize("spec", ["dynamic8", "dynamic4", "fp8", "int8", "int4", "nf4"])
def test_first_update_is_exact_and_later_ones_are_close(spec):
    expected, _ = train(optax.adam(0.01), 1)
    actual, _ = train(quantize_state(optax.adam(0.01), spec), 1)
    assert_same(actual, expected)
    expected, _ = train(optax.adam(0.01), 20)
    actual, _ = train(quantize_state(optax.adam(0.01), spec), 20)
    start = make_params()
    for name in PARAMS:
        error = np.linalg.norm(actual[name] - expected[name])
        distance = np.linalg.norm(start[name] - expected[name])
        assert error < 0.25 * distance, (name, error / distance)


def test_quantized_update_is_that_of_dequantized_moments():
    # The oracle: Adam of optax with the moments that the state stands for.
    tx, inner = adamw8bit(0.01), optax.adamw(0.01)
    params, state = train(tx, 3)
    grads = make_params(seed=5)
    actual, new_state = tx.update(grads, state, params)
    floats = jax.tree.map(
        lambda x: jaxq.dequantize(x) if is_qtensor(x) else x, state, is_leaf=is_qtensor
    )
    expected, new_floats = inner.update(grads, floats, params)
    assert_same(actual, expected)
    new = jax.tree.map(
        lambda x: jaxq.dequantize(x) if is_qtensor(x) else x,
        new_state,
        is_leaf=is_qtensor,
    )
    # Half a gap of the signed map is at most 1.8 % of the largest number of a block.
    for actual_mu, mu in zip(
        jax.tree.leaves(new[0].mu), jax.tree.leaves(new_floats[0].mu), strict=True
    ):
        assert np.abs(actual_mu - mu).max() <= 0.018 * np.abs(mu).max()


def naive_int8(tx):
    """Affine int8 for both moments, as `jaxq.quantize` rounds them."""
    spec = QuantSpec("uint8", PerGroup(256), symmetric=False)

    def quantized(state):
        adam, *rest = state
        mu = jax.tree.map(lambda x: jaxq.quantize(x, spec, contracting=-1), adam.mu)
        nu = jax.tree.map(lambda x: jaxq.quantize(x, spec, contracting=-1), adam.nu)
        return (adam._replace(mu=mu, nu=nu), *rest)

    def floats(state):
        return jax.tree.map(
            lambda x: jaxq.dequantize(x) if is_qtensor(x) else x,
            state,
            is_leaf=is_qtensor,
        )

    def update(grads, state, params=None):
        updates, state = tx.update(grads, floats(state), params)
        return updates, quantized(state)

    return optax.GradientTransformation(lambda p: quantized(tx.init(p)), update)


def losses(tx, num_steps=60):
    """Losses of a matrix whose columns have gradients of very different sizes."""
    sizes = 10.0 ** -(jnp.arange(256, dtype=jnp.float32).reshape(1, 256) ** 0.25)
    x = normal(256, 64)
    target = normal(64, 256, seed=1) * sizes

    def loss(w):
        return jnp.mean(((x @ (w * sizes - target)) / 8) ** 2) * 100

    @jax.jit
    def step(w, state):
        value, grads = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, value

    w = jnp.zeros((64, 256))
    state, values = tx.init(w), []
    for _ in range(num_steps):
        w, state, value = step(w, state)
        values.append(float(value))
    return np.asarray(values)


def test_affine_int8_second_moments_diverge_and_ours_do_not():
    # A second moment that rounds to 0 makes the step m / eps.
    wide = losses(optax.adam(0.01))
    naive = losses(naive_int8(optax.adam(0.01)))
    assert not np.isfinite(naive).all() or naive[-1] > 1e3 * naive[0]
    affine = QuantSpec("uint8", PerGroup(256), symmetric=False)
    for spec, second in (
        ("dynamic8", None),
        ("dynamic4", None),
        ("fp8", None),
        ("int8", affine),
    ):
        actual = losses(quantize_state(optax.adam(0.01), spec, second=second))
        assert np.isfinite(actual).all()
        assert actual[-1] < 2 * wide[-1] + 0.01 * wide[0], (spec, actual[-1], wide[-1])


@pytest.mark.parametrize("spec", ["dynamic8", "dynamic4", "fp8", "int8", "mxfp8"])
def test_second_moment_that_is_not_zero_never_becomes_zero(spec):
    tx = quantize_state(optax.adam(1e-3), spec)
    grads = jnp.zeros((16, 256)).at[:, 0].set(1.0).at[:, 1].set(1e-9)
    _, state = tx.update(grads, tx.init(grads))
    nu = jaxq.dequantize(state[0].nu)
    assert (np.asarray(nu)[:, :2] > 0).all()
    if spec != "dynamic4":  # its table has no 0
        assert (np.asarray(nu)[:, 2:] == 0).all()


def test_rows_without_gradients_stay_where_they_are():
    # The rows of an embedding whose tokens did not occur.
    tx = adamw4bit(0.1, weight_decay=0.0)
    params = normal(64, 128)
    state = tx.init(params)
    grads = normal(64, 128, seed=1).at[32:].set(0.0)
    updates, state = tx.update(grads, state, params)
    updates, state = tx.update(grads, state, params)
    assert (np.asarray(updates)[32:] == 0).all()
    assert (np.abs(np.asarray(updates)[:32]) > 0).all()


def test_not_finite_gradient_spoils_its_block_only():
    tx = adamw8bit(1e-3)
    params = normal(16, 512)
    _, state = tx.update(params.at[3, 5].set(jnp.nan), tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    is_nan = np.isnan(np.asarray(updates))
    assert is_nan[3, :256].all()
    assert is_nan.sum() == 256


# Memory.


@pytest.mark.parametrize(("make", "most"), [(adamw8bit, 2.1), (adamw4bit, 1.1)])
def test_bytes_for_each_parameter(make, most):
    state = make(1e-3).init(make_params())
    size = nbytes = 0
    for leaf in jax.tree.leaves(state, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            size += leaf.size
            nbytes += sum(x.nbytes for x in jax.tree.leaves(leaf))
    num_quantized = sum(np.prod(s) for s in PARAMS.values()) - 300  # without the bias
    assert size == 2 * num_quantized
    assert nbytes / num_quantized <= most


def test_donated_update_needs_no_second_state():
    params = {f"w{i}": normal(256, 1024, seed=i) for i in range(8)}

    def peak(tx):
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        memory = step.lower(params, state, params).compile().memory_analysis()
        other = memory.temp_size_in_bytes + memory.output_size_in_bytes
        aliased = memory.alias_size_in_bytes
        return other - aliased, memory.argument_size_in_bytes

    size = 8 * 256 * 1024
    extra, arguments = peak(adamw8bit(1e-3))
    _, wide_arguments = peak(optax.adamw(1e-3))
    assert wide_arguments - arguments >= (8 - 2.1) * size
    # The floats of some leaves at a time, not of all.
    assert extra < 8 * size, extra / size
