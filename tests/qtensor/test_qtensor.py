"""QTensor: its text, its bytes, its axes, and the errors of what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerBlock, PerFlat, PerGroup, PerTensor, QTensor, QuantSpec
from jaxq.formats import Packing, codes_per_pack
from tests import tables
from tests.arrays import normal

SHAPE = (96, 12)


def quantized(spec="int8", shape=SHAPE, **roles) -> QTensor:
    return jaxq.quantize(normal(*shape), spec, **roles)


# Text.


TEXTS = {
    "int8": "int8[96x12], PerChannel(along -2), scale=float32, 8.333 bits",
    "int4": "int4[96x12], PerGroup(along -2), scale=bfloat16, signed_extreme, "
    "4.167 bits",
    "nf4": "nf4[96x12], PerGroup(64 along -2), scale=float32, 4.667 bits",
    "nvfp4": "float4_e2m1fn[96x12], PerGroup(16 along -2), "
    "scale=float8_e4m3fn*float32, 4.528 bits",
    "uint8": "uint8[96x12], PerChannel(along -2), scale=float32, asymmetric, "
    "8.417 bits",
    "mxfp4": "float4_e2m1fn[96x12], PerGroup(32 along -2), scale=float8_e8m0fnu, "
    "mx_floor, 4.25 bits",
}


@pytest.mark.parametrize("spec", TEXTS)
def test_repr_is_one_line(spec):
    assert repr(quantized(spec)) == f"QTensor({TEXTS[spec]}, float32)"


@pytest.mark.parametrize("preset", ["int8", "uint4", "nf4_dq"])
def test_leaves_that_are_not_arrays(preset):
    # Transforms and libraries put other leaves into a tree: sentinels, None, axis
    # numbers, dtypes.
    qt = quantized(preset)
    for leaf in (
        object(),
        0,
        None,
        "data",
        jnp.float32,
        jax.ShapeDtypeStruct((2,), jnp.int8),
    ):
        other = jax.tree.map(lambda _, leaf=leaf: leaf, qt)
        assert isinstance(other, QTensor)
        assert repr(other).startswith(f"QTensor({qt.spec.fmt.name}[")
        assert "\n" not in repr(other)
        if leaf is not None:
            assert jax.tree.structure(other) == jax.tree.structure(qt)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(qt)]
    assert paths[:2] == [".data", ".scale" if preset != "nf4_dq" else ".scale.data"]
    mapped = jax.vmap(lambda q: q, in_axes=(jax.tree.map(lambda _: 0, qt),))
    assert mapped(jax.tree.map(lambda a: a[None], qt)).shape == (1, *SHAPE)


@pytest.mark.parametrize("preset", ["int8", "nf4_dq"])
# treescope reads numpy.chararray.
@pytest.mark.filterwarnings(
    "ignore:The chararray class is deprecated:DeprecationWarning"
)
def test_treescope(preset):
    treescope = pytest.importorskip("treescope", reason="renders with treescope")
    qt = quantized(preset)
    text = treescope.render_to_text(qt)
    assert text.startswith("QTensor(")
    assert f"name={qt.spec.fmt.name!r}" in text
    assert "(96, 12)" in text
    assert "QTensor(" in treescope.render_to_text(jax.tree.map(lambda _: object(), qt))


# Bytes.


@pytest.mark.parametrize(
    ("preset", "data", "scale"),
    [
        ("int8", 96 * 12, 12 * 4),
        ("int4", 96 * 12 // 2, 12 * 2),  # one group of 96 each
        ("int3", 96 * 12 * 3 // 8, 12 * 2),
        ("binary", 96 * 12 // 8, 12 * 4),
        ("nf4", 96 * 12 // 2, 24 * 4),  # groups of 64 and 32
        ("nf4_dq", 96 * 12 // 2, 24 + 4),
        ("mxfp6_e2m3", 96 * 12 * 6 // 8, 36),
        ("nvfp4", 96 * 12 // 2, 72 + 4),
        ("vsq4", 96 * 12 // 2, 72 // 2 + 12 * 4),
    ],
)
def test_bytes_of_every_level(preset, data, scale):
    qt = quantized(preset)
    assert qt.data.dtype in (jnp.uint8, jnp.int8)
    assert (qt.data.nbytes, qt.scale.nbytes, qt.nbytes) == (data, scale, data + scale)
    assert qt.bits_per_element == 8 * (data + scale) / (96 * 12)
    if isinstance(qt.scale, QTensor):
        assert qt.scale.size == np.prod(qt.meta.geometry.num_blocks)
        assert qt.scale.bits_per_element == 8 * scale / qt.scale.size


# Packing.

RELAYOUT = {
    **{
        name: jaxq.presets()[name]
        for name in ("int8", "int4", "int3", "uint4", "mxfp6_e2m3", "nf4_dq", "nvfp4")
    },
    "odd groups": QuantSpec("int4", PerGroup(5, pad=True), packing="none"),
    "odd groups, zero point": QuantSpec(
        "uint2", PerGroup(7, pad=True), symmetric=False, packing="none"
    ),
    "odd groups, minimum": QuantSpec(
        "uint4", PerGroup(5, pad=True), offset="min", packing="none"
    ),
    "flat": QuantSpec("nf4", PerFlat(10), packing="none"),
    "bytes to nibbles": QuantSpec("binary", PerGroup(3), packing="bitstream"),
}


@pytest.mark.parametrize(
    "name",
    tables.thinned(
        RELAYOUT,
        [name for name in RELAYOUT if name not in ("int8", "uint4", "mxfp6_e2m3")],
    ),
)
def test_relayout_does_not_change_values(name):
    qt = quantized(RELAYOUT[name], (95 if "odd" in name else 96, 12))
    orders = []
    for packing in Packing:
        try:
            codes_per_pack(qt.spec.fmt.bits, packing)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error).split("'")[1]):
                jaxq.relayout(qt, packing)
            continue
        orders.append(packing)

    @jax.jit
    def moved(qt):
        others = [jaxq.relayout(qt, packing.value) for packing in orders]
        assert [other.meta.packing for other in others] == orders
        back = [
            jaxq.dequantize(jaxq.relayout(other, qt.meta.packing)) for other in others
        ]
        return [other.codes() for other in (qt, *others)], [
            jaxq.dequantize(other) for other in (qt, *others)
        ] + back

    for expected, *others in moved(qt):
        for other in others:
            np.testing.assert_array_equal(other, expected)
    assert len(orders) >= (
        5 if qt.spec.fmt.bits < 8 and 8 % qt.spec.fmt.bits == 0 else 2
    )


def test_relayout_gives_the_bytes_of_quantizing_with_that_packing():
    for packing in ("low_first", "high_first", "bitstream", "halves"):
        spec = jaxq.presets()["nf4"].replace(packing=packing)
        np.testing.assert_array_equal(
            jaxq.relayout(quantized("nf4"), packing).data, quantized(spec).data
        )
    bytes_of = jaxq.relayout(quantized("nf4"), "none")
    np.testing.assert_array_equal(bytes_of.data.T, bytes_of.codes())


def test_relayout_refuses_more_blocks_of_quantized_scales():
    spec = QuantSpec(
        "int4", PerGroup(5, pad=True), scale=QuantSpec("uint8"), packing="none"
    )
    with pytest.raises(
        ValueError,
        match=r"1 more blocks .*, and quantized scales cannot grow\. Quantize with",
    ):
        jaxq.relayout(quantized(spec, (95, 12)), "halves")
    with pytest.raises(
        ValueError, match="relayout: target must be one of none, .*; got 'zigzag'"
    ):
        jaxq.relayout(quantized("int4"), "zigzag")


# Axes.

MOVED = [
    "int8",
    "nf4_dq",
    "nvfp4",
    "vsq4",
    "uint4",
    QuantSpec("int8", PerTensor()),
    QuantSpec("nf4", PerFlat(64)),
]


@pytest.mark.parametrize(
    "spec", [*MOVED, QuantSpec("int8", PerBlock((16, 4)))], ids=str
)
def test_transposes(spec):
    qt = quantized(spec)
    values = np.asarray(jaxq.dequantize(qt))
    turned = qt.T
    assert turned.shape == (12, 96)
    # No data moves: the leaves are the same objects.
    for leaf, other in zip(jax.tree.leaves(turned), jax.tree.leaves(qt), strict=True):
        assert leaf is other
    np.testing.assert_array_equal(jaxq.dequantize(turned), values.T)
    np.testing.assert_array_equal(turned.codes(), np.asarray(qt.codes()).T)
    np.testing.assert_array_equal(jaxq.dequantize(qt.swapaxes(0, -1)), values.T)
    assert turned.T.meta == qt.meta
    assert qt.swapaxes(0, 0).meta == qt.meta


def test_axes_of_stacks():
    qt = quantized("nf4", (3, 64, 4, 2), contracting=-3, batch=0)
    values = np.asarray(jaxq.dequantize(qt))
    for a, b in ((-1, -2), (1, 3), (-3, -2)):
        moved = qt.swapaxes(a, b)
        np.testing.assert_array_equal(jaxq.dequantize(moved), values.swapaxes(a, b))
        np.testing.assert_array_equal(
            jaxq.dequantize(moved[1]), values.swapaxes(a, b)[1]
        )
    with pytest.raises(
        ValueError,
        match=r"swapaxes: axis -4 is not one of the last 3 axes of QTensor\(nf4\[3x64",
    ):
        qt.swapaxes(0, 1)
    with pytest.raises(ValueError, match="axis 5 is not one of"):
        qt.swapaxes(9, 1)
    with pytest.raises(
        TypeError,
        match=r"has batch axes\. Use swapaxes\(-1, -2\), or slice the batch first",
    ):
        _ = qt.T


@pytest.mark.parametrize(
    "spec",
    tables.thinned(MOVED, [s for s in MOVED if s not in ("int8", "vsq4")]),
    ids=str,
)
def test_reshape_splits_and_merges_kept_axes(spec):
    qt = quantized(spec)
    values = np.asarray(jaxq.dequantize(qt))
    shapes = (
        (96, 3, 4),
        (96, 1, 12),
        (96, 12, 1),
        (1, 96, 12),
        (96, 12),
        (96, 2, 3, 2),
        (96, -1, 6),
    )

    @jax.jit
    def reshaped(qt):
        splits = [qt.reshape(shape) for shape in shapes]
        merged = [split.reshape(96, 12) for split in splits]
        assert {jax.tree.structure(other) for other in merged} == {
            jax.tree.structure(qt)
        }
        assert [split.shape for split in splits] == [
            values.reshape(shape).shape for shape in shapes
        ]
        turned, again = qt.T.reshape(3, 4, 96), qt.reshape(96, 3, 4).reshape(96, 4, 3)
        return jax.tree.map(
            jaxq.dequantize,
            (splits, merged, turned, again),
            is_leaf=lambda leaf: isinstance(leaf, QTensor),
        )

    splits, merged, turned, again = reshaped(qt)
    for split, shape in zip(splits, shapes, strict=True):
        np.testing.assert_array_equal(split, values.reshape(shape))
    for other in merged:
        np.testing.assert_array_equal(other, values)
    np.testing.assert_array_equal(turned, values.T.reshape(3, 4, 96))
    np.testing.assert_array_equal(again, values.reshape(96, 4, 3))


def test_reshape_with_two_contracted_axes():
    qt = quantized("int8", (4, 12, 20), contracting=(-3, -2))
    values = np.asarray(jaxq.dequantize(qt))
    split = qt.reshape(4, 12, 4, 5)
    np.testing.assert_array_equal(jaxq.dequantize(split), values.reshape(4, 12, 4, 5))
    with pytest.raises(ValueError, match=r"contracted axes \[-3, -2\] must keep"):
        qt.reshape(48, 20)


def test_reshape_with_batch_axes_tiles_and_minimums():
    qt = quantized(
        QuantSpec("uint4", PerGroup(16), offset="min"),
        (3, 32, 12),
        contracting=-2,
        batch=0,
    )
    values = np.asarray(jaxq.dequantize(qt))
    np.testing.assert_array_equal(
        jaxq.dequantize(qt.reshape(3, 32, 4, 3)), values.reshape(3, 32, 4, 3)
    )
    mean = quantized(
        QuantSpec("int8", offset="mean"), (3, 32, 12), contracting=-2, batch=0
    )
    np.testing.assert_array_equal(
        jaxq.dequantize(mean.reshape(3, 32, 4, 3)),
        np.asarray(jaxq.dequantize(mean)).reshape(3, 32, 4, 3),
    )
    # One scale for each of the 4 matrices.
    tiles = quantized(
        QuantSpec("int8", PerBlock((32, 12))), (4, 32, 12), contracting=-2
    )
    values = np.asarray(jaxq.dequantize(tiles))
    np.testing.assert_array_equal(
        jaxq.dequantize(tiles.reshape(2, 2, 32, 12)), values.reshape(2, 2, 32, 12)
    )
    # An axis with one block can be split. An axis with several tiles cannot.
    np.testing.assert_array_equal(
        jaxq.dequantize(tiles.reshape(4, 32, 3, 4)), values.reshape(4, 32, 3, 4)
    )
    cut = quantized(QuantSpec("int8", PerBlock((32, 6))))
    with pytest.raises(ValueError, match="blocks of codes or of scales would be cut"):
        cut.reshape(96, 3, 4)


@pytest.mark.parametrize(
    ("shape", "new", "roles", "message"),
    [
        ((96, 12), (12, 96), {}, r"contracted axes \[-2\] must keep their sizes"),
        ((96, 12), (8, 12, 12), {}, r"contracted axes \[-2\] must keep their sizes"),
        ((96, 12), (1152,), {}, r"contracted axes \[-2\] must keep their sizes"),
        (
            (96, 12),
            (96, 13),
            {},
            "the number of elements and the batch axes must not change",
        ),
        (
            (96, 12),
            (-1, -1),
            {},
            "the number of elements and the batch axes must not change",
        ),
        (
            (3, 32, 4),
            (96, 4),
            {"contracting": -2, "batch": 0},
            "the number of elements and the batch axes must not change",
        ),
        (
            (4, 32, 6),
            (24, 32),
            {"contracting": -2},
            r"contracted axes \[-2\] must keep their sizes",
        ),
        ((64, 0), (0, 64), {}, "an array without elements must keep its shape"),
    ],
)
def test_reshape_refuses_the_rest(shape, new, roles, message):
    with pytest.raises(
        ValueError,
        match=rf"QTensor\.reshape: QTensor\(int8.*cannot become \[.*\]: {message}",
    ):
        quantized("int8", shape, **roles).reshape(new)


def test_reshape_refuses_axes_that_are_not_neighbours_in_storage():
    qt = quantized("int8", (4, 32, 6), contracting=-2)
    qt = qt.swapaxes(-1, -3).swapaxes(-1, -2)
    assert qt.shape == (6, 4, 32)  # stored as [4, 6, 32]
    with pytest.raises(
        ValueError, match="the axes to merge are not neighbours in storage"
    ):
        qt.reshape(24, 32)


def test_indexing_and_iteration_over_batch_axes():
    qt = quantized("nf4_dq", (2, 3, 64, 4), contracting=-2, batch=(0, 1))
    values = np.asarray(jaxq.dequantize(qt))
    assert (len(qt), qt.batch_shape) == (2, (2, 3))
    for index in (
        0,
        -1,
        (1, 2),
        slice(1, 2),
        (slice(None), 1),
        ...,
        (0, ...),
        np.array([1, 0]),
    ):
        np.testing.assert_array_equal(jaxq.dequantize(qt[index]), values[index])
    assert [part.shape for part in qt] == [(3, 64, 4)] * 2
    np.testing.assert_array_equal(
        np.stack([jaxq.dequantize(part) for part in qt]), values
    )
    single = qt[0, 0]
    for index in (0, slice(2), (0, 0), None):
        with pytest.raises(
            IndexError,
            match=r"only batch axes can be indexed, and QTensor.* has 0\. .*dequantize",
        ):
            single[index]
    with pytest.raises(IndexError, match="has 2"):
        qt[0, 0, 0]
    with pytest.raises(TypeError, match="only batch axes can be iterated over"):
        list(single)


@pytest.mark.parametrize("preset", ["int8", "int4", "nf4"])
def test_only_leading_axes_are_mapped_over(preset):
    # The sizes of square matrices do not show which axis was removed.
    qt = jaxq.quantize(normal(3, 64, 64), preset, contracting=-2, batch=0)
    np.testing.assert_array_equal(jax.vmap(jaxq.dequantize)(qt), jaxq.dequantize(qt))
    for use in (
        jaxq.dequantize,
        lambda layer: jnp.ones((2, 64)) @ layer,
        lambda layer: layer.codes(),
    ):
        with pytest.raises(
            ValueError,
            match="Only leading batch axes may be mapped over: use in_axes=0",
        ):
            jax.vmap(use, in_axes=1)(qt)


def test_astype_changes_what_dequantize_returns():
    qt = quantized()
    half = qt.astype(jnp.bfloat16)
    assert (half.dtype, jaxq.dequantize(half).dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert half.data is qt.data
    assert half.astype("float32").meta == qt.meta
    with pytest.raises(
        TypeError,
        match=r"astype: dtype must be a float dtype, got int8\. For the codes use",
    ):
        qt.astype(jnp.int8)


# Everything else.

REFUSED = {
    "+": lambda q: q + 1,
    "1 -": lambda q: 1 - q,
    "*": lambda q: q * q,
    "jax array *": lambda q: jnp.ones(3) * q,
    "numpy array *": lambda q: np.ones(3) * q,
    "numpy scalar /": lambda q: np.float32(2) / q,
    "//": lambda q: q // 2,
    "%": lambda q: q % 2,
    "divmod": lambda q: divmod(q, 2),
    "**": lambda q: q**2,
    "negative": lambda q: -q,
    "positive": lambda q: +q,
    "invert": lambda q: ~q,
    "abs": abs,
    "round": round,
    "<": lambda q: q < 1,
    "==": lambda q: q == 0,
    "== array": lambda q: jnp.ones(3) == q,
    "!=": lambda q: np.ones(3) != q,
    ">= array": lambda q: q >= np.ones(3),
    "&": lambda q: q & 1,
    "<<": lambda q: q << 1,
    "float": float,
    "int": int,
    "complex": complex,
    "if": lambda q: 1 if q else 0,
    "numpy": np.asarray,
    "numpy with dtype": lambda q: np.array(q, np.float32),
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arithmetic_names_the_remedy(name):
    with pytest.raises(
        TypeError, match=r"QTensor\(int8\[96x12\].*jaxq\.dequantize\(qt\)"
    ):
        REFUSED[name](quantized())


def test_a_qtensor_equals_only_itself():
    q, other = quantized(), quantized()
    assert (q == q, q == other, q != other, q == "w") == (True, False, True, False)
    assert (q == None) is False  # noqa: E711
    assert q in [other, q]
    assert len({q, q, other}) == 2


@pytest.mark.parametrize(
    "use",
    [
        jnp.sin,
        lambda q: jnp.add(jnp.ones(3), q),
        lambda q: np.add(np.ones(3), q),
        jnp.stack,
    ],
)
def test_functions_of_arrays_refuse_it(use):
    # The class has no `__jax_array__`. The attribute of an instance raises an error.
    assert not hasattr(QTensor, "__jax_array__")
    with pytest.raises(TypeError, match="QTensor"):
        use(quantized())


@pytest.mark.parametrize(
    "use",
    [
        jnp.asarray,
        jnp.exp,
        lambda q: jnp.split(q, 2),
        lambda q: jnp.dot(jnp.ones((1, 8)), q),
    ],
)
def test_errors_of_jax_name_the_array_and_the_remedy(use):
    q = quantized()
    q = dataclasses.replace(q, meta=dataclasses.replace(q.meta, name="mlp/up"))
    with pytest.raises(TypeError, match=r"QTensor\(mlp/up: .*jaxq.dequantize"):
        use(q)
    with pytest.raises(ValueError, match="order must be one of C"):
        q.reshape(q.shape, order="F")


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized().data = None
    assert quantized().meta == quantized().meta
    assert hash(quantized().meta) == hash(quantized().meta)


@pytest.mark.parametrize("preset", tables.thinned(["uint8", "nf4_dq"], ["nf4_dq"]))
def test_it_passes_through_jax(preset):
    qt = quantized(preset, (4, 64, 4), contracting=-2, batch=0)
    values = np.asarray(jaxq.dequantize(qt))
    same = jax.jit(lambda q: q)(qt)
    assert jax.tree.structure(same) == jax.tree.structure(qt)
    put = jax.device_put(qt, jax.devices()[-1])
    np.testing.assert_array_equal(jaxq.dequantize(put), values)
    chosen = jax.jit(lambda q, i: jaxq.dequantize(q[i]))(qt, 2)
    np.testing.assert_array_equal(chosen, values[2])
    mesh = jax.make_mesh(
        (len(jax.devices()),), ("layers",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spread = jax.device_put(qt, jax.NamedSharding(mesh, jax.P("layers")))
    assert len(spread.data.sharding.device_set) == len(jax.devices()) == 4
    np.testing.assert_array_equal(jaxq.dequantize(spread), values)
    swapped = jax.lax.cond(
        jnp.array(True), lambda a, b: a, lambda a, b: b, qt[0], qt[1]
    )
    np.testing.assert_array_equal(jaxq.dequantize(swapped), values[0])


# Input scales.


def test_an_input_scale_multiplies_rows():
    w, s = normal(64, 8), np.exp(normal(64, seed=1))
    plain = jaxq.quantize(w, "int4")
    qt = plain.with_input_scale(s)
    expected = np.asarray(jaxq.dequantize(plain)) * s[:, None]
    np.testing.assert_array_equal(jaxq.dequantize(qt), expected)
    np.testing.assert_array_equal(jaxq.dequantize(qt.T), expected.T)
    np.testing.assert_array_equal(
        jaxq.dequantize(qt.reshape(64, 2, 4)), expected.reshape(64, 2, 4)
    )
    np.testing.assert_array_equal(qt.codes(), plain.codes())
    assert qt.nbytes == plain.nbytes + 4 * 64
    assert "input_scale" in repr(qt)
    assert "input_scale" not in repr(qt.with_input_scale(None))
    again = jaxq.qtensor.requantize(jaxq.dequantize(qt), qt)
    np.testing.assert_array_equal(again.codes(), qt.codes())


def test_an_input_scale_of_flat_blocks_and_stacks():
    w, s = normal(2, 64, 8), np.exp(normal(2, 64, seed=1))
    for spec in (QuantSpec("int8", PerFlat(64)), "int8"):
        plain = jaxq.quantize(w, spec, contracting=-2, batch=0)
        qt = plain.with_input_scale(s)
        expected = np.asarray(jaxq.dequantize(plain)) * s[..., None]
        np.testing.assert_array_equal(jaxq.dequantize(qt), expected)
        shared = plain.with_input_scale(s[0])
        np.testing.assert_array_equal(shared.input_scale, np.stack([s[0], s[0]]))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (np.ones(63, "f"), ValueError, r"scale must be \[64\], .*got float32\[63\]"),
        (np.ones(64, int), TypeError, "scale must be floats, got int32"),
        (np.zeros(64, "f"), ValueError, "finite and above 0, got numbers from 0.0"),
        (np.full(64, np.nan, "f"), ValueError, "finite and above 0"),
    ],
)
def test_input_scales_that_are_refused(scale, error, message):
    qt = jaxq.quantize(normal(64, 8), "int8")
    with pytest.raises(error, match=message):
        qt.with_input_scale(scale)
