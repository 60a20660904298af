"""requantize: new codes with the scales of another QTensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.qtensor import requantize
from tests import tables
from tests.arrays import assert_same, normal_with_outliers

over_some = pytest.mark.parametrize(
    "preset",
    tables.thinned(jaxq.presets(), ["int8", "uint4", "int3", "nf4_dq", "mxfp4", "ttq"]),
)


@over_some
def test_the_same_numbers_get_the_same_codes(preset):
    qt = jaxq.quantize(normal_with_outliers(100, 24), preset)
    if qt.codebook is not None:
        pytest.skip("quantize uses a threshold, requantize the nearest entry")
    again = requantize(normal_with_outliers(100, 24), qt)
    assert_same(again, qt)
    assert_same(qt.with_codes(qt.codes()), qt)


@over_some
def test_other_numbers_get_the_nearest_value(preset):
    """Compared with the values of all codes."""
    qt, w = (
        jaxq.quantize(normal_with_outliers(96, 5), preset),
        normal_with_outliers(96, 5, seed=1) / 2,
    )
    values = np.asarray(jaxq.dequantize(requantize(w, qt)), np.float64)
    grid = [
        jaxq.dequantize(qt.with_codes(jnp.full(qt.shape, c, qt.spec.fmt.code_dtype)))
        for c in qt.spec.fmt.codes()
    ]
    grid = np.asarray(jnp.stack(grid), np.float64)
    nearest = np.nanmin(np.abs(grid - np.asarray(w, np.float64)), 0)
    if preset == "log4":  # log4 takes the nearest logarithm
        nearest = nearest * 1.5
    np.testing.assert_array_less(
        np.abs(values - np.asarray(w, np.float64)), nearest + 1e-6
    )


def test_in_every_layout():
    w = normal_with_outliers(128, 16, seed=1)
    qt = jaxq.quantize(normal_with_outliers(128, 16), "int4")
    columns = requantize(w, jaxq.relayout(qt, "columns"))
    np.testing.assert_array_equal(columns.codes(), requantize(w, qt).codes())
    assert columns.meta.layout == "columns"
    stack = jaxq.quantize(
        normal_with_outliers(3, 128, 16), "nf4", contracting=-2, batch=0
    )
    mapped = jax.vmap(requantize)(normal_with_outliers(3, 128, 16, seed=1), stack)
    whole = requantize(normal_with_outliers(3, 128, 16, seed=1), stack)
    assert_same(mapped, whole)


def test_mistakes_are_named():
    qt = jaxq.quantize(normal_with_outliers(64, 16), "int8")
    with pytest.raises(ValueError, match=r"\[64, 16\], got w: float32\[16,64\]"):
        requantize(normal_with_outliers(16, 64), qt)
    w = normal_with_outliers(16, 64)
    with pytest.raises(TypeError, match="must be a QTensor"):
        requantize(w, w)  # pyright: ignore
    with pytest.raises(ValueError, match=r"must be int8\[64, 16\], got int32"):
        qt.with_codes(jnp.zeros((64, 16), jnp.int32))
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda w: jaxq.dequantize(requantize(w, qt)).sum())(
            normal_with_outliers(64, 16)
        )
