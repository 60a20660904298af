"""Collectives that send codes: values, gradients, bytes on the wire, and training."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests.arrays import normal, normal_with_outliers
from tests.sharding.hlo import collectives_in
from tests.tables import thinned

NUM = 4  # devices
TYPES = (AxisType.Auto, AxisType.Explicit)
# The bits of a code, the size of a group, the bytes of a scale.
WIRE = {
    "int8": (8, 256, 4),
    "fp8": (8, 256, 4),
    "mxfp8": (8, 32, 1),
    "int4": (4, 128, 2),
    "nf4": (4, 64, 4),
    "ternary": (2, 256, 4),
    # Packs of 8 and of 4 codes fill three bytes.
    "int3": (3, 128, 2),
    "fp6_e2m3": (6, 256, 4),
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((NUM,), ("data",), axis_types=(kind,))


DATA = P("data")


def mapped(body, in_specs=DATA, out_specs=DATA, mesh=None, **options):
    mesh = mesh or mesh_of()
    return jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
        )
    )


def on_mesh(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def as_float64(x):
    return np.asarray(x).astype(np.float64)


# Values of all_reduce and reduce_scatter.


def rounding_bound(rows, group):
    """Half a step of int8 for each number of float64 rows `[..., n]`."""
    n = rows.shape[-1]
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -n % group)]
    groups = np.pad(np.abs(rows), padding).reshape(*rows.shape[:-1], -1, group)
    steps = groups.max(-1, keepdims=True) / 127 * np.ones(group)
    return 0.5001 * steps.reshape(*rows.shape[:-1], -1)[..., :n]


AUTO, EXPLICIT = TYPES
# (shape, check_vma, type of the mesh axis); the default rows contain every pair.
SUMS = tuple(itertools.product([(37, 50), (4096,), (3,)], [True, False], TYPES))
DEFAULT_SUMS = (
    ((37, 50), True, AUTO),
    ((37, 50), False, EXPLICIT),
    ((4096,), True, EXPLICIT),
    ((4096,), False, AUTO),
    ((3,), True, EXPLICIT),
    ((3,), False, AUTO),
)


@pytest.mark.parametrize(("shape", "check_vma", "kind"), thinned(SUMS, DEFAULT_SUMS))
def test_a_sum_is_within_two_roundings(shape, check_vma, kind):
    mesh = mesh_of(kind)
    x = normal_with_outliers(NUM, *shape)

    def body(x):
        y = sharding.all_reduce(x[0], "data", "int8")
        assert y.shape == shape
        if check_vma:
            y = jax.lax.pcast(y, "data", to="varying")
        return y[None]

    f = mapped(body, mesh=mesh, check_vma=check_vma)
    y = np.asarray(f(on_mesh(x, mesh, P("data"))))
    # All devices have the same bits.
    assert (y == y[:1]).all()
    size = math.prod(shape)
    piece = -(-size // NUM)
    rows = np.pad(as_float64(x).reshape(NUM, size), [(0, 0), (0, NUM * piece - size)])
    pieces = rows.reshape(NUM, NUM, piece)  # [device, piece, n]
    bound = rounding_bound(pieces, 256).sum(0)  # [piece, n]
    bound += rounding_bound(np.abs(pieces.sum(0)) + bound, 256)
    error = np.abs(as_float64(y[0]).reshape(-1) - rows.sum(0)[:size])
    assert (error <= bound.reshape(-1)[:size]).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("axis", "tiled"), [(0, True), (0, False), (1, True), (-1, False)]
)
def test_a_part_of_a_sum_is_within_one_rounding(axis, tiled):
    shape = [5, 6, 7]
    shape[axis] = 3 * NUM if tiled else NUM
    x = normal_with_outliers(NUM, *shape)
    f = mapped(
        lambda x: sharding.reduce_scatter(
            x[0], "data", "int8", scatter_dimension=axis, tiled=tiled
        )[None]
    )
    exact = mapped(
        lambda x: jax.lax.psum_scatter(
            x[0], "data", scatter_dimension=axis % 3, tiled=tiled
        )[None]
    )
    y, expected = as_float64(f(x)), as_float64(exact(x))
    assert y.shape == expected.shape
    largest = np.abs(np.asarray(x)).max((1, 2, 3)).sum()
    assert 0 < np.abs(y - expected).max() <= 0.5001 * largest / 127


def spec_of(preset):
    """The spec with the groups that a row on the wire has."""
    size = WIRE[preset][1]
    return jaxq.presets()[preset].replace(granularity=jaxq.PerGroup(size, pad=True))


@pytest.mark.parametrize("preset", thinned(WIRE, ("mxfp8", "nf4")))
def test_every_format_sums(preset):
    x = normal(NUM, 1000)
    y = mapped(lambda x: sharding.all_reduce(x[0], "data", preset), out_specs=P())(x)
    true = as_float64(x).sum(0)
    relative = np.sqrt(((as_float64(y) - true) ** 2).mean() / (true**2).mean())
    # The same array quantized twice on one device, without any collective.
    once = jaxq.dequantize(jaxq.quantize(x, spec_of(preset), batch=(0,)))
    twice = jaxq.dequantize(jaxq.quantize(once.sum(0), spec_of(preset)))
    expected = np.sqrt(((as_float64(twice) - true) ** 2).mean() / (true**2).mean())
    np.testing.assert_allclose(relative, expected, rtol=0.2)


def test_a_sum_has_the_dtype_of_its_summands():
    x = normal(NUM, 300, dtype="bfloat16")
    f = mapped(lambda x: sharding.all_reduce(x[0], "data", "int8"), out_specs=P())
    y = f(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(as_float64(y), as_float64(x).sum(0), atol=0.15)


def test_a_scalar_and_an_empty_array():
    tree = {"scalar": jnp.float32(2.5), "empty": jnp.zeros((0, 3))}

    def body(tree):
        return sharding.all_reduce(
            jax.lax.pcast(tree, "data", to="varying"), "data", "int8"
        )

    y = mapped(body, in_specs=P(), out_specs=P())(tree)
    assert y["empty"].shape == (0, 3)
    np.testing.assert_allclose(y["scalar"], 10.0, rtol=0.01)


def test_a_sum_over_several_mesh_axes():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = ("data", "model")
    x = normal(NUM, 512)
    f = mapped(
        lambda x: sharding.all_reduce(x[0], axes, "int8"), P(axes), P(), mesh=mesh
    )
    y = f(x)
    np.testing.assert_allclose(as_float64(y), as_float64(x).sum(0), atol=0.1)
    # One axis: the sum of two devices. The order of axes is that of jax.lax.
    part = mapped(
        lambda x: sharding.reduce_scatter(x[0], axes, "int8", tiled=True),
        P(axes),
        P(axes),
        mesh=mesh,
    )
    np.testing.assert_allclose(as_float64(part(x)), as_float64(x).sum(0), atol=0.1)
    rows = mapped(
        lambda x: sharding.all_reduce(x[0], "model", "int8")[None],
        P(axes),
        P("data"),
        mesh=mesh,
    )
    expected = as_float64(x).reshape(2, 2, 512).sum(1)
    np.testing.assert_allclose(as_float64(rows(x)), expected, atol=0.1)


def test_one_device_rounds_nothing():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    x = normal(1, 64, 8)
    for body in (
        lambda x: sharding.all_reduce(x, "data", "int4"),
        lambda x: sharding.reduce_scatter(x, "data", "int4"),
        lambda x: sharding.all_gather(x, "data", "int4", tiled=True),
    ):
        f = mapped(body, P("data"), P("data"), mesh=mesh, check_vma=False)
        y = np.asarray(f(x)).reshape(x.shape)
        np.testing.assert_array_equal(y, np.asarray(x))


def test_nan_stays_in_its_group():
    x = np.array(normal(NUM, 4096))
    x[2, 300] = np.nan  # piece 0, its second group of 256 numbers
    x[0, 1024 + 5] = np.inf  # piece 1, its first group
    y = mapped(lambda x: sharding.all_reduce(x[0], "data", "int8"), out_specs=P())(x)
    wrong = ~np.isfinite(np.asarray(y))
    expected = np.zeros(4096, bool)
    expected[256:512] = expected[1024:1280] = True
    np.testing.assert_array_equal(wrong, expected)


def test_stochastic_rounding_is_unbiased_and_differs_between_devices():
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(64), rounding="stochastic")
    x = jnp.broadcast_to(normal(64), (NUM, 64))

    def body(x, key):
        sums = jax.vmap(lambda key: sharding.all_reduce(x[0], "data", spec, key=key))(
            jax.random.split(key, 400)
        )
        parts = sharding.all_gather(x[0], "data", spec, key=key)
        return sums, parts

    f = mapped(body, (P("data"), P()), (P(), P("data")))
    sums, parts = f(x, jax.random.key(0))
    true, step = as_float64(x).sum(0), NUM * float(jnp.abs(x).max()) / 7
    error = np.abs(as_float64(sums).mean(0) - true).max()
    assert error < 4 * step / np.sqrt(400)
    assert len(np.unique(np.asarray(parts)[:NUM], axis=0)) == NUM


# Error feedback.


def errors_of(x, mesh):
    """The first errors for summands `[num_devices, *shape]`."""
    shape = jax.eval_shape(lambda x: x[0], x)
    return sharding.init_error({"w": shape}, mesh, "data")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["all_reduce", "mean_gradients", "reduce_scatter"])
def test_results_and_last_errors_add_up_to_the_true_sum(name, dtype):
    mesh, steps = mesh_of(), 6
    x = normal(steps, NUM, 12, 50, dtype=dtype)
    error = errors_of(x[0], mesh)
    options = {
        "all_reduce": {},
        "mean_gradients": {"min_size": 0},
        "reduce_scatter": {"tiled": True},
    }[name]
    is_part = name == "reduce_scatter"

    def step(error, x):
        function = getattr(sharding, name)
        total, error = function({"w": x}, "data", "int4", error=error, **options)
        return error, total["w"]

    f = mapped(
        lambda error, x: jax.lax.scan(step, error, x[:, 0]),
        (P("data"), P(None, "data")),
        (P("data"), P(None, "data") if is_part else P()),
        mesh=mesh,
    )
    error, totals = f(error, x)
    assert totals.dtype == dtype
    assert error["w"].dtype == jnp.float32
    totals = as_float64(totals) * (NUM if name == "mean_gradients" else 1)
    true = as_float64(x).sum((0, 1))
    found = totals.sum(0) + as_float64(error["w"]).sum(0)
    np.testing.assert_allclose(found, true, atol=2e-5)
    # Without the errors, it is wrong by less than one step's rounding.
    assert 0 < np.abs(totals.sum(0) - true).max() < 4


def test_the_mean_over_steps_tends_to_the_true_sum():
    mesh = mesh_of()
    x = normal(NUM, 700)
    error = errors_of(x, mesh)

    def body(x, error):
        def step(error, _):
            y, error = sharding.all_reduce({"w": x[0]}, "data", "int4", error=error)
            return error, y["w"]

        return jax.lax.scan(step, error, None, length=64)[1]

    y = as_float64(mapped(body, out_specs=P(), mesh=mesh)(x, error))
    true = as_float64(x).sum(0)
    distance = [np.abs(y[:num].mean(0) - true).max() for num in (1, 8, 64)]
    assert distance[1] < distance[0] / 4
    assert distance[2] < distance[0] / 32


def test_nan_does_not_stay_in_the_error():
    mesh = mesh_of()
    bad = np.array(normal(NUM, 600))
    bad[1, 3] = np.nan
    error = errors_of(bad, mesh)
    f = mapped(
        lambda x, e: sharding.all_reduce({"w": x[0]}, "data", "int4", error=e),
        out_specs=(P(), P("data")),
        mesh=mesh,
    )
    y, error = f(bad, error)
    assert np.isnan(np.asarray(y["w"])).sum() == 128
    assert np.isfinite(np.asarray(error["w"])).all()
    y, _ = f(normal(NUM, 600), error)
    assert np.isfinite(np.asarray(y["w"])).all()


def test_errors_are_sharded_like_parameters():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "tensor": on_mesh(jnp.ones((4, 6)), mesh, P(None, "model")),
        "fsdp": on_mesh(jnp.ones((4, 6)), mesh, P(("data", "model"))),
        "bias": jnp.ones(3, jnp.bfloat16),
    }
    error = sharding.init_error(params, mesh, "data")
    found = {name: (leaf.shape, leaf.sharding.spec) for name, leaf in error.items()}
    assert found == {
        "tensor": ((2, 4, 6), P("data", None, "model")),
        "fsdp": ((2, 4, 6), P("data", "model")),
        "bias": ((2, 3), P("data")),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in error.values())


def test_numbers_of_python_are_scalars():
    error = sharding.init_error({"scale": 2.0}, mesh_of(), "data")
    y, error = mapped(
        lambda x, e: sharding.mean_gradients(
            {"scale": x.reshape(())}, "data", "int8", e
        ),
        in_specs=(DATA, DATA),
        out_specs=(P(), DATA),
    )(jnp.arange(1.0 * NUM), error)
    assert float(y["scale"]) == (NUM - 1) / 2
    assert error["scale"].shape == (NUM,)
    with pytest.raises(TypeError, match="scale"):
        sharding.init_error({"scale": 2}, mesh_of(), "data")


# all_gather.


# (axis, tiled, type of the mesh axis); the default rows contain every pair.
GATHERS = tuple(itertools.product([0, 1, -1], [True, False], TYPES))
DEFAULT_GATHERS = (
    (0, True, AUTO),
    (0, False, EXPLICIT),
    (1, True, EXPLICIT),
    (1, False, AUTO),
    (-1, True, AUTO),
    (-1, False, EXPLICIT),
)


@pytest.mark.parametrize(("axis", "tiled", "kind"), thinned(GATHERS, DEFAULT_GATHERS))
def test_gathered_floats_are_those_of_each_device(axis, tiled, kind):
    mesh = mesh_of(kind)
    x = normal_with_outliers(NUM, 6, 5, 7, dtype="bfloat16")
    f = mapped(
        lambda x: sharding.all_gather(x[0], "data", "int4", axis=axis, tiled=tiled)[
            None
        ],
        mesh=mesh,
    )
    y = np.asarray(f(on_mesh(x, mesh, P("data"))))
    # The same codes on one device: groups of 128 in the flattened array.
    rows = jaxq.quantize(x.reshape(NUM, -1), spec_of("int4"), contracting=-1, batch=0)
    parts = jaxq.dequantize(rows).reshape(x.shape)
    join = np.concatenate if tiled else np.stack
    expected = join([np.asarray(part) for part in parts], axis=axis)
    assert y.dtype == expected.dtype
    for device in range(NUM):
        np.testing.assert_array_equal(y[device], expected)


@pytest.mark.parametrize("gradient_spec", [None, "int8"])
@pytest.mark.parametrize("tiled", [True, False])
def test_the_gradient_passes_straight_through_the_gather(tiled, gradient_spec):
    mesh = mesh_of()
    x, factors = normal(NUM, 6, 8), normal(NUM, NUM, 6, 8)

    def loss(x, factors, gather):
        y = gather(x[0])
        return (y * factors[0].reshape(y.shape)).sum()[None]

    def gradient(gather):
        f = mapped(functools.partial(loss, gather=gather), mesh=mesh)
        return as_float64(jax.grad(lambda x: f(x, factors).sum())(x))

    quantized = functools.partial(
        sharding.all_gather,
        axis_name="data",
        spec="int4",
        tiled=tiled,
        gradient_spec=gradient_spec,
    )
    exact = functools.partial(jax.lax.all_gather, axis_name="data", tiled=tiled)
    found, expected = gradient(quantized), gradient(exact)
    np.testing.assert_allclose(expected, as_float64(factors).sum(0), atol=1e-5)
    if gradient_spec is None:
        np.testing.assert_array_equal(found, expected)
    else:
        assert 0 < np.abs(found - expected).max() < NUM * 4 / 127


PRESETS = ("int8", "int4", "nf4", "fp8", "uint4", "mxfp4", "nvfp4", "nf4_dq")


# Shards of the input axis (1) would cut groups of the scales of nf4_dq.
WEIGHTS = [
    case
    for case in itertools.product(PRESETS, [0, 1, 2], ["rows", "columns"])
    if case[:2] != ("nf4_dq", 1)
]
DEFAULT_WEIGHTS = (
    ("int8", 0, "columns"),
    ("int8", 1, "rows"),
    ("uint4", 1, "columns"),
    ("uint4", 2, "rows"),
    ("nf4_dq", 0, "rows"),
    ("nf4_dq", 2, "columns"),
    ("nvfp4", 1, "rows"),
)


@pytest.mark.parametrize(
    ("preset", "axis", "layout"), thinned(WEIGHTS, DEFAULT_WEIGHTS)
)
def test_a_qtensor_is_whole_again_bit_for_bit(preset, axis, layout):
    mesh = mesh_of()
    qt = jaxq.quantize(normal_with_outliers(NUM, 1024, 256), preset, batch=(0,))
    qt = jaxq.relayout(qt, layout).with_input_scale(jnp.linspace(0.5, 2, 1024))
    at = P(*["data" if number == axis else None for number in range(3)])

    def body(part):
        whole = sharding.all_gather(part, "data", axis=axis - 3, tiled=True)
        assert whole.shape == qt.shape
        assert whole.meta == qt.meta
        return jax.tree.map(lambda leaf: leaf[None], whole)

    f = mapped(body, (sharding.specs(qt, at, mesh=mesh),), mesh=mesh)
    gathered = jax.tree.map(np.asarray, f(sharding.place(qt, mesh, at)))
    for device in range(NUM):
        mine = jax.tree.map(lambda leaf, device=device: leaf[device], gathered)
        jax.tree.map(np.testing.assert_array_equal, mine, jax.tree.map(np.asarray, qt))


def test_a_qtensor_is_gathered_along_one_of_two_mesh_axes():
    """Sharded over data (FSDP) and over model (tensor parallel), along each axis."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    qt = jaxq.quantize(normal_with_outliers(512, 64), "int4")
    x = normal(4, 512)

    def product(x, part):
        part = sharding.all_gather(part, "data", axis=0, tiled=True)
        assert part.shape == (512, 32)
        return x @ part

    at = sharding.specs(qt, P("data", "model"), mesh=mesh)
    f = mapped(product, (P("data"), at), P("data", "model"), mesh=mesh)
    np.testing.assert_allclose(f(x, qt), x @ qt, rtol=1e-4, atol=1e-4)

    def rows(part):
        part = sharding.all_gather(part, "model", axis=0, tiled=True)
        assert part.shape == (256, 64)
        part = sharding.all_gather(part, "data", axis=0, tiled=True)
        assert part.meta == qt.meta
        return jaxq.dequantize(part)[None]

    both = ("data", "model")
    at = sharding.specs(qt, P(both), mesh=mesh)
    found = np.asarray(mapped(rows, (at,), P(both), mesh=mesh)(qt))
    np.testing.assert_array_equal(found[3], jaxq.dequantize(qt))


def test_qtensors_of_devices_are_stacked():
    x = normal(NUM, 64, 8)

    def body(x):
        stack = sharding.all_gather(jaxq.quantize(x[0], "int4"), "data")
        assert stack.shape == (NUM, 64, 8)
        return jaxq.dequantize(stack)[None]

    found = np.asarray(mapped(body)(x))[0]
    expected = jaxq.dequantize(jaxq.quantize(x, "int4", batch=(0,)))
    np.testing.assert_array_equal(found, expected)


# Bytes on the wire.


def wire(text):
    """The bytes that each kind of collective gives a device, and the dtypes."""
    found, dtypes = {}, set()
    for kind, dtype, num_bytes in collectives_in(text):
        found[kind] = found.get(kind, 0) + num_bytes
        dtypes.add(dtype)
    return found, dtypes


def bytes_of_row(n, preset):
    """Codes fill whole packs of bytes, and each group has a scale."""
    bits, group, scale = WIRE[preset]
    pack = 8 // math.gcd(8, bits)
    return -(-n // pack) * pack * bits // 8 + -(-n // group) * scale


ROWS = tuple(itertools.product(WIRE, [8192, 5000, 1001]))
DEFAULT_ROWS = (
    ("int8", 8192),
    ("fp8", 5000),
    ("mxfp8", 1001),
    ("int4", 1001),
    ("nf4", 5000),
    ("ternary", 8192),
    ("int3", 1001),
    ("fp6_e2m3", 1001),
)


@pytest.mark.parametrize(("preset", "size"), thinned(ROWS, DEFAULT_ROWS))
def test_bytes_of_floats_equal_the_formula(preset, size):
    x = jax.ShapeDtypeStruct((NUM, size), jnp.float32)
    f = mapped(lambda x: sharding.all_reduce(x[0], "data", preset), out_specs=P())
    found, dtypes = wire(f.lower(x).compile().as_text())
    piece = NUM * bytes_of_row(-(-size // NUM), preset)
    assert found == {"all-to-all": piece, "all-gather": piece}
    assert dtypes <= {"u8", "u16", "u32"}
    f = mapped(lambda x: sharding.all_gather(x[0], "data", preset))
    found, dtypes = wire(f.lower(x).compile().as_text())
    assert found == {"all-gather": NUM * bytes_of_row(size, preset)}
    assert dtypes <= {"u8", "u16", "u32"}


def test_bytes_of_a_reduce_scatter_and_of_a_gradient():
    x = jax.ShapeDtypeStruct((NUM, 64, 128), jnp.float32)
    f = mapped(lambda x: sharding.reduce_scatter(x[0], "data", "int8", tiled=True))
    found, _ = wire(f.lower(x).compile().as_text())
    expected = NUM * bytes_of_row(64 * 128 // NUM, "int8")
    assert found == {"all-to-all": expected}

    def loss(x):
        y = sharding.all_gather(x[0], "data", "int4", tiled=True, gradient_spec="int8")
        return (y**2).sum()

    f = mapped(lambda x: jax.grad(loss)(x))
    found, dtypes = wire(f.lower(x).compile().as_text())
    assert found == {
        "all-gather": NUM * bytes_of_row(64 * 128, "int4"),
        "all-to-all": NUM * bytes_of_row(64 * 128, "int8"),
    }
    assert dtypes <= {"u8", "u16", "u32"}


@pytest.mark.parametrize("preset", ["int8", "fp8", "int4", "nvfp4"])
def test_a_sharded_weight_sends_the_bytes_that_it_has(preset):
    mesh = mesh_of()
    qt = jaxq.quantize(normal(1024, 64), preset)
    at = sharding.specs(qt, P("data", None), mesh=mesh)
    x = jax.ShapeDtypeStruct((4, 1024), jnp.float32)

    def product(x, part):
        return x @ sharding.all_gather(part, "data", axis=0, tiled=True)

    f = mapped(product, (P("data"), at), mesh=mesh)
    found, dtypes = wire(f.lower(x, qt).compile().as_text())
    # Scales that every device has do not travel.
    leaves, leaf_specs = jax.tree.leaves(qt), jax.tree.leaves(at)
    moved = [
        leaf.nbytes for leaf, spec in zip(leaves, leaf_specs, strict=True) if any(spec)
    ]
    assert found == {"all-gather": sum(moved)}
    assert qt.data.nbytes in moved
    assert dtypes <= {"u8", "u16", "u32"}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("preset", ["int8", "fp8", "int4"])
def test_only_unsigned_integers_travel_on_tpu_and_gpu(preset, platform):
    mesh = AbstractMesh((NUM,), ("data",), (AxisType.Auto,))
    f = jax.shard_map(
        lambda x: sharding.all_reduce(x[0], "data", preset),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(f).trace(jax.ShapeDtypeStruct((NUM, 4096), jnp.bfloat16))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [
        line for line in text.splitlines() if re.search("all_(to_all|gather)", line)
    ]
    kinds = [
        re.findall(r"tensor<[\dx]*(\w+)>", line.rsplit(":", 1)[1]) for line in lines
    ]
    assert len(kinds) == 4
    assert all(kind.startswith("ui") for line in kinds for kind in line)


# Trees, and errors.


def test_small_arrays_travel_as_floats():
    grads = {"w": normal(NUM, 64, 64), "b": normal(NUM, 64)}
    f = mapped(
        lambda g: sharding.mean_gradients(
            jax.tree.map(lambda leaf: leaf[0], g), "data", "int8"
        ),
        out_specs=P(),
    )
    found, dtypes = wire(f.lower(grads).compile().as_text())
    assert found["all-reduce"] == 64 * 4
    assert "f32" in dtypes
    y = f(grads)
    np.testing.assert_allclose(y["b"], as_float64(grads["b"]).mean(0), atol=1e-6)
    error = np.abs(y["w"] - as_float64(grads["w"]).mean(0)).max()
    assert 1e-4 < error < 0.05


def test_small_arrays_have_no_error_left():
    mesh = mesh_of()
    x = normal(NUM, 8)
    error = {"w": on_mesh(normal(NUM, 8, seed=1), mesh, P("data"))}
    f = mapped(
        lambda x, e: sharding.mean_gradients({"w": x[0]}, "data", "int8", e),
        out_specs=(P(), P("data")),
        mesh=mesh,
    )
    y, left = f(x, error)
    expected = (as_float64(x) + as_float64(error["w"])).mean(0)
    np.testing.assert_allclose(y["w"], expected, atol=1e-6)
    assert not np.asarray(left["w"]).any()


def test_gradients_that_jax_has_summed_are_an_error():
    def body(w, x):
        grads = jax.grad(lambda w: (x @ w).sum())(w)
        return sharding.mean_gradients({"w": grads}, "data", "int8")

    f = mapped(body, (P(), P("data")), P())
    with pytest.raises(ValueError, match=r"w is the same on all devices.*pcast"):
        f(normal(8, 8), normal(8, 8))


def test_gradients_that_jax_has_summed_over_one_of_two_axes_are_an_error():
    """A mean over both axes would count the sum over one of them twice."""
    mesh = jax.make_mesh((2, 2), ("a", "b"))

    def body(w, x):
        local = jax.lax.pcast(w, "a", to="varying")
        grads = jax.grad(lambda w: (x @ w).sum())(local)
        return sharding.mean_gradients(grads, ("a", "b"), "int8", min_size=0)

    specs = (P(), P(("a", "b")))
    f = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())
    x = jax.device_put(normal(8, 8), NamedSharding(mesh, specs[1]))
    w = jax.device_put(normal(8, 8), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"the same on all devices of \['b'\]"):
        f(w, x)


def raises(message, body, *args, error=ValueError, **options):
    with pytest.raises(error, match=message):
        mapped(body, **options)(*args)


def test_wrong_arguments():
    x = normal(NUM, 8)
    raises("unknown preset", lambda x: sharding.all_reduce(x, "data", "int5"), x)
    raises(
        r"spec= has granularity PerChannel.*PerGroup\(256\)",
        lambda x: sharding.all_reduce(x, "data", jaxq.QuantSpec("int8")),
        x,
    )
    raises(
        "needs a PRNG key",
        lambda x: sharding.all_reduce(
            x,
            "data",
            jaxq.QuantSpec("int8", jaxq.PerGroup(64), rounding="stochastic"),
        ),
        x,
    )
    raises(
        "scatter_dimension=2 does not exist",
        lambda x: sharding.reduce_scatter(x, "data", "int8", scatter_dimension=2),
        x,
    )
    raises(
        "axis 1 of x has size 8, which must be equal to the 4 devices",
        lambda x: sharding.reduce_scatter(x, "data", "int8", scatter_dimension=1),
        x,
    )
    raises("spec is None", lambda x: sharding.all_gather(x, "data"), x)
    raises(
        "axis=3 does not", lambda x: sharding.all_gather(x, "data", "int8", axis=3), x
    )
    raises(
        "w must be float32",
        lambda x: sharding.all_reduce({"w": x.astype(jnp.int32)}, "data", "int8"),
        x,
        error=TypeError,
    )
    with pytest.raises(ValueError, match=r"no axis 'data' is mapped.*shard_map"):
        sharding.all_reduce(x, "data", "int8")
    with pytest.raises(ValueError, match="min_size must be a whole number"):
        sharding.mean_gradients(x, "data", "int8", min_size=-1)
    with pytest.raises(ValueError, match=r"mesh has the axes \['data'\]"):
        sharding.init_error(x, mesh_of(), "model")


def test_wrong_errors():
    x, mesh = normal(NUM, 8), mesh_of()
    error = errors_of(x, mesh)

    def reduce(x, error):
        return sharding.all_reduce({"w": x[0]}, "data", "int8", error=error)[0]

    message = r"error/w must be float32\[1, 8\], the row of this device.*init_error"
    options = {"mesh": mesh, "out_specs": P()}
    raises(
        message,
        lambda x, e: reduce(x, {"w": e["w"][0]}),
        x,
        error,
        **options,
    )
    raises("another structure", lambda x, e: reduce(x, e["w"]), x, error, **options)


def test_wrong_qtensors():
    mesh = mesh_of()
    qt = jaxq.quantize(normal(512, 64), "int4")
    at = sharding.specs(qt, P("data", None), mesh=mesh)

    def gather(axis, **options):
        return lambda part: sharding.all_gather(part, "data", axis=axis, **options).data

    raises(
        r"does not become \[128, 256\] along axis 1",
        gather(1, tiled=True),
        qt,
        in_specs=(at,),
    )
    raises("new axis at 0", gather(1), qt, in_specs=(at,))
    raises("axis=2 does not exist", gather(2, tiled=True), qt, in_specs=(at,))
    raises("is the same on all devices", gather(0, tiled=True), qt, in_specs=P())

    def local(x):
        part = jaxq.quantize(x, "int4")
        return sharding.all_gather(part, "data", axis=0, tiled=True).data

    raises("is not a part of a larger QTensor", local, normal(512, 64))


def test_axes_that_are_not_mapped():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = on_mesh(normal(2, 8, 64), mesh, P("data", None, "model"))
    with jax.set_mesh(mesh):
        f = jax.jit(
            jax.shard_map(
                lambda x: sharding.all_reduce(x[0], "data", "int8"),
                in_specs=P("data"),
                out_specs=P(),
                axis_names={"data"},
            )
        )
        with pytest.raises(ValueError, match=r"sharded over the mesh axes \['model'\]"):
            f(x)


# Training.


@functools.cache
def digits():
    """Images and labels of 8 x 8 digits: 1,280 to train, 517 held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.data[order] / 16).astype(np.float32)
    y = data.target[order].astype(np.int32)
    return (x[:1280], y[:1280]), (x[1280:], y[1280:])


def logits(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


def loss_of(params, batch):
    x, y = batch
    scores = jax.nn.log_softmax(logits(params, x))
    return -jnp.take_along_axis(scores, y[:, None], 1).mean()


@functools.cache
def trained(spec, feedback):
    """Held-out accuracy and loss of a network trained on four devices."""
    mesh, (train, held_out) = mesh_of(), digits()
    params = {
        "up": normal(64, 128) / 8,
        "bias": jnp.zeros(128),
        "down": normal(128, 10) / 11,
    }
    error = sharding.init_error(params, mesh, "data")

    def step(carry, batch):
        params, error = carry
        local = jax.lax.pcast(params, "data", to="varying")
        grads = jax.grad(loss_of)(local, batch)
        if spec is None:
            grads = jax.lax.pmean(grads, "data")
        elif feedback:
            grads, error = sharding.mean_gradients(
                grads, "data", spec, error, min_size=1000
            )
        else:
            grads = sharding.mean_gradients(grads, "data", spec, min_size=1000)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        return (params, error), None

    def run(params, error, batches):
        return jax.lax.scan(step, (params, error), batches)[0]

    rng = np.random.default_rng(1)
    order = np.concatenate([rng.permutation(1280) for _ in range(15)]).reshape(-1, 128)
    batches = tuple(part[order] for part in train)
    f = mapped(
        run,
        (P(), P("data"), P(None, "data")),
        (P(), P("data")),
        mesh=mesh,
    )
    params, _ = f(params, error, batches)
    accuracy = float((logits(params, held_out[0]).argmax(1) == held_out[1]).mean())
    return accuracy, float(loss_of(params, held_out))


@pytest.mark.parametrize(
    ("spec", "feedback"), [("int8", False), ("int4", False), ("int4", True)]
)
def test_training_converges_as_with_float_gradients(spec, feedback):
    accuracy, loss = trained(None, False)
    assert accuracy > 0.95
    found_accuracy, found_loss = trained(spec, feedback)
    assert found_accuracy > accuracy - 0.01
    assert found_loss < loss * 1.03


def test_error_feedback_makes_the_narrowest_gradients_converge():
    """Ternary gradients without error feedback are far behind."""
    _, loss = trained(None, False)
    _, without = trained("ternary", False)
    _, with_feedback = trained("ternary", True)
    assert with_feedback < loss * 1.1
    assert without > loss * 1.5
    assert abs(trained("int4", True)[1] - loss) < abs(trained("int4", False)[1] - loss)
