"""Products with a TrainedWeight: values of the quantized product, and gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.qtensor import TrainedWeight
from tests import tables
from tests.arrays import assert_close, assert_same, normal

NWC = ("NWC", "WIO", "NWC")
BATCHED = (((2,), (1,)), ((0,), (0,)))


class Product(NamedTuple):
    """A product of jaxq, and the same product of jax.

    Attributes:
      x: shape of the input.
      w: shape of the weight.
      axes: how the weight is quantized.
      ours: `ours(x, w)` takes an array and a quantized weight.
      plain: `plain(x, w)` takes two arrays.
      x_axes: how the input is quantized.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: dict[str, Any]
    ours: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    x_axes: dict[str, Any]


def indices(x):
    """Rows of a table of 16, from floats."""
    return jnp.asarray(np.arange(x.shape[0]) * 5 % 16)


GROUP_SIZES = np.int32([2, 3])
PRODUCTS = {
    "matmul": Product(
        (3, 64),
        (64, 8),
        {"contracting": -2},
        jaxq.matmul,
        lambda x, w: x @ w,
        {"contracting": -1},
    ),
    "at_left": Product(
        (64, 3),
        (8, 64),
        {"contracting": -1},
        lambda x, w: w @ x,
        lambda x, w: w @ x,
        {"contracting": -2},
    ),
    "at_right": Product(
        (3, 64),
        (64, 8),
        {"contracting": -2},
        lambda x, w: x @ w,
        lambda x, w: x @ w,
        {"contracting": -1},
    ),
    "batched": Product(
        (2, 3, 64),
        (2, 64, 8),
        {"contracting": -2, "batch": 0},
        lambda x, w: jaxq.dot_general(x, w, BATCHED),
        lambda x, w: lax.dot_general(x, w, BATCHED),
        {"contracting": -1, "batch": 0},
    ),
    "batched_left": Product(
        (2, 64, 3),
        (2, 8, 64),
        {"contracting": -1, "batch": 0},
        lambda x, w: jaxq.dot_general(w, x, BATCHED),
        lambda x, w: lax.dot_general(w, x, BATCHED),
        {"contracting": -2, "batch": 0},
    ),
    "einsum": Product(
        (3, 2, 32),
        (2, 32, 8),
        {"contracting": (0, 1)},
        lambda x, w: jaxq.einsum("bhk,hkn->nb", x, w),
        lambda x, w: jnp.einsum("bhk,hkn->nb", x, w),
        {"contracting": (1, 2)},
    ),
    "conv": Product(
        (2, 6, 32),
        (3, 32, 8),
        {"contracting": (0, 1)},
        lambda x, w: jaxq.ops.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=NWC
        ),
        lambda x, w: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=NWC
        ),
        {"contracting": (1, 2)},
    ),
    "take": Product(
        (5,),
        (16, 64),
        {"contracting": -1},
        lambda x, w: jaxq.ops.take(w, indices(x)),
        lambda x, w: jnp.take(w, indices(x), axis=0),
        {},
    ),
    "ragged_dot": Product(
        (5, 64),
        (2, 64, 8),
        {"contracting": -2, "batch": 0},
        lambda x, w: jaxq.ops.ragged_dot(x, w, GROUP_SIZES),
        lambda x, w: lax.ragged_dot(x, w, GROUP_SIZES),
        {},
    ),
}


# Compiled as a whole, because many small programs take long to compile.
started = jax.jit(TrainedWeight.start)


def trained(name, preset, dtype="float32", **activation):
    """An input and a weight whose floats and scales have moved since the start."""
    product = PRODUCTS[name]
    floats = normal(*product.w)
    spec = jaxq.presets()[preset]
    qt = jaxq.quantize(floats.astype(dtype), spec, **product.axes)
    has_input_scale = activation.pop("input_scale", False)
    if has_input_scale:
        num_inputs = 3 * 32 if name == "conv" else 64
        qt = qt.with_input_scale(jnp.exp(normal(num_inputs, seed=4)))
    if activation:
        qt = qt.with_activation("int8", **activation.pop("options", {}))
    w = dataclasses.replace(started(floats, qt), range_gradient="lsq")
    w = dataclasses.replace(w, floats=1.1 * w.floats, scale=w.scale * 1.03)
    return normal(*product.x, seed=1).astype(dtype), w


@functools.partial(jax.jit, static_argnames="function")
def slopes(x, w, function):
    """The gradients of a weighted sum of `function(x, w)`."""

    def loss(x, w):
        y = function(x, w).astype(jnp.float32)
        return (y * normal(*y.shape, seed=2)).sum()

    return jax.grad(loss, argnums=(0, 1))(x, w)


@functools.partial(jax.jit, static_argnames="function")
def jitted(x, w, function):
    return function(x, w)


def check_product(name, x, w, reference, tolerance=2e-5):
    """The value is that of the quantized weight. The gradients are the reference's."""
    ours, qt = PRODUCTS[name].ours, w.quantize()
    if name == "matmul":
        assert_same(ours(x, w), ours(x, qt))
    assert_same(jitted(x, w, ours), jitted(x, qt, ours))
    actual, expected = slopes(x, w, ours), slopes(x, w, reference)
    assert_close(actual, expected, tolerance)
    assert np.any(actual[1].floats)
    assert np.any(actual[1].scale)
    return actual


PRESETS = ("int4", "int8", "fp8", "nf4")
WEIGHT_ONLY = [(name, preset) for preset in PRESETS for name in PRODUCTS]
# Each product once.
DEFAULT = [(name, PRESETS[i % 4]) for i, name in enumerate(PRODUCTS)]


@pytest.mark.parametrize(("name", "preset"), tables.thinned(WEIGHT_ONLY, DEFAULT))
def test_weight_only(name, preset):
    x, w = trained(name, preset)
    plain = PRODUCTS[name].plain
    check_product(name, x, w, lambda x, w: plain(x, w.fake_quant()))


ACTIVATION = ("matmul", "at_left", "batched", "batched_left", "einsum", "conv")
over_activation = pytest.mark.parametrize(
    "name", tables.thinned(ACTIVATION, ("matmul", "batched_left", "conv"))
)


@over_activation
def test_dynamic_activation_quantization(name):
    x, w = trained(name, "int8", dynamic=True)
    product = PRODUCTS[name]

    def reference(x, w):
        fake_x = jaxq.fake_quant(x, "int8", **product.x_axes)
        return product.plain(fake_x, w.fake_quant())

    check_product(name, x, w, reference)


@over_activation
def test_static_activation_quantization(name):
    check_static(name, "lsq")


@pytest.mark.parametrize("gradient", [None, "pact"])
def test_other_gradients_of_a_range(gradient):
    check_static("matmul", gradient)


def check_static(name, gradient):
    x, w = trained(name, "int8", options={"bounds": (-1.5, 1.0)})
    w = dataclasses.replace(w, range_gradient=gradient)
    product = PRODUCTS[name]
    all_axes = tuple(range(x.ndim))

    def reference(x, w):
        low, high = w.input_range[..., 0], w.input_range[..., 1]
        if gradient is None:
            low, high = lax.stop_gradient((low, high))
        spec = jaxq.presets()["int8"].replace(granularity=jaxq.PerTensor())
        batch = (0,) if "batched" in name else ()
        fake_x = jaxq.fake_quant(
            x,
            spec,
            contracting=all_axes[len(batch) :],
            batch=batch,
            bounds=(low, high),
            range_gradient=gradient or "lsq",
        )
        return product.plain(fake_x, w.fake_quant())

    to_w = check_product(name, x, w, reference)[1]
    assert np.any(to_w.input_range) == (gradient is not None)


def test_the_lsq_factor_of_a_range():
    x, w = trained("matmul", "int8", options={"bounds": (-1.5, 1.5)})
    ours = PRODUCTS["matmul"].ours
    plain_slope = slopes(x, w, ours)[1]
    scaled = slopes(x, dataclasses.replace(w, gradient_scale=True), ours)[1]
    factor = 1 / np.sqrt(64 * 127)  # 64 features, and 64 weights a scale
    assert_close(scaled.input_range, plain_slope.input_range * factor, 1e-5)
    assert_close(scaled.scale, plain_slope.scale * factor, 1e-5)


def test_outlier_columns_stay_floats():
    x, w = trained("matmul", "int8", options={"outliers": 2.0})
    is_outlier = np.abs(np.asarray(x)).max(0) >= 2
    assert 0 < is_outlier.sum() < 64

    def reference(x, w):
        ordinary = jnp.where(is_outlier[None], 0.0, x)
        fake_x = jaxq.fake_quant(ordinary, "int8", contracting=-1)
        return (fake_x + jnp.where(is_outlier[None], x, 0.0)) @ w.fake_quant()

    check_product("matmul", x, w, reference)


WITH_INPUT_SCALE = ("matmul", "at_left", "batched", "ragged_dot", "conv")


@pytest.mark.parametrize(
    "name", tables.thinned(WITH_INPUT_SCALE, ("at_left", "ragged_dot", "conv"))
)
def test_input_scales(name):
    x, w = trained(name, "int4", input_scale=True)
    plain = PRODUCTS[name].plain
    to_w = check_product(name, x, w, lambda x, w: plain(x, w.fake_quant()))[1]
    assert not np.any(to_w.input_scale)


@pytest.mark.parametrize("bounds", [None, (-3.0, 3.0)])
def test_the_input_is_quantized_after_it_is_multiplied_by_the_input_scale(bounds):
    options = {} if bounds is None else {"bounds": bounds}
    x, w = trained("matmul", "int8", input_scale=True, options=options)
    factors = lax.stop_gradient(w.input_scale)[None]
    spec = jaxq.presets()["int8"]

    def reference(x, w):
        ends = None if bounds is None else (w.input_range[0], w.input_range[1])
        fake_x = jaxq.fake_quant(x * factors, spec, contracting=-1, bounds=ends)
        return (fake_x / factors) @ w.fake_quant()

    check_product("matmul", x, w, reference)


# The switch.


def test_the_switch_is_traced():
    x, w = trained("matmul", "int8", dynamic=True)
    num_traces = 0

    @jax.jit
    def value_and_slopes(x, w):
        nonlocal num_traces
        num_traces += 1
        return x @ w, slopes(x, w, PRODUCTS["matmul"].ours)

    def switched(value):
        return dataclasses.replace(w, switch=jnp.float32(value))

    value, (to_x, to_w) = value_and_slopes(x, switched(0))
    expected = slopes(x, w.floats, PRODUCTS["matmul"].plain)
    assert_close(value, x @ w.floats, 1e-6)
    assert_close((to_x, to_w.floats), expected, 1e-6)
    assert not np.any(to_w.scale)
    value, gradients = value_and_slopes(x, switched(1))
    assert_same(value, x @ w.quantize())
    to_x, to_w = slopes(x, w, PRODUCTS["matmul"].ours)
    assert_close(gradients[0], to_x, 1e-6)
    assert_close(gradients[1].scale, to_w.scale, 1e-6)
    assert gradients[1].switch == 0
    assert num_traces == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("conv", "bfloat16"),
        ("take", "bfloat16"),
        ("ragged_dot", "bfloat16"),
        ("at_left", "float32"),
    ],
)
def test_every_product_has_the_switch(name, dtype):
    x, w = trained(name, "int4", dtype)
    switch = jnp.zeros(w.batch_shape)
    off, on = (dataclasses.replace(w, switch=switch + value) for value in (0, 1))
    product = PRODUCTS[name]
    expected = product.plain(x, w.floats.astype(dtype))
    actual = jitted(x, off, product.ours)
    assert actual.dtype == dtype
    assert_close(actual, expected, 1e-6 if dtype == "float32" else 0.02)
    assert_same(jitted(x, on, product.ours), jitted(x, w.quantize(), product.ours))


# Transformations and dtypes.


@pytest.mark.parametrize(("name", "dynamic"), [("matmul", True), ("ragged_dot", False)])
def test_forward_mode(name, dynamic):
    x, w = trained(name, "int8", **({"dynamic": True} if dynamic else {}))
    product = PRODUCTS[name]
    x_change = normal(*x.shape, seed=5)
    w_change = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=6), w)

    def reference(x, w):
        fake_x = jaxq.fake_quant(x, "int8", contracting=-1) if dynamic else x
        return product.plain(fake_x, w.fake_quant())

    @functools.partial(jax.jit, static_argnames="function")
    def tangent(x, w, function):
        return jax.jvp(function, (x, w), (x_change, w_change))

    y, y_change = tangent(x, w, product.ours)
    assert_same(y, jitted(x, w.quantize(), product.ours))
    assert_close(y_change, tangent(x, w, reference)[1], 2e-5)


def test_second_derivatives():
    x, w = trained("matmul", "int4")

    def loss(row):
        return ((row @ w) ** 2).sum()

    values = jaxq.dequantize(w.quantize())  # [k, n]
    assert_close(jax.jit(jax.hessian(loss))(x[0]), 2 * values @ values.T, 1e-5)


def test_the_backward_pass_keeps_only_the_input_and_the_weight():
    x, w = trained("matmul", "int8", dynamic=True)
    _, pull_back = jax.vjp(jaxq.matmul, x, w)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((x, w)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back)) <= nbytes + 8


def test_scan_vmap_and_remat():
    x, w = trained("batched", "int8", dynamic=True)
    per_layer = [slopes(x[i], w[i], PRODUCTS["matmul"].ours) for i in range(2)]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *per_layer)

    def loss_of_layer(x, w):
        y = jaxq.matmul(x, w)
        return (y * normal(*y.shape, seed=2)).sum()

    def scanned(x, w):
        def layer(total, item):
            return total + jax.checkpoint(loss_of_layer)(*item), None

        return lax.scan(layer, jnp.float32(0), (x, w))[0]

    actual = jax.jit(jax.grad(scanned, argnums=(0, 1)))(x, w)
    assert_close(actual, expected, 1e-5)

    def mapped(x, w):
        return jax.vmap(loss_of_layer)(x, w).sum()

    assert_close(jax.jit(jax.grad(mapped, argnums=(0, 1)))(x, w), expected, 1e-5)
    # The layers of a scan compute with one switch each.
    switched = dataclasses.replace(w, switch=jnp.ones(2))
    actual = jax.jit(jax.grad(scanned, argnums=(0, 1)))(x, switched)
    assert_close(actual[0], expected[0], 1e-5)


@pytest.mark.parametrize(
    "name", tables.thinned(PRODUCTS, ("at_left", "conv", "take", "ragged_dot"))
)
def test_bfloat16_layers_with_float32_masters(name):
    x, w = trained(name, "int4", "bfloat16")
    assert (w.dtype, w.floats.dtype) == (jnp.bfloat16, jnp.float32)
    product = PRODUCTS[name]
    y = jitted(x, w, product.ours)
    assert y.dtype == jnp.bfloat16
    assert_same(y, jitted(x, w.quantize(), product.ours))
    to_x, to_w = slopes(x, w, product.ours)
    assert to_x.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(to_w)} == {"float32"}
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    expected = slopes(*wide, lambda x, w: product.plain(x, w.fake_quant()))
    assert_close(jax.tree.leaves(to_w), jax.tree.leaves(expected[1]), 0.03)
    assert_close(to_x, expected[0], 0.03)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["matmul", "at_left", "conv", "ragged_dot"])
def test_float32_inputs_of_a_bfloat16_weight(name):
    x, w = trained(name, "int4", "bfloat16")
    x, product = x.astype(jnp.float32), PRODUCTS[name]
    y = jitted(x, w, product.ours)
    assert_same(y, jitted(x, w.quantize(), product.ours))
    assert y.dtype == jnp.float32
    to_x, to_w = slopes(x, w, product.ours)
    assert (to_x.dtype, to_w.floats.dtype) == (jnp.float32, jnp.float32)


def test_x64():
    x, w = trained("matmul", "int8", options={"bounds": (-1.5, 1.5)})
    w = dataclasses.replace(w, gradient_scale=True)
    expected = slopes(x, w, PRODUCTS["matmul"].ours)
    with jax.enable_x64(True):
        assert_same(x @ w, x @ w.quantize())
        actual = slopes(x, w, PRODUCTS["matmul"].ours)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"float32"}
        assert_close(actual, expected, 1e-5)


def test_no_rows():
    _, w = trained("matmul", "int8", dynamic=True)
    x = jnp.zeros((0, 64))
    assert (x @ w).shape == (0, 8)
    to_x, to_w = slopes(x, w, PRODUCTS["matmul"].ours)
    assert to_x.shape == (0, 64)
    assert not np.any(to_w.floats)


# Errors, and the plan.


def test_operands_that_cannot_be_multiplied():
    x, w = trained("matmul", "int4")
    square = TrainedWeight.start(jnp.eye(8), jaxq.quantize(jnp.eye(8), "int8"))
    for other in (square, square.quantize()):
        with pytest.raises(TypeError, match="can only be multiplied by a float array"):
            w @ other
    with pytest.raises(TypeError, match="cannot be multiplied by TrainedWeight"):
        jnp.ones((3, 64), jnp.int32) @ w
    with pytest.raises(TypeError, match="differ in size"):
        x[:, :32] @ w
    with pytest.raises(ValueError, match="has two operands, got 3"):
        jaxq.einsum("bk,kn,n->b", x, w, jnp.ones(8))
    dims = (((1,), (0,)), ((), ()))
    with pytest.raises(TypeError, match="preferred_element_type must be float32"):
        jaxq.dot_general(x, w, dims, preferred_element_type=jnp.int32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_explain_gives_the_plan_of_the_quantized_weight(dynamic):
    options = {"dynamic": True} if dynamic else {}
    x, w = trained("matmul", "int8", **options)
    assert jaxq.explain(x, w) == jaxq.explain(x, w.quantize())
    on_tpu = jaxq.explain(x, w, platform="tpu")
    assert on_tpu == jaxq.explain(x, w.quantize(), platform="tpu")
    shapes = jax.eval_shape(lambda w: w, w)
    assert jaxq.explain(x, shapes) == jaxq.explain(x, w)
    assert jaxq.explain(x, jaxq.nn.TrainedParam(w)) == jaxq.explain(x, w)
