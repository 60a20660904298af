"""The product in plain XLA on an accelerator: one dense product per weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import formats
from jaxq.formats import Packing
from jaxq.kernels._call import Call, with_leaves
from jaxq.kernels._forms import xla_form
from jaxq.kernels._rows import RowMeta, Rows
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
