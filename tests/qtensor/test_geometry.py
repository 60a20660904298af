"""Roles of axes: stored shapes, inverses of every arrangement, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerChannel, PerFlat, PerGroup, PerTensor, PerToken, QuantSpec
from jaxq.qtensor._geometry import ErrorContext, resolve

GROUP = PerGroup(16, pad=True)
# shape, granularity, contracting, batch -> shape of the stored codes and of the scales
ROLES = {
    "row": ((100,), PerChannel(), None, (), (100,), (1,)),
    "dense": ((64, 24), PerChannel(), None, (), (24, 64), (24, 1)),
    "dense in groups": ((64, 24), GROUP, None, (), (24, 64), (24, 4)),
    "ragged groups": ((70, 24), GROUP, None, (), (24, 70), (24, 5)),
    "group larger than the axis": ((10, 24), GROUP, None, (), (24, 10), (24, 1)),
    "query, key and value": ((64, 4, 8), GROUP, -3, (), (4, 8, 64), (4, 8, 4)),
    "attention output": ((4, 12, 20), GROUP, (-3, -2), (), (20, 48), (20, 3)),
    "convolution": ((3, 3, 8, 20), GROUP, (0, 1, 2), (), (20, 72), (20, 5)),
    "embedding": ((50, 64), GROUP, -1, (), (50, 64), (50, 4)),
    "first and last": ((4, 6, 8), PerChannel(), (0, 2), (), (6, 32), (6, 1)),
    "stacked layers": ((3, 64, 24), GROUP, -2, 0, (3, 24, 64), (3, 24, 4)),
    "layers and experts": (
        (2, 3, 64, 24),
        GROUP,
        -2,
        (0, 1),
        (2, 3, 24, 64),
        (2, 3, 24, 4),
    ),
    "tensor": ((64, 24), PerTensor(), None, (), (24, 64), (1, 1)),
    "tokens": ((2, 5, 32), PerToken(), None, (), (2, 5, 32), (2, 5, 1)),
    "channel by axis": ((4, 6, 8), PerChannel(axis=-2), None, (), (6, 32), (6, 1)),
    "group by axis": (
        (4, 64, 8),
        PerGroup(16, axis=1),
        None,
        (),
        (4, 8, 64),
        (4, 8, 4),
    ),
    "tiles": ((64, 24), PerBlock((16, 8)), None, (), (24, 64), (3, 4)),
    "tiles that do not divide": (
        (60, 20),
        PerBlock((16, 8), pad=True),
        None,
        (),
        (20, 60),
        (3, 4),
    ),
    "tiles of stacked matrices": (
        (3, 64, 24),
        PerBlock((16, 8)),
        -2,
        (),
        (3, 24, 64),
        (3, 3, 4),
    ),
    "flat": ((24, 10), PerFlat(64), None, (), (240,), (4,)),
    "flat stack": ((3, 24, 10), PerFlat(64), -2, 0, (3, 240), (3, 4)),
}
over_roles = pytest.mark.parametrize("role", ROLES)


def geometry_of(role: str):
    shape, granularity, contracting, batch, *_ = ROLES[role]
    context = ErrorContext("test", "x", "float32")
    return resolve(shape, granularity, contracting, batch, context=context, multiple=1)


@over_roles
def test_stored_shapes(role):
    shape, granularity, contracting, batch, codes, scales = ROLES[role]
    quantize = functools.partial(
        jaxq.quantize,
        spec=QuantSpec("int8", granularity),
        contracting=contracting,
        batch=batch,
    )
    qt = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert (qt.data.shape, qt.scale.shape) == (codes, scales)
    assert (qt.shape, jax.eval_shape(jaxq.QTensor.codes, qt).shape) == (shape, shape)
    values = jax.jit(lambda x: jaxq.dequantize(quantize(x)))(np.ones(shape, np.float32))
    assert values.shape == shape
    np.testing.assert_allclose(values, np.ones(shape), rtol=1e-6)


@over_roles
def test_every_arrangement_has_an_inverse(role):
    shape, geometry = ROLES[role][0], geometry_of(role)
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)

    @jax.jit
    def there_and_back(x):
        view = geometry.to_view(x)
        padded = geometry.pad(view)
        storage = geometry.to_storage(padded)
        blocks = geometry.from_blocks(geometry.to_blocks(padded))
        pairs = (
            (geometry.unpad(padded), view),
            (blocks, padded),
            (geometry.to_view_order(storage), padded),
        )
        return geometry.from_view(view), pairs, storage

    back, pairs, storage = there_and_back(x)
    np.testing.assert_array_equal(back, x)
    for actual, expected in pairs:
        np.testing.assert_array_equal(actual, expected)
    # The definition of storage order: kept axes in order, then the contracted axes,
    # flattened.
    rest = np.transpose(
        x, (*range(x.ndim - len(geometry.shape)), *(x.ndim + a for a in geometry.order))
    )
    flat = rest.reshape(
        *rest.shape[: x.ndim - len(geometry.shape)], *geometry.storage_shape
    )
    np.testing.assert_array_equal(
        np.asarray(storage)[tuple(slice(n) for n in flat.shape)], flat
    )


@over_roles
def test_scales_broadcast_to_their_blocks(role):
    geometry, shape = geometry_of(role), ROLES[role][0]
    batch = shape[: len(shape) - len(geometry.shape)]
    scale = np.arange(np.prod(batch + geometry.num_blocks), dtype=np.float32).reshape(
        *batch, *geometry.num_blocks
    )

    @jax.jit
    def blocked(scale, ones):
        spread = geometry.scale_to_blocks(scale)
        return (
            spread,
            geometry.scale_from_blocks(spread),
            geometry.to_blocks(geometry.pad(geometry.to_view(ones))),
        )

    spread, back, ones = map(np.asarray, blocked(scale, np.ones(shape, np.float32)))
    np.testing.assert_array_equal(back, scale)
    # Ones times the scale of their block: each block holds exactly one number.
    np.testing.assert_array_equal(
        np.max(ones * spread, axis=geometry.block_axes, keepdims=True), spread
    )
    counts = geometry.counts()
    assert counts.sum() * np.prod(batch, initial=1) == np.prod(shape)
    expected = np.sum(ones, axis=geometry.block_axes, keepdims=True)
    np.testing.assert_array_equal(np.broadcast_to(counts, expected.shape), expected)


def test_values_do_not_depend_on_how_a_role_is_named():
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    by_axis = jaxq.quantize(x.T.copy(), QuantSpec("int4", PerGroup(16, axis=-2)))
    by_argument = jaxq.quantize(x, QuantSpec("int4", PerGroup(16)), contracting=-1)
    positive = jaxq.quantize(x, QuantSpec("int4", PerGroup(16)), contracting=1)
    np.testing.assert_array_equal(
        jaxq.dequantize(by_axis).T, jaxq.dequantize(by_argument)
    )
    np.testing.assert_array_equal(by_axis.data, by_argument.data)
    assert positive.meta == by_argument.meta
    channel = QuantSpec("int8", PerChannel(axis=1))
    np.testing.assert_array_equal(
        jaxq.quantize(x, channel, contracting=0).scale[:, 0],
        abs(x).max(0) * np.float32(1 / 127),
    )


def test_flat_blocks_cross_rows():
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    qt = jaxq.quantize(x, QuantSpec("int8", PerFlat(8)))
    flat = np.pad(x.T.ravel(), (0, 4)).reshape(8, 8)
    np.testing.assert_array_equal(qt.scale, abs(flat).max(1) * np.float32(1 / 127))


CONTRADICTIONS = {
    "batch axis that does not lead": (
        (2, 3, 4),
        PerChannel(),
        -1,
        1,
        "batch axes must be the leading axes, got batch=1",
    ),
    "batch axis twice": (
        (2, 3, 4),
        PerChannel(),
        -1,
        (0, 0),
        r"batch axes \[0, 0\] must be distinct axes",
    ),
    "batch axis out of range": (
        (2, 3),
        PerChannel(),
        -1,
        5,
        r"batch axes \[5\] must be distinct axes of the array",
    ),
    "only batch axes": (
        (2, 3),
        PerChannel(),
        None,
        (0, 1),
        "every axis is a batch axis, so no axis is left",
    ),
    "contracting a batch axis": (
        (2, 3, 4),
        PerChannel(),
        0,
        0,
        "contracting=0 must name at least one axis, and no batch",
    ),
    "contracting nothing": (
        (2, 3),
        PerChannel(),
        (),
        (),
        r"contracting=\(\) must name at least one axis",
    ),
    "contracting out of range": (
        (2, 3),
        PerChannel(),
        -3,
        (),
        r"contracting axes \[-3\] must be distinct axes",
    ),
    "contracting twice": (
        (2, 3),
        PerChannel(),
        (0, -2),
        (),
        r"contracting axes \[0, -2\] must be distinct",
    ),
    "two roles": (
        (4, 6),
        PerGroup(2, axis=0),
        -1,
        (),
        r"contracts axes \[-2\], but contracting=-1 contracts axes \[-1\]",
    ),
    "two channels": (
        (4, 6),
        PerChannel(axis=0),
        0,
        (),
        r"contracts axes \[-1\], but contracting=0 contracts axes \[-2\]",
    ),
    "axis of the batch": (
        (2, 4, 6),
        PerGroup(2, axis=0),
        None,
        0,
        "names a batch axis",
    ),
    "axis out of range": (
        (4, 6),
        PerGroup(2, axis=2),
        None,
        (),
        r"granularity axis axes \[2\] must be distinct axes",
    ),
    "no default": (
        (2, 3, 4),
        PerGroup(2),
        None,
        (),
        r"contracting= is missing, and only a matrix and a 1-D array have a default",
    ),
    "tiles of two contracted axes": (
        (2, 4, 8),
        PerBlock((2, 2)),
        (0, 1),
        (),
        "needs one contracted axis",
    ),
    "too many tiles": ((4, 8), PerBlock((2, 2, 2)), None, (), "at most 2 sizes"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name):
    shape, granularity, contracting, batch, message = CONTRADICTIONS[name]
    with pytest.raises(
        ValueError,
        match=rf"quantize: .*{message}.*\(w: float32\[{','.join(map(str, shape))}\]\)",
    ):
        jaxq.quantize(
            jnp.ones(shape),
            QuantSpec("int8", granularity),
            contracting=contracting,
            batch=batch,
        )


@pytest.mark.parametrize("make", [PerGroup, PerFlat, lambda size: PerBlock((4, size))])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_sizes_are_whole_and_positive(make, size):
    with pytest.raises(
        ValueError, match=rf"sizes are whole numbers of at least 1, got {size!r}"
    ):
        make(size)
