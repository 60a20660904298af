"""float8 activations times a weight in a narrower format, such as int4."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxq
from jaxq import QuantSpec
from jaxq.kernels import is_exact_in_float8
from tests.arrays import normal_with_outliers
from tests.kernels.problems import error
from tests.kernels.products import lowered_for
from tests.tables import thinned

K, N = 512, 256
MATRIX = (((1,), (0,)), ((), ()))
WEIGHTS = {
    "int4": "int4",
    "one scale": QuantSpec("int4", jaxq.PerChannel()),
    "uint4": "uint4",
    "int3": "int3",
    "offset": QuantSpec("uint4", jaxq.PerGroup(64), offset="min"),
    "nf4": "nf4",
    "mxfp4": "mxfp4",
}
ONE_SCALE = {"token": jaxq.PerToken(), "tensor": jaxq.PerTensor()}


@functools.cache
def product_of(weight: str, fmt: str, granularity, dtype: str, m: int = 20):
    """x, a weight with an activation spec, and the float64 product of their codes."""
    x = normal_with_outliers(m, K, dtype=dtype)
    w = jaxq.quantize(normal_with_outliers(K, N, dtype=dtype, seed=1), WEIGHTS[weight])
    spec = QuantSpec(fmt, granularity)
    x8 = jaxq.quantize(x, spec, contracting=-1)
    return x, w.with_activation(spec), in_float64(x8) @ in_float64(w)


def in_float64(qt: jaxq.QTensor) -> np.ndarray:
    """The decoded numbers. float32 holds the product of a code and a scale closely."""
    return np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)


def multiply(x, w, dims=MATRIX):
    return jaxq.dot_general(x, w, dims, preferred_element_type=jnp.float32)


@pytest.mark.parametrize(
    ("weight", "fmt", "scale", "dtype"),
    thinned(
        itertools.product(
            WEIGHTS, ("float8_e4m3fn", "float8_e5m2"), ONE_SCALE, ("float32", "float16")
        ),
        [
            ("int4", "float8_e4m3fn", "token", "float32"),
            ("uint4", "float8_e5m2", "tensor", "float16"),
            ("nf4", "float8_e4m3fn", "token", "float32"),
            ("offset", "float8_e4m3fn", "token", "float32"),
        ],
    ),
)
def test_the_scale_of_the_activation_multiplies_the_result(weight, fmt, scale, dtype):
    x, w, expected = product_of(weight, fmt, ONE_SCALE[scale], dtype)
    plan = jaxq.explain(x, w)
    assert plan.path == "codes"
    assert "multiplies the result" in plan.reason
    rounds_weights = dtype == "float16" and weight in ("nf4", "offset")
    limit = 1e-3 if rounds_weights else 1e-6
    assert error(multiply(x, w), expected) < limit
    # The weight as the left operand.
    swapped = jaxq.explain(w.T, x.T)
    # A quantized activation is the left operand of the product of codes.
    assert (swapped.path, swapped.swapped) == ("codes", False)
    assert error(multiply(w.T, x.T), expected.T) < limit


def test_integer_weights_are_not_rounded_to_bfloat16():
    """A product of bfloat16 activations would round scaled weights."""
    x, w, expected = product_of("int4", "float8_e4m3fn", jaxq.PerToken(), "bfloat16")
    assert error(multiply(x, w), expected) < 1e-6
    x, w, expected = product_of("nf4", "float8_e4m3fn", jaxq.PerToken(), "bfloat16")
    assert 1e-4 < error(multiply(x, w), expected) < 5e-3


@pytest.mark.parametrize(
    ("platform", "weight", "m", "call"),
    [
        ("tpu", "int4", 20, "tpu_custom_call"),
        ("tpu", "mxfp4", 2048, "tpu_custom_call"),
        ("cuda", "int4", 20, "mosaic_gpu"),
        ("cuda", "uint4", 1024, "mosaic_gpu"),
        ("cuda", "nf4", 20, "mosaic_gpu"),
    ],
)
def test_the_kernel_of_the_weight_runs(platform, weight, m, call):
    x, w, _ = product_of(weight, "float8_e4m3fn", jaxq.PerToken(), "bfloat16", m)
    assert jaxq.explain(x, w, platform=platform).why_no_kernel is None
    text = lowered_for(platform, multiply, x, w)
    assert call in text
    assert "stablehlo.dot_general" not in text


def test_many_rows_and_one_scale_are_a_float8_product_of_xla():
    """An int4 weight is decoded to float8. The matrix unit multiplies float8 twice as
    fast as bfloat16."""
    x, w, _ = product_of("one scale", "float8_e4m3fn", jaxq.PerToken(), "bfloat16", 512)
    plan = jaxq.explain(x, w, platform="cuda")
    assert "512 or more rows" in plan.why_no_kernel
    text = lowered_for("cuda", multiply, x, w)
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 1
    assert dots[0].count("f8E4M3FN") == 2


@pytest.mark.parametrize("weight", ["int4", "nf4"])
def test_gradients_pass_straight_through(weight):
    x, w, _ = product_of(weight, "float8_e4m3fn", jaxq.PerToken(), "float32")

    def loss(x, w):
        return jnp.sum(jnp.sin(multiply(x, w)))

    bare = w.with_activation(None)
    dy = jnp.cos(multiply(x, w))
    dx, dw = jax.grad(loss, (0, 1), allow_int=True)(x, w)
    expected = jax.vjp(multiply, x, bare)[1](dy)
    np.testing.assert_allclose(dx, expected[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw.scale, expected[1].scale, rtol=1e-4, atol=1e-3)


def test_stacks_and_several_free_axes():
    x = normal_with_outliers(3, 2, 5, 64)
    w = normal_with_outliers(3, 64, 4, 8)
    qt = jaxq.quantize(w, "int4", contracting=1, batch=0).with_activation("fp8")
    y = jaxq.einsum("ebtk,ekhd->behtd", x, qt)
    for e in range(3):
        one = jax.tree.map(lambda leaf, e=e: leaf[e], qt)
        expected = jaxq.einsum("btk,khd->bhtd", x[e], one)
        np.testing.assert_allclose(y[:, e], expected, rtol=1e-5, atol=1e-5)


def test_a_symbolic_number_of_rows():
    x, w, expected = product_of("int4", "float8_e4m3fn", jaxq.PerToken(), "float32")
    (m,) = export.symbolic_shape("m")
    shape = jax.ShapeDtypeStruct((m, K), x.dtype)
    exported = export.export(jax.jit(lambda x: multiply(x, w)), platforms=["cpu"])
    assert error(exported(shape).call(x), expected) < 1e-6


def test_which_formats_float8_holds():
    exact = ("int2", "int4", "uint4", "float4_e2m1fn")
    assert all(is_exact_in_float8(jaxq.formats.get(name)) for name in exact)
    others = ("int8", "int5", "nf4", "float6_e2m3fn")
    assert [is_exact_in_float8(jaxq.formats.get(name)) for name in others] == [
        False,
        False,
        False,
        True,
    ]
