"""Convolution with quantized kernels: exact sums of codes, or floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import PerTensor, QuantSpec, sharding
from jaxq.ops import plan_conv
from tests import tables
from tests.arrays import normal_with_outliers
from tests.ops.reference import ROUNDOFF, dots, with_codes

# Flax's order: batch, spatial, feature; kernels [*window, in, out].
NUMBERS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
# name: (x, kernel, options)
CASES = {
    "1d": ((2, 20, 6), (3, 6, 8), {"window_strides": (1,), "padding": "SAME"}),
    "2d": ((2, 9, 10, 6), (3, 2, 6, 8), {"window_strides": (1, 1), "padding": "VALID"}),
    "3d": (
        (1, 5, 6, 4, 3),
        (2, 3, 2, 3, 4),
        {"window_strides": (1, 1, 1), "padding": "SAME"},
    ),
    "strided": (
        (2, 9, 10, 6),
        (3, 3, 6, 8),
        {"window_strides": (2, 3), "padding": [(1, 2), (0, 1)]},
    ),
    "dilated": (
        (2, 9, 10, 6),
        (3, 3, 6, 8),
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    ),
    "stretched": (
        (2, 5, 6, 6),
        (3, 3, 6, 8),
        {"window_strides": (1, 1), "padding": [(2, 2), (2, 2)], "lhs_dilation": (2, 2)},
    ),
    "grouped": (
        (2, 9, 10, 6),
        (3, 3, 2, 9),
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 3},
    ),
    "depthwise": (
        (2, 20, 6),
        (3, 1, 12),
        {"window_strides": (1,), "padding": "SAME", "feature_group_count": 6},
    ),
}


def prepared(case: str):
    x_shape, k_shape, options = CASES[case]
    numbers = NUMBERS[len(x_shape) - 2]
    return (
        normal_with_outliers(*x_shape),
        normal_with_outliers(*k_shape, seed=1),
        {**options, "dimension_numbers": numbers},
    )


def all_but(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(-ndim, 0) if a != axis)


WEIGHTS = [(preset, case) for preset in ("int8", "nf4_dq", "fp8") for case in CASES]


@pytest.mark.parametrize(
    ("preset", "case"),
    tables.thinned(
        WEIGHTS, [("int8", "3d"), ("fp8", "grouped"), ("nf4_dq", "strided")]
    ),
)
def test_weight_only(preset, case):
    x, kernel, options = prepared(case)
    qt = jaxq.quantize(kernel, preset, contracting=all_but(kernel.ndim, -1))

    @jax.jit
    def both(x, qt):
        expected = lax.conv_general_dilated(x, jaxq.dequantize(qt), **options)
        return jaxq.ops.conv_general_dilated(x, qt, **options), expected

    y, expected = both(x, qt)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", tables.thinned(CASES, ["stretched", "grouped"]))
def test_integer_sums_are_exact(case):
    x, kernel, options = prepared(case)
    qx = jaxq.quantize(x, "int8", contracting=all_but(x.ndim, -x.ndim))
    qk = jaxq.quantize(kernel, "int8", contracting=all_but(kernel.ndim, -1))
    rng = np.random.default_rng(0)
    qx = with_codes(qx, rng.integers(-127, 128, qx.data.shape))
    qk = with_codes(qk, rng.integers(-127, 128, qk.data.shape))

    def conv(x, kernel):
        return jaxq.ops.conv_general_dilated(x, kernel, **options)

    assert dots(conv, qx, qk) == [("int8", "int8", "int32")]
    with jax.enable_x64(True):
        wide = [np.asarray(q.codes()).astype(np.float64) for q in (qx, qk)]
        exact = np.asarray(lax.conv_general_dilated(*wide, **options))
    assert abs(exact).max() > 1000
    np.testing.assert_array_equal(jax.jit(conv)(qx, qk), exact)


@pytest.mark.parametrize("case", tables.thinned(CASES, ["1d", "grouped"]))
def test_scales_of_examples_and_channels(case):
    x, kernel, options = prepared(case)
    x = x * jnp.exp2(jnp.arange(x.shape[0], dtype=x.dtype)).reshape(
        -1, *[1] * (x.ndim - 1)
    )
    kernel = kernel * jnp.exp2(jnp.arange(kernel.shape[-1], dtype=x.dtype)).reshape(
        *[1] * (kernel.ndim - 1), -1
    )
    qk = jaxq.quantize(kernel, "int8", contracting=all_but(kernel.ndim, -1))
    for spec in ("int8", QuantSpec("int8", PerTensor())):
        qx = jaxq.quantize(x, spec, contracting=all_but(x.ndim, -x.ndim))
        y = jaxq.ops.conv_general_dilated(qx, qk, **options)
        expected = lax.conv_general_dilated(
            jaxq.dequantize(qx), jaxq.dequantize(qk), **options
        )
        np.testing.assert_allclose(
            y, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max())
        )


def test_batch_groups():
    x, kernel = normal_with_outliers(4, 8, 3), normal_with_outliers(3, 3, 6)
    options = {
        "window_strides": (1,),
        "padding": "SAME",
        "dimension_numbers": ("NHC", "HIO", "NHC"),
    }
    for spec, ends in (
        ("int8", {}),
        (QuantSpec("int8", PerTensor()), {}),
        ("int8", {"bounds": (-20.0, 20.0)}),
    ):
        qt = jaxq.quantize(kernel, "int8", contracting=(-3, -2)).with_activation(
            spec, **ends
        )
        y = jaxq.ops.conv_general_dilated(x, qt, **options, batch_group_count=2)
        expected = lax.conv_general_dilated(x, kernel, **options, batch_group_count=2)
        assert y.shape == expected.shape == (2, 8, 6)
        assert np.abs(y - expected).max() < 0.04 * np.abs(expected).max()


def test_pytorch_order():
    x, kernel = normal_with_outliers(2, 6, 9, 10), normal_with_outliers(8, 6, 3, 3)
    qx, qk = (
        jaxq.quantize(x, "int8", contracting=(-3, -2, -1)),
        jaxq.quantize(kernel, "int8", contracting=(-3, -2, -1)),
    )
    y = jaxq.ops.conv_general_dilated(qx, qk, (1, 1), "SAME")
    expected = lax.conv_general_dilated(
        jaxq.dequantize(qx), jaxq.dequantize(qk), (1, 1), "SAME"
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert dots(
        lambda a, b: jaxq.ops.conv_general_dilated(a, b, (1, 1), "SAME"), qx, qk
    ) == [("int8", "int8", "int32")]


def reason(x, kernel) -> str:
    return plan_conv(x, kernel, channel=kernel.ndim - 1).reason


def test_reasons_for_a_convolution_of_floats():
    x, kernel = normal_with_outliers(2, 20, 6), normal_with_outliers(3, 6, 8)
    qx = jaxq.quantize(x, "int8", contracting=(-2, -1))
    qk = jaxq.quantize(kernel, "int8", contracting=(-3, -2))
    assert reason(qx, qk) == "int8 x int8 convolution of codes"
    assert "not in symmetric integers" in reason(
        jaxq.quantize(x, "uint8", contracting=(-2, -1)), qk
    )
    assert "not in symmetric integers" in reason(
        qx, jaxq.quantize(kernel, "fp8", contracting=(-3, -2))
    )
    assert "several scales" in reason(
        qx,
        jaxq.quantize(
            kernel, QuantSpec("int8", jaxq.PerGroup(9)), contracting=(-3, -2)
        ),
    )
    assert "scales along axes" in reason(jaxq.quantize(x, "int8", contracting=-1), qk)
    long = jax.eval_shape(
        lambda w: jaxq.quantize(w, "int8", contracting=(-3, -2)),
        jax.ShapeDtypeStruct((9, 16384, 2), jnp.float32),
    )
    assert "may exceed int32" in reason(qx, long)
    # The fallback is a convolution of floats.
    tokens = jaxq.quantize(x, "int8", contracting=-1)
    options = {
        "window_strides": (1,),
        "padding": "SAME",
        "dimension_numbers": NUMBERS[1],
    }
    expected = lax.conv_general_dilated(
        jaxq.dequantize(tokens), jaxq.dequantize(qk), **options
    )
    np.testing.assert_allclose(
        jaxq.ops.conv_general_dilated(tokens, qk, **options),
        expected,
        rtol=1e-5,
        atol=1e-4,
    )


def test_sums_beyond_int32_are_computed_in_floats():
    # 147,456 products of 127 * 127: int32 would wrap.
    options = {
        "window_strides": (1,),
        "padding": "VALID",
        "dimension_numbers": NUMBERS[1],
    }
    x = jaxq.quantize(jnp.ones((1, 9, 16384)), "int8", contracting=(-2, -1))
    kernel = jaxq.quantize(jnp.ones((9, 16384, 1)), "int8", contracting=(-3, -2))
    y = jaxq.ops.conv_general_dilated(x, kernel, **options)
    np.testing.assert_allclose(y, np.full((1, 1, 1), 9 * 16384), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype):
    x, kernel, options = prepared("2d")
    qt = jaxq.quantize(kernel, "int8", contracting=all_but(4, -1)).astype(dtype)
    y = jaxq.ops.conv_general_dilated(x.astype(dtype), qt, **options)
    assert y.dtype == jnp.dtype(dtype)
    wide = jaxq.ops.conv_general_dilated(
        x.astype(dtype), qt, **options, preferred_element_type=jnp.float32
    )
    assert wide.dtype == jnp.float32
    floats = x.astype(dtype).astype(jnp.float32), jaxq.dequantize(qt, dtype=jnp.float32)
    expected = lax.conv_general_dilated(*floats, **options)
    size = lax.conv_general_dilated(*(abs(v) for v in floats), **options)
    assert np.all(
        abs(wide - expected) <= 1.01 * ROUNDOFF[dtype] * size
    )  # the kernel is rounded to dtype
    assert np.all(
        abs(y.astype(jnp.float32) - wide) <= 1.01 * ROUNDOFF[dtype] * abs(wide)
    )


@pytest.mark.parametrize("case", ["1d", "strided", "grouped"])
def test_dynamic_activation_quantization(case):
    x, kernel, options = prepared(case)
    qk = jaxq.quantize(kernel, "int8", contracting=all_but(kernel.ndim, -1))
    dynamic = qk.with_activation("int8")

    def conv(x, kernel):
        return jaxq.ops.conv_general_dilated(x, kernel, **options)

    explicit = conv(jaxq.quantize(x, "int8", contracting=all_but(x.ndim, -x.ndim)), qk)
    np.testing.assert_array_equal(conv(x, dynamic), explicit)
    assert dots(conv, x, dynamic) == [("int8", "int8", "int32")]
    dy = normal_with_outliers(*explicit.shape, seed=3)
    dynamic_gradients, float_gradients = (
        jax.jit(
            jax.grad(
                lambda x, k: jnp.sum(dy * conv(x, k)), argnums=(0, 1), allow_int=True
            )
        )(x, k)
        for k in (dynamic, qk)
    )
    np.testing.assert_allclose(
        dynamic_gradients[0], float_gradients[0], rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(
        dynamic_gradients[1].scale, float_gradients[1].scale, rtol=1e-4, atol=1e-2
    )


def test_gradients_of_weight_only():
    x, kernel, options = prepared("2d")
    qk = jaxq.quantize(kernel, "int8", contracting=all_but(4, -1))

    def loss(x, k):
        return jnp.sum(jaxq.ops.conv_general_dilated(x, k, **options) ** 2)

    def plain(x, k):
        return jnp.sum(lax.conv_general_dilated(x, jaxq.dequantize(k), **options) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, qk)
    expected = jax.grad(plain, argnums=(0, 1), allow_int=True)(x, qk)
    np.testing.assert_allclose(gradients[0], expected[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradients[1].scale, expected[1].scale, rtol=1e-4)


def test_operands_that_do_not_fit():
    with pytest.raises(TypeError, match="rhs must be a QTensor"):
        jaxq.ops.conv_general_dilated(
            jnp.ones((1, 4, 2)), jnp.ones((2, 2, 2)), (1,), "SAME"
        )
    qk = jaxq.quantize(normal_with_outliers(3, 6, 8), "int8", contracting=(-3, -2))
    with pytest.raises(
        TypeError, match="lhs must be a float32, .* or a QTensor, got int32"
    ):
        jaxq.ops.conv_general_dilated(
            jnp.ones((2, 20, 6), jnp.int32),
            qk,
            (1,),
            "SAME",
            dimension_numbers=NUMBERS[1],
            preferred_element_type=jnp.float32,
        )


@pytest.mark.parametrize("activation", [None, "int8"])
def test_a_convolution_mapped_over_a_mesh_axis(activation):
    images, kernel = (
        normal_with_outliers(4, 2, 6, 6, 8),
        normal_with_outliers(3, 3, 8, 16, seed=2),
    )
    qk = jaxq.quantize(kernel, "int8", contracting=(0, 1, 2))
    qk = qk.with_activation(activation)

    def gradient(images, qk):
        def convolve(x):
            return jaxq.ops.conv_general_dilated(
                x, qk, (1, 1), "SAME", dimension_numbers=NUMBERS[2]
            )

        return jax.grad(lambda x: jnp.sum(jax.vmap(convolve)(x)))(images)

    expected = np.asarray(jax.jit(gradient)(images, qk))
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    images = jax.device_put(images, NamedSharding(mesh, P("d")))
    qk = sharding.place(qk, mesh, P(None, None, None, "t"))
    dx = jax.jit(gradient)(images, qk)
    assert dx.sharding.spec[0] == "d"
    np.testing.assert_allclose(np.asarray(dx), expected, rtol=1e-5, atol=1e-4)
