"""A second calibration of an equal model compiles nothing."""

import collections
import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import assert_same, normal

X = normal(8, 64)


class Net(nnx.Module):
    def __init__(self, seed: int = 0, features: int = 32):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(64, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.second = nnx.Linear(features, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


class LinenNet(linen.Module):
    features: int = 32
    sizes: dict | None = None  # a module with a dict has no hash

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(self.features)(x))
        return linen.Dense(8)(x)


def linen_variables(module, seed=0):
    return module.init(jax.random.key(seed), X)


@contextlib.contextmanager
def counted_programs():
    """Counts the functions that jax traces and the programs that it compiles."""
    events = collections.Counter()

    def listen(event, duration, **details):
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def assert_compiles_nothing(call):
    with counted_programs() as events:
        call()
    assert events["jaxpr_trace_duration"] == 0
    assert events["backend_compile_duration"] == 0


def calibrate_linen(module, variables, batches, **arguments):
    return jaxq.nn.linen.calibrate(module, variables, batches, **arguments)


def half(model, batch):
    return model(0.5 * batch)


@pytest.mark.parametrize("forward", [None, half])
def test_nnx(forward):
    observer = jaxq.observers.absmax()
    first = jaxq.nn.calibrate(Net(0), [X, X], forward=forward, observer=observer)
    other = Net(1)
    with counted_programs() as events:
        # The count is not always 0.
        jax.jit(lambda x: x + 1)(X)
    assert events["jaxpr_trace_duration"] == events["backend_compile_duration"] == 1
    assert_compiles_nothing(
        lambda: jaxq.nn.calibrate(other, [X], forward=forward, observer=observer)
    )
    again = jaxq.nn.calibrate(Net(0), [X, X], forward=forward, observer=observer)
    assert list(again) == list(first) == ["first", "second"]
    assert_same(again, first)


def test_linen():
    module = LinenNet()
    first = calibrate_linen(module, linen_variables(module), [X, X])
    others = linen_variables(module, seed=1)
    assert_compiles_nothing(lambda: calibrate_linen(LinenNet(), others, [X, X]))
    again = calibrate_linen(module, linen_variables(module), [X, X])
    assert list(again) == list(first) == ["Dense_0", "Dense_1"]
    assert_same(again, first)


def test_a_linen_module_without_hash():
    module = LinenNet(sizes={"a": 1})
    with pytest.raises(TypeError):
        hash(module)
    stats = calibrate_linen(module, linen_variables(module), [X])
    plain = calibrate_linen(LinenNet(), linen_variables(module), [X])
    assert_same(stats, plain)


def test_another_model_layer_or_setting_is_another_program():
    narrow, wide = jaxq.nn.calibrate(Net(), [X]), jaxq.nn.calibrate(Net(0, 48), [X])
    assert narrow["second"].mean.shape == (32,)
    assert wide["second"].mean.shape == (48,)
    only = jaxq.nn.calibrate(Net(), [X], layers=["second"], hessian=False)
    assert list(only) == ["second"]
    assert only["second"].hessian is None
    module = LinenNet()
    variables = linen_variables(module)
    calibrate_linen(module, variables, [X])
    only = calibrate_linen(module, variables, [X], layers=["Dense_1"], hessian=False)
    assert list(only) == ["Dense_1"]
    assert only["Dense_1"].hessian is None


def test_start_continues_with_cached_programs():
    module = LinenNet()
    variables = linen_variables(module)
    whole = calibrate_linen(module, variables, [X, 2 * X])
    for _ in range(2):
        first = calibrate_linen(module, variables, [X])
        assert_same(calibrate_linen(module, variables, [2 * X], start=first), whole)
    model, whole = Net(), jaxq.nn.calibrate(Net(), [X, 2 * X])
    for _ in range(2):
        first = jaxq.nn.calibrate(model, [X])
        assert_same(jaxq.nn.calibrate(model, [2 * X], start=first), whole)


def test_train_mode_is_seen_in_a_cached_program():
    class Dropped(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.linear(self.dropout(x, deterministic=False))

    class LinenDropped(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dropout(0.5, deterministic=False, rng_collection="params")(x)
            return linen.Dense(8)(x)

    module = LinenDropped()
    variables = module.init({"params": jax.random.key(0)}, X)

    def run(module, variables, x):
        return module.apply(variables, x, rngs={"params": jax.random.key(1)})

    for _ in range(2):
        with pytest.warns(UserWarning, match="random numbers are drawn"):
            jaxq.nn.calibrate(Dropped(), [X])
        with pytest.warns(UserWarning, match="drops numbers at random"):
            calibrate_linen(module, variables, [X], forward=run)


WEIGHTS = {"up": normal(64, 32), "down": normal(32, 8)}


def run_weights(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def quantize_net(recipe, sequential):
    return jaxq.quantize_model(
        Net(), recipe, calibration=[X], forward=half, sequential=sequential
    )


def quantize_tree(recipe, sequential):
    return jaxq.quantize_params(
        WEIGHTS, recipe, calibration=[X], forward=run_weights, sequential=sequential
    )


def quantize_linen(recipe, sequential):
    module = LinenNet()
    return jaxq.nn.linen.quantize_model(
        module, linen_variables(module), recipe, calibration=[X], sequential=sequential
    )


@pytest.mark.parametrize("quantized", [quantize_net, quantize_tree, quantize_linen])
@pytest.mark.parametrize(
    ("recipe", "sequential"), [("w8a8_static", False), ("int4_gptq", "layers")]
)
def test_a_second_quantization_compiles_nothing(quantized, recipe, sequential):
    *first, report = quantized(recipe, sequential)
    with counted_programs() as events:
        *again, second_report = quantized(recipe, sequential)
    assert events["backend_compile_duration"] == 0
    if quantized is not quantize_linen:  # a trace finds the layers of a linen module
        assert events["jaxpr_trace_duration"] == 0
    assert_same(jax.tree.leaves(again[-1]), jax.tree.leaves(first[-1]))
    assert second_report.rows == report.rows
    assert second_report.output_sqnr == report.output_sqnr


def test_another_forward_or_number_in_a_tree_is_another_program():
    def scaled(params, x):
        factor = 5.0 if params["factor"] is True else params["factor"]
        return (0 * x + factor) @ params["up"]

    def largest(factor, forward):
        params = {"up": WEIGHTS["up"], "factor": factor}
        qparams, _ = jaxq.quantize_params(
            params, "w8a8_static", calibration=[X], forward=forward
        )
        return float(abs(qparams["up"].input_range).max())

    assert largest(1, scaled) == pytest.approx(1, rel=0.02)
    assert largest(3, scaled) == pytest.approx(3, rel=0.02)
    assert largest(True, scaled) == pytest.approx(5, rel=0.02)  # although 1 == True
    assert largest(2.0, lambda p, x: scaled(p, 2 * x)) == pytest.approx(2, rel=0.02)


def test_a_second_sensitivity_compiles_nothing():
    model = Net()
    measured = jaxq.nn.sensitivity(model, ["int8"], [X])
    assert_compiles_nothing(lambda: jaxq.nn.sensitivity(model, ["int8"], [X]))
    assert jaxq.nn.sensitivity(model, ["int8"], [X]) == measured
    module = LinenNet()
    arguments = module, linen_variables(module), ["int8"], [X]
    measured = jaxq.nn.linen.sensitivity(*arguments)
    with counted_programs() as events:
        assert jaxq.nn.linen.sensitivity(*arguments) == measured
    assert events["backend_compile_duration"] == 0


@pytest.mark.parametrize("activation", [None, "int8", "fp8"])
def test_eager_products_compile_once(activation):
    weight = jaxq.quantize(normal(64, 32), "int8").with_activation(activation)

    def product_and_gradient():
        jax.block_until_ready(X @ weight)
        jax.grad(lambda x: (x @ weight).sum())(X)

    product_and_gradient()
    assert_compiles_nothing(product_and_gradient)


def test_an_eager_convolution_compiles_once():
    kernel = jaxq.quantize(normal(3, 8, 8), "int8", contracting=(0, 1))
    kernel, x = kernel.with_activation("int8"), jnp.ones((2, 16, 8))
    dims = ("NWC", "WIO", "NWC")

    def convolution():
        return jaxq.ops.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=dims
        )

    convolution()
    assert_compiles_nothing(convolution)
