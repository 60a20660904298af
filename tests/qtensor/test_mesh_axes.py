"""Arrays on a mesh of four devices: same bits, and the mesh axes of the float array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from tests import tables
from tests.arrays import normal_with_outliers

TYPES = (AxisType.Explicit, AxisType.Auto)
SPECS = {"rows": P("model", None), "columns": P(None, "model"), "both": P("d", "model")}
PRESETS = ("int8", "int4", "nf4_dq", "mxfp4", "nvfp4", "uint4")
# The calls on an array and on its QTensor. Each result must have the same bits as on
# one device.
CALLS = {
    "quantize": lambda w, qt: jaxq.quantize(w, qt.spec),
    "dequantize": lambda w, qt: jaxq.dequantize(qt),
    "fake_quant": lambda w, qt: jaxq.fake_quant(w, qt.spec),
    "fake_quant grid": lambda w, qt: jaxq.fake_quant(w, qt),
    "gradient": lambda w, qt: jax.grad(lambda w: jaxq.fake_quant(w, qt.spec).sum())(w),
    "requantize": lambda w, qt: jaxq.qtensor.requantize(w, qt),
    "codes": lambda w, qt: qt.codes(),
    "bounds": lambda w, qt: jaxq.fake_quant(w, qt.spec, bounds=(-1.0, 1.0)),
}
# Calls whose preset must have a spec with a range.
NEEDS_RANGE = ("bounds",)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("d", "model"), axis_types=(kind, kind))


def is_sharded(x, mesh, *spec):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)


CASES = [
    (call, preset, kind)
    for call in CALLS
    for preset in PRESETS
    for kind in TYPES
    if not (call in NEEDS_RANGE and preset == "nf4_dq")
]
FEW = [
    (call, PRESETS[i % len(PRESETS)], AxisType.Explicit) for i, call in enumerate(CALLS)
]
FEW = [case for case in FEW if case in CASES]


@pytest.mark.parametrize(("call", "preset", "kind"), tables.thinned(CASES, FEW))
@pytest.mark.parametrize("compiled", [False, True])
def test_the_bits_are_those_of_one_device(call, preset, kind, compiled):
    w = normal_with_outliers(256, 64)
    run = jax.jit(CALLS[call]) if compiled else CALLS[call]
    expected = run(w, jaxq.quantize(w, preset))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        for spec in SPECS.values():
            sharded = jax.device_put(w, NamedSharding(mesh, spec))
            result = run(sharded, jaxq.quantize(sharded, preset))
            jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SPECS)
def test_codes_and_scales_are_sharded_as_the_floats(kind, name):
    mesh, spec = mesh_of(kind), SPECS[name]
    w = normal_with_outliers(256, 64)
    with jax.set_mesh(mesh):
        w = jax.device_put(w, NamedSharding(mesh, spec))
        qt = jaxq.quantize(w, "int4")
        assert is_sharded(qt.data, mesh, *reversed(spec))
        assert is_sharded(qt.scale, mesh, *reversed(spec))
        assert is_sharded(jaxq.dequantize(qt), mesh, *spec)
        # One scale for each column cannot be sharded along the rows.
        per_channel = jaxq.quantize(w, "int8").scale
        assert is_sharded(per_channel, mesh, spec[1], None)


def test_under_jit_explicit_axes_reach_the_codes():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        w = jax.device_put(
            normal_with_outliers(256, 64), NamedSharding(mesh, P("d", "model"))
        )
        shapes = jax.eval_shape(lambda w: jaxq.quantize(w, "nf4"), w)
        assert shapes.data.sharding.spec == P("model", "d")
        floats = jax.eval_shape(jaxq.dequantize, shapes)
        assert floats.sharding.spec == P("d", "model")


@pytest.mark.parametrize("name", ["minmax", "percentile"])
def test_observers_read_arrays_with_explicit_axes(name):
    mesh = mesh_of(AxisType.Explicit)
    observers = {
        "minmax": jaxq.observers.minmax(),
        "percentile": jaxq.observers.percentile(99.0),
    }
    observer, x = observers[name], normal_with_outliers(64, 32)

    def bounds(x):
        return observer.bounds(observer.update(observer.init(x), x), "int8")

    expected = bounds(x)
    with jax.set_mesh(mesh):
        for spec in SPECS.values():
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            np.testing.assert_array_equal(
                jnp.asarray(bounds(sharded)), jnp.asarray(expected)
            )


def test_a_group_that_is_not_full_on_a_sharded_axis():
    mesh = mesh_of(AxisType.Explicit)
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(32, pad=True))
    w = normal_with_outliers(120, 64)
    expected = jaxq.quantize(w, spec)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P("model", "d")))
        qt = jaxq.quantize(sharded, spec)
        jax.tree.map(np.testing.assert_array_equal, qt, expected)
        np.testing.assert_array_equal(jaxq.dequantize(qt), jaxq.dequantize(expected))
