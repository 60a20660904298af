"""Weights as rows: shapes, and products of weights whose blocks cross rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.ops._facts import facts_of
from jaxq.ops._weight_rows import row_shapes, weight_rows, why_not_rows

S = jaxq.QuantSpec

ACROSS_ROWS = {
    "one block for a small array": ((8, 8), S("nf4", jaxq.PerFlat(64))),
    "fewer numbers than a block": ((32, 16), S("nf4", jaxq.PerFlat(4096))),
    "blocks of an odd size": ((100, 6), S("int4", jaxq.PerFlat(25))),
    "rows of an odd length": ((9, 4), S("int4", jaxq.PerFlat(3))),
    "a bit stream across rows": ((100, 6), S("int3", jaxq.PerFlat(50))),
    "four to a byte": ((100, 6), S("int2", jaxq.PerFlat(50), symmetric=False)),
    "whole rows": ((128, 6), S("nf4", jaxq.PerFlat(64))),
}


@pytest.mark.parametrize("case", ACROSS_ROWS)
def test_flat_blocks(case):
    shape, spec = ACROSS_ROWS[case]
    rng = np.random.default_rng(0)
    w, x = (
        rng.standard_normal(shape, np.float32),
        rng.standard_normal((5, shape[0]), np.float32),
    )
    qt = jaxq.quantize(w, spec)
    expected = x.astype(np.float64) @ np.asarray(jaxq.dequantize(qt), np.float64)
    np.testing.assert_allclose(
        np.asarray(jaxq.matmul(x, qt)),
        expected,
        rtol=1e-5,
        atol=1e-5 * np.abs(expected).max(),
    )
    assert jaxq.explain(x, qt).path == (
        "weight_only" if case == "whole rows" else "dequantize"
    )


def test_packed_weight_meets_grouped_activations():
    rng = np.random.default_rng(0)
    w, x = (
        rng.standard_normal((100, 6), np.float32),
        rng.standard_normal((5, 100), np.float32),
    )
    qt = jaxq.quantize(w, S("int3"))
    qx = jaxq.quantize(x, S("int8", jaxq.PerGroup(20)), contracting=-1)
    expected = np.asarray(jaxq.dequantize(qx), np.float64) @ np.asarray(
        jaxq.dequantize(qt), np.float64
    )
    np.testing.assert_allclose(
        np.asarray(qx @ qt), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
    assert jaxq.explain(qx, qt).path == "codes"


def test_narrow_arrays_do_not_wrap():
    a = jnp.full((1, 4), 100, jnp.int8)
    for y in (jaxq.matmul(a, a.T), jaxq.einsum("ij,jk->ik", a, a.T)):
        assert y.dtype == jnp.int32
        assert y.item() == 40_000
    b = jnp.full((1, 400), 10, jnp.float8_e4m3fn)
    assert jaxq.matmul(b, b.T).item() == 40_000.0


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((((0, 0), (0, 0)), ((), ())), "must be distinct axes of the left operand"),
        ((((1,), (5,)), ((), ())), "must be distinct axes of the right operand"),
        (((1,), (0,)), "dimension_numbers must be"),
    ],
)
def test_wrong_dimension_numbers(dims, message):
    with pytest.raises(TypeError, match=message):
        jaxq.dot_general(
            jnp.ones((64, 64)), jaxq.quantize(jnp.ones((64, 64)), "int8"), dims
        )


def test_scaled_products_are_floats():
    with pytest.raises(
        TypeError, match="must be float32 or a narrower float, got int8"
    ):
        jaxq.matmul(
            jnp.ones((2, 64)),
            jaxq.quantize(jnp.ones((64, 4)), "int8"),
            preferred_element_type=jnp.int8,
        )


def test_activations_that_need_a_key_are_refused():
    qt = jaxq.quantize(jax.random.normal(jax.random.key(0), (64, 4)), "int8")
    with pytest.raises(ValueError, match="needs a key at every call"):
        qt.with_activation(S("int8", rounding="stochastic"))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", jaxq.presets())
def test_row_shapes_are_the_shapes_of_the_rows(name, layout):
    def stack(w):
        qt = jaxq.quantize(w, name, contracting=-3, batch=0)
        return qt if qt.meta.geometry.flat else jaxq.relayout(qt, layout)

    qt = jax.eval_shape(stack, jax.ShapeDtypeStruct((3, 100, 4, 6), jnp.float32))
    assert why_not_rows(qt.meta) is None
    rows = jax.eval_shape(jax.vmap(lambda qt: weight_rows(qt)[0]), qt)
    expected = row_shapes(facts_of(qt))
    leaves = {name: leaf for name, leaf in rows._asdict().items() if leaf is not None}
    assert list(leaves) == list(expected)
    for name, leaf in leaves.items():
        assert leaf.shape == expected[name].shape, name
        assert name == "data" or leaf.dtype == expected[name].dtype, name
