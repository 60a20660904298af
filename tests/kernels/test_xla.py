"""The product in plain XLA: dense products, and the numbers that are multiplied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import (
    PerChannel,
    PerGroup,
    QuantSpec,
    dequantize,
    dot_general,
    formats,
    quantize,
)
from jaxq.formats import Packing
from jaxq.kernels import _rows, _xla
from jaxq.kernels._call import Call, with_leaves
from jaxq.kernels._codes import codes_matmul
from jaxq.kernels._forms import xla_form
from jaxq.kernels._rows import RowMeta, Rows, int8_meta
from jaxq.ops._weight_rows import weight_rows
from tests.kernels.products import bfloat16, lowered_for, weight

WHOLE_WEIGHT = 2**62


@pytest.mark.parametrize("preset", ["int4", "nf4", "int8"])
def test_many_rows_are_one_product(preset):
    """The halves of the bytes are joined before the product. x is not cut."""
    x, qt = bfloat16(512, 128), weight(preset, dtype="bfloat16")
    text = lowered_for("cuda", lambda x, qt: x @ qt, x, qt)
    assert text.count("stablehlo.dot_general") == 1


@pytest.mark.parametrize(
    ("m", "k", "padded_k", "group"),
    [
        (1, 150, 192, 64),
        (5, 150, 192, 64),
        (5, 150, 150, 150),
        (5, 151, 152, 152),
        (5, 151, 152, 64),
    ],
)
def test_joined_fields_are_the_weight(m, k, padded_k, group):
    """Halves of groups, of a last group that is not full, and of a whole row."""
    n, rng = 48, np.random.default_rng(0)
    codes = rng.integers(-8, 8, (n, padded_k))
    scale = rng.uniform(0.5, 1.5, (n, -(-padded_k // group))).astype(np.float32)
    unit = None if group == padded_k else group
    data = formats.pack(jnp.asarray(codes, jnp.int8), 4, Packing.HALVES, unit=unit)
    meta = RowMeta(formats.get("int4"), Packing.HALVES, unit, k, padded_k)
    meta = dataclasses.replace(meta, block_bytes=WHOLE_WEIGHT, group=group)
    rows = Rows(data, jnp.asarray(scale), None, None, None)
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.float32)
    y = jax.jit(lambda x: xla_form(x[None], *(a[None] for a in leaves), call=call))(x)
    weights = (codes * np.repeat(scale, group, 1)[:, :padded_k])[:, :k]
    exact = np.asarray(x, np.float64) @ weights.T
    np.testing.assert_allclose(y[0], exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("fmt", "k", "group", "has_zero_points"),
    [
        ("int4", 256, 64, False),
        ("int4", 150, 64, True),  # the last group is not full
        ("int4", 256, None, False),
        ("int3", 256, 64, False),
        ("int8", 256, 64, True),
    ],
)
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
def test_codes_on_a_cpu_are_multiplied_as_floats(fmt, k, group, has_zero_points, scale):
    """Only sums are rounded, and no product of integers is left."""
    n, m = 48, 5
    granularity = PerGroup(group, pad=True) if group else PerChannel()
    spec = QuantSpec(fmt, granularity, symmetric=not has_zero_points, scale=scale)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(k, n)), jnp.float32)
    x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    rows, meta = weight_rows(quantize(w, spec, contracting=0))
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)

    def product(x):
        return xla_form(x[None], *(a[None] for a in leaves), call=call)[0]

    ones = jnp.ones((1, 1), jnp.float32)
    expected = jax.jit(codes_matmul, static_argnums=(1, 3))(
        Rows(x, ones, None, None, None), int8_meta(k), rows, meta
    )
    # XLA chooses the order of the sum over groups. One group has the same bits.
    tolerance = 3e-7 * np.abs(expected).max() if group else 0
    np.testing.assert_allclose(jax.jit(product)(x), expected, rtol=0, atol=tolerance)
    assert "preferred_element_type=int32" not in str(jax.make_jaxpr(product)(x))


def test_sums_that_float32_cannot_hold_stay_in_int32():
    k = 2**24 // (127 * 7) + 2
    x = jnp.full((1, k), 127, jnp.int8)
    meta = RowMeta(formats.get("int4"), Packing.HALVES, None, k + k % 2, k + k % 2)
    x = jnp.pad(x, ((0, 0), (0, k % 2)))
    codes = jnp.full((16, meta.k), 7, jnp.int8)
    data = formats.pack(codes, 4, Packing.HALVES)
    rows = Rows(data, jnp.ones((16, 1), jnp.float32), None, None, None)
    call, leaves = with_leaves(Call(meta, (), "float32"), rows)

    def product(x):
        return xla_form(x[None], *(a[None] for a in leaves), call=call)[0]

    assert "preferred_element_type=int32" in str(jax.make_jaxpr(product)(x))
    assert product(x)[0, 0] == np.float32(127 * 7 * k)


def test_exact_weights_are_rounded_as_a_cast_rounds():
    """All bfloat16 scales, times the differences of 8-bit codes and zero points."""
    # All normal numbers. XLA:CPU replaces smaller numbers by zeros.
    scales = np.arange(0x0080, 0x7F80, dtype=np.uint16).view(jnp.bfloat16)
    codes = np.arange(-255, 1, dtype=np.float32)[None]

    @jax.jit
    def rounded(scale):
        rows, factor = _xla._without_huge_scales(
            Rows(jnp.zeros((0, 0)), scale[:, None], None, None, None)
        )
        weight = jnp.asarray(codes) * rows.scale.astype(jnp.float32)
        return _xla._round_exact_product(weight) * factor

    actual = np.asarray(rounded(jnp.asarray(scales)))
    with np.errstate(over="ignore"):
        weight = codes * scales.astype(np.float32)[:, None]
        expected = weight.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("exponent", "m"), [(0, 1), (100, 5), (-100, 5)])
@pytest.mark.parametrize("preset", ["int4", "uint4", "int8", "nf4"])
def test_few_rows_round_the_weight_to_bfloat16(monkeypatch, preset, exponent, m):
    """The decoded weight is the dequantized weight in bfloat16, bit for bit."""
    monkeypatch.setattr(_xla, "num_cores", lambda: 2)
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 0)
    rng = np.random.default_rng(0)
    w = jnp.asarray(np.ldexp(rng.normal(size=(256, 48)), exponent), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(m, 256)), jnp.bfloat16)
    qt = quantize(w, preset)
    unit_rows = jnp.eye(16, 256, dtype=jnp.bfloat16)
    actual = np.asarray(unit_rows @ qt, np.float32)
    decoded = np.asarray(dequantize(qt, dtype="float32")).astype(jnp.bfloat16)
    if preset == "int8":  # the scale multiplies the result
        decoded = np.asarray(dequantize(qt, dtype="bfloat16"))
    expected = decoded.astype(np.float32)
    np.testing.assert_array_equal(actual, expected[:16])
    y = np.asarray(x @ qt, np.float64)
    exact = np.asarray(x, np.float64) @ expected.astype(np.float64)
    np.testing.assert_allclose(y, exact, atol=2**-7 * np.abs(exact).max())


@pytest.mark.parametrize("preset", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_rows_on_a_cpu_are_one_product(preset, transposed):
    """A small weight is decoded once, and its product is the result."""
    m, k, n = 6400, 384, 1536
    text, temporary_bytes = _compiled(preset, m, k, n, transposed)
    columns = k if transposed else n
    products = [line for line in text.splitlines() if " dot(" in line]
    assert len(products) == 1
    assert f"f32[{m},{columns}]" in products[0]
    assert f"f32[{columns},{m}]" not in text
    assert temporary_bytes <= 1.1 * 4 * n * k


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_many_rows_write_columns_of_the_result(preset):
    """A large weight is decoded in blocks. No second array has the size of y."""
    m, k, n = 2048, 4096, 4096
    text, temporary_bytes = _compiled(preset, m, k, n, transposed=False)
    assert temporary_bytes <= 8 * 2**20
    assert f"f32[{n},{m}]" not in text


def test_gradients_of_many_rows_need_less_than_the_weight():
    """A block of m rows of the weight, its product, and its columns of x."""
    m, k, n = 1024, 4096, 4096
    _, temporary_bytes = _compiled("int4", m, k, n, transposed=True)
    most_bytes = 1.05 * 4 * m * (2 * k + m)
    assert temporary_bytes <= most_bytes < 4 * n * k


def _compiled(preset, m, k, n, transposed):
    """The text and the temporary bytes of a program.

    The program multiplies m rows of x, or m rows of the cotangent of y.
    """
    weight = jax.ShapeDtypeStruct((k, n), jnp.float32)
    qt = jax.eval_shape(lambda w: quantize(w, preset), weight)
    x = jax.ShapeDtypeStruct((m, n if transposed else k), jnp.float32)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    program = jax.jit(lambda x, qt: dot_general(x, qt, dims)).lower(x, qt).compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    return text, memory.temp_size_in_bytes


@pytest.mark.parametrize("preset", ["int4", "int8", "uint4", "nf4"])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (512, 64), (150, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_many_rows_have_the_exact_product(
    monkeypatch, preset, k, group, transposed
):
    """Several blocks, of which the last two share rows."""
    m, n = 130, 296
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 0)
    rng = np.random.default_rng(0)
    spec = QuantSpec(preset, PerGroup(group, pad=True), symmetric=preset != "uint4")
    qt = quantize(jnp.asarray(rng.normal(size=(k, n)), jnp.float32), spec)
    x = jnp.asarray(rng.normal(size=(m, n if transposed else k)), jnp.float32)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    y = jax.jit(lambda x, qt: dot_general(x, qt, dims))(x, qt)
    decoded = np.asarray(dequantize(qt), np.float64)
    exact = np.asarray(x, np.float64) @ (decoded.T if transposed else decoded)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
