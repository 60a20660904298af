"""Codes times codes: exact in int32, native for float8, and never widened."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from tests import tables
from tests.arrays import normal_with_outliers
from tests.ops.reference import assert_product, compiled, dots, with_codes

FORMATS = ("int8", "uint8", "int4", "uint4", "int3", "int2")


def integers(
    fmt: str,
    shape: tuple[int, int],
    *,
    symmetric: bool,
    groups: int,
    contracting: int,
    seed: int,
):
    """A QTensor of random codes with scales of one, and its numbers in int64."""
    k = shape[contracting]
    granularity = PerGroup(k // groups) if groups > 1 else jaxq.PerChannel()
    spec = QuantSpec(fmt, granularity, symmetric=symmetric)
    qt = quantized(shape, spec, contracting)
    rng = np.random.default_rng(seed)
    rows, low, high = shape[1 + contracting], int(spec.fmt.min), int(spec.fmt.max)
    codes = rng.integers(low, high + 1, (rows, k))
    if symmetric:
        codes = np.maximum(codes, -high)
        zero = None
        values = codes
    else:
        zero = rng.integers(low, high + 1, (rows, groups))
        values = codes - np.repeat(zero, k // groups, axis=1)
    return with_codes(qt, codes, zero), values.astype(np.int64)


@functools.cache
def quantized(
    shape: tuple[int, int], spec: QuantSpec, contracting: int
) -> jaxq.QTensor:
    return jaxq.quantize(jnp.full(shape, 0.5), spec, contracting=contracting)


product = jax.jit(jaxq.matmul)


def both_sides():
    for a in FORMATS:
        for b in FORMATS:
            for a_symmetric in (True, False):
                for b_symmetric in (True, False):
                    one_sided = (a_symmetric and a.startswith("u")) or (
                        b_symmetric and b.startswith("u")
                    )
                    if not one_sided and (a in ("int8", "uint8") or a == b):
                        yield a, a_symmetric, b, b_symmetric


# Whole bytes, halves of bytes and a stream of bits; symmetric or not on either side.
SIDES = list(both_sides())
FEW = [
    ("int8", True, "int3", True),
    ("int8", True, "uint4", False),
]
FEW += [
    ("uint8", False, "uint8", False),
    ("int2", True, "int2", True),
]


@pytest.mark.parametrize(
    ("a", "a_symmetric", "b", "b_symmetric"), tables.thinned(SIDES, FEW)
)
def test_integer_sums_are_exact(a, a_symmetric, b, b_symmetric):
    x, left = integers(
        a, (3, 96), symmetric=a_symmetric, groups=1, contracting=-1, seed=1
    )
    w, right = integers(
        b, (96, 5), symmetric=b_symmetric, groups=1, contracting=-2, seed=2
    )
    assert jaxq.explain(x, w).path == "codes"
    np.testing.assert_array_equal(jaxq.dequantize(w), right.T)
    np.testing.assert_array_equal(
        product(x, w), left @ right.T
    )  # below 2^24, so float32 holds every sum


GROUPED = [
    (("int8", b), symmetric, groups)
    for b in ("int8", "int4", "int3")
    for symmetric in ((True, True), (True, False), (False, True), (False, False))
    for groups in ((4, 4), (1, 4), (4, 1))
]
# Symmetric or not, with groups on both sides or on the right alone.
FEW_GROUPED = [
    (("int8", "int8"), (False, False), (4, 4)),
    (("int8", "int4"), (True, True), (4, 4)),
    (("int8", "int4"), (False, False), (1, 4)),
    (("int8", "int3"), (True, True), (1, 4)),
]


@pytest.mark.parametrize(
    ("formats", "symmetric", "groups"), tables.thinned(GROUPED, FEW_GROUPED)
)
def test_groups_on_one_side_or_both(formats, symmetric, groups):
    x, left = integers(
        formats[0],
        (3, 96),
        symmetric=symmetric[0],
        groups=groups[0],
        contracting=-1,
        seed=3,
    )
    w, right = integers(
        formats[1],
        (96, 5),
        symmetric=symmetric[1],
        groups=groups[1],
        contracting=-2,
        seed=4,
    )
    assert jaxq.explain(x, w).path == "codes"
    np.testing.assert_array_equal(product(x, w), left @ right.T)
    # With scales: the sum of each group is multiplied by the scale of that group.
    x, w = (
        dataclasses.replace(
            q, scale=np.exp2(np.round(normal_with_outliers(*q.scale.shape)))
        )
        for q in (x, w)
    )
    exact = np.asarray(jaxq.dequantize(x), np.float64) @ np.asarray(
        jaxq.dequantize(w), np.float64
    )
    np.testing.assert_allclose(
        product(x, w), exact, rtol=1e-6, atol=1e-6 * abs(exact).max()
    )


REAL = [
    ("int8", "int4"),
    ("uint8", "uint4"),
    ("uint8", "int3"),
    ("mxint8", "mxint8"),
    ("int8", "ternary"),
]
REAL = [(a, b, m) for a, b in [*REAL, ("int8", "vsq4")] for m in (1, 5)]
UNSIGNED = ("uint8", "uint4")


@pytest.mark.parametrize(
    ("a", "b", "m"),
    tables.thinned(
        REAL,
        [(a, b, m) for a, b, m in REAL if m == (1 if (a, b) == UNSIGNED else 5)],
    ),
)
def test_real_numbers(a, b, m):
    # 200 is not a multiple of a group. Padding must not count, whatever the zero points
    # are.
    x, w = (
        jaxq.quantize(normal_with_outliers(m, 200) + 1, a, contracting=-1),
        jaxq.quantize(normal_with_outliers(200, 24) + 1, b),
    )
    assert jaxq.explain(x, w).path == "codes"
    assert_product(product(x, w), np.matmul, x, w, 200)


@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_beyond_int32(symmetric):
    # 140,000 products of extreme codes, all of one sign.
    k = 140_000
    spec = QuantSpec("int8", symmetric=symmetric)
    x = jaxq.quantize(jnp.full((2, k), 0.5), spec, contracting=-1)
    w = jaxq.quantize(jnp.full((k, 3), 0.5), spec)
    low = np.full((2, k), -127 if symmetric else -128)
    zero = (None, None) if symmetric else (np.full(2, 127), np.full(3, 127))
    x, w = with_codes(x, low, zero[0]), with_codes(w, low[:1].repeat(3, 0), zero[1])
    exact = k * (127 if symmetric else 255) ** 2
    assert exact > 2**31 - 1
    np.testing.assert_allclose(product(x, w), np.full((2, 3), exact), rtol=1e-6)
    chunk = 2**31 // (128**2 if symmetric else 255**2)
    assert f"in {-(-k // chunk)} parts of at most" in str(jaxq.explain(x, w))
    shorter = dataclasses.replace(QuantSpec("int8"), symmetric=symmetric)
    few = quantized((2, 64), shorter, -1), quantized((64, 3), shorter, -2)
    assert "parts" not in str(jaxq.explain(*few))


FLOATS = [
    ("fp8", "fp8"),
    ("fp8", "fp8_e5m2"),
    ("mxfp8", "mxfp8"),
    ("fp8_e5m2", "mxfp8"),
]


@pytest.mark.parametrize(
    ("a", "b"), tables.thinned(FLOATS, [("fp8", "fp8_e5m2"), ("mxfp8", "mxfp8")])
)
def test_float8_products(a, b):
    x, w = (
        jaxq.quantize(normal_with_outliers(5, 96), a, contracting=-1),
        jaxq.quantize(normal_with_outliers(96, 7), b),
    )
    assert jaxq.explain(x, w).path == "codes"
    assert_product(product(x, w), np.matmul, x, w, 96)
    names = {
        "fp8": "float8_e4m3fn",
        "mxfp8": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
    }
    assert dots(jaxq.matmul, x, w) == [(names[a], names[b], "float32")]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("int8", "int8", [("int8", "int8", "int32")]),
        # XLA:CPU multiplies floats faster than packed codes. They hold the same sums.
        ("int8", "int4", [("float32", "float32", "float32")] * 2),
        ("uint8", "int8", [("uint8", "int8", "int32")]),
        ("uint8", "uint4", [("uint8", "uint8", "int32")]),
    ],
)
@pytest.mark.parametrize("m", [1, 16])
def test_the_dot_is_of_codes(a, b, expected, m):
    x, w = (
        jaxq.quantize(normal_with_outliers(m, 256), a, contracting=-1),
        jaxq.quantize(normal_with_outliers(256, 128), b),
    )
    assert dots(jaxq.matmul, x, w) == expected


@pytest.mark.parametrize("m", [1, 2, 16])
def test_int8_goes_to_the_matrix_library(m):
    # XLA:CPU multiplies a single int8 row in a loop over a widened weight. jaxq adds a
    # row of zeros, and the product goes to the matrix library.
    w = jaxq.quantize(normal_with_outliers(512, 256), "int8")

    def dynamic(x, w):
        return jaxq.quantize(x, "int8", contracting=-1) @ w

    program = compiled(dynamic, normal_with_outliers(m, 512), w)
    text = program.as_text()
    assert "__ynn_fusion" in text
    assert "s32[256,512]" not in text
    assert "f32[256,512]" not in text
    assert program.memory_analysis().temp_size_in_bytes < 256 * 512


def assert_einsum(subscripts, a, b, terms):
    y = jax.jit(functools.partial(jaxq.einsum, subscripts))(a, b)
    assert_product(y, functools.partial(np.einsum, subscripts), a, b, terms)


def test_batch_axes_and_several_free_axes():
    x = jaxq.quantize(normal_with_outliers(3, 5, 64), "int8", contracting=-1, batch=0)
    w = jaxq.quantize(normal_with_outliers(3, 64, 8), "int8", contracting=-2, batch=0)
    assert jaxq.explain(x, w).path == "codes"
    assert_product(product(x, w), np.matmul, x, w, 64)
    heads = jaxq.quantize(normal_with_outliers(64, 2, 8), "int8", contracting=-3)
    tokens = jaxq.quantize(normal_with_outliers(3, 5, 64), "int8", contracting=-1)
    assert jaxq.explain(tokens, heads, (((2,), (0,)), ((), ()))).path == "codes"
    assert_einsum("btd,dhk->bthk", tokens, heads, 64)
    # weight first; kept axes in another order than stored
    assert_einsum("dhk,btd->kthb", heads, tokens, 64)
    both = jaxq.quantize(normal_with_outliers(3, 4, 16), "int8", contracting=(-2, -1))
    out = jaxq.quantize(normal_with_outliers(4, 16, 24), "int8", contracting=(-3, -2))
    assert jaxq.explain(both, out, (((1, 2), (0, 1)), ((), ()))).path == "codes"
    assert_einsum("thk,hkd->td", both, out, 64)


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        (("int8", -1), ("nf4", -2), "do not multiply natively"),
        (("fp8", -1), ("int8", -2), "do not multiply natively"),
        (("int8", -2), ("int8", -2), "along which its scales are shared"),
        ((QuantSpec("uint8", offset="min"), -1), ("int8", -2), "has a real offset"),
        (
            (QuantSpec("int8", PerGroup(16)), -1),
            (QuantSpec("int8", PerGroup(32)), -2),
            "their groups along k differ",
        ),
    ],
)
def test_products_in_floats_if_codes_cannot_be_multiplied(x, w, why):
    a = jaxq.quantize(normal_with_outliers(5, 64), x[0], contracting=x[1])
    b = jaxq.quantize(normal_with_outliers(64, 8), w[0], contracting=w[1])
    plan = jaxq.explain(a, b)
    assert plan.path == "weight_only"
    assert why in plan.reason
    assert_product(product(a, b), np.matmul, a, b, 64)


def test_contracted_axes_flattened_in_different_orders():
    # [h, k] against [k, h]: the same contracted numbers, stored in another order.
    x = jaxq.quantize(normal_with_outliers(5, 4, 16), "int8", contracting=(-2, -1))
    w = jaxq.quantize(normal_with_outliers(16, 4, 8), "int8", contracting=(-3, -2))
    assert "different orders" in jaxq.explain(x, w, (((1, 2), (1, 0)), ((), ()))).reason
    assert_einsum("thk,khd->td", x, w, 64)


@pytest.mark.parametrize("preset", ["int4", "nf4"])  # multiplied as codes, and not
def test_dynamic_activation_quantization(preset):
    x, qt = (
        normal_with_outliers(4, 256),
        jaxq.quantize(normal_with_outliers(256, 16), preset),
    )
    dynamic = qt.with_activation("int8")
    explicit = jaxq.quantize(x, "int8", contracting=-1)
    np.testing.assert_array_equal(x @ dynamic, explicit @ qt)
    assert "dynamic activation quantization to int8" in jaxq.explain(x, dynamic).reason
    assert jaxq.explain(x, dynamic).path == jaxq.explain(explicit, qt).path
    left = qt.T.with_activation("int8")
    # The activation is the left operand of this product too.
    np.testing.assert_array_equal(left @ x.T, (explicit @ qt).T)
    # Straight through: the gradient is that of the weight alone.
    weights = np.sin(np.arange(64, dtype=np.float32)).reshape(4, 16)
    slope = jax.jit(jax.grad(lambda x, qt: jnp.sum(weights * (x @ qt))))
    np.testing.assert_allclose(slope(x, dynamic), slope(x, qt), rtol=1e-6, atol=1e-6)
    assert (
        jax.eval_shape(
            jaxq.matmul, x.astype("bfloat16"), dynamic.astype("bfloat16")
        ).dtype
        == "bfloat16"
    )


MOST = [
    ("fp8", "fp8", 6e6),
    ("mxfp8", "mxfp8", 7e6),
    ("mxint8", "mxint8", 6e6),
    ("uint4", "int8", 8e6),
    ("vsq4", "vsq4", 10e6),
]
MOST = [(*case, m) for case in MOST for m in (1, 128)]


@pytest.mark.parametrize(
    ("weight", "activation", "most", "m"),
    tables.thinned(
        MOST, [case for case in MOST if case[3] == 128 or case[0] == "mxint8"]
    ),
)
def test_products_of_codes_never_widen_a_whole_operand(weight, activation, most, m):
    # The float32 weight would take 67 MB, the partial sums of all groups up to 540 MB.
    shape, presets = jax.ShapeDtypeStruct((4096, 4096), jnp.float32), jaxq.presets()
    qt = jax.eval_shape(
        lambda w: jaxq.quantize(w, weight).with_activation(presets[activation]), shape
    )
    program = compiled(
        lambda x, qt: x @ qt, jax.ShapeDtypeStruct((m, 4096), jnp.float32), qt
    )
    assert program.memory_analysis().temp_size_in_bytes <= most


@pytest.mark.parametrize(
    ("preset", "activation"),
    [("fp8", "fp8"), ("int8", "uint8"), ("int4", "uint8"), ("int4", "int8")],
)
def test_codes_along_columns_give_the_same_product(preset, activation):
    qt = jaxq.quantize(normal_with_outliers(64, 96), preset).with_activation(activation)
    x = normal_with_outliers(4, 64)
    expected = np.asarray(x @ qt)
    bound = 1e-6 * np.abs(expected).max()
    columns = np.asarray(x @ jaxq.relayout(qt, "columns"))
    np.testing.assert_allclose(columns, expected, rtol=0, atol=bound)
