"""Products of parts on a mesh equal those on one device.

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


MAPPED = {
    "weight only": lambda qt: qt,
    "int8": lambda qt: qt.with_activation("int8"),
    "static": lambda qt: qt.with_activation("int8", bounds=(-8.0, 8.0)),
    "outliers": lambda qt: qt.with_activation("int8", outliers=2.5),
    "input scale": lambda qt: qt.with_input_scale(jnp.ones(64)).with_activation("int8"),
}


@pytest.mark.parametrize("axes", [("d", "t"), ("d",)])
@pytest.mark.parametrize("name", MAPPED)
def test_gradients_of_mapped_products(name, axes):
    """The mapped axis of x is sharded, so `vmap` maps over a mesh axis."""
    qt, x = jaxq.quantize(normal(64, 32), "int8"), normal(4, 8, 64, seed=3)
    weight = np.asarray(jaxq.dequantize(qt), np.float64)
    expected = np.broadcast_to(weight.sum(1), x.shape)
    types = (AxisType.Explicit,) * len(axes)
    mesh = jax.make_mesh((2,) * len(axes), axes, axis_types=types)
    columns = P(None, "t") if "t" in axes else P()
    qt = sharding.place(MAPPED[name](qt), mesh, columns)
    x = jax.device_put(x, NamedSharding(mesh, P("d")))

    def of_each(x, qt):
        return jax.vmap(jax.grad(lambda x: (x @ qt).sum()))(x)

    def of_all(x, qt):
        return jax.grad(lambda x: jax.vmap(lambda x: x @ qt)(x).sum())(x)

    def of_a_scan(x, qt):
        # jax differentiates the step after `vmap` has returned.
        def loss(x):
            def step(total, share):
                return total + jax.vmap(lambda x: (share * x) @ qt)(x).sum(), None

            return jax.lax.scan(step, jnp.zeros(()), jnp.array([0.25, 0.75]))[0]

        return jax.grad(loss)(x)

    for gradient in (of_each, of_all, of_a_scan):
        dx = jax.jit(gradient)(x, qt)
        assert dx.sharding.spec[0] == "d"
        np.testing.assert_allclose(np.asarray(dx), expected, rtol=0, atol=1e-4)


def test_an_error_names_the_meshes_of_operands_on_different_meshes():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    other = jax.make_mesh((4,), ("z",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(normal(8, 64), NamedSharding(other, P("z")))
    indices = jax.device_put(jnp.arange(4), NamedSharding(other, P("z")))
    qt = sharding.place(jaxq.quantize(normal(64, 32), "int8"), mesh, P(None, "t"))
    table = sharding.place(
        jaxq.quantize(normal(64, 32), "int8", contracting=-1), mesh, P("t")
    )
    experts = jaxq.quantize(normal(4, 64, 32), "int8", batch=0)
    experts = sharding.place(experts, mesh, P("t"))
    cache = jaxq.ops.KVCache.empty(
        "int4", batch=2, num_heads=2, length=128, head_dim=64, dtype=jnp.float32
    )
    cache = jax.device_put(cache, NamedSharding(mesh, P()))
    q = jax.device_put(normal(2, 1, 4, 64), NamedSharding(other, P()))
    sizes = jnp.array([2, 2, 2, 2])
    calls = {
        "dot_general": lambda: x @ qt,
        "explain": lambda: jaxq.explain(x, qt),
        "ragged_dot": lambda: jaxq.ops.ragged_dot(x, experts, sizes),
        "take": lambda: jaxq.ops.take(table, indices),
        "KVCache.attend": lambda: cache.attend(q),
    }
    for caller, call in calls.items():
        with pytest.raises(ValueError, match=f"^{caller}: .* on different meshes") as e:
            call()
        assert "{'d': 2, 't': 2}" in str(e.value)
        assert "{'z': 4}" in str(e.value)


def test_a_map_over_a_mesh_axis_of_the_weight_is_an_error():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    qt = sharding.place(jaxq.quantize(normal(64, 32), "int8"), mesh, P(None, "t"))
    x = jax.device_put(normal(4, 8, 64), NamedSharding(mesh, P("t")))
    with pytest.raises(ValueError, match=r"mesh axes \['t'\], and jax\.vmap maps"):
        jax.vmap(lambda x: x @ qt)(x)


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


# The shardings of the rows and of the experts. A sum over k has another order.
EXPERTS = {
    "experts": (P(), P(("d", "t"))),
    "rows and experts": (P("d"), P("t")),
    "the same axis": (P("d"), P("d")),
    "columns": (P("d"), P(None, None, "t")),
    "k": (P("d", "t"), P(None, "t")),
    "fsdp": (P("d"), P(None, "d")),
}


def ragged(x, experts, sizes):
    def loss(x):
        return (jaxq.ops.ragged_dot(x, experts, sizes) ** 2).sum()

    return jaxq.ops.ragged_dot(x, experts, sizes), jax.grad(loss)(x)


@pytest.mark.parametrize("activation", [None, "dynamic", "static"])
@pytest.mark.parametrize("where", EXPERTS)
def test_devices_multiply_the_rows_of_their_experts(where, activation):
    """Some experts have no rows, and the last rows have no expert."""
    experts = jaxq.quantize(normal_with_outliers(4, 64, 32), "int8", batch=0)
    experts = experts.with_input_scale(jnp.linspace(0.5, 2, 256).reshape(4, 64))
    if activation is not None:
        high = jnp.array([1.0, 2.0, 3.0, 4.0])
        bounds = (-high, high) if activation == "static" else None
        experts = experts.with_activation("int8", bounds=bounds)
    x, sizes = normal(24, 64, seed=3), jnp.array([5, 0, 9, 7])
    expected, expected_dx = map(np.asarray, jax.jit(ragged)(x, experts, sizes))
    assert not expected[21:].any()
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    rows, at = EXPERTS[where]
    with jax.set_mesh(mesh):
        experts = sharding.place(experts, mesh, at)
        x = jax.device_put(x, NamedSharding(mesh, rows))
        y, dx = jax.jit(ragged)(x, experts, sizes)
        assert tuple(y.sharding.spec)[:1] == (rows[0] if rows else None,)
    bound = (1e-6 if where == "k" else 0) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=bound)
    bound = 1e-6 * np.abs(expected_dx).max()
    np.testing.assert_allclose(np.asarray(dx), expected_dx, rtol=0, atol=bound)


@pytest.mark.parametrize("where", ["experts", "rows and experts", "the same axis"])
def test_group_sizes_can_add_up_to_more_rows_than_x_has(where):
    experts, x = jaxq.quantize(normal(4, 64, 32), "int8", batch=0), normal(8, 64)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    rows, at = EXPERTS[where]
    with jax.set_mesh(mesh):
        placed = sharding.place(experts, mesh, at)
        placed_x = jax.device_put(x, NamedSharding(mesh, rows))
    for sizes in ([0, 9, 1, 1], [3, 0, 2, 9]):
        groups = np.repeat(np.arange(4), sizes)[:8]
        weights = np.asarray(jaxq.dequantize(experts), np.float64)[groups]
        expected = np.einsum("mk,mkn->mn", np.asarray(x, np.float64), weights)
        with jax.set_mesh(mesh):
            y = jax.jit(jaxq.ops.ragged_dot)(placed_x, placed, jnp.array(sizes))
        np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=1e-4)


def filled_cache():
    cache = jaxq.ops.KVCache.empty(
        "int4", batch=2, num_heads=2, length=128, head_dim=64, dtype=jnp.float32
    )
    k, v = (normal(2, 70, 2, 64, seed=seed) for seed in (0, 1))
    return cache.append(k, v, count=jnp.array([70, 40]))


def cache_specs(cache, slots, heads):
    return jax.tree.map(
        lambda leaf: P(slots, heads) if leaf.ndim > 1 else P(slots), cache
    )


@pytest.mark.parametrize("slots", ["d", None])
@pytest.mark.parametrize("q_spec", [P("d", None, "t"), P()])
def test_devices_read_their_slots_and_heads(slots, q_spec):
    cache, q, k = filled_cache(), normal(2, 1, 4, 64, seed=2), normal(2, 1, 2, 64)

    def attend(cache, q, k):
        return cache.attend(q), cache.attend(q, k, k)

    expected = jax.jit(attend)(cache, q, k)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = cache_specs(cache, slots, "t")
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        cache = jax.device_put(cache, at)
        q, k = jax.device_put((q, k), NamedSharding(mesh, q_spec))
        result = jax.jit(attend)(cache, q, k)
        assert result[0].sharding.is_equivalent_to(q.sharding, 4)
    for actual, wanted in zip(result, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))


def test_a_part_of_a_cache_works_in_shard_map():
    cache, q = filled_cache(), normal(2, 1, 4, 64, seed=2)
    expected = np.asarray(cache.attend(q))
    mesh = jax.make_mesh((2, 2), ("d", "t"))
    q_spec = P("d", None, "t")
    attend = jax.shard_map(
        lambda cache, q: cache.attend(q),
        mesh=mesh,
        in_specs=(cache_specs(cache, "d", "t"), q_spec),
        out_specs=q_spec,
    )
    with jax.set_mesh(mesh):
        specs = cache_specs(cache, "d", "t")
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        cache = jax.device_put(cache, at)
        result = jax.jit(attend)(cache, jax.device_put(q, NamedSharding(mesh, q_spec)))
    np.testing.assert_array_equal(np.asarray(result), expected)
