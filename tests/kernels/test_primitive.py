"""The product as a primitive: every transformation of jax, platform and mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import jaxq
from jaxq import kernels
from tests.arrays import assert_close, normal_with_outliers
from tests.kernels.products import (
    CUSTOM_CALL,
    LAYOUT,
    K,
    M,
    N,
    bfloat16,
    h200,
    lowered_for,
    weight,
)
from tests.tables import thinned


def dequantized_matmul(x, qt):
    return x @ jaxq.dequantize(qt, dtype=jnp.float32)


def with_scale(qt: jaxq.QTensor, scale: jax.Array) -> jaxq.QTensor:
    """The weight with its scale replaced, so that a gradient for it can be taken."""
    leaves, tree = jax.tree.flatten(qt)
    replaced = [scale if leaf is qt.scale else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, replaced)


# Derivatives and batching, against the same function of a dequantized weight.


@pytest.mark.parametrize(
    ("preset", "layout"),
    thinned(
        itertools.product(["int4", "nf4", "uint4", "ttq"], ["rows", "columns"]),
        [("uint4", "columns"), ("ttq", "rows")],
    ),
)
def test_forward_reverse_and_second_derivatives(preset, layout):
    qt, x, v = (
        weight(preset, layout),
        normal_with_outliers(3, K) / 8,
        normal_with_outliers(3, K, seed=2),
    )
    scale = qt.scale

    def loss(multiply):
        return lambda x, scale: jnp.sum(jnp.sin(multiply(x, with_scale(qt, scale))))

    def derivatives(f):
        gradient = jax.grad(f, argnums=(0, 1))

        def slope(x, scale):
            return jnp.vdot(jax.grad(f)(x, scale), v)

        return (
            jax.jvp(f, (x, scale), (v, scale))[1],
            gradient(x, scale),
            jax.jvp(gradient, (x, scale), (v, scale))[1],
            jax.grad(slope, argnums=(0, 1))(x, scale),
        )

    actual = jax.jit(functools.partial(derivatives, loss(jaxq.matmul)))()
    expected = jax.jit(functools.partial(derivatives, loss(dequantized_matmul)))()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, 2e-2 if a.dtype == jnp.bfloat16 else 1e-4)


def test_linearize_and_transpose():
    qt, x = weight("nf4"), normal_with_outliers(3, K)
    y, linear = jax.linearize(lambda x: x @ qt, x)
    assert_close(jax.jit(linear)(x), y)
    (dx,) = jax.jit(jax.linear_transpose(lambda x: x @ qt, x))(y)
    assert_close(dx, jax.jit(dequantized_matmul)(y, qt.T))


@pytest.mark.parametrize("in_axes", [(0, None), (1, None), (None, 0), (0, 0), (2, 0)])
def test_vmap(in_axes):
    x_axis, weight_axis = in_axes
    shapes = {0: (3, 5, K), 1: (5, 3, K), 2: (5, K, 3), None: (5, K)}
    x = normal_with_outliers(*shapes[x_axis])
    qt = weight("int4", stack=0 if weight_axis is None else 3)
    actual = jax.jit(jax.vmap(jaxq.matmul, in_axes=in_axes))(x, qt)
    w = jaxq.dequantize(qt, dtype=jnp.float32)
    assert_close(actual, jax.jit(jax.vmap(jnp.matmul, in_axes=in_axes))(x, w))


@pytest.mark.heavy
def test_vmap_of_gradients_and_gradients_of_vmap():
    qt, x = weight("nf4", stack=3), normal_with_outliers(3, 5, K)
    first = jax.tree.map(lambda leaf: leaf[0], qt)

    def loss(multiply, x, scale):
        return jnp.sum(jnp.sin(multiply(x, with_scale(first, scale))))

    def total(multiply, x, scales):
        losses = jax.vmap(functools.partial(loss, multiply))(x, scales)
        return jnp.sum(losses)

    gradients = {}
    for multiply in (jaxq.matmul, dequantized_matmul):
        gradient = jax.grad(functools.partial(loss, multiply), argnums=(0, 1))
        inner = jax.vmap(gradient)(x, qt.scale)
        outer = jax.grad(functools.partial(total, multiply), argnums=(0, 1))(
            x, qt.scale
        )
        assert_close(inner, outer, 1e-4)
        gradients[multiply] = inner
    assert_close(gradients[jaxq.matmul], gradients[dequantized_matmul], 1e-4)
    # Forward mode over a factor of the scales, against reverse mode.
    one = jnp.ones(())
    forward = jax.jacfwd(lambda s: loss(jaxq.matmul, x[0], s * first.scale))(one)
    reverse = jax.grad(lambda s: loss(dequantized_matmul, x[0], s * first.scale))(one)
    assert_close(forward, reverse, 1e-4)


def test_products_of_integers_have_gradients_for_their_scales():
    qt = weight("int8")
    x = jaxq.quantize(normal_with_outliers(4, K), "int8", contracting=-1)

    def loss(multiply):
        return lambda scale: jnp.sum(jnp.sin(multiply(x, with_scale(qt, scale))))

    def product_of_floats(x, qt):
        return jaxq.dequantize(x) @ jaxq.dequantize(qt)

    actual = jax.jit(jax.grad(loss(jaxq.matmul)))(qt.scale)
    expected = jax.jit(jax.grad(loss(product_of_floats)))(qt.scale)
    assert_close(actual, expected, 1e-4)


# Platforms.


def squares(x, qt):
    return jnp.sum((x @ qt).astype(jnp.float32) ** 2)


FUNCTIONS = {
    "jit": lambda x, qt: x @ qt,
    "grad": jax.grad(squares),
    "grad of scales": jax.grad(squares, argnums=1, allow_int=True),
    "vmap": jax.vmap(lambda x, qt: x @ qt, in_axes=(0, None)),
    "checkpoint": jax.grad(jax.checkpoint(squares)),
}


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernel_survives_transformations(name, platform):
    qt = weight("int4", dtype="bfloat16")
    x = bfloat16(2, M, K) if name == "vmap" else bfloat16(M, K)
    assert CUSTOM_CALL[platform] in lowered_for(platform, FUNCTIONS[name], x, qt)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_the_kernel_runs_on_stacks(platform):
    stack = weight("int4", dtype="bfloat16", stack=3)
    x = bfloat16(M, K)
    mapped = jax.vmap(jaxq.matmul, in_axes=(None, 0))
    assert CUSTOM_CALL[platform] in lowered_for(platform, mapped, x, stack)

    def scanned(x, stack):
        return jax.lax.scan(lambda h, layer: ((h @ layer)[:, :K], None), x, stack)[0]

    assert CUSTOM_CALL[platform] in lowered_for(platform, scanned, x, stack)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_the_kernel_runs_inside_shard_map(platform):
    layout = LAYOUT[platform]
    qt, x = weight("int4", layout, "bfloat16"), bfloat16(M, K)
    device = h200() if platform == "cuda" else None
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,), abstract_device=device)
    n_axis_sharded = {
        "rows": PartitionSpec("d", None),
        "columns": PartitionSpec(None, "d"),
    }

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), n_axis_sharded[layout], PartitionSpec("d", None)),
        out_specs=PartitionSpec(None, "d"),
    )
    def by_columns(x, data, scale):
        return kernels.quantized_matmul(x, data, scale, layout=layout)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(by_columns).trace(x, qt.data, qt.scale)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert CUSTOM_CALL[platform] in text


def test_one_program_for_several_platforms():
    # The TPU has a kernel for both layouts, the CPU for none.
    x = bfloat16(M, K)
    rows = weight("int4", "rows", "bfloat16")
    columns = weight("int4", "columns", "bfloat16")
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("tpu_custom_call", "mosaic_gpu")
    ]
    export = jax.export.export(
        jax.jit(lambda x, r, c: (x @ r, x @ c)),
        platforms=("cpu", "tpu"),
        disabled_checks=checks,
    )
    exported = export(x, rows, columns)
    assert exported.mlir_module().count("tpu_custom_call") == 2
    results = jax.export.deserialize(exported.serialize()).call(x, rows, columns)
    w = np.asarray(jaxq.dequantize(rows, dtype=jnp.float32))
    expected = np.asarray(x, np.float32) @ w
    for y in results:
        assert_close(y, expected, 2e-2)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("along", ["n", "k"])
def test_plain_jit_over_several_devices_takes_the_xla_form_and_warns(platform, along):
    layout = LAYOUT[platform]
    qt, x = weight("int8", layout, "bfloat16"), bfloat16(M, K)
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,))
    n_axis = 0 if layout == "rows" else 1
    data_axis = n_axis if along == "n" else 1 - n_axis

    def struct(leaf, axis):
        spec = [None] * leaf.ndim
        if axis is not None and leaf.shape[axis] % 4 == 0:
            spec[axis] = "d"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def place(leaf):
        if leaf is qt.data:
            return struct(leaf, data_axis)
        return struct(leaf, 0 if along == "n" else None)

    placed_x = struct(x, 1 if along == "k" else None)
    traced = jax.jit(lambda x, qt: x @ qt).trace(placed_x, jax.tree.map(place, qt))
    with pytest.warns(
        kernels.FallbackWarning, match="partitions this program for 4 devices"
    ):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert CUSTOM_CALL[platform] not in text
    assert "dot_general" in text


def test_shard_map_on_real_devices():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    qt, x = weight("int4"), normal_with_outliers(M, K)
    specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "d")
    )
    def by_columns(x, data, scale):
        return kernels.quantized_matmul(x, data, scale)

    def gradients(multiply):
        def loss(x, scale):
            return jnp.sum(jnp.sin(multiply(x, qt.data, scale)))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, qt.scale)

    assert_close(jax.jit(by_columns)(x, qt.data, qt.scale), x @ qt)
    actual, expected = gradients(by_columns), gradients(kernels.quantized_matmul)
    assert_close(actual[0], expected[0], 1e-4)
    assert_close(actual[1], expected[1], 1e-2)


# Meshes whose axes are part of an array's type, as `jax.make_mesh` makes them.


SHARDED = list(
    itertools.product(("rows of x", "columns of the weight", "k"), (None, "int8"))
)
X_SPEC = {"rows of x": ("d",), "columns of the weight": (), "k": (None, "d")}
WEIGHT_SPEC = {"rows of x": (), "columns of the weight": ("d",), "k": (None, "d")}
RESULT_SPEC = {
    "rows of x": ("d", None),
    "columns of the weight": (None, "d"),
    "k": (None, None),
}


@pytest.mark.parametrize(
    ("where", "activation"), thinned(SHARDED, [SHARDED[1], SHARDED[4]])
)
def test_ordinary_jit_on_four_devices(where, activation):
    explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    auto = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = jaxq.QuantSpec("int4", jaxq.PerGroup(32))
    x, qt = normal_with_outliers(M, K), jaxq.quantize(normal_with_outliers(K, N), spec)

    def put(mesh, tree, axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)

    @jax.jit
    def product_and_gradient(x, qt):
        return x @ qt, jax.grad(lambda x: jnp.sum(jnp.sin(x @ qt)))(x)

    y, dx = product_and_gradient(x, qt.with_activation(activation))
    for mesh in (explicit, auto):
        sharded = put(mesh, qt, WEIGHT_SPEC[where]).with_activation(activation)
        with jax.set_mesh(mesh):
            results = product_and_gradient(put(mesh, x, X_SPEC[where]), sharded)
        assert_close(results[0], y)
        assert_close(results[1], dx, 1e-4)
    # With explicit axes the sharding of the result is part of its type.
    result = jax.eval_shape(
        jaxq.matmul,
        put(explicit, x, X_SPEC[where]),
        put(explicit, qt, WEIGHT_SPEC[where]),
    )
    assert tuple(result.sharding.spec) == RESULT_SPEC[where]


def test_the_triton_kernel_runs_inside_shard_map():
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,), abstract_device=h200())
    specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "d")
    )
    def by_columns(x, data, scale):
        return kernels.quantized_matmul(x, data, scale)

    qt = weight("int4")
    shapes = [
        jax.ShapeDtypeStruct(array.shape, array.dtype)
        for array in (normal_with_outliers(M, K), qt.data, qt.scale)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(by_columns).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


def test_a_stack_is_decoded_one_matrix_after_the_other():
    def memory(num: int) -> int:
        w = jax.ShapeDtypeStruct((num, 1024, 1024), jnp.float32)
        x = jax.ShapeDtypeStruct((num, 4, 1024), jnp.float32)
        qt = jax.eval_shape(
            lambda w: jaxq.quantize(w, "int4", contracting=-2, batch=0), w
        )
        product = jax.jit(lambda x, qt: jaxq.einsum("emk,ekn->emn", x, qt))
        compiled = product.lower(x, qt).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8) < 1.5 * memory(2)
