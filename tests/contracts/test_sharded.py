"""Every preset on a mesh of four devices: the numbers of one device, or an error.

The table is {preset} x {sharded axis} x {type of mesh axes} x {action}. The rows that
run by default contain every pair of entries of two columns.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests import tables
from tests.arrays import normal_with_outliers

K, N = 256, 128
# The PartitionSpec of a weight [in, out], or of a stack of two such weights.
SPECS = {
    "row": P("t", None),
    "column": P(None, "t"),
    "both": P("d", "t"),
    "batch": P("t", None, None),
}
KINDS = (AxisType.Explicit, AxisType.Auto)
PRESETS = tuple(jaxq.presets())
ACTIONS = ("quantize", "place", "matmul", "gradient", "save and load", "scan")

# Half of the rows of these weights would cut something: the packing HALVES arranges the
# codes of a whole row together, in codes or in quantized scales, or flat blocks of
# scales cross the border.
CUT_BY_ROWS = ("binary", "log4", "ternary", "ttq", "vsq4", "nf4_dq")

# Their scales are means. The sums over a sharded block have another order, so scales
# differ in the last bits, and a number between two codes can get the other one.
SCALES_ARE_MEANS = ("binary", "ternary", "ttq")

TABLE = list(itertools.product(PRESETS, SPECS, KINDS, ACTIONS))


def pairwise():
    """Rows of the table that contain every pair of entries of two columns."""
    names, rows = list(SPECS), []
    for i, preset in enumerate(PRESETS):
        for j, action in enumerate(ACTIONS):
            kind = KINDS[(i // len(names) + j) % 2]
            rows.append((preset, names[(i + j) % len(names)], kind, action))
    return rows


def test_the_default_rows_contain_every_pair():
    columns = (PRESETS, tuple(SPECS), KINDS, ACTIONS)
    for a, b in itertools.combinations(range(4), 2):
        pairs = {(row[a], row[b]) for row in pairwise()}
        assert pairs == set(itertools.product(columns[a], columns[b]))


@functools.cache
def weight_for(where):
    shape = (2, K, N) if where == "batch" else (K, N)
    return normal_with_outliers(*shape)


def quantized(w, preset):
    return jaxq.quantize(w, preset, contracting=-2, batch=tuple(range(w.ndim - 2)))


@functools.cache
def on_one_device(preset, *, is_batch, is_stack=False):
    """A quantized weight on one device, which several actions use."""
    w = weight_for("batch" if is_batch else "row")
    return quantized(jnp.stack([w, -2 * w]) if is_stack else w, preset)


def product(x, qt):
    if qt.ndim == 3:
        return jaxq.einsum("bk,ekn->ebn", x, qt)
    return x @ qt


def products_of_layers(x, stack):
    def step(carry, layer):
        return carry, x @ layer

    return jax.lax.scan(step, None, stack)[1]


def squares(x, qt):
    return (product(x, qt) ** 2).sum()


def run(action, x, qt):
    """The result of an action that computes with a QTensor."""
    if action == "matmul":
        return jax.jit(product)(x, qt)
    if action == "gradient":
        return jax.jit(jax.grad(squares))(x, qt)
    return jax.jit(products_of_layers)(x, qt)


def is_cut(preset, where):
    """Whether a shard would cut a group, a byte or a scale."""
    return preset in CUT_BY_ROWS and where in ("row", "both")


def placed_on(qt, mesh, preset, where):
    """The QTensor on the mesh. A shard that would cut something must be an error."""
    num_batch = len(qt.batch_shape) - (where == "batch")
    spec = P(*[None] * num_batch, *SPECS[where])
    if is_cut(preset, where):
        with pytest.raises(ValueError, match=r"place: the shards do not fit"):
            sharding.place(qt, mesh, spec)
        placed = sharding.place(qt, mesh, spec, fit_to_shards=True)
        np.testing.assert_array_equal(jaxq.dequantize(placed), jaxq.dequantize(qt))
    else:
        placed = sharding.place(qt, mesh, spec)
        jax.tree.map(np.testing.assert_array_equal, placed, qt)
    (shard, *_) = placed.data.addressable_shards
    assert shard.data.size * (4 if where == "both" else 2) == placed.data.size
    return placed


def check_files(qt, placed, mesh, preset, where, folder):
    """Saves a QTensor on the mesh, and loads it from disk straight onto the mesh."""
    rules = SPECS[where]
    jaxq.save(folder / "placed", placed)
    loaded = jaxq.load(folder / "placed", mesh=mesh, rules=rules)

    def compare(leaf, expected):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, expected)

    jax.tree.map(compare, loaded, placed)
    jaxq.save(folder / "whole", qt)
    if is_cut(preset, where):
        with pytest.raises(ValueError, match=r"load: the shards do not fit"):
            jaxq.load(folder / "whole", mesh=mesh, rules=rules)
    else:
        # A file does not know the mesh.
        whole = (folder / "whole").read_bytes()
        assert (folder / "placed").read_bytes() == whole


@pytest.mark.parametrize(
    ("preset", "where", "kind", "action"), tables.thinned(TABLE, pairwise())
)
def test_sharded_weights(preset, where, kind, action, tmp_path):
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(kind, kind))
    is_batch = where == "batch"
    if action == "quantize":
        expected = on_one_device(preset, is_batch=is_batch)
        with jax.set_mesh(mesh):
            w = jax.device_put(weight_for(where), NamedSharding(mesh, SPECS[where]))
            qt = quantized(w, preset)
        same_sums = where == "batch" or (where == "column" and preset != "ttq")
        if preset not in SCALES_ARE_MEANS or same_sums:
            jax.tree.map(np.testing.assert_array_equal, qt, expected)
            return
        np.testing.assert_allclose(qt.scale, expected.scale, rtol=1e-6)
        if qt.codebook is not None:
            np.testing.assert_allclose(qt.codebook, expected.codebook, rtol=1e-6)
        assert jnp.mean(qt.codes() == expected.codes()) > 0.999
        return
    is_stack = action == "scan" and not is_batch
    qt = on_one_device(preset, is_batch=is_batch, is_stack=is_stack)
    x = normal_with_outliers(4, K)
    placed = placed_on(qt, mesh, preset, where)
    if action == "place":
        return
    if action == "save and load":
        check_files(qt, placed, mesh, preset, where, tmp_path)
        return
    expected = run(action, x, qt)
    with jax.set_mesh(mesh):
        x = sharding.place(x, mesh, P())
        if (action, where, kind) == ("scan", "batch", AxisType.Explicit):
            # jax does not scan over layers that are on different devices.
            with pytest.raises(ValueError, match=r"xs should be replicated"):
                run(action, x, placed)
            return
        y = run(action, x, placed)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * scale)
