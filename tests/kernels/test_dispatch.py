"""Which kernel runs, why none does, and who is warned."""

import dataclasses
import inspect
import itertools
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxq
from jaxq import kernels
from jaxq.kernels._registry import KERNELS, kernel_module
from tests.arrays import normal_with_outliers
from tests.kernels.problems import problem
from tests.kernels.products import (
    CUSTOM_CALL,
    WITH_OFFSET,
    K,
    M,
    N,
    bfloat16,
    lowered_for,
    weight,
)


@pytest.mark.parametrize(
    ("platform", "x", "qt", "kernel", "reason"),
    [
        ("cpu", "bfloat16", ("int4", "rows"), "xla", "there are no kernels for cpu"),
        ("tpu", "bfloat16", ("int4", "columns"), "tpu", None),
        ("tpu", "bfloat16", ("int4", "rows"), "tpu", None),
        ("cuda", "bfloat16", ("int4", "rows"), "mosaic_gpu", None),
        ("cuda", "bfloat16", ("int4", "columns"), "xla", "relayout"),
        ("cuda", "float32", ("nf4", "rows"), "triton", None),
        (
            "tpu",
            "bfloat16",
            ("int3", "rows"),
            "xla",
            "int3 has 3 bits, and kernels take 4 and 8 bits",
        ),
        (
            "tpu",
            "bfloat16",
            ("fp8", "rows"),
            "xla",
            "8-bit codes only of integer formats, not of float8_e4m3fn",
        ),
        ("tpu", "bfloat16", (WITH_OFFSET, "rows"), "xla", "real offsets"),
    ],
)
def test_explain_names_the_kernel_and_the_reason(platform, x, qt, kernel, reason):
    qt = weight(*qt, dtype=x)
    plan = jaxq.explain(normal_with_outliers(M, K, dtype=x), qt, platform=platform)
    assert plan.kernel == kernel
    if reason is None:
        assert plan.why_no_kernel is None
    else:
        assert reason in plan.why_no_kernel
    if platform == "cpu":
        return
    assert (plan.why_no_kernel or f"the {kernel} kernel") in str(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.FallbackWarning)
        text = lowered_for(
            platform, jaxq.matmul, normal_with_outliers(M, K, dtype=x), qt
        )
    runs_mosaic = kernel in ("tpu", "mosaic_gpu")
    assert (CUSTOM_CALL[platform] in text) == runs_mosaic


@pytest.mark.parametrize(
    ("platform", "k", "kernel"),
    [("tpu", 330, "tpu"), ("cuda", 320, "mosaic_gpu"), ("cuda", 330, "triton")],
)
def test_a_last_group_that_is_not_full_has_a_kernel(platform, k, kernel):
    """The program does not pad codes, and pads no more than x."""
    qt = jaxq.quantize(normal_with_outliers(k, N, dtype="bfloat16"), "int4")
    assert qt.scale.shape == (N, 3)
    x = bfloat16(M, k)
    assert jaxq.explain(x, qt, platform=platform).kernel == kernel
    text = lowered_for(platform, jaxq.matmul, x, qt)
    changes = ("stablehlo.pad", "stablehlo.concatenate")
    lines = [
        line for line in text.splitlines() if any(name in line for name in changes)
    ]
    assert not any("xui8>" in line for line in lines)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_explain_says_that_x_is_widened(dtypes):
    x_dtype, weight_dtype = dtypes
    x = normal_with_outliers(M, K, dtype=x_dtype)
    qt = weight("int4", dtype=weight_dtype)
    w = normal_with_outliers(2, K, N, dtype=weight_dtype)
    experts = jaxq.quantize(w, "int4", contracting=-2, batch=0)
    for plan in (
        jaxq.explain(x, qt, platform="tpu"),
        jaxq.explain(x, experts, group_sizes=np.array([M, 0]), platform="tpu"),
    ):
        assert f"widened from {x_dtype} to float32" in str(plan)
        assert f'weight.astype("{x_dtype}")' in str(plan)
        assert plan.x_dtype == "float32"
    narrow = jaxq.explain(x, qt.astype(x_dtype), platform="tpu")
    assert ("widened" in str(narrow), narrow.x_dtype) == (False, x_dtype)
    wide = normal_with_outliers(M, K, dtype="float32")
    assert "widened" not in str(jaxq.explain(wide, qt, platform="tpu"))


def test_explain_sees_shardings():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    sharding = NamedSharding(mesh, PartitionSpec())
    qt = jax.device_put(weight("int4", "columns", "bfloat16"), sharding)
    plan = jaxq.explain(bfloat16(M, K), qt, platform="tpu")
    assert plan.kernel == "xla"
    assert "4 devices" in plan.why_no_kernel


def test_a_choice_without_a_kernel_has_a_reason():
    p = problem("int4", k=256, n=24, group=64, layout="columns")
    assert kernels.choose(p, "tpu", None)[:2] == ("tpu", None)
    for platform in ("cpu", "rocm"):
        reason = f"there are no kernels for {platform}"
        assert kernels.choose(p, platform, None)[:2] == ("xla", reason)
    assert "shard_map" in kernels.choose(p, "tpu", None, num_devices=4).reason


def test_choose_checks_the_family_and_the_platform():
    p = problem("int4")
    transposed = dataclasses.replace(p, transposed=True)
    assert kernels.choose(p, "gpu", None) == kernels.choose(p, "cuda", None)
    with pytest.raises(ValueError, match="choose: platform"):
        kernels.choose(p, "tpuv5", None)
    with pytest.raises(ValueError, match="choose: family"):
        kernels.choose(p, "tpu", None, family="bogus")
    for family in ("codes", "activation", "attention"):
        message = f"'{family}' does not compute a Problem"
        with pytest.raises(TypeError, match=message):
            kernels.choose(p, "tpu", None, family=family)
    with pytest.raises(TypeError, match="got tuple"):
        kernels.choose((1, 2), "tpu", None)
    with pytest.raises(ValueError, match="transposed=True"):
        kernels.choose(p, "tpu", None, family="transposed")
    assert kernels.choose(transposed, "tpu", None).backend == "tpu_transposed"
    codes = kernels.CodesProblem(1, 16, 128, 256, 128, "int8", 2, 2)
    assert kernels.choose(codes, "tpu", None).backend == "codes_tpu"
    experts = kernels.choose(transposed, "tpu", None, family="ragged")
    assert (experts.backend, experts.preferred) == ("xla", True)
    assert "runs in XLA" in experts.reason


@pytest.mark.parametrize("family", KERNELS)
def test_every_platform_has_a_kernel_of_every_family(family):
    assert set(KERNELS[family]) == set(kernels.PLATFORMS)
    for name in itertools.chain.from_iterable(KERNELS[family].values()):
        arguments = inspect.signature(kernel_module(name).why_not).parameters
        assert list(arguments) == ["problem", "device_kind"]


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_product_that_needs_no_kernel_gives_no_warning(num_devices):
    """XLA multiplies these codes natively, or there is nothing to compute."""
    int8 = problem("int8", group=None, x_dtype="int8")
    one_scale = kernels.CodesProblem(1, 64, 512, 1024, 1024, "float8_e4m3fn", 1, 1)
    for p, family in (
        (int8, "product"),
        (one_scale, "codes"),
        (problem("int4", m=0), "product"),
        (problem("int4", m=0, e=8), "ragged"),
        (dataclasses.replace(one_scale, m=0), "codes"),
    ):
        choice = kernels.choose(p, "cuda", None, num_devices, family=family)
        assert (choice.backend, choice.preferred) == ("xla", True)


def test_a_transposed_weight_has_a_kernel_or_warns():
    def product(y, qt):
        return y @ qt.T

    qt = weight("int4", dtype="bfloat16")
    for platform, kernel in (("tpu", "tpu_custom_call"), ("cuda", "gpu.triton")):
        assert kernel in lowered_for(platform, product, bfloat16(M, N), qt)
    columns = jaxq.relayout(qt, "columns")
    with pytest.warns(kernels.FallbackWarning, match="columns"):
        lowered_for("cuda", product, bfloat16(M, N), columns)


def test_a_derivative_without_a_kernel_does_not_warn():
    """Its forward product warns, or has a kernel."""

    def dx(dy, qt):
        shape = jax.ShapeDtypeStruct((M, K), dy.dtype)
        return jax.linear_transpose(lambda x: x @ qt, shape)(dy)

    columns = weight("int4", "columns", "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", kernels.FallbackWarning)
        text = lowered_for("cuda", dx, bfloat16(M, N), columns)
    assert "gpu.triton" not in text


def test_int8_products_on_a_gpu_are_left_to_xla_without_a_warning():
    def lower(preset):
        qt = weight(preset, dtype="bfloat16").with_activation("int8")
        return lowered_for("cuda", jaxq.matmul, bfloat16(M, K), qt)

    with warnings.catch_warnings():
        warnings.simplefilter("error", kernels.FallbackWarning)
        assert "jaxq_codes_matmul" not in lower("int8")
    with pytest.warns(kernels.FallbackWarning, match="symmetric signed integers"):
        lower("uint4")


@pytest.mark.parametrize(
    ("device", "m", "kernel"),
    [
        ("NVIDIA A100-SXM4-40GB", 64, "triton"),
        ("NVIDIA A100-SXM4-40GB", 65, "xla"),
        ("NVIDIA H200", 65, "mosaic_gpu"),
        ("NVIDIA H200", 512, "xla"),
    ],
)
def test_many_rows_of_a_codebook_are_dense(device, m, kernel):
    """Triton's search is slow, so it is dense from fewer rows. It gives no warning."""
    choice = kernels.choose(problem("codebook4", m=m), "cuda", device)
    assert choice.backend == kernel
    assert choice.preferred == (kernel == "xla")
