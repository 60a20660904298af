"""Operands of `jax.nn.scaled_matmul`: its formula on them gives jaxq's product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, PerGroup, PerTensor, QuantSpec
from jaxq.io import scaled_matmul_operand


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def by_formula(a, b) -> np.ndarray:
    """The formula in the docstring of `jax.nn.scaled_matmul`, in float64."""

    def floats(operand):
        codes = np.asarray(operand.codes, np.float64)
        block = codes.shape[-1] // operand.scales.shape[-1]
        scales = np.asarray(operand.scales, np.float64)
        values = codes * np.repeat(scales, block, axis=-1)
        return values * np.asarray(operand.global_scale, np.float64)

    return np.einsum("bmk,bnk->bmn", floats(a), floats(b))


DTYPES = {
    "mxfp8": ("float8_e4m3fn", "float8_e8m0fnu", 32),
    "mxfp8_e5m2": ("float8_e5m2", "float8_e8m0fnu", 32),
    "mxfp4": ("float4_e2m1fn", "float8_e8m0fnu", 32),
    "nvfp4": ("float4_e2m1fn", "float8_e4m3fn", 16),
}


@pytest.mark.parametrize("preset", DTYPES)
def test_the_product_is_that_of_jaxq(preset):
    codes, scales, block = DTYPES[preset]
    x = jaxq.quantize(normal(3, 5, 64), preset, contracting=-1, batch=(0,))
    w = jaxq.quantize(normal(3, 64, 8, seed=1), preset, contracting=-2, batch=(0,))
    a, b = scaled_matmul_operand(x), scaled_matmul_operand(w)
    assert (a.codes.dtype, a.scales.dtype) == (codes, scales)
    assert (a.codes.shape, a.scales.shape) == ((3, 5, 64), (3, 5, 64 // block))
    assert (b.codes.shape, b.scales.shape) == ((3, 8, 64), (3, 8, 64 // block))
    assert a.global_scale.shape == b.global_scale.shape == (3, 1, 1)
    product = by_formula(a, b)
    exact = np.asarray(jaxq.dequantize(x), np.float64) @ np.asarray(
        jaxq.dequantize(w), np.float64
    )
    # Numbers and scales are the same. Only NVFP4's two scales round once in float32.
    np.testing.assert_allclose(product, exact, rtol=1e-6, atol=1e-6)
    numbers = (((2,), (1,)), ((0,), (0,)))
    theirs = jaxq.dot_general(x, w, numbers, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", DTYPES)
def test_jax_computes_the_product(preset):
    x = jaxq.quantize(normal(32, 64), preset, contracting=-1)
    w = jaxq.quantize(normal(64, 32, seed=1), preset)

    @jax.jit
    def matmul(x, w):
        a, b = scaled_matmul_operand(x), scaled_matmul_operand(w)
        product = jax.nn.scaled_matmul(a.codes, b.codes, a.scales, b.scales)
        return product * a.global_scale * b.global_scale

    try:
        product = matmul(x, w)
    except NotImplementedError as error:
        pytest.skip(f"jax {jax.__version__} cannot run it here: {error}")
    np.testing.assert_allclose(product[0], x @ w, rtol=1e-5, atol=1e-5)


def test_axes_are_flattened():
    x = jaxq.quantize(normal(2, 3, 4, 64), "nvfp4", contracting=-1, batch=(0, 1))
    operand = scaled_matmul_operand(x)
    assert operand.codes.shape == (6, 4, 64)
    assert operand.global_scale.shape == (6, 1, 1)
    w = jaxq.quantize(normal(4, 16, 2, 3), "mxfp4", contracting=(0, 1))
    operand = scaled_matmul_operand(w)
    assert operand.codes.shape == (1, 6, 64)
    identity = scaled_matmul_operand(
        jaxq.quantize(jnp.eye(64), "mxfp4", contracting=-1)
    )
    rows = np.asarray(jaxq.dequantize(w)).reshape(64, 6)
    np.testing.assert_array_equal(by_formula(identity, operand)[0], rows)


def test_the_layout_for_tpu_kernels_is_no_obstacle():
    w = jaxq.quantize(normal(64, 8), "mxfp8")
    columns = scaled_matmul_operand(jaxq.relayout(w, "columns"))
    np.testing.assert_array_equal(columns.codes, scaled_matmul_operand(w).codes)


def test_what_is_no_operand():
    w = normal(64, 8)
    fp8, e8m0 = "float8_e4m3fn", "float8_e8m0fnu"
    cases = {
        "its format is none of": "int4",
        "its scales are float32": QuantSpec(fp8, PerGroup(32)),
        "its blocks are not groups along": QuantSpec(fp8, PerTensor(), scale=e8m0),
        "the last of its blocks of 48 is not full": QuantSpec(
            fp8, PerGroup(48, pad=True), scale=e8m0
        ),
        "its scales are quantized, but not to float8_e4m3fn": QuantSpec(
            fp8, PerGroup(32), scale=QuantSpec("uint4", PerChannel())
        ),
    }
    for reason, spec in cases.items():
        with pytest.raises(ValueError, match=f"cannot be an operand: {reason}"):
            scaled_matmul_operand(jaxq.quantize(w, spec))
    scaled = jaxq.quantize(w, "mxfp8").with_input_scale(jnp.full(64, 2.0))
    with pytest.raises(ValueError, match="an input_scale"):
        scaled_matmul_operand(scaled)
    with pytest.raises(TypeError, match="expected a QTensor, got Array"):
        scaled_matmul_operand(w)
