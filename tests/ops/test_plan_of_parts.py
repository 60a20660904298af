"""Products on a mesh: what `explain` says, and the programs that devices get."""

import dataclasses
import re
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import kernels, sharding
from tests.arrays import normal_with_outliers
from tests.kernels.products import CUSTOM_CALL, LAYOUT, h200

K, N, ROWS = 512, 1024, 16
# The shardings of x and of the weight, what a device multiplies, and the collectives.
CASES = {
    "column": (P("d"), P(None, "t"), "[8, 512] @ [512, 512]", (), ()),
    "row": (P("d", "t"), P("t", None), "[8, 256] @ [256, 1024]", (), ("t",)),
    "sliced x": (P("d"), P("t", None), "[8, 256] @ [256, 1024]", (), ("t",)),
    "fsdp": (P("d"), P("d", None), "[8, 512] @ [512, 1024]", ("d",), ()),
    "fsdp and column": (P("d"), P("d", "t"), "[8, 512] @ [512, 512]", ("d",), ()),
    "both": (P(), P("d", "t"), "[16, 256] @ [256, 512]", (), ("d",)),
}


def mesh_for(platform, kind):
    device = h200() if platform == "cuda" else None
    return AbstractMesh((2, 2), ("d", "t"), (kind, kind), abstract_device=device)


def shapes_of(mesh, where, platform, preset="int4"):
    """Shapes of x and of a weight with their shardings."""
    w = normal_with_outliers(K, N, dtype="bfloat16")
    qt = jaxq.relayout(jaxq.quantize(w, preset), LAYOUT[platform])
    at = sharding.specs(qt, CASES[where][1], mesh=mesh)

    def struct(leaf, spec):
        at = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    x = jax.ShapeDtypeStruct((ROWS, K), "bfloat16")
    return struct(x, CASES[where][0]), jax.tree.map(struct, qt, at)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("where", CASES)
def test_explicit_axes_run_a_kernel_on_each_device(where, platform):
    mesh = mesh_for(platform, AxisType.Explicit)
    x, qt = shapes_of(mesh, where, platform)
    _, _, part, gathered, summed = CASES[where]
    plan = jaxq.explain(x, qt, platform=platform, mesh=mesh)
    assert plan.kernel != "xla"
    assert (plan.num_devices, plan.part) == (4, part)
    assert (plan.gathered, plan.summed) == (gathered, summed)
    assert jaxq.explain(x, qt, platform=platform) == plan  # the mesh of the operands
    assert part in str(plan)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x, qt: x @ qt).trace(x, qt)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert CUSTOM_CALL[platform] in text
    assert ("all_reduce" in text) == bool(summed)
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_xla_partitions_products_on_automatic_axes(platform):
    mesh = mesh_for(platform, AxisType.Auto)
    x, qt = shapes_of(mesh, "row", platform)
    plan = jaxq.explain(x, qt, platform=platform, mesh=mesh)
    assert (plan.kernel, plan.part) == ("xla", None)
    assert "with explicit axes each device runs a kernel" in plan.why_no_kernel
    multiply = jax.jit(lambda x, qt: x @ qt)
    with (
        pytest.warns(kernels.FallbackWarning, match="explicit mesh axes"),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        multiply.trace(x, qt).lower(lowering_platforms=(platform,))


# Weight, activation, layout, whether a kernel quantizes the activation on each device,
# and the dtype of an all-reduce.
QUANTIZED_INPUT = [
    ("int4", "int8", "column", True, None),
    ("int4", "int8", "row", False, "float32"),
    ("int4", "int8", "sliced x", True, "float32"),
    ("int4", "int8", "fsdp", True, None),
    ("int4", "fp8", "both", True, "float32"),
    ("int8", "int8", "both", True, "int32"),
]


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize(
    ("preset", "activation", "where", "has_kernel", "sum_dtype"), QUANTIZED_INPUT
)
def test_each_device_multiplies_quantized_activations(
    preset, activation, where, has_kernel, sum_dtype, platform
):
    mesh = mesh_for(platform, AxisType.Explicit)
    x, qt = shapes_of(mesh, where, platform, preset)
    qt = qt.with_activation(activation)
    _, _, part, gathered, summed = CASES[where]
    plan = jaxq.explain(x, qt, platform=platform, mesh=mesh)
    assert plan.path == "codes"
    assert (plan.num_devices, plan.part) == (4, part)
    assert (plan.gathered, plan.summed) == (gathered, summed)
    assert (plan.activation_kernel != "xla") == has_kernel
    assert has_kernel or "several devices share" in plan.why_no_activation_kernel
    assert (sum_dtype or "all-reduce") in str(plan) or not summed
    is_native = (platform, preset) == ("cuda", "int8")  # XLA has such a product
    assert (plan.kernel == "xla") == is_native
    with (
        warnings.catch_warnings(),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        warnings.simplefilter("error", kernels.FallbackWarning)
        traced = jax.jit(lambda x, qt: x @ qt).trace(x, qt)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == is_native
    assert text.count("stablehlo.custom_call") == has_kernel + (not is_native)
    assert text.count("all_reduce") == len(summed)
    if summed:
        name = {"int32": "i32", "float32": "f32"}[sum_dtype]
        assert re.search(rf"all_reduce.*?-> tensor<\S+x{name}>", text, re.DOTALL)


def test_a_mesh_does_not_change_how_operands_are_prepared():
    mesh = mesh_for("tpu", AxisType.Explicit)
    x, qt = shapes_of(mesh, "row", "tpu", "int8")
    factors = jax.ShapeDtypeStruct((K,), "float32")
    qt = dataclasses.replace(qt.with_activation("int8"), input_scale=factors)
    plan = jaxq.explain(x, qt, platform="tpu", mesh=mesh)
    assert plan.before == ("scale_left", "quantize_left")
    assert (plan.kernel, plan.summed, plan.result) == ("tpu", ("t",), "int32")
    asymmetric = qt.with_activation(jaxq.QuantSpec("uint8", offset="min"))
    plan = jaxq.explain(x, asymmetric, platform="tpu", mesh=mesh)
    assert plan.before == ("scale_left", "quantize_left", "dequantize_left")
    assert (plan.kernel, plan.summed, plan.result) == ("tpu", ("t",), "float32")


def test_outlier_columns_have_a_kernel_on_each_device():
    mesh = mesh_for("cuda", AxisType.Explicit)
    x, qt = shapes_of(mesh, "row", "cuda", "int8")
    qt = qt.with_activation("int8", outliers=6.0)
    plan = jaxq.explain(x, qt, platform="cuda", mesh=mesh)
    assert plan.kernel == "mosaic_gpu"
    assert (plan.part, plan.summed) == ("[8, 256] @ [256, 1024]", ("t",))


@pytest.mark.parametrize(
    ("where", "part", "summed"),
    [
        ("column", "[8, 512] @ [512, 512]", ("t",)),
        ("row", "[8, 256] @ [256, 1024]", ()),
    ],
)
def test_the_gradient_is_explained_on_a_mesh(where, part, summed):
    """A column-parallel product has no collective, and its gradient has one."""
    mesh = mesh_for("tpu", AxisType.Explicit)
    x, qt = shapes_of(mesh, where, "tpu")
    plan = jaxq.explain(x, qt, platform="tpu", derivative=True)
    assert (plan.kernel, plan.part, plan.summed) == ("tpu_transposed", part, summed)


def placed(tree, specs, mesh):
    """The shapes of a tree with shardings."""

    def struct(leaf, spec):
        at = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    return jax.tree.map(struct, tree, specs)


# The shardings of the rows and of the experts, and what a device multiplies.
EXPERTS = {
    "experts": (P("d"), P("t"), "[8, 512] @ [2, 512, 256]", (), ("t",)),
    "columns": (P("d"), P(None, None, "t"), "[8, 512] @ [4, 512, 128]", (), ()),
    "fsdp": (P("d"), P(None, "d"), "[8, 512] @ [4, 512, 256]", ("d",), ()),
}


@pytest.mark.parametrize("platform", CUSTOM_CALL)
@pytest.mark.parametrize("where", EXPERTS)
def test_devices_multiply_their_experts(where, platform):
    mesh = mesh_for(platform, AxisType.Explicit)
    rows, at, part, gathered, summed = EXPERTS[where]
    w = normal_with_outliers(4, 512, 256, dtype="bfloat16")
    qt = jaxq.relayout(jaxq.quantize(w, "int4", batch=(0,)), LAYOUT[platform])
    qt = placed(qt, sharding.specs(qt, at, mesh=mesh), mesh)
    x = placed(jax.ShapeDtypeStruct((16, 512), "bfloat16"), rows, mesh)
    sizes = placed(jax.ShapeDtypeStruct((4,), "int32"), P(), mesh)
    plan = jaxq.explain(x, qt, group_sizes=sizes, platform=platform, mesh=mesh)
    assert plan.kernel.startswith("ragged")
    assert (plan.num_devices, plan.part) == (4, part)
    assert (plan.gathered, plan.summed) == (gathered, summed)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jaxq.ops.ragged_dot).trace(x, qt, sizes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    kernel = "tpu_custom_call" if platform == "tpu" else "xla.gpu.triton"
    assert kernel in text
    assert text.count("all_reduce") == len(summed)


@pytest.mark.parametrize("platform", CUSTOM_CALL)
def test_devices_read_their_heads_of_a_cache(platform):
    mesh = mesh_for(platform, AxisType.Explicit)
    cache = jaxq.ops.KVCache.empty(
        "int4", batch=4, num_heads=2, length=512, head_dim=128
    )
    specs = jax.tree.map(lambda leaf: P("d", "t") if leaf.ndim > 1 else P("d"), cache)
    cache = placed(cache, specs, mesh)
    q = jax.ShapeDtypeStruct((4, 1, 8, 128), "bfloat16")
    q = placed(q, P("d", None, "t", None), mesh)
    plan = cache.explain(q, platform=platform)
    assert plan.kernel.startswith("attention")
    assert plan.part == "queries [2, 1, 4, 128] by 2 slots with 1 key heads"
    assert (plan.num_devices, plan.gathered, plan.summed) == (4, (), ())
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda cache, q: cache.attend(q)).trace(cache, q)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    kernel = "tpu_custom_call" if platform == "tpu" else "xla.gpu.triton"
    assert kernel in text
    assert "stablehlo.while" not in text  # the loop of the XLA form
    recent = placed(cache.recent_keys, P(None, None, "d"), mesh)
    sharded_tokens = dataclasses.replace(cache, recent_keys=recent)
    plan = sharded_tokens.explain(q, platform=platform)
    assert (plan.kernel, plan.part) == ("xla", None)
    assert "no device has whole slots and heads" in plan.why_no_kernel


def test_a_mesh_must_be_a_mesh():
    x, qt = (
        np.ones((2, 32), np.float32),
        jaxq.quantize(np.eye(32, dtype=np.float32), "int8"),
    )
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        jaxq.explain(x, qt, mesh="d")
