"""New codes on an old grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.qtensor import requantize
from tests import tables
from tests.ops.reference import normal

over_some = pytest.mark.parametrize(
    "preset",
    tables.thinned(jaxq.presets(), ["int8", "uint4", "int3", "nf4_dq", "mxfp4", "ttq"]),
)


@over_some
def test_the_same_numbers_get_the_same_codes(preset):
    qt = jaxq.quantize(normal(100, 24), preset)
    if qt.codebook is not None:
        pytest.skip(
            "a table of its own takes the nearest entry, its codes came from a threshold"
        )
    again = requantize(normal(100, 24), qt)
    jax.tree.map(np.testing.assert_array_equal, again, qt)
    jax.tree.map(np.testing.assert_array_equal, qt.with_codes(qt.codes()), qt)


@over_some
def test_other_numbers_go_to_the_nearest_of_the_grid(preset):
    """Against every number that the grid has."""
    qt, w = jaxq.quantize(normal(96, 5), preset), normal(96, 5, seed=1) / 2
    found = np.asarray(jaxq.dequantize(requantize(w, qt)), np.float64)
    grid = [
        jaxq.dequantize(qt.with_codes(jnp.full(qt.shape, c, qt.spec.fmt.code_dtype)))
        for c in qt.spec.fmt.codes()
    ]
    grid = np.asarray(jnp.stack(grid), np.float64)
    nearest = np.nanmin(np.abs(grid - np.asarray(w, np.float64)), 0)
    if preset == "log4":  # nearest of the logarithm
        nearest = nearest * 1.5
    np.testing.assert_array_less(
        np.abs(found - np.asarray(w, np.float64)), nearest + 1e-6
    )


def test_in_every_layout():
    w = normal(128, 16, seed=1)
    qt = jaxq.quantize(normal(128, 16), "int4")
    turned = requantize(w, jaxq.relayout(qt, "columns"))
    np.testing.assert_array_equal(turned.codes(), requantize(w, qt).codes())
    assert turned.meta.layout == "columns"
    stack = jaxq.quantize(normal(3, 128, 16), "nf4", contracting=-2, batch=0)
    mapped = jax.vmap(requantize)(normal(3, 128, 16, seed=1), stack)
    whole = requantize(normal(3, 128, 16, seed=1), stack)
    jax.tree.map(np.testing.assert_array_equal, mapped, whole)


def test_mistakes_are_named():
    qt = jaxq.quantize(normal(64, 16), "int8")
    with pytest.raises(ValueError, match=r"shape \[64, 16\], got float32\[16,64\]"):
        requantize(normal(16, 64), qt)
    with pytest.raises(TypeError, match="must be a QTensor"):
        requantize(normal(16, 64), normal(16, 64))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must be int8\[64, 16\], got int32"):
        qt.with_codes(jnp.zeros((64, 16), jnp.int32))
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda w: jaxq.dequantize(requantize(w, qt)).sum())(normal(64, 16))
