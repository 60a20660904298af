"""jaxq on clean data under the debug settings of jax.

`jax_debug_nans` and `jax_debug_infs` raise an error if an operation returns a NaN or an
infinity. With `jax_disable_jit`, loops run in Python and pass Python integers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import normal
from tests.tables import thinned

SETTINGS = {
    "debug_nans": jax.debug_nans,
    "debug_infs": jax.debug_infs,
    "disable_jit": jax.disable_jit,
}
RECIPES = [
    name
    for name in jaxq.recipes.names()
    if name not in jaxq.presets() and not name.endswith("_rotated")
]


def with_and_without(setting: str, function):
    """The results of a function under a setting and without it, as lists of leaves."""
    with SETTINGS[setting](True):
        actual = function()
    return jax.tree.leaves(actual), jax.tree.leaves(function())


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


CASES = [(setting, recipe) for setting in SETTINGS for recipe in RECIPES]


@pytest.mark.parametrize(
    ("setting", "recipe"),
    thinned(CASES, [("debug_nans", "fp8_dynamic"), ("debug_infs", "fp8_static")]),
)
def test_a_recipe_runs_under_a_debug_setting(setting, recipe):
    model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    x = normal(16, 32)

    def outputs():
        qmodel, _ = jaxq.quantize_model(model, recipe, calibration=[x])
        return qmodel(x)

    assert_close(*with_and_without(setting, outputs))


@pytest.mark.parametrize("setting", ["debug_nans", "debug_infs"])
def test_a_linen_model_is_calibrated_under_a_debug_setting(setting):
    module, x = linen.Dense(16), normal(16, 32)
    variables = module.init(jax.random.key(0), x)

    def outputs():
        qmodule, qvariables, _ = jaxq.nn.linen.quantize_model(
            module, variables, "fp8_static", calibration=[x]
        )
        return qmodule.apply(qvariables, x)

    assert_close(*with_and_without(setting, outputs))


OBSERVERS = [(setting, name) for setting in SETTINGS for name in jaxq.observers.names()]


@pytest.mark.parametrize(
    ("setting", "name"),
    thinned(
        OBSERVERS,
        [
            ("debug_infs", "minmax"),
            ("debug_infs", "percentile"),
        ],
    ),
)
def test_an_observer_runs_under_a_debug_setting(setting, name):
    observer = jaxq.observers.from_dict({"type": name})
    x = normal(64)

    def bounds():
        first = observer.update(observer.init(x), x)
        second = observer.update(observer.init(x), 2 * x)
        if name == "moving_average":  # it depends on the order and cannot merge
            return observer.bounds(second, "int8")
        return observer.bounds(observer.merge(first, second), "int8")

    assert_close(*with_and_without(setting, bounds))


@pytest.mark.parametrize("setting", ["debug_nans", "debug_infs"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "nf8", "float64"])
def test_a_cast_runs_under_a_debug_setting(setting, name):
    x = jnp.asarray([0.25, -0.5, 1.0], jnp.float32)
    fmt = jaxq.formats.get(name)

    def numbers():
        listed = fmt.values() if fmt.bits <= 16 else ()
        return jaxq.cast(x, fmt), listed

    assert_close(*with_and_without(setting, numbers))


# GPTQ runs its loops row by row, which takes minutes.
@pytest.mark.parametrize("method", thinned(["clip", "gptq"], ["clip"]))
def test_a_method_runs_without_jit(method):
    spec = jaxq.QuantSpec(format="int4", granularity=jaxq.PerGroup(8))
    w, hessian = normal(16, 4), np.eye(16, dtype=np.float32)

    def codes():
        if method == "clip":
            qt, _ = jaxq.methods.clip(w, spec, rule="mse")
        else:
            qt, _ = jaxq.methods.gptq(w, hessian, spec)
        return qt.codes()

    assert_close(*with_and_without("disable_jit", codes))


def test_an_infinite_sqnr_is_no_error_under_debug_infs():
    x = normal(8)
    with jax.debug_infs(True):
        assert jaxq.metrics.sqnr(x, x) == np.inf
