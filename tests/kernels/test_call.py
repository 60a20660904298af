"""The product as a primitive: every transformation of jax, every platform, one device or several, and what is said."""

import contextlib
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import jaxq
from jaxq import kernels
from tests.ops.reference import normal
from tests.tables import thinned

K, N, M = 128, 256, 16
CUSTOM_CALL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
LAYOUT = {"tpu": "columns", "cuda": "rows"}
WITH_OFFSET = jaxq.QuantSpec("uint4", jaxq.PerGroup(64), offset="min")


@functools.cache
def weight(
    preset="int4", layout="rows", dtype="float32", *, stack: int = 0
) -> jaxq.QTensor:
    shape, roles = (
        ((stack, K, N), {"contracting": -2, "batch": 0}) if stack else ((K, N), {})
    )
    return jaxq.relayout(
        jaxq.quantize(normal(*shape, dtype=dtype), preset, **roles), layout
    )


def bf16(*shape: int) -> jax.Array:
    return normal(*shape, dtype="bfloat16")


def plain(x, qt):
    return x @ jaxq.dequantize(qt, dtype=jnp.float32)


def close(found, expected, tolerance=1e-5):
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * max(1.0, abs(expected).max())
    )


# Derivatives and batching, against the same function of a dequantized weight.


@pytest.mark.parametrize(
    ("preset", "layout"),
    thinned(
        itertools.product(["int4", "nf4", "uint4", "ttq"], ["rows", "columns"]),
        [("uint4", "columns"), ("ttq", "rows")],
    ),
)
def test_forward_reverse_and_second_derivatives(preset, layout):
    qt, x, v = weight(preset, layout), normal(3, K) / 8, normal(3, K, seed=2)

    def loss(multiply):
        return lambda x, scale: jnp.sum(jnp.sin(multiply(x, _with_scale(qt, scale))))

    scale = qt.scale
    ours, theirs = loss(jaxq.matmul), loss(plain)

    def derivatives(f):
        return (
            jax.jvp(f, (x, scale), (v, scale))[1],
            jax.grad(f, argnums=(0, 1))(x, scale),
            jax.jvp(jax.grad(f, argnums=(0, 1)), (x, scale), (v, scale))[1],
            jax.grad(lambda x, s: jnp.vdot(jax.grad(f)(x, s), v), argnums=(0, 1))(
                x, scale
            ),
        )

    found, expected = (
        jax.jit(functools.partial(derivatives, f))() for f in (ours, theirs)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 2e-2 if a.dtype == jnp.bfloat16 else 1e-4)


def _with_scale(qt: jaxq.QTensor, scale: jax.Array) -> jaxq.QTensor:
    leaves, tree = jax.tree.flatten(qt)
    return jax.tree.unflatten(
        tree, [scale if leaf is qt.scale else leaf for leaf in leaves]
    )


def test_linearize_and_transpose():
    qt, x = weight("nf4"), normal(3, K)
    y, linear = jax.linearize(lambda x: x @ qt, x)
    close(jax.jit(linear)(x), y)
    (dx,) = jax.jit(jax.linear_transpose(lambda x: x @ qt, x))(y)
    close(dx, jax.jit(plain)(y, qt.T))


@pytest.mark.parametrize("in_axes", [(0, None), (1, None), (None, 0), (0, 0), (2, 0)])
def test_vmap(in_axes):
    x = normal(*{0: (3, 5, K), 1: (5, 3, K), 2: (5, K, 3), None: (5, K)}[in_axes[0]])
    qt = weight("int4", stack=0 if in_axes[1] is None else 3)
    found = jax.jit(jax.vmap(jaxq.matmul, in_axes=in_axes))(x, qt)
    w = jaxq.dequantize(qt, dtype=jnp.float32)
    close(found, jax.jit(jax.vmap(jnp.matmul, in_axes=in_axes))(x, w))


@pytest.mark.heavy
def test_vmap_of_gradients_and_gradients_of_vmap():
    qt, x = weight("nf4", stack=3), normal(3, 5, K)

    def loss(multiply, x, scale):
        return jnp.sum(jnp.sin(multiply(x, _with_scale(one, scale))))

    one = jax.tree.map(lambda leaf: leaf[0], qt)
    for multiply in (jaxq.matmul, plain):
        inner = jax.vmap(jax.grad(functools.partial(loss, multiply), argnums=(0, 1)))(
            x, qt.scale
        )
        outer = jax.grad(
            lambda x, s: jnp.sum(jax.vmap(functools.partial(loss, multiply))(x, s)),
            argnums=(0, 1),
        )(  # noqa: B023
            x, qt.scale
        )
        jax.tree.map(functools.partial(close, tolerance=1e-4), inner, outer)
        if multiply is jaxq.matmul:
            ours = inner
    jax.tree.map(functools.partial(close, tolerance=1e-4), ours, inner)
    columns = jax.jacfwd(lambda s: jnp.sum(loss(jaxq.matmul, x[0], s * one.scale)))(
        jnp.ones(())
    )
    close(
        columns,
        jax.grad(lambda s: loss(plain, x[0], s * one.scale))(jnp.ones(())),
        1e-4,
    )


def test_products_of_integers_have_gradients_for_their_scales():
    qt = weight("int8")
    x = jaxq.quantize(normal(4, K), "int8", contracting=-1)

    def loss(multiply):
        return lambda scale: jnp.sum(jnp.sin(multiply(x, _with_scale(qt, scale))))

    def both(x, qt):
        return jaxq.dequantize(x) @ jaxq.dequantize(qt)

    found, expected = (
        jax.jit(jax.grad(loss(multiply)))(qt.scale) for multiply in (jaxq.matmul, both)
    )
    close(found, expected, 1e-4)


# Platforms.


def lowered(platform, f, *args, platforms=None):
    mesh = (
        AbstractMesh((1,), ("x",), abstract_device=_abstract_device(platform))
        if platform == "cuda"
        else None
    )
    with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
        return (
            jax.jit(f)
            .trace(*args)
            .lower(lowering_platforms=platforms or (platform,))
            .as_text()
        )


def _abstract_device(platform):
    from jax._src.mesh import (
        AbstractDevice,
    )  # not public yet; only this test of programs for absent devices needs it

    assert platform == "cuda"
    return AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


FUNCTIONS = {
    "jit": lambda x, qt: x @ qt,
    "grad": jax.grad(lambda x, qt: jnp.sum((x @ qt).astype(jnp.float32) ** 2)),
    "grad of scales": jax.grad(
        lambda x, qt: jnp.sum((x @ qt).astype(jnp.float32) ** 2),
        argnums=1,
        allow_int=True,
    ),
    "vmap": jax.vmap(lambda x, qt: x @ qt, in_axes=(0, None)),
    "checkpoint": jax.grad(
        jax.checkpoint(lambda x, qt: jnp.sum((x @ qt).astype(jnp.float32) ** 2))
    ),
}


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernel_survives_transformations(name, platform):
    qt = weight("int4", LAYOUT[platform], "bfloat16")
    x = bf16(2, M, K) if name == "vmap" else bf16(M, K)
    assert CUSTOM_CALL[platform] in lowered(platform, FUNCTIONS[name], x, qt)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_the_kernel_runs_on_stacks(platform):
    stack, x = weight("int4", LAYOUT[platform], "bfloat16", stack=3), bf16(M, K)
    assert CUSTOM_CALL[platform] in lowered(
        platform, jax.vmap(jaxq.matmul, in_axes=(None, 0)), x, stack
    )

    def through(x, stack):
        return jax.lax.scan(lambda h, layer: ((h @ layer)[:, :K], None), x, stack)[0]

    assert CUSTOM_CALL[platform] in lowered(platform, through, x, stack)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_the_kernel_runs_inside_shard_map(platform):
    qt, x = weight("int4", LAYOUT[platform], "bfloat16"), bf16(M, K)
    mesh = AbstractMesh(
        (4,),
        ("d",),
        (AxisType.Auto,),
        abstract_device=_abstract_device("cuda") if platform == "cuda" else None,
    )
    columns = (
        PartitionSpec("d", None)
        if LAYOUT[platform] == "rows"
        else PartitionSpec(None, "d")
    )

    def f(x, data, scale):
        def one(x, data, scale):
            return kernels.quantized_matmul(x, data, scale, layout=LAYOUT[platform])

        specs = (PartitionSpec(), columns, PartitionSpec("d", None))
        return jax.shard_map(
            one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "d")
        )(x, data, scale)

    with jax.sharding.use_abstract_mesh(mesh):
        text = (
            jax.jit(f)
            .trace(x, qt.data, qt.scale)
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert CUSTOM_CALL[platform] in text


def test_one_program_for_several_platforms():
    # Rows and columns both, so that each platform has a kernel for one of them; on the CPU both run.
    x, rows, columns = (
        bf16(M, K),
        weight("int4", "rows", "bfloat16"),
        weight("int4", "columns", "bfloat16"),
    )
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("tpu_custom_call", "mosaic_gpu")
    ]
    with pytest.warns(kernels.FallbackWarning, match="relayout"):
        exported = jax.export.export(
            jax.jit(lambda x, r, c: (x @ r, x @ c)),
            platforms=("cpu", "tpu"),
            disabled_checks=checks,
        )(x, rows, columns)
    assert "tpu_custom_call" in exported.mlir_module()
    found = jax.export.deserialize(exported.serialize()).call(x, rows, columns)
    expected = np.asarray(x, np.float32) @ np.asarray(
        jaxq.dequantize(rows, dtype=jnp.float32)
    )
    for y in found:
        close(y, expected, 2e-2)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("along", ["n", "k"])
def test_plain_jit_over_several_devices_takes_the_xla_form_and_says_so(platform, along):
    qt, x = weight("int8", LAYOUT[platform], "bfloat16"), bf16(M, K)
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,))
    axis = (
        (1 if along == "k" else 0)
        if LAYOUT[platform] == "rows"
        else (0 if along == "k" else 1)
    )

    def struct(leaf, axis):
        spec = [None] * leaf.ndim
        if axis is not None and leaf.shape[axis] % 4 == 0:
            spec[axis] = "d"
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    placed = jax.tree.map(
        lambda leaf: struct(
            leaf, axis if leaf is qt.data else 0 if along == "n" else None
        ),
        qt,
    )
    with pytest.warns(
        kernels.FallbackWarning, match="partitions this program for 4 devices"
    ):
        text = (
            jax.jit(lambda x, qt: x @ qt)
            .trace(struct(x, 1 if along == "k" else None), placed)
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert CUSTOM_CALL[platform] not in text
    assert "dot_general" in text


def test_shard_map_on_real_devices():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    qt, x = weight("int4"), normal(M, K)
    specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "d")
    )
    def by_columns(x, data, scale):
        return kernels.quantized_matmul(x, data, scale)

    def loss(multiply):
        return lambda x, scale: jnp.sum(jnp.sin(multiply(x, qt.data, scale)))

    close(jax.jit(by_columns)(x, qt.data, qt.scale), x @ qt)
    found = jax.jit(jax.grad(loss(by_columns), argnums=(0, 1)))(x, qt.scale)
    expected = jax.jit(jax.grad(loss(kernels.quantized_matmul), argnums=(0, 1)))(
        x, qt.scale
    )
    close(found[0], expected[0], 1e-4)
    close(found[1], expected[1], 1e-2)


# What is said.


@pytest.mark.parametrize(
    ("platform", "x", "qt", "kernel", "reason"),
    [
        ("cpu", "bfloat16", ("int4", "rows"), "xla", "there are no kernels for cpu"),
        ("tpu", "bfloat16", ("int4", "columns"), "tpu", None),
        ("tpu", "bfloat16", ("int4", "rows"), "xla", "relayout"),
        ("cuda", "bfloat16", ("int4", "rows"), "mosaic_gpu", None),
        ("cuda", "bfloat16", ("int4", "columns"), "xla", "relayout"),
        ("cuda", "float32", ("nf4", "rows"), "triton", None),
        (
            "tpu",
            "bfloat16",
            ("int3", "columns"),
            "xla",
            "int3 has 3 bits, kernels take 4 and 8",
        ),
        ("tpu", "bfloat16", ("fp8", "columns"), "xla", "float8_e4m3fn is no integer"),
        ("tpu", "bfloat16", (WITH_OFFSET, "columns"), "xla", "real offsets"),
    ],
)
def test_explain_names_the_kernel_and_the_reason(platform, x, qt, kernel, reason):
    plan = jaxq.explain(normal(M, K, dtype=x), weight(*qt, dtype=x), platform=platform)
    assert plan.kernel == kernel
    assert (
        (plan.why_no_kernel is None) if reason is None else reason in plan.why_no_kernel
    )
    assert platform == "cpu" or (plan.why_no_kernel or f"the {kernel} kernel") in str(
        plan
    )
    if platform != "cpu":
        assert (CUSTOM_CALL[platform] in _text(platform, x, weight(*qt, dtype=x))) == (
            kernel in ("tpu", "mosaic_gpu")
        )


def _text(platform, dtype, qt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.FallbackWarning)
        return lowered(platform, jaxq.matmul, normal(M, K, dtype=dtype), qt)


def test_explain_sees_shardings():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    qt = jax.device_put(
        weight("int4", "columns", "bfloat16"), NamedSharding(mesh, PartitionSpec())
    )
    plan = jaxq.explain(bf16(M, K), qt, platform="tpu")
    assert plan.kernel == "xla"
    assert "4 devices" in plan.why_no_kernel


# Meshes whose axes are part of an array's type, as `jax.make_mesh` makes them.


SHARDED = list(
    itertools.product(("rows of x", "columns of the weight", "k"), (None, "int8"))
)


@pytest.mark.parametrize(
    ("where", "activation"), thinned(SHARDED, [SHARDED[1], SHARDED[4]])
)
def test_ordinary_jit_on_four_devices(where, activation):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    auto = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x, qt = (
        normal(M, K),
        jaxq.quantize(normal(K, N), jaxq.QuantSpec("int4", jaxq.PerGroup(32))),
    )

    @jax.jit
    def product_and_slope(x, qt):
        return x @ qt, jax.grad(lambda x: jnp.sum(jnp.sin(x @ qt)))(x)

    expected, slope = product_and_slope(x, qt.with_activation(activation))
    x_spec = {"rows of x": ("d",), "columns of the weight": (), "k": (None, "d")}[where]
    w_spec = {"rows of x": (), "columns of the weight": ("d",), "k": (None, "d")}[where]
    for found in (mesh, auto):

        def put(a, spec, found=found):
            return jax.device_put(a, NamedSharding(found, PartitionSpec(*spec)))

        sharded = jax.tree.map(
            lambda leaf, put=put: put(leaf, w_spec), qt
        ).with_activation(activation)
        with jax.set_mesh(found):
            y, dx = product_and_slope(put(x, x_spec), sharded)
        close(y, expected)
        close(dx, slope, 1e-4)
    # The type of the result says how it lies.
    wide = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*x_spec)))
    leaves = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*w_spec))),
        qt,
    )
    spec = jax.eval_shape(jaxq.matmul, wide, leaves).sharding.spec
    assert tuple(spec) == (
        ("d", None)
        if where == "rows of x"
        else (None, "d")
        if where != "k"
        else (None, None)
    )


def test_the_triton_kernel_runs_inside_shard_map():
    mesh = AbstractMesh(
        (4,), ("d",), (AxisType.Auto,), abstract_device=_abstract_device("cuda")
    )
    specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "d")
    )
    def by_columns(x, data, scale):
        return kernels.quantized_matmul(x, data, scale)

    qt = weight("int4")
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in (normal(M, K), qt.data, qt.scale)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        text = (
            jax.jit(by_columns)
            .trace(*shapes)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert "triton" in text


def test_a_transposed_weight_says_that_it_has_no_kernel():
    qt = weight("int4", dtype="bfloat16")
    with pytest.warns(kernels.FallbackWarning, match="kept axes are contracted"):
        lowered("cuda", lambda y, qt: y @ qt.T, bf16(M, N), qt)
    with (
        warnings.catch_warnings()
    ):  # a derivative has none either, and nobody expects one
        warnings.simplefilter("error", kernels.FallbackWarning)
        lowered(
            "cuda",
            jax.grad(lambda x, qt: jnp.sum(x @ qt).astype(jnp.float32)),
            bf16(M, K),
            qt,
        )


def test_int8_products_on_a_gpu_are_xlas_own_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", kernels.FallbackWarning)
        lowered(
            "cuda",
            jaxq.matmul,
            bf16(M, K),
            weight("int8", dtype="bfloat16").with_activation("int8"),
        )
    with pytest.warns(kernels.FallbackWarning, match="int8"):
        lowered(
            "cuda",
            jaxq.matmul,
            bf16(M, K),
            weight("int4", dtype="bfloat16").with_activation("int8"),
        )


def test_a_stack_is_decoded_one_matrix_after_the_other():
    def memory(num: int) -> int:
        w = jax.ShapeDtypeStruct((num, 1024, 1024), jnp.float32)
        qt = jax.eval_shape(
            lambda w: jaxq.quantize(w, "int4", contracting=-2, batch=0), w
        )
        product = jax.jit(lambda x, qt: jaxq.einsum("emk,ekn->emn", x, qt))
        compiled = product.lower(
            jax.ShapeDtypeStruct((num, 4, 1024), jnp.float32), qt
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8) < 1.5 * memory(2)
