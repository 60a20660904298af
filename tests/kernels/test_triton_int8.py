"""int8 activations on GPU: w8a8 with weights in groups, and w4a8."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.kernels import _triton_int8 as kernel
from tests.kernels.problems import error, for_kernel, operands, problem
from tests.kernels.products import bfloat16, lowered_for
from tests.tables import thinned


def int8_problem(codes="int4", group=64, **other):
    unit = group if codes == "int4" else None
    facts = {"k": 256, "n": 72, "out_dtype": "float32", "x_dtype": "int8"}
    return problem(codes, group=group, unit=unit, **(facts | other))


@pytest.mark.parametrize(
    ("codes", "group", "m"),
    thinned(
        itertools.product(("int4", "int8"), (64, 128, 256), (5, 70)),
        [("int4", 64, 5), ("int8", 128, 5), ("int4", 256, 70)],
    ),
)
def test_against_float64(codes, group, m):
    p = int8_problem(codes, group, m=m, e=2)
    assert kernel.why_not(p, "NVIDIA A100-SXM4-40GB") is None
    arrays, expected = operands(p, powers_of_two=True)
    tiles = kernel.default_tiles(p, None)
    arrays = for_kernel(kernel, arrays)
    y = kernel.matmul(*arrays, problem=p, tiles=tiles, interpret=True)
    np.testing.assert_array_equal(y, expected)  # int32 sums are exact


@pytest.mark.parametrize("codes", ["int4", "int8"])
def test_one_scale_multiplies_an_int32_sum(codes):
    """Scales are no powers of two, so a sum of scaled parts would be rounded."""
    k = 4096
    p = int8_problem(codes, group=k, k=k, n=24, m=5)
    (x, data, scale, *others), scaled = operands(p)
    ones, sums = operands(dataclasses.replace(p, scale_dtype=None))
    np.testing.assert_array_equal(data, ones[1])
    arrays = for_kernel(kernel, [x, data, scale, *others])
    tiles = kernel.default_tiles(p, None)
    y = kernel.matmul(*arrays, problem=p, tiles=tiles, interpret=True)
    expected = sums.astype(np.float32) * np.asarray(scale)
    np.testing.assert_array_equal(y, expected)
    assert error(y, scaled) < 1e-7


def test_an_index_reads_a_stack_in_place():
    p = int8_problem(m=3, e=3)
    (x, data, *leaves), expected = operands(p)
    order = jnp.array([2, 0, 1], jnp.int32)
    stack = jnp.zeros_like(data).at[order].set(data)
    arrays = for_kernel(kernel, [x, stack, *leaves])
    tiles = kernel.default_tiles(p, None)
    y = kernel.matmul(*arrays, problem=p, tiles=tiles, index=order, interpret=True)
    assert error(y, expected) < 1e-6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x_dtype": "bfloat16"}, "takes int8 x"),
        ({"scale_dtype": None}, "weights with scales"),
        ({"layout": "columns"}, "columns"),
        ({"signed": False}, "symmetric signed integers"),
        ({"zero_point": True}, "symmetric signed integers"),
        ({"m": 0}, "empty"),
        ({"k": 200}, "not full"),
        ({"unit": 32}, "one HALVES unit"),
        ({"group": 32, "unit": 32}, "multiple of 64 int4"),
    ],
)
def test_why_not_names_the_reason(changes, reason):
    p = int8_problem()
    assert kernel.why_not(p, None) is None
    assert reason in kernel.why_not(dataclasses.replace(p, **changes), None)


PRODUCTS = {
    "w8a8 in groups": jaxq.QuantSpec("int8", jaxq.PerGroup(128)),
    "w4a8 in groups": "int4",
    "w4a8 with one scale": jaxq.QuantSpec("int4", jaxq.PerChannel()),
}


@pytest.mark.parametrize("m", [16, 600])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_the_kernel(name, m):
    w = jaxq.quantize(jnp.ones((512, 128), jnp.bfloat16), PRODUCTS[name])
    w = w.with_activation("int8")
    x = bfloat16(m, 512)
    plan = jaxq.explain(x, w, platform="cuda")
    assert (plan.kernel, plan.why_no_kernel) == ("triton_int8", None)
    text = lowered_for("cuda", jaxq.matmul, x, w)
    assert "jaxq_codes_matmul" in text
    assert "stablehlo.dot_general" not in text


def test_the_product_is_that_of_plain_xla():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-127, 128, (20, 512)), jnp.int8)
    w = jnp.asarray(rng.normal(size=(512, 72)), jnp.float32)
    qt = jaxq.quantize(w, "int4")
    multiply = jax.jit(
        lambda **options: jaxq.kernels.quantized_matmul(
            x, qt.data, qt.scale, group_size=128, **options
        ),
        static_argnames=("backend", "interpret"),
    )
    y = multiply(backend="triton_int8", interpret=True)
    assert error(y, np.asarray(multiply(backend="xla"), np.float64)) < 1e-6
