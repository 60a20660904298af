"""The layout "columns": only the order of the bytes differs from "rows"."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.arrays import assert_same, normal_with_outliers
from tests.tables import thinned

# One preset for each way to store codes and scales. k = 100 is padded in most of them.
PRESETS = ["int8", "int4", "int3", "nf4_dq", "uint4", "mxfp4", "ttq"]


@pytest.mark.parametrize("preset", thinned(PRESETS, ["int8", "int3", "nf4_dq", "ttq"]))
def test_relayout_to_columns_and_back(preset):
    qt = jaxq.quantize(normal_with_outliers(100, 24), preset)
    columns = jaxq.relayout(qt, "columns")
    assert columns.data.shape == qt.data.shape[::-1]
    assert (columns.shape, columns.nbytes, columns.spec) == (
        qt.shape,
        qt.nbytes,
        qt.spec,
    )
    assert "columns" in repr(columns)
    np.testing.assert_array_equal(columns.codes(), qt.codes())
    np.testing.assert_array_equal(jaxq.dequantize(columns), jaxq.dequantize(qt))
    assert_same(jaxq.relayout(columns, "rows"), qt)
    assert jaxq.relayout(columns, "columns") is columns
    assert_same(jax.jit(jaxq.relayout, static_argnums=1)(qt, "columns"), columns)
    none = jaxq.relayout(columns, "none")  # another packing keeps the layout
    assert none.data.shape == jaxq.relayout(qt, "none").data.shape[::-1]
    np.testing.assert_array_equal(none.codes(), qt.codes())


@pytest.mark.parametrize("preset", thinned(["int8", "int4", "nf4_dq"], ["nf4_dq"]))
def test_stacks_slice_scan_and_map(preset):
    stack = jaxq.relayout(
        jaxq.quantize(
            normal_with_outliers(3, 100, 24), preset, contracting=-2, batch=0
        ),
        "columns",
    )
    whole = jaxq.dequantize(stack)
    np.testing.assert_array_equal(jaxq.dequantize(stack[1]), whole[1])
    np.testing.assert_array_equal(jax.vmap(jaxq.dequantize)(stack), whole)
    _, scanned = jax.lax.scan(lambda c, q: (c, jaxq.dequantize(q)), 0, stack)
    np.testing.assert_array_equal(scanned, whole)


def test_axes_of_columns():
    qt = jaxq.quantize(normal_with_outliers(100, 4, 6), "int4", contracting=-3)
    columns = jaxq.relayout(qt, "columns")
    assert columns.data.shape == (50, 4, 6)
    merged = columns.reshape(100, 24)
    assert merged.data.shape == (50, 24)
    np.testing.assert_array_equal(
        jaxq.dequantize(merged), jaxq.dequantize(qt).reshape(100, 24)
    )
    np.testing.assert_array_equal(jaxq.dequantize(merged.T), jaxq.dequantize(merged).T)
    x = normal_with_outliers(5, 24)
    np.testing.assert_allclose(x @ merged.T, x @ jaxq.dequantize(merged).T, 1e-5, 1e-4)


def test_take_from_columns():
    table = jaxq.quantize(normal_with_outliers(24, 100), "int4", contracting=(-1,))
    indices = jnp.array([3, 0, -1])
    rows = jaxq.ops.take(jaxq.relayout(table, "columns"), indices)
    np.testing.assert_array_equal(rows, jaxq.ops.take(table, indices))


def test_saved_files_have_rows(tmp_path):
    qt = jaxq.quantize(normal_with_outliers(100, 24), "int4")
    jaxq.save(tmp_path / "w", {"w": jaxq.relayout(qt, "columns")})
    assert_same(jaxq.load(tmp_path / "w")["w"], qt)
    pickled = pickle.load(io.BytesIO(pickle.dumps(jaxq.relayout(qt, "columns"))))
    assert_same(pickled, jaxq.relayout(qt, "columns"))


def test_blocks_that_cross_rows_have_no_columns():
    qt = jaxq.quantize(
        normal_with_outliers(128, 6), jaxq.QuantSpec("nf4", jaxq.PerFlat(64))
    )
    with pytest.raises(ValueError, match="the blocks of .* cross rows"):
        jaxq.relayout(qt, "columns")


def test_exported_programs_name_their_arguments():
    x, qt = (
        normal_with_outliers(3, 100),
        jaxq.relayout(
            jaxq.quantize(normal_with_outliers(100, 24), "nf4_dq"), "columns"
        ),
    )
    exported = jax.export.export(jax.jit(jaxq.matmul))(x, qt)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, qt), jax.jit(jaxq.matmul)(x, qt))
    assert again.in_tree == jax.tree.structure(((x, qt), {}))
