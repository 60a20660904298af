"""Every preset in every place of a product, against a float64 product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from tests import tables
from tests.arrays import normal_with_outliers
from tests.ops.reference import assert_product, dots, double

# One preset for each way to store numbers: scales of channels, groups, flat blocks or
# the tensor; quantized scales; zero points; whole bytes, halves of bytes, a stream of
# bits. These presets take every case below, the others the first few.
KINDS = ("int3", "int8", "nf4_dq", "nvfp4", "ternary", "uint4")


def x_first(subscripts):
    return lambda m, x, w: m.einsum(subscripts, x, w)


def w_first(subscripts):
    return lambda m, x, w: m.einsum(subscripts, w, x)


# name: (weight, shape of the other operand, product of x and weight, terms of a sum).
# `m` is numpy or jaxq.
# numpy and QTensor both have `.T`. 288 is not a multiple of 64, 128 or 256.
CASES = {
    "2d": ("matrix", (5, 288), lambda m, x, w: x @ w, 288),
    "left_1d": ("matrix", (288,), lambda m, x, w: w.T @ x, 288),
    "stack": ("stack", (3, 5, 288), lambda m, x, w: x @ w, 288),
    "transposed": ("matrix", (5, 24), lambda m, x, w: x @ w.T, 24),
    # The following cases are only for KINDS.
    "qkv_moved": ("qkv", (2, 5, 288), x_first("btd,dhk->bhtk"), 288),
    "attention_output": ("heads", (2, 5, 2, 144), x_first("bthk,hkd->btd"), 288),
    "3d": ("matrix", (2, 3, 288), lambda m, x, w: x @ w, 288),
    "1d": ("matrix", (288,), lambda m, x, w: x @ w, 288),
    "left": ("matrix", (288, 5), lambda m, x, w: w.T @ x, 288),
    "row": ("row", (5, 288), lambda m, x, w: x @ w, 288),
    "stack_left": ("stack", (3, 5, 288), w_first("lkn,lmk->lnm"), 288),
    "qkv": ("qkv", (2, 5, 288), x_first("btd,dhk->bthk"), 288),
    "output_left": ("heads", (5, 2, 144), w_first("hkd,thk->dt"), 288),
    "transposed_1d": ("matrix", (24,), lambda m, x, w: x @ w.T, 24),
    "transposed_left": ("matrix", (24, 5), lambda m, x, w: w @ x, 24),
    "transposed_stack": ("stack", (3, 5, 24), x_first("lmn,lkn->lmk"), 24),
    "transposed_qkv": ("qkv", (5, 2, 12), x_first("thk,dhk->td"), 24),
    "transposed_heads": ("heads", (5, 24), x_first("td,hkd->thk"), 24),
    "one_kept_axis": ("qkv", (5, 12), x_first("tk,dhk->tdh"), 12),
    "one_contracted_axis": ("heads", (5, 2), x_first("th,hkd->tkd"), 2),
}
FIRST = tuple(CASES)[:4]
REST = tuple(CASES)[4:]
EVERYWHERE = [
    (preset, case)
    for preset in jaxq.presets()
    for case in (CASES if preset in KINDS else FIRST)
]
DEFAULT = [
    (preset, case)
    for preset, case in EVERYWHERE
    if (preset in ("uint4", "nvfp4", "ttq") and case in FIRST) or preset == "nf4_dq"
]


@functools.cache
def weights(preset: str) -> dict[str, jaxq.QTensor]:
    layers = [
        jaxq.quantize(normal_with_outliers(288, 24, seed=i), preset) for i in range(3)
    ]
    qtensors = {
        "matrix": layers[0],
        "stack": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
    }
    if preset in KINDS:
        qtensors["heads"] = jaxq.quantize(
            normal_with_outliers(2, 144, 24), preset, contracting=(-3, -2)
        )
        qtensors["qkv"] = layers[0].reshape(288, 2, 12)
        qtensors["row"] = jaxq.quantize(normal_with_outliers(288), preset)
    return qtensors


@functools.cache
def numbers(preset: str) -> dict[str, np.ndarray]:
    values = jax.jit(
        lambda qts: {name: jaxq.dequantize(qt) for name, qt in qts.items()}
    )(weights(preset))
    return {name: double(value) for name, value in values.items()}


def other(case: str) -> jax.Array:
    return normal_with_outliers(*CASES[case][1], seed=1)


@functools.cache
def products(preset: str, cases: tuple[str, ...]) -> dict[str, jax.Array]:
    def multiplied(qts, xs):
        return {
            case: CASES[case][2](jaxq, x, qts[CASES[case][0]]) for case, x in xs.items()
        }

    return jax.jit(multiplied)(weights(preset), {case: other(case) for case in cases})


def jitted_product(preset: str, case: str) -> jax.Array:
    return products(preset, FIRST if case in FIRST else REST)[case]


@pytest.mark.parametrize(("preset", "case"), tables.thinned(EVERYWHERE, DEFAULT))
def test_every_preset_everywhere(preset, case):
    weight, _, product, terms = CASES[case]
    y = jitted_product(preset, case)
    assert_product(
        y, functools.partial(product, np), other(case), numbers(preset)[weight], terms
    )


EAGER = [(preset, case) for preset in ("int8", "nf4_dq") for case in CASES]


@pytest.mark.parametrize(
    ("preset", "case"),
    tables.thinned(
        EAGER,
        [("nf4_dq", case) for case in ("2d", "stack", "qkv", "left")],
    ),
)
def test_eager_equals_jitted(preset, case):
    weight, _, product, _ = CASES[case]
    eager, jitted = (
        product(jaxq, other(case), weights(preset)[weight]),
        jitted_product(preset, case),
    )
    np.testing.assert_allclose(
        eager, jitted, rtol=1e-5, atol=1e-5 * float(jnp.abs(jitted).max())
    )


DTYPE_CASES = [
    ("float32", "float32", None, "float32"),
    ("bfloat16", "bfloat16", None, "bfloat16"),
    ("bfloat16", "bfloat16", "float32", "float32"),
    ("float16", "float16", None, "float16"),
    ("float16", "float16", "float32", "float32"),
    ("float32", "float32", "bfloat16", "bfloat16"),
]


TYPED = [
    (preset, case, *dtypes)
    for preset in ("int8", "uint4")
    for case in ("2d", "1d", "left", "stack", "transposed_left", "one_kept_axis")
    for dtypes in DTYPE_CASES
]


@pytest.mark.parametrize(
    ("preset", "case", "x_dtype", "w_dtype", "preferred", "result"),
    tables.thinned(
        TYPED,
        [
            row
            for i, row in enumerate(TYPED)
            if row[:2] == ("int8", "2d")
            or (row[:2] in (("int8", "left"), ("uint4", "stack")) and i % 2)
        ],
    ),
)
def test_dtypes(preset, case, x_dtype, w_dtype, preferred, result):
    weight, _, product, terms = CASES[case]
    x, qt = other(case).astype(x_dtype), weights(preset)[weight].astype(w_dtype)

    class Preferring:
        @staticmethod
        def einsum(*args):
            return jaxq.einsum(*args, preferred_element_type=preferred)

    if preferred is not None and case not in ("stack", "one_kept_axis"):
        sides = {
            "left": (qt.T, x),
            "transposed": (x, qt.T),
            "transposed_left": (qt, x),
        }.get(case, (x, qt))
        y = jaxq.matmul(*sides, preferred_element_type=preferred)
    elif preferred is not None and case == "stack":
        y = jaxq.matmul(x, qt, preferred_element_type=preferred)
    else:
        y = product(Preferring, x, qt)
    assert_product(
        y,
        functools.partial(product, np),
        x,
        numbers(preset)[weight],
        terms,
        weights=x_dtype,
        dtype=result,
    )


def test_results_promote_as_lax_and_numpy_say(standard_promotion):
    for a in ("float32", "bfloat16", "float16"):
        for b in ("float32", "bfloat16", "float16"):

            def products(x, w):
                qt = jaxq.quantize(w, "int8")
                return x @ qt, qt.T @ x.T, jaxq.quantize(x, "int8", contracting=-1) @ qt

            results = jax.eval_shape(
                products,
                jax.ShapeDtypeStruct((2, 32), a),
                jax.ShapeDtypeStruct((32, 3), b),
            )
            assert {y.dtype for y in results} == {jnp.promote_types(a, b)}


def test_arrays_alone_are_lax():
    x, w = normal_with_outliers(5, 32), normal_with_outliers(32, 7)
    dims = (((1,), (0,)), ((), ()))
    np.testing.assert_array_equal(
        jaxq.dot_general(x, w, dims), lax.dot_general(x, w, dims)
    )
    half = x.astype("bfloat16"), w.astype("bfloat16")
    y = jaxq.dot_general(*half, dims)
    assert_product(y, np.matmul, *half, 32, dtype="bfloat16")
    assert dots(lambda a, b: jaxq.dot_general(a, b, dims), *half) == [
        ("bfloat16", "bfloat16", "float32")
    ]
    codes = jnp.full((3, 64), 100, jnp.int8)
    y = jaxq.dot_general(
        codes, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    assert y.dtype == jnp.int32
    assert (y == 640000).all()


@pytest.mark.parametrize("preset", ["int8", "fp8", "nf4"])
def test_empty_operands(preset):
    qt = jaxq.quantize(normal_with_outliers(32, 8), preset)
    assert (jnp.zeros((0, 32)) @ qt).shape == (0, 8)
    assert (jnp.zeros((0, 8)) @ qt.T).shape == (0, 32)
    assert (jaxq.quantize(jnp.zeros((0, 32)), preset, contracting=-1) @ qt).shape == (
        0,
        8,
    )
    none = jaxq.quantize(jnp.zeros((32, 0)), preset)
    assert (jnp.ones((3, 32)) @ none).shape == (3, 0)
    np.testing.assert_array_equal(jnp.ones((3, 0)) @ none.T, jnp.zeros((3, 32)))
    empty = jaxq.quantize(jnp.zeros((0, 8)), preset)
    np.testing.assert_array_equal(jnp.ones((3, 0)) @ empty, jnp.zeros((3, 8)))


def test_errors_of_operands_that_do_not_fit():
    qt = jaxq.quantize(normal_with_outliers(32, 8), "int8")
    with pytest.raises(
        TypeError,
        match=r"axes \[1\] of \[2, 31\] and \[0\] of \[32, 8\] differ in size",
    ):
        jnp.ones((2, 31)) @ qt
    stack = jaxq.quantize(
        normal_with_outliers(3, 32, 8), "int8", contracting=-2, batch=0
    )
    with pytest.raises(TypeError, match="batch axes"):
        jaxq.dot_general(jnp.ones((2, 5, 32)), stack, (((2,), (1,)), ((0,), (0,))))
    for x in (
        jnp.ones((2, 32), jnp.int32),
        np.ones((2, 32), np.int8),
        jnp.ones((2, 32), bool),
    ):
        with pytest.raises(
            TypeError, match="Pass floats, or quantize this operand as well"
        ):
            jaxq.matmul(x, qt)
    with pytest.raises(TypeError, match="Pass floats"):
        jaxq.matmul(qt.T, jnp.ones((32, 2), jnp.int32))
    for weight in (
        qt,
        qt.with_activation("int8"),
    ):  # neither product is computed in float64
        with (
            jax.enable_x64(True),
            pytest.raises(TypeError, match=r"float64\[2,32\].*astype\(jnp.float32\)"),
        ):
            jnp.ones((2, 32), jnp.float64) @ weight
        with (
            jax.enable_x64(True),
            pytest.raises(
                TypeError, match="must be float32 or a narrower float, got float64"
            ),
        ):
            jaxq.matmul(
                jnp.ones((2, 32), jnp.float32),
                weight,
                preferred_element_type=jnp.float64,
            )
        for product in (
            lambda x, w: x @ w,
            jaxq.matmul,
            lambda x, w: jaxq.einsum("mk,kn->mn", x, w),
        ):
            with pytest.raises(
                TypeError, match=r"float64\[2,32\].*astype\(jnp.float32\)"
            ):
                product(np.full((2, 32), 1e300), weight)


def test_numpy_arrays_and_lists_on_either_side():
    qt = jaxq.quantize(normal_with_outliers(32, 8), "int8")
    x = np.asarray(normal_with_outliers(2, 32))
    expected = jnp.asarray(x) @ qt
    for y in (
        x @ qt,
        jaxq.matmul(x, qt),
        jaxq.dot_general(x, qt, (((1,), (0,)), ((), ()))),
    ):
        assert isinstance(y, jax.Array)
        np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(qt.T @ x.T, jaxq.matmul(qt.T, jnp.asarray(x.T)))
    np.testing.assert_array_equal(jaxq.matmul(x.tolist(), qt), expected)


@pytest.mark.parametrize("preset", tables.thinned(["int4", "mxfp4"], ["int4"]))
def test_64_bit_types_may_be_on(preset):
    x, w = normal_with_outliers(3, 64), normal_with_outliers(64, 8)

    @jax.jit
    def products(x, qt):
        return x @ qt, qt.T @ x.T, x @ qt.with_activation(jaxq.presets()["int8"])

    expected, _, dynamic = products(x, jaxq.quantize(w, preset))
    with jax.enable_x64(True):
        qt = jaxq.quantize(w, preset)
        y, turned, again = products(x, qt)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.asarray(y).T, turned, rtol=1e-5, atol=1e-5)
        assert jax.jit(jax.grad(lambda x: jnp.sum(x @ qt)))(x).shape == x.shape
        np.testing.assert_allclose(again, dynamic, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(x @ qt, y)  # eager too


@jax.jit
def wider_products(x, y, qt):
    return x @ qt, qt.T @ x.T, y @ qt.T


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
@pytest.mark.parametrize("preset", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wider_weight_is_not_rounded_to_a_narrow_operand(
    standard_promotion, dtype, preset, size
):
    x, qt = (
        normal_with_outliers(4, 256, dtype=dtype),
        jaxq.quantize(normal_with_outliers(256, 64) * size, preset),
    )
    y = normal_with_outliers(4, 64, dtype=dtype)
    right, left, turned = wider_products(x, y, qt)
    assert_product(right, np.matmul, x, qt, 256)
    assert_product(left, np.matmul, qt.T, x.T, 256)
    assert_product(turned, np.matmul, y, qt.T, 64)


@pytest.mark.parametrize("activation", [None, "int8"])
def test_without_jit(activation):
    x, qt = (
        normal_with_outliers(2, 64),
        jaxq.quantize(normal_with_outliers(64, 16), "int8").with_activation(activation),
    )
    with jax.disable_jit():
        y = x @ qt
    np.testing.assert_allclose(y, x @ qt, rtol=1e-5, atol=1e-4)


FORWARD = {
    "dynamic": lambda qt: qt.with_activation("int8"),
    "static": lambda qt: qt.with_activation("int8", bounds=(-0.5, 0.5)),
    "outliers": lambda qt: qt.with_activation("int8", outliers=1.5),
    "asymmetric": lambda qt: qt.with_activation("uint8"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_quantized_activations_have_forward_derivatives(name):
    """The tangent is that of the float product. Clipped numbers have none."""
    qt = FORWARD[name](jaxq.quantize(normal_with_outliers(64, 16), "int8"))
    x, x_dot = normal_with_outliers(4, 64), normal_with_outliers(4, 64, seed=3)
    y, y_dot = jax.jvp(jax.jit(lambda x: x @ qt), (x,), (x_dot,))
    np.testing.assert_array_equal(y, jax.jit(lambda x: x @ qt)(x))
    kept = np.asarray(x_dot, np.float64)
    if name == "static":
        # A number up to half a step beyond the range is rounded, not clipped.
        kept = kept * (np.abs(x) <= 0.5 + 0.25 / 127)
    expected = kept @ np.asarray(jaxq.dequantize(qt), np.float64)
    np.testing.assert_allclose(y_dot, expected, rtol=1e-4, atol=1e-4)


def test_the_tangent_of_a_scale_with_quantized_activations():
    """The product is linear in the scales of the weight."""
    qt = jaxq.quantize(normal_with_outliers(64, 16), "int8").with_activation("int8")
    x = normal_with_outliers(4, 64)

    def product(scale):
        return x @ dataclasses.replace(qt, scale=scale)

    _, y_dot = jax.jvp(jax.jit(product), (qt.scale,), (qt.scale,))
    expected = np.asarray(x, np.float64) @ np.asarray(jaxq.dequantize(qt), np.float64)
    np.testing.assert_allclose(y_dot, expected, rtol=1e-4, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda scale: product(scale).sum()))(qt.scale)
    total = float(jnp.sum(gradient * qt.scale))
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)
