"""AdaRound: codes are neighbours, and no output gets worse, also on held-out inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, PerTensor, QuantSpec
from jaxq.methods._adaround import _neighbours, _soft_step, adaround
from tests import tables

N, OUT, STEPS = 32, 16, 600
SPECS: dict[str, QuantSpec] = {
    name: jaxq.presets()[name] for name in ("int4", "uint4", "nf4", "mxfp4", "int8")
} | {
    "minimum": QuantSpec("uint4", PerGroup(20, pad=True), offset="min"),
    "signed extreme": QuantSpec(
        "int4", PerGroup(16), scale="float16", scale_rule="signed_extreme"
    ),
}
KEY = jax.random.key(0)
neighbours = jax.jit(_neighbours)


@functools.cache
def problem(seed: int = 0):
    """(w, inputs, inputs held out)."""
    random = np.random.default_rng(seed)
    mix = np.eye(N) + 0.6 * random.standard_normal((N, N)) / np.sqrt(N)
    x = (random.standard_normal((512, N)) @ mix).astype(np.float32)
    return (
        (0.05 * random.standard_normal((N, OUT))).astype(np.float32),
        x[:256],
        x[256:],
    )


def errors(w, qt, x, target=None) -> np.ndarray:
    """Mean squared error of each output; `target` are the float inputs."""
    target = x if target is None else target
    difference = target @ w - x @ np.asarray(jaxq.dequantize(qt))
    return np.mean(difference**2, axis=0)


@functools.cache
def learned(name: str):
    w, x, _ = problem()
    return adaround(w, x, SPECS[name], key=KEY, num_steps=STEPS)


over_specs = pytest.mark.parametrize("name", tables.thinned(SPECS, ["uint4", "nf4"]))


@over_specs
def test_soft_rounding_starts_at_the_weights(name):
    w, _, _ = problem()
    nearest = jaxq.quantize(w, SPECS[name], contracting=-2)
    low, high, share = map(np.asarray, neighbours(w, nearest))
    np.testing.assert_allclose(
        low + share * (high - low), np.clip(w, low, high), atol=1e-6
    )
    assert np.all(low <= high)
    rounded = np.asarray(jaxq.dequantize(nearest))
    either = np.minimum(abs(rounded - low), abs(rounded - high))
    np.testing.assert_allclose(either, 0, atol=1e-6)
    assert np.mean(low < high) > 0.9
    assert _soft_step(jnp.array([-20.0, 0.0, 20.0])).tolist() == [0, 0.5, 1]


@over_specs
def test_every_code_is_a_neighbour_and_no_output_is_worse(name):
    w, x, held_out = problem()
    qt, info = learned(name)
    nearest = jaxq.quantize(w, SPECS[name], contracting=-2)
    assert jax.tree.structure(qt) == jax.tree.structure(nearest)
    low, high, _ = map(np.asarray, neighbours(w, nearest))
    values = np.asarray(jaxq.dequantize(qt))
    np.testing.assert_allclose(
        np.minimum(abs(values - low), abs(values - high)), 0, atol=1e-6
    )
    before, after = errors(w, nearest, x), errors(w, qt, x)
    assert np.all(after <= before * (1 + 1e-4))
    np.testing.assert_allclose(
        [info.error, info.initial_error], [after.mean(), before.mean()], rtol=1e-3
    )
    assert (
        int(info.num_changed)
        == np.sum(np.asarray(qt.codes()) != np.asarray(nearest.codes()))
        > 0
    )
    assert after.mean() < 0.9 * before.mean()
    assert errors(w, qt, held_out).mean() < 0.95 * errors(w, nearest, held_out).mean()
    assert not info.underdetermined


def test_targets_of_the_float_network():
    # x comes from a quantized layer, so it is biased and noisy. Only with the float
    # inputs can the outputs match those of the float network.
    w, x, _ = problem(1)
    noisy = (x + 0.2 * np.random.default_rng(3).standard_normal(x.shape) + 0.2).astype(
        np.float32
    )
    plain, _ = adaround(w, noisy, "int4", key=KEY, num_steps=STEPS)
    aware, info = adaround(w, noisy, "int4", key=KEY, num_steps=STEPS, x_float=x)
    np.testing.assert_allclose(info.error, errors(w, aware, noisy, x).mean(), rtol=1e-3)
    assert errors(w, aware, noisy, x).mean() < errors(w, plain, noisy, x).mean()


def test_a_stack_the_key_and_few_tokens():
    w, x, _ = problem()
    run = functools.partial(adaround, spec="int4", num_steps=5)
    stack, info = run(np.stack([w, 2 * w]), x, key=KEY)
    assert (stack.batch_shape, info.error.shape) == ((2,), (2,))
    qt, info = run(w, x[:8], key=KEY)
    assert bool(info.underdetermined)
    repeated, _ = run(w, x[:8], key=KEY)
    np.testing.assert_array_equal(qt.codes(), repeated.codes())
    legacy, _ = run(w, x[:8], key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(legacy.codes(), qt.codes())
    zeros, info = run(np.zeros_like(w), x[:8], key=KEY)
    assert not np.any(jaxq.dequantize(zeros))
    assert float(info.error) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": np.ones((8, N + 1), np.float32)},
            ValueError,
            r"x must be inputs \[tokens, in\]: \[any,32\]; got",
        ),
        (
            {"x_float": np.ones((7, N), np.float32)},
            ValueError,
            r"x_float must be inputs.*: \[256,32\]; got",
        ),
        ({"x": np.full((8, N), np.nan, np.float32)}, ValueError, r"x\[0, 0\] is nan"),
        (
            {"x": np.ones((0, N), np.float32)},
            ValueError,
            r"x must be inputs.*got float32\[0,32\]",
        ),
        (
            {"spec": QuantSpec("ternary", PerTensor(), scale_rule="twn")},
            ValueError,
            "no two neighbours",
        ),
        (
            {"num_steps": 0},
            ValueError,
            "num_steps must be a whole number of at least 1",
        ),
    ],
)
def test_errors(change, error, message):
    w, x, _ = problem()
    with pytest.raises(error, match=f"adaround: .*{message}"):
        adaround(**({"w": w, "x": x, "spec": "int4", "key": KEY} | change))
