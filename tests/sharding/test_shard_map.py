"""QTensors as arguments of `jax.shard_map`: each device computes with its part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import sharding
from tests.arrays import normal, normal_with_outliers
from tests.kernels.products import CUSTOM_CALL, h200

TYPES = (AxisType.Auto, AxisType.Explicit)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("d", "t"), axis_types=(kind, kind))


def mapped(body, mesh, in_specs, out_specs, **options):
    return jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
        )
    )


def assert_close(y, expected):
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-4)


def test_a_part_has_the_shape_and_the_blocks_of_its_floats():
    qt = jaxq.quantize(normal_with_outliers(2, 256, 64), "int4", batch=(0,))
    mesh, shapes = mesh_of(), []

    def record(part):
        shapes.append((part.shape, part.meta.geometry.num_blocks, part[0].T.shape))
        return part

    at = sharding.specs(qt, P(None, "d", "t"), mesh=mesh)
    back = mapped(record, mesh, (at,), at)(qt)
    assert shapes == [((2, 128, 32), (32, 1), (32, 128))]
    # What the function returns is whole again.
    assert back.meta == qt.meta
    jax.tree.map(np.testing.assert_array_equal, back, qt)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_block_of_two_layers_is_tensor_parallel(kind, layout):
    """The first weight is column-parallel, the second row-parallel."""
    mesh = mesh_of(kind)
    up = jaxq.quantize(normal_with_outliers(64, 256), "int4")
    down = jaxq.quantize(normal_with_outliers(256, 64), "uint4")
    up, down = jaxq.relayout(up, layout), jaxq.relayout(down, layout)
    x = normal_with_outliers(4, 64)

    def block(x, up, down, axis=None):
        y = jax.nn.relu(x @ up) @ down
        return y if axis is None else jax.lax.psum(y, axis)

    specs = (
        P("d"),
        sharding.specs(up, P(None, "t"), mesh=mesh),
        sharding.specs(down, P("t", None), mesh=mesh),
    )
    f = functools.partial(block, axis="t")
    # A sharding over Explicit axes is part of the type, and must be that of in_specs.
    placed = [
        sharding.place(x, mesh, P("d")),
        sharding.place(up, mesh, P(None, "t")),
        sharding.place(down, mesh, P("t", None)),
    ]
    with jax.set_mesh(mesh):
        y = mapped(f, mesh, specs, P("d"))(*placed)
    assert_close(y, block(x, up, down))


def test_gradients_of_inputs_and_of_summed_products():
    mesh = mesh_of()
    qt = jaxq.quantize(normal_with_outliers(256, 64), "int4").with_input_scale(
        jnp.linspace(0.5, 2.0, 256)
    )
    x = normal_with_outliers(4, 256)
    at = sharding.specs(qt, P("t", "d"), mesh=mesh)

    def product(x, qt):
        return jax.lax.psum(x @ qt, "t")

    f = mapped(product, mesh, (P(None, "t"), at), P(None, "d"))
    found = jax.grad(lambda x: (f(x, qt) ** 2).sum())(x)
    expected = jax.grad(lambda x: ((x @ qt) ** 2).sum())(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)

    def inner_gradient(x, qt):
        return jax.grad(lambda x: (x @ qt).sum())(x)

    f = mapped(
        inner_gradient, mesh, (P("d"), sharding.specs(qt, P(), mesh=mesh)), P("d")
    )
    assert_close(f(x, qt), inner_gradient(x, qt))


def test_layers_of_a_stack_are_scanned():
    mesh = mesh_of()
    stack = jaxq.quantize(normal_with_outliers(3, 128, 128), "nf4", batch=(0,))
    x = normal_with_outliers(4, 128)

    def scan(x, stack, product):
        def step(h, layer):
            return jnp.tanh(product(h, layer) / 8), None

        return jax.lax.scan(step, x, stack)[0]

    def row_parallel(h, layer):
        start = jax.lax.axis_index("t") * layer.shape[0]
        part = jax.lax.dynamic_slice_in_dim(h, start, layer.shape[0], axis=1)
        return jax.lax.psum(part @ layer, "t")

    at = sharding.specs(stack, P(None, "t", None), mesh=mesh)
    f = functools.partial(scan, product=row_parallel)
    y = mapped(f, mesh, (P("d"), at), P("d"))(x, stack)
    assert_close(y, scan(x, stack, jaxq.matmul))


def test_experts_are_parallel():
    mesh = jax.make_mesh((4,), ("e",), axis_types=(AxisType.Auto,))
    experts = jaxq.quantize(normal_with_outliers(8, 64, 32), "nf4_dq", batch=(0,))
    x = normal_with_outliers(8, 4, 64)
    at = sharding.specs(experts, P("e"), mesh=mesh)

    def product(x, experts):
        return jaxq.einsum("ebk,ekn->ebn", x, experts)

    f = mapped(product, mesh, (P("e"), at), P("e"))
    assert_close(f(x, experts), product(x, experts))

    rows, sizes = normal_with_outliers(32, 64), jnp.array([3, 5, 0, 8, 4, 4, 1, 7])
    f = mapped(jaxq.ops.ragged_dot, mesh, (P("e"), at, P("e")), P("e"))
    assert_close(f(rows, experts, sizes), jaxq.ops.ragged_dot(rows, experts, sizes))


def test_rows_of_a_table_are_taken_from_its_columns():
    mesh = mesh_of()
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(32))
    table = jaxq.quantize(normal_with_outliers(16, 128), spec, contracting=-1)
    tokens = jnp.array([[1, 5], [0, 15]])
    at = sharding.specs(table, P(None, "t"), mesh=mesh)
    f = mapped(jaxq.ops.take, mesh, (at, P("d")), P("d", None, "t"))
    np.testing.assert_array_equal(f(table, tokens), jaxq.ops.take(table, tokens))


def test_integer_products_and_static_activations_run_on_parts():
    mesh = mesh_of()
    qt = jaxq.quantize(normal_with_outliers(128, 32), "int8")
    qt = qt.with_activation("int8", bounds=(-4.0, 4.0))
    x = normal_with_outliers(4, 128)
    at = sharding.specs(qt, P("t", "d"), mesh=mesh)

    def product(x, qt):
        assert jaxq.explain(x, qt).path == "codes"
        return jax.lax.psum(x @ qt, "t")

    f = mapped(product, mesh, (P(None, "t"), at), P(None, "d"))
    assert_close(f(x, qt), x @ qt)


def test_axes_that_the_function_does_not_map_stay_automatic():
    mesh = mesh_of()
    qt = jaxq.quantize(normal_with_outliers(256, 64), "int4")
    qt = sharding.place(qt, mesh, P("t", "d"))
    x = normal_with_outliers(4, 256)
    at = sharding.specs(qt, P("t", None), mesh=mesh)

    def product(x, qt):
        return jax.lax.psum(x @ qt, "t")

    f = mapped(product, mesh, (P(None, "t"), at), P(), axis_names={"t"})
    assert_close(f(x, qt), x @ qt)


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_where_the_function_does_not_map_an_axis(kind):
    """The weight is sharded over "t", and the function maps "d" only."""
    mesh = mesh_of(kind)
    qt, x = jaxq.quantize(normal_with_outliers(64, 32), "int8"), normal(8, 64)
    weight = np.asarray(jaxq.dequantize(qt), np.float64)
    expected = 2 * (np.asarray(x, np.float64) @ weight) @ weight.T
    placed = sharding.place(qt, mesh, P(None, "t"))
    product = jax.shard_map(
        lambda x, qt: x @ qt,
        mesh=mesh,
        in_specs=(P("d"), P()),
        out_specs=P("d"),
        axis_names={"d"},
    )

    @jax.jit
    def gradient(x, qt):
        return jax.grad(lambda x: (product(x, qt) ** 2).sum())(x)

    with jax.set_mesh(mesh):
        dx = gradient(sharding.place(x, mesh, P("d")), placed)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-3)


def test_other_functions_see_the_part():
    mesh = mesh_of()
    w = normal_with_outliers(256, 64)
    qt = jaxq.quantize(w, "int4")
    at = sharding.specs(qt, P("t", "d"), mesh=mesh)

    def body(part, w):
        again = jaxq.qtensor.requantize(w, part)
        heads = part.reshape(128, 4, 8)
        low_first = jaxq.relayout(part, "low_first")
        return again, jaxq.dequantize(heads), jaxq.dequantize(low_first)

    spec = P("t", "d")
    f = mapped(body, mesh, (at, spec), (at, P("t", "d", None), spec))
    again, heads, floats = f(qt, w)
    jax.tree.map(np.testing.assert_array_equal, again, qt)
    expected = jaxq.dequantize(qt)
    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(heads.reshape(256, 64), expected)


WRONG = {
    # 224 codes of a shard are not whole groups of 128.
    "group": ("int4", 448),
    # The packing HALVES arranges whole rows.
    "row": ("ternary", 256),
    # Two scales for each of the 64 channels are one row of 128 scales.
    "scales": ("nf4_dq", 128),
}


@pytest.mark.parametrize("name", WRONG)
def test_specs_by_hand_that_cut_are_an_error_and_no_wrong_number(name):
    preset, rows = WRONG[name]
    qt = jaxq.quantize(normal_with_outliers(rows, 64), preset)

    def last_axis(leaf):
        entry = "t" if leaf.shape[-1] > 1 else None
        return P(*[None] * (leaf.ndim - 1), entry)

    by_hand = jax.tree.map(last_axis, qt)
    f = mapped(jaxq.dequantize, mesh_of(), (by_hand,), P("t"))
    with pytest.raises(ValueError, match=r"in_specs=jaxq\.sharding\.specs"):
        f(qt)


def test_codes_without_their_scales_are_an_error():
    qt = jaxq.quantize(normal_with_outliers(256, 64), "int4")
    only_codes = jax.tree.unflatten(jax.tree.structure(qt), [P("t"), P()])
    f = mapped(jaxq.dequantize, mesh_of(), (only_codes,), P(None, "t"))
    with pytest.raises(ValueError, match=r"in_specs=jaxq\.sharding\.specs"):
        f(qt)


def test_a_map_over_kept_axes_stays_an_error():
    qt = jaxq.quantize(normal_with_outliers(3, 6, 64), "int8", batch=(0,))
    mesh = mesh_of()
    at = sharding.specs(qt, P(), mesh=mesh)

    def body(qt):
        return jax.vmap(jaxq.dequantize, in_axes=1)(qt)

    with pytest.raises(ValueError, match="Only leading batch axes may be mapped over"):
        mapped(body, mesh, (at,), P())(qt)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_kernels_run_on_parts(platform):
    device = h200() if platform == "cuda" else None
    mesh = AbstractMesh((2,), ("t",), (AxisType.Auto,), abstract_device=device)
    qt = jaxq.quantize(normal_with_outliers(512, 512, dtype="bfloat16"), "int4")
    x = normal_with_outliers(4, 512, dtype="bfloat16")
    at = sharding.specs(qt, P("t", None), mesh=mesh)

    def product(x, qt):
        return jax.lax.psum(x @ qt, "t")

    f = jax.shard_map(product, mesh=mesh, in_specs=(P(None, "t"), at), out_specs=P())
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(f).trace(x, qt)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert CUSTOM_CALL[platform] in text
