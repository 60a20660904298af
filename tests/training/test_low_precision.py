"""Products of low-precision training against float64 and against plain arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import training
from jaxq.training import LowPrecision, ProductSpec

RECIPES = training.low_precision_recipes()
STATELESS = [name for name, recipe in RECIPES.items() if recipe.delayed is None]
NEAREST = ("fp8", "fp8_block", "mxfp8")
DIMS = (((1,), (0,)), ((), ()))
KEY = jax.random.key(7)
M, K, N = 48, 160, 96


def arrays(dtype="float32"):
    """x `[m, k]`, w `[k, n]` and dy `[m, n]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((M, K), (K, N), (M, N))
    x, w, dy = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    # Magnitudes that differ between rows and between columns.
    return x * jnp.linspace(0.1, 4, K, dtype=dtype)[None], w, dy * 1e-3


def dot_of(name: str):
    needs_key = RECIPES[name].needs_key
    return training.dot_general(name, key=KEY if needs_key else None)


@functools.cache
def computed(name: str):
    """(y, dx, dw) of a recipe."""
    return three_products(dot_of(name), *arrays())


def three_products(dot, x, w, dy):
    @jax.jit
    def run(x, w, dy):
        y, pull_back = jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)
        return y, *pull_back(dy)

    return run(x, w, dy)


def float64(*values):
    return tuple(np.asarray(value, np.float64) for value in values)


def exact_products():
    x, w, dy = float64(*arrays())
    return x @ w, dy @ w.T, x.T @ dy


def relative_error(value, exact):
    return np.linalg.norm(np.asarray(value, np.float64) - exact) / np.linalg.norm(exact)


# The error of one rounding, relative to a number: 2^-4 at most for float8_e4m3fn, 2^-3
# for float8_e5m2, and 1/4 for float4_e2m1fn. Stochastic rounding has twice that.
LARGEST_ERRORS = {
    "int8": (0.012, 0.014, 0.014),
    "fp8": (0.045, 0.07, 0.07),
    "fp8_block": (0.045, 0.045, 0.045),
    "mxfp8": (0.045, 0.045, 0.045),
    "nvfp4": (0.17, 0.22, 0.22),
}


@pytest.mark.parametrize("name", STATELESS)
def test_each_product_is_near_float64(name):
    for value, exact, largest in zip(
        computed(name), exact_products(), LARGEST_ERRORS[name], strict=True
    ):
        error = relative_error(value, exact)
        assert largest / 3 < error < largest


def rounded(x, spec, axis):
    """The values of a quantized matrix, float64."""
    qt = jaxq.quantize(x, spec, contracting=axis)
    return np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)


@pytest.mark.parametrize("name", NEAREST)
def test_products_are_those_of_the_quantized_operands(name):
    x, w, dy = arrays()
    recipe = RECIPES[name]
    forward, input_gradient, weight_gradient = (
        recipe.forward,
        recipe.input_gradient,
        recipe.weight_gradient,
    )
    expected = (
        rounded(x, forward.lhs, -1) @ rounded(w, forward.rhs, -2),
        rounded(dy, input_gradient.lhs, -1) @ rounded(w, input_gradient.rhs, -1).T,
        rounded(x, weight_gradient.lhs, -2).T @ rounded(dy, weight_gradient.rhs, -2),
    )
    for value, exact in zip(computed(name), expected, strict=True):
        assert relative_error(value, exact) < 1e-6


def test_int8_products_are_exact_integers():
    x, w, _ = arrays()
    x_codes = jaxq.quantize(x, "int8", contracting=-1)
    w_codes = jaxq.quantize(w, "int8", contracting=-2)
    sums = np.asarray(x_codes.codes(), np.int64) @ np.asarray(w_codes.codes(), np.int64)
    scaled = sums.astype(np.float32) * np.asarray(x_codes.scale)
    expected = scaled * np.asarray(w_codes.scale).T
    np.testing.assert_array_equal(computed("int8")[0], expected)


@pytest.mark.parametrize("name", STATELESS)
def test_operands_that_the_format_holds_are_exact(name):
    """Every block has the largest magnitude 6, and all numbers are in E2M1."""
    numbers = np.array([0, 0.5, 1, 2, 3, 4, 6, -6, -4, -1.5], np.float32)
    rng = np.random.default_rng(0)
    x, w = rng.choice(numbers, (16, 64)), rng.choice(numbers, (64, 32))
    x[:, ::8], w[::8] = 6, -6
    if name == "int8":
        x, w = np.trunc(x) * 127 / 6, np.trunc(w) * 127 / 6
        x, w = np.rint(x).astype(np.float32), np.rint(w).astype(np.float32)
        x[:, 0], w[0] = 127, 127
    elif name == "fp8":
        x[0, 0], w[0, 0] = 448, 448
    y = jax.jit(dot_of(name), static_argnums=2)(x, w, DIMS)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    assert relative_error(y, exact) < 1e-6


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_stochastic_gradients_are_unbiased(name):
    """The mean over keys of dx approaches the product with the float dy."""
    x, w, dy = (a[:16] for a in arrays())
    x, w, dy = x[:, :16], w[:, :32], dy[:, :32]
    recipe = RECIPES[name]

    @jax.jit
    @jax.vmap
    def gradient(key):
        product = functools.partial(training._low_precision_dot.multiply_arrays, recipe)
        _, pull_back = jax.vjp(lambda x: product(x, w, DIMS, key=key), x)
        return pull_back(dy)[0]

    draws = np.asarray(gradient(jax.random.split(KEY, 512)), np.float64)
    expected = float64(dy)[0] @ rounded(w, recipe.input_gradient.rhs, -1).T
    error_of_mean = draws.std(0) / np.sqrt(len(draws))
    assert (error_of_mean > 0).all()
    deviations = (draws.mean(0) - expected) / error_of_mean
    assert abs(deviations.mean()) < 4 / np.sqrt(deviations.size)
    assert 0.8 < deviations.std() < 1.2


def test_both_gradients_draw_their_own_random_numbers():
    # Each row and each column has the same numbers, so all scales are equal.
    row = np.asarray(jax.random.normal(jax.random.key(1), (32,)))
    dy = jnp.asarray(np.stack([np.roll(row, shift) for shift in range(32)]))
    identity = jnp.eye(32)
    _, dx, dw = three_products(dot_of("int8"), identity, identity, dy)
    step = float(jnp.max(jnp.abs(dy))) / 127
    np.testing.assert_allclose(dx, dy, atol=step)
    np.testing.assert_allclose(dw, dy, atol=step)
    assert (np.abs(dx - dw) > step / 2).mean() > 0.2


# What is compiled.


@pytest.mark.parametrize(
    ("name", "count"),
    [("fp8", 3), ("fp8_block", 5), ("int8", 6), ("mxfp8", 6), ("nvfp4", 5)],
)
def test_each_operand_is_quantized_once(name, count):
    """fp8 quantizes x, w and dy. Tiles serve both products with the weight."""
    text = str(
        jax.make_jaxpr(functools.partial(three_products, dot_of(name)))(*arrays())
    )
    assert text.count("name=quantize_operand") == count


OPERANDS = {
    "fp8": ["f8E4M3FN f8E4M3FN", "f8E5M2 f8E4M3FN", "f8E5M2 f8E4M3FN"],
    "int8": ["i8 i8"] * 3,
    # In the gradient of w, one group of 128 covers all 48 tokens.
    "fp8_block": ["bf16 bf16"] * 2 + ["f8E4M3FN f8E4M3FN"],
    "mxfp8": ["bf16 bf16"] * 3,
    "nvfp4": ["bf16 bf16"] * 3,
}


@pytest.mark.parametrize(
    ("name", "platform"),
    [(name, "cuda") for name in STATELESS] + [("fp8", "tpu"), ("int8", "cpu")],
)
def test_training_dots_have_narrow_operands(name, platform):
    dot = dot_of(name)

    @jax.jit
    def run(x, w, dy):
        y, pull_back = jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)
        return y, *pull_back(dy)

    lowered = run.trace(*arrays()).lower(lowering_platforms=(platform,))
    dots = []
    for line in lowered.as_text().splitlines():
        if "stablehlo.dot_general" not in line or f"x{K}x" not in line + "x":
            continue
        operands, result = line.rpartition(" : ")[2].split("->")
        dtypes = [part.split("x")[-1].rstrip(">) ") for part in operands.split(",")]
        accumulated = result.strip().split("x")[-1].rstrip(">")
        assert accumulated == ("i32" if dtypes[0] == "i8" else "f32")
        dots.append(" ".join(dtypes))
    assert sorted(d for d in dots if d != "f32 f32") == sorted(OPERANDS[name])


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_what_is_saved_for_the_backward_pass(name):
    """fp8 saves x and w as float8 numbers, nvfp4 saves the tiles of w."""
    dot = dot_of(name)
    x, w, _ = arrays()
    _, pull_back = jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)
    saved = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull_back)}
    if name == "fp8":
        assert ((K, M), "float8_e4m3fn") in saved
        assert ((K, N), "float8_e4m3fn") in saved
        assert not any(
            dtype == "float32" and len(shape) == 2 and shape[-1] > 1
            for shape, dtype in saved
        )
    else:
        assert ((K, N), "bfloat16") in saved


# Transformations.


def test_int8_bits_do_not_depend_on_jit():
    x, w, dy = arrays()
    y, pull_back = jax.vjp(lambda x, w: dot_of("int8")(x, w, DIMS), x, w)
    for eager, jitted in zip((y, *pull_back(dy)), computed("int8"), strict=True):
        np.testing.assert_array_equal(eager, jitted)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_remat_and_scan_compute_the_same_gradients(name):
    x, _, _ = arrays()
    weights = jax.random.normal(jax.random.key(5), (3, K, K)) / np.sqrt(K)
    dot = dot_of(name)

    def layer(x, w):
        return jnp.tanh(dot(x, w, DIMS)), None

    def plain(x, weights):
        for w in weights:
            x = layer(x, w)[0]
        return x.sum()

    def scanned(x, weights):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    expected = jax.jit(jax.grad(plain, (0, 1)))(x, weights)
    actual = jax.jit(jax.grad(scanned, (0, 1)))(x, weights)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_vmap_is_a_product_with_batch_axes():
    x = jax.random.normal(jax.random.key(1), (3, 8, 32))
    w = jax.random.normal(jax.random.key(2), (3, 32, 16))
    dot = dot_of("fp8")
    batched = dot(x, w, (((2,), (1,)), ((0,), (0,))))
    mapped = jax.vmap(lambda x, w: dot(x, w, DIMS))(x, w)
    np.testing.assert_array_equal(batched, mapped)
    np.testing.assert_array_equal(batched[1], dot(x[1], w[1], DIMS))


def test_any_axes_may_be_contracted():
    x = jax.random.normal(jax.random.key(1), (4, 6, 2, 8))
    w = jax.random.normal(jax.random.key(2), (2, 10, 8, 4))
    dims = (((3, 2), (2, 0)), ((0,), (3,)))
    dot = dot_of("mxfp8")
    y = dot(x, w, dims)
    exact = jax.lax.dot_general(x, w, dims)
    assert y.shape == exact.shape
    assert relative_error(y, np.asarray(exact, np.float64)) < 0.06
    dx = jax.grad(lambda x: jnp.sum(dot(x, w, dims) ** 2))(x)
    exact = jax.grad(lambda x: jnp.sum(jax.lax.dot_general(x, w, dims) ** 2))(x)
    assert relative_error(dx, np.asarray(exact, np.float64)) < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_and_gradients_keep_their_dtypes(dtype):
    x, w, dy = arrays(dtype)
    y, dx, dw = three_products(dot_of("fp8"), x, w, dy)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    y = dot_of("fp8")(x, w, DIMS, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32


# Recipes.


def test_a_product_without_specs_is_a_float_product():
    x, w, dy = arrays()
    floats = ProductSpec(None, None)
    int8 = ProductSpec(*[jaxq.QuantSpec("int8", jaxq.PerChannel())] * 2)
    recipe = LowPrecision(int8, floats, floats)
    y, dx, dw = three_products(training.dot_general(recipe), x, w, dy)
    exact = exact_products()
    assert relative_error(y, exact[0]) > 1e-3
    assert relative_error(dx, exact[1]) < 1e-6
    assert relative_error(dw, exact[2]) < 1e-6


@pytest.mark.parametrize("preset", ["nf4", "uint8", "int4", "fp6_e3m2", "mxint8"])
def test_every_preset_can_be_an_operand(preset):
    x, w, dy = arrays()
    spec = jaxq.presets()[preset]
    product = ProductSpec(spec, spec)
    recipe = LowPrecision(product, product, product)
    y, dx, dw = three_products(training.dot_general(recipe), x, w, dy)
    expected = (
        rounded(x, spec, -1) @ rounded(w, spec, -2),
        rounded(dy, spec, -1) @ rounded(w, spec, -1).T,
        rounded(x, spec, -2).T @ rounded(dy, spec, -2),
    )
    for value, exact in zip((y, dx, dw), expected, strict=True):
        assert relative_error(value, exact) < 1e-5


def test_a_rotation_leaves_the_product_unchanged():
    x, w, dy = arrays()
    floats = ProductSpec(None, None, hadamard=32)
    recipe = LowPrecision(floats, floats, floats)
    values = three_products(training.dot_general(recipe), x, w, dy)
    for value, exact in zip(values, exact_products(), strict=True):
        assert relative_error(value, exact) < 1e-5


def test_a_rotation_makes_an_outlier_smaller():
    """A rotated number is at most the norm of its block divided by sqrt(size)."""
    x = jnp.zeros((4, 64)).at[2, 5].set(8.0)
    rotated = training._low_precision_product._rotated(x, 16, -1, KEY)
    assert np.abs(rotated[2, :16]).tolist() == [2.0] * 16
    assert float(jnp.max(jnp.abs(rotated[2, 16:]))) == 0


def fp4_operand(four_over_six):
    """A recipe that quantizes only the input."""
    floats = ProductSpec(None, None)
    spec = RECIPES["nvfp4"].forward.lhs
    return LowPrecision(
        ProductSpec(spec, None), floats, floats, four_over_six=four_over_six
    )


def test_four_over_six_chooses_the_smaller_error():
    """Each block has the values of one of two roundings, the better one."""
    x = np.asarray(jax.random.normal(jax.random.key(3), (8, 64)))
    dot = training.dot_general(fp4_operand(four_over_six=True))
    y = np.asarray(dot(x, jnp.eye(64), DIMS))

    tensor_scale = np.abs(x).max() / (6 * 256)
    blocks = x.reshape(8, 4, 16)
    largest = np.abs(blocks).max(-1, keepdims=True)
    values, errors = [], []
    for target in (6, 4):
        scale = (largest / target / tensor_scale).astype(jnp.float8_e4m3fn)
        scale = scale.astype(np.float32) * tensor_scale
        numbers = (blocks / scale).astype(jnp.float4_e2m1fn).astype(np.float32) * scale
        values.append(numbers)
        errors.append(((numbers - blocks) ** 2).sum(-1, keepdims=True))
    better = np.where(errors[1] < errors[0], values[1], values[0])
    np.testing.assert_allclose(y, better.reshape(8, 64), rtol=1e-5, atol=1e-6)
    assert 0.1 < (errors[1] < errors[0]).mean() < 0.9


def test_four_over_six_keeps_zeros_and_nan():
    x = jnp.zeros((2, 32)).at[0, :16].set(3.0)
    dot = training.dot_general(fp4_operand(four_over_six=True))
    np.testing.assert_allclose(dot(x, jnp.eye(32), DIMS), x, rtol=1e-6)
    np.testing.assert_array_equal(dot(0 * x, jnp.eye(32), DIMS), 0 * x)
    assert jnp.isnan(dot(x.at[1, 1].set(jnp.nan), jnp.eye(32), DIMS)[1]).all()


# The published mean squared errors of N(0, 1), Quartet II (2026), times 1000.
PUBLISHED = {"nearest": 9.0, "four over six": 7.6, "tiles": 12.4, "stochastic": 23.5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_errors_of_fp4_are_the_published_ones(name):
    x = jax.random.normal(jax.random.key(0), (512, 1024))
    recipe = RECIPES["nvfp4"]
    spec = {
        "tiles": recipe.forward.rhs,
        "stochastic": recipe.input_gradient.lhs,
    }.get(name, recipe.forward.lhs)
    factors = training._factors.as_factors(
        x,
        spec,
        axis=-1,
        key=KEY if name == "stochastic" else None,
        four_over_six=name == "four over six",
    )
    values = float64(factors.numbers)[0] * float64(factors.scale)[0]
    error = np.mean((values - float64(x)[0]) ** 2) * 1000
    assert abs(error - PUBLISHED[name]) < 0.15


# Errors.


def test_recipes_with_state_or_random_numbers_are_refused():
    with pytest.raises(
        ValueError, match="delayed scaling needs a state.*low_precision"
    ):
        training.dot_general("fp8_delayed")
    with pytest.raises(ValueError, match="rounds stochastically.*low_precision"):
        training.dot_general("int8")
    with pytest.raises(ValueError, match="Omit key="):
        training.dot_general("fp8", key=KEY)
    with pytest.raises(ValueError, match="mxfp8"):
        training.dot_general("mxpf8")
    with pytest.raises(TypeError, match="recipe must be a name"):
        training.dot_general(8)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got int32"):
        dot_of("fp8")(jnp.ones((2, 4), jnp.int32), jnp.ones((4, 2)), DIMS)


def test_specs_are_checked():
    group = jaxq.QuantSpec("int8", jaxq.PerGroup(16, axis=0))
    with pytest.raises(ValueError, match="names an axis"):
        ProductSpec(group, None)
    with pytest.raises(TypeError, match="lhs must be a jaxq.QuantSpec"):
        ProductSpec("int8", None)
    with pytest.raises(ValueError, match="Hadamard"):
        ProductSpec(None, None, hadamard=6)
    with pytest.raises(ValueError, match="delayed scaling has one scale"):
        dataclasses.replace(RECIPES["int8"], delayed=training.DelayedScaling())
    with pytest.raises(ValueError, match="four_over_six=True is for"):
        dataclasses.replace(RECIPES["mxfp8"], four_over_six=True)


def test_equal_recipes_compile_once():
    x, w, _ = arrays()
    run = jax.jit(lambda dot, x, w: dot(x, w, DIMS), static_argnums=0)
    for _ in range(2):
        run(training.dot_general("int8", key=jax.random.key(3)), x, w)
    assert run._cache_size() == 1
    assert training.dot_general("fp8") == training.dot_general(RECIPES["fp8"])


# Delayed scaling.


def test_delayed_scaling_follows_the_worked_history():
    """The scales of Transformer Engine for E4M3, 448 / bound, with a history of 3."""
    scaling = training.DelayedScaling(length=3)
    state, scales = scaling.init(), []
    for amax in (1, 4, 2, 8, 1, 1, 1, 0, np.inf):
        state = scaling.update(state, jnp.float32(amax))
        scales.append(448 / float(state.bound))
    assert scales == [448, 112, 112, 56, 56, 56, 448, 448, 448]


def test_an_infinite_step_does_not_stop_the_scaling():
    scaling = training.DelayedScaling(length=4, margin=1)
    state = scaling.init()
    for amax in (2, np.inf, np.nan, 8):
        state = scaling.update(state, jnp.float32(amax))
    assert float(state.bound) == 16


def test_delayed_scaling_takes_the_maximum_over_devices():
    scaling = training.DelayedScaling(length=2, axis_name="data")
    x = jnp.array([[1.0, -2.0], [8.0, 0.5]])
    largest = jax.vmap(scaling.largest_magnitude, axis_name="data")(x)
    assert largest.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("field", ["length", "margin"])
def test_delayed_scaling_checks_its_fields(field):
    with pytest.raises(ValueError, match=f"{field} must be a whole number"):
        training.DelayedScaling(**{field: 0.5})
