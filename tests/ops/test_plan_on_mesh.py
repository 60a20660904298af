"""Products on a mesh: what `explain` says, and the programs that devices get."""

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


def test_explain_says_when_xla_partitions_a_product():
    mesh = mesh_for("tpu", AxisType.Explicit)
    x, qt = shapes_of(mesh, "row", "tpu", "int8")
    plan = jaxq.explain(x, qt.with_activation("int8"), platform="tpu", mesh=mesh)
    assert (plan.kernel, plan.part) == ("xla", None)
    assert "quantized or scaled first" in plan.why_no_kernel


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


def test_products_of_experts_are_explained_on_a_mesh():
    mesh = mesh_for("tpu", AxisType.Explicit)
    experts = jaxq.quantize(normal_with_outliers(4, 512, 256), "int4", batch=(0,))
    x = jax.ShapeDtypeStruct((16, 512), "float32")
    sizes = jax.ShapeDtypeStruct((4,), "int32")
    plan = jaxq.explain(x, experts, group_sizes=sizes, platform="tpu", mesh=mesh)
    assert plan.kernel == "xla"
    assert "4 devices" in plan.why_no_kernel


def test_a_mesh_must_be_a_mesh():
    x, qt = (
        np.ones((2, 32), np.float32),
        jaxq.quantize(np.eye(32, dtype=np.float32), "int8"),
    )
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        jaxq.explain(x, qt, mesh="d")
