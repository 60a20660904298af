"""Codes along columns, as TPU kernels want them: the same array in every way but the order of its bytes."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.ops.reference import normal
from tests.tables import thinned

# One of each way to store codes and scales; k = 100 is padded in most of them.
PRESETS = ["int8", "int4", "int3", "nf4_dq", "uint4", "mxfp4", "ttq"]


def same(a: jaxq.QTensor, b: jaxq.QTensor):
    """The same leaves, bit for bit, and the same statics."""
    assert a.meta == b.meta
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(
            np.asarray(left).view(np.uint8), np.asarray(right).view(np.uint8)
        )


@pytest.mark.parametrize("preset", thinned(PRESETS, ["int8", "int3", "nf4_dq", "ttq"]))
def test_there_and_back(preset):
    qt = jaxq.quantize(normal(100, 24), preset)
    turned = jaxq.relayout(qt, "columns")
    assert turned.data.shape == qt.data.shape[::-1]
    assert (turned.shape, turned.nbytes, turned.spec) == (qt.shape, qt.nbytes, qt.spec)
    assert "columns" in repr(turned)
    np.testing.assert_array_equal(turned.codes(), qt.codes())
    np.testing.assert_array_equal(jaxq.dequantize(turned), jaxq.dequantize(qt))
    same(jaxq.relayout(turned, "rows"), qt)
    assert jaxq.relayout(turned, "columns") is turned
    same(jax.jit(jaxq.relayout, static_argnums=1)(qt, "columns"), turned)
    none = jaxq.relayout(turned, "none")  # another packing keeps the layout
    assert none.data.shape == jaxq.relayout(qt, "none").data.shape[::-1]
    np.testing.assert_array_equal(none.codes(), qt.codes())


@pytest.mark.parametrize("preset", thinned(["int8", "int4", "nf4_dq"], ["nf4_dq"]))
def test_stacks_slice_scan_and_map(preset):
    stack = jaxq.relayout(
        jaxq.quantize(normal(3, 100, 24), preset, contracting=-2, batch=0), "columns"
    )
    whole = jaxq.dequantize(stack)
    np.testing.assert_array_equal(jaxq.dequantize(stack[1]), whole[1])
    np.testing.assert_array_equal(jax.vmap(jaxq.dequantize)(stack), whole)
    _, scanned = jax.lax.scan(lambda c, q: (c, jaxq.dequantize(q)), 0, stack)
    np.testing.assert_array_equal(scanned, whole)


def test_axes_of_columns():
    qt = jaxq.quantize(normal(100, 4, 6), "int4", contracting=-3)
    turned = jaxq.relayout(qt, "columns")
    assert turned.data.shape == (50, 4, 6)
    merged = turned.reshape(100, 24)
    assert merged.data.shape == (50, 24)
    np.testing.assert_array_equal(
        jaxq.dequantize(merged), jaxq.dequantize(qt).reshape(100, 24)
    )
    np.testing.assert_array_equal(jaxq.dequantize(merged.T), jaxq.dequantize(merged).T)
    x = normal(5, 24)
    np.testing.assert_allclose(x @ merged.T, x @ jaxq.dequantize(merged).T, 1e-5, 1e-4)


def test_rows_of_a_table():
    table = jaxq.quantize(normal(24, 100), "int4", contracting=(-1,))
    places = jnp.array([3, 0, -1])
    found = jaxq.ops.take(jaxq.relayout(table, "columns"), places)
    np.testing.assert_array_equal(found, jaxq.ops.take(table, places))


def test_files_hold_rows(tmp_path):
    qt = jaxq.quantize(normal(100, 24), "int4")
    jaxq.save(tmp_path / "w", {"w": jaxq.relayout(qt, "columns")})
    same(jaxq.load(tmp_path / "w")["w"], qt)
    pickled = pickle.load(io.BytesIO(pickle.dumps(jaxq.relayout(qt, "columns"))))
    same(pickled, jaxq.relayout(qt, "columns"))


def test_blocks_across_rows_have_no_columns():
    qt = jaxq.quantize(normal(128, 6), jaxq.QuantSpec("nf4", jaxq.PerFlat(64)))
    with pytest.raises(ValueError, match="the blocks of .* cross rows"):
        jaxq.relayout(qt, "columns")


def test_exported_programs_name_their_arguments():
    x, qt = (
        normal(3, 100),
        jaxq.relayout(jaxq.quantize(normal(100, 24), "nf4_dq"), "columns"),
    )
    exported = jax.export.export(jax.jit(jaxq.matmul))(x, qt)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, qt), jax.jit(jaxq.matmul)(x, qt))
    assert again.in_tree == jax.tree.structure(((x, qt), {}))
