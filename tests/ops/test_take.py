"""Rows of a quantized table are the rows of the dequantized table, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerTensor, QuantSpec
from tests import tables
from tests.arrays import normal_with_outliers
from tests.ops.reference import compiled

# Storage that no preset has: one scale for all, tiles of one row, real offsets.
OTHERS = {
    "tensor": QuantSpec("int8", PerTensor()),
    "tiles": QuantSpec("int4", PerBlock((1, 16), pad=True)),
    "offset": QuantSpec("uint4", jaxq.PerGroup(16, pad=True), offset="min"),
    "narrow offset": QuantSpec(
        "uint4", jaxq.PerGroup(16, pad=True), offset="min", scale="bfloat16"
    ),
}


@pytest.mark.parametrize(
    "name",
    tables.thinned([*jaxq.presets(), *OTHERS], [*tables.REPRESENTATIVES, *OTHERS]),
)
def test_rows_are_equal_to_the_bit(name):
    table = jaxq.quantize(
        normal_with_outliers(20, 72), OTHERS.get(name, name), contracting=-1
    )
    ids = np.array([[0, 19, 7], [7, 7, 1]])
    rows = jax.jit(jaxq.ops.take)(table, ids)
    np.testing.assert_array_equal(rows, np.asarray(jaxq.dequantize(table))[ids])


@pytest.mark.parametrize(
    "ids", [3, [], [[]], [-1, -20], np.array([5], np.uint8), np.array([5], np.uint32)]
)
def test_indices_of_any_shape(ids):
    table = jaxq.quantize(normal_with_outliers(20, 72), "int4", contracting=-1)
    ids = np.asarray(ids, np.asarray(ids).dtype if np.size(ids) else np.int32)
    expected = np.asarray(jaxq.dequantize(table))[ids]
    rows = jaxq.ops.take(table, ids)
    np.testing.assert_array_equal(rows, expected)
    assert rows.shape == expected.shape


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_narrow_indices_into_a_long_table(dtype):
    table = jaxq.quantize(normal_with_outliers(70_000, 2), "int8", contracting=-1)
    ids = np.array([0, 5, 127], dtype)
    np.testing.assert_array_equal(
        jaxq.ops.take(table, ids), np.asarray(jaxq.dequantize(table))[ids]
    )


def test_indices_out_of_range_give_nan():
    table = jaxq.quantize(normal_with_outliers(20, 8), "int8", contracting=-1)
    rows = jaxq.ops.take(table, jnp.array([20, -21, 4]))
    assert np.isnan(rows[:2]).all()
    assert np.isfinite(rows[2]).all()
    expected = jnp.take(jaxq.dequantize(table), jnp.array([20, -21, 4]), axis=0)
    np.testing.assert_array_equal(np.isnan(rows), np.isnan(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_table(dtype):
    table = jaxq.quantize(
        normal_with_outliers(20, 8, dtype=dtype), "int8", contracting=-1
    )
    rows = jaxq.ops.take(table, jnp.array([1, 2]))
    assert rows.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(rows, jaxq.dequantize(table)[jnp.array([1, 2])])


def test_only_the_rows_at_the_indices_are_decoded():
    table = jax.eval_shape(
        lambda w: jaxq.quantize(w, "nf4", contracting=-1),
        jax.ShapeDtypeStruct((32000, 512), jnp.float32),
    )
    program = compiled(jaxq.ops.take, table, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert program.memory_analysis().temp_size_in_bytes < 64 * 1024


def test_gradient_reaches_the_scales():
    table, ids = (
        jaxq.quantize(normal_with_outliers(20, 8), "int8", contracting=-1),
        jnp.array([3, 3, 5]),
    )
    scale = jax.grad(lambda t: jnp.sum(jaxq.ops.take(t, ids)), allow_int=True)(
        table
    ).scale
    codes = np.asarray(table.codes(), np.float32).sum(1)
    np.testing.assert_allclose(
        scale[:, 0], codes * np.bincount(ids, minlength=20), rtol=1e-6
    )


def test_errors():
    table = jaxq.quantize(normal_with_outliers(20, 8), "int8", contracting=-1)
    with pytest.raises(TypeError, match=r"indices must be integers, got float32\[2\]"):
        jaxq.ops.take(table, jnp.ones(2))
    for wrong in (
        jaxq.quantize(normal_with_outliers(20, 8), "int8"),
        jaxq.quantize(normal_with_outliers(2, 20, 8), "int8", contracting=-1, batch=0),
        jaxq.quantize(
            normal_with_outliers(20, 8),
            QuantSpec("int8", jaxq.PerFlat(16)),
            contracting=-1,
        ),
    ):
        with pytest.raises(
            ValueError, match=r"must be \[n, d\] with scales shared along axis -1"
        ):
            jaxq.ops.take(wrong, jnp.array([1]))
    tiles = jaxq.quantize(
        normal_with_outliers(20, 8), QuantSpec("int8", PerBlock((4, 4))), contracting=-1
    )
    with pytest.raises(ValueError, match="cross rows"):
        jaxq.ops.take(tiles, jnp.array([1]))
