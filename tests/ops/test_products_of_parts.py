"""Products with quantized activations on a mesh equal those on one device.

Every device quantizes and multiplies its parts. Integers are summed over devices before
they are scaled, so the results have the bits of one device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests import tables
from tests.arrays import normal, normal_with_outliers

K, N, ROWS = 256, 128, 16
INT4_ROWS = jaxq.QuantSpec("int4", jaxq.PerChannel())
INT8_GROUPS = jaxq.QuantSpec("int8", jaxq.PerGroup(64))
PER_TENSOR = jaxq.QuantSpec("int8", jaxq.PerTensor())


def weight(preset, activation, **options):
    qt = jaxq.quantize(normal_with_outliers(K, N), preset)
    return qt.with_activation(activation, **options)


# Weights whose sums over devices are sums of integers.
INTEGERS = {
    "w8a8": lambda: weight("int8", "int8"),
    "w8a8 static": lambda: weight("int8", "int8", bounds=(-3.0, 3.0)),
    "w8a8 per tensor": lambda: weight("int8", PER_TENSOR),
    "w8a8 asymmetric": lambda: weight("uint8", "uint8"),
    "w4a8": lambda: weight(INT4_ROWS, "int8"),
    "input scale": lambda: weight("int8", "int8").with_input_scale(
        jnp.linspace(0.5, 2, K)
    ),
}
FLOATS = {
    "w4a8 groups": lambda: weight("int4", "int8"),
    "int8 groups": lambda: weight(INT8_GROUPS, INT8_GROUPS),
    "w4a4": lambda: weight(INT4_ROWS, "int4"),
    "fp8": lambda: weight("fp8", "fp8"),
    "mxfp8": lambda: weight("mxfp8", "mxfp8"),
    "nf4 and int8": lambda: weight("nf4", "int8"),
    "int4 and fp8": lambda: weight("int4", "fp8"),
    "outliers": lambda: weight("int8", "int8", outliers=2.5),
}
# The shardings of x and of the weight.
LAYOUTS = {
    "column": (P("d"), P(None, "t")),
    "row": (P("d", "t"), P("t", None)),
    "sliced x": (P("d"), P("t", None)),
    "fsdp": (P("d"), P("d", None)),
    "both": (P(), P("d", "t")),
}
ROWS_OF_TABLE = [(name, where) for name in (*INTEGERS, *FLOATS) for where in LAYOUTS]
ALWAYS = [
    *((name, "row") for name in ("w8a8", "w8a8 asymmetric", "w4a8", "input scale")),
    *((name, "row") for name in ("w4a8 groups", "fp8", "outliers")),
    *(("w8a8", where) for where in ("column", "sliced x", "both")),
    *((name, "fsdp") for name in ("input scale", "int4 and fp8")),
]


def loss(x, qt):
    return ((x @ qt) ** 2).sum()


def both(x, qt):
    return x @ qt, jax.grad(loss)(x, qt)


@pytest.mark.parametrize(("name", "where"), tables.thinned(ROWS_OF_TABLE, ALWAYS))
def test_parts_give_the_product_of_one_device(name, where):
    qt, x = (INTEGERS | FLOATS)[name](), normal(ROWS, K, seed=3)
    expected, expected_dx = map(np.asarray, jax.jit(both)(x, qt))
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    x_spec, weight_spec = LAYOUTS[where]
    with jax.set_mesh(mesh):
        qt = sharding.place(qt, mesh, weight_spec, fit_to_shards=True)
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        y, dx = jax.jit(both)(x, qt)
        assert dx.sharding.is_equivalent_to(x.sharding, 2)
    if name in INTEGERS:
        np.testing.assert_array_equal(np.asarray(y), expected)
    bound = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=bound)
    bound = 2e-6 * np.abs(expected_dx).max()
    np.testing.assert_allclose(np.asarray(dx), expected_dx, rtol=0, atol=bound)


def test_the_weight_can_be_on_the_left():
    qt, x = weight("int8", "int8"), normal(K, ROWS)
    expected = jax.jit(lambda qt, x: qt.T @ x)(qt, x)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        qt = sharding.place(qt, mesh, P("t", None))
        x = jax.device_put(x, NamedSharding(mesh, P("t", "d")))
        y = jax.jit(lambda qt, x: qt.T @ x)(qt, x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


def test_experts_are_a_batch_axis_of_parts():
    experts = jaxq.quantize(normal(4, K, N), "int8", batch=0).with_activation("int8")
    x = normal(4, ROWS, K, seed=1)

    def product(x, qt):
        return jaxq.einsum("ebk,ekn->ebn", x, qt)

    expected = jax.jit(product)(x, experts)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        experts = sharding.place(experts, mesh, P("d", "t"))
        x = jax.device_put(x, NamedSharding(mesh, P("d", None, "t")))
        y = jax.jit(product)(x, experts)
        assert "d" in jax.typeof(y).sharding.spec
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))
