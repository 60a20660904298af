"""Products of codes with scales in groups: kernels, XLA form, primitive, products."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import kernels
from jaxq.kernels import _codes_product, _codes_triton
from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._rows import leaf_names
from jaxq.ops._weight_rows import weight_rows
from tests.arrays import normal_with_outliers
from tests.kernels.problems import error
from tests.kernels.products import lowered_for
from tests.tables import thinned

KERNELS = ("codes_tpu", "codes_triton")
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8")


def operands(fmt: str, m: int, n: int, k: int, groups: tuple, seed: int = 0):
    """Two quantized operands `[m, k]` and `[n, k]`, and their product in float64.

    `groups` has the granularity of each.
    """
    rng = np.random.default_rng(seed)
    qts = []
    for rows, granularity in zip((m, n), groups, strict=True):
        x = jnp.asarray(rng.normal(size=(rows, k)), jnp.float32)
        spec = jaxq.QuantSpec(fmt, granularity)
        qts.append(jaxq.quantize(x, spec, contracting=-1))
    return qts, decoded(qts[0]) @ decoded(qts[1]).T


def decoded(qt: jaxq.QTensor) -> np.ndarray:
    """The numbers in float64, by ml_dtypes and numpy."""
    codes = np.asarray(qt.data)
    if qt.spec.fmt.name != "int8":
        codes = codes.view(getattr(ml_dtypes, qt.spec.fmt.name))
    scale = np.asarray(qt.scale, np.float64)
    for axis, size in enumerate(codes.shape):
        scale = np.repeat(scale, -(-size // scale.shape[axis]), axis)
    return codes.astype(np.float64) * scale


def call_of(a: jaxq.QTensor, b: jaxq.QTensor):
    """The static call of a product, and its leaves with a leading axis."""
    (a_rows, a_meta), (b_rows, b_meta) = weight_rows(a), weight_rows(b)
    names = [leaf_names(rows) for rows in (a_rows, b_rows)]
    call = _codes_product.CodesCall(a_meta, names[0], b_meta, names[1])
    leaves = [leaf[None] for leaf in (*a_rows, *b_rows) if leaf is not None]
    return call, leaves


GROUPS = {
    "groups": (jaxq.PerGroup(128), jaxq.PerGroup(128)),
    "blocks": (jaxq.PerGroup(128), jaxq.PerBlock((128, 128))),
    "one scale of a row": (jaxq.PerToken(), jaxq.PerGroup(128)),
    "one scale of b": (jaxq.PerGroup(128), jaxq.PerTensor()),
    "long groups": (jaxq.PerGroup(256), jaxq.PerGroup(256)),
}
CASES = list(itertools.product(KERNELS, FORMATS, GROUPS))


@pytest.mark.parametrize(
    ("kernel", "fmt", "groups"),
    thinned(
        CASES,
        [
            ("codes_tpu", "float8_e4m3fn", "blocks"),
            ("codes_tpu", "int8", "one scale of a row"),
            ("codes_triton", "float8_e4m3fn", "blocks"),
            ("codes_triton", "float8_e5m2", "one scale of b"),
        ],
    ),
)
def test_kernels_against_float64(kernel, fmt, groups):
    """Several steps along k, and rows and columns that fill no tile."""
    (a, b), expected = operands(fmt, 20, 256, 2048, GROUPS[groups])
    call, leaves = call_of(a, b)
    tiles = {"bk": 1024} if kernel == "codes_tpu" and "long" not in groups else {}
    y = _codes_product.codes_kernel_form(
        *leaves, call=call, kernel=kernel, interpret=True, **tiles
    )
    assert y.dtype == jnp.float32
    assert error(y[0], expected) < 1e-6
    xla = _codes_product.codes_xla_form(*leaves, call=call)
    assert error(xla[0], expected) < 1e-6


def test_an_accelerator_bounds_the_partial_sums():
    """The float32 sums of all groups together would need 8 times the memory."""
    (a, b), expected = operands("int8", 256, 256, 1024, GROUPS["groups"])
    call, leaves = call_of(a, b)
    all_groups = 8 * 256 * 256 * 4

    def compiled(block_bytes):
        meta = dataclasses.replace(call.b_meta, block_bytes=block_bytes)
        form = dataclasses.replace(call, b_meta=meta)
        return (
            jax.jit(lambda *leaves: _codes_product.codes_xla_form(*leaves, call=form))
            .lower(*leaves)
            .compile()
        )

    small, large = compiled(8 * 256 * 256), compiled(2**40)
    assert large.memory_analysis().temp_size_in_bytes >= all_groups
    assert small.memory_analysis().temp_size_in_bytes < all_groups
    for program in (small, large):
        assert error(program(*leaves)[0], expected) < 1e-6


INT4_CASES = list(itertools.product(KERNELS, FORMATS, (64, 128, 256)))


@pytest.mark.parametrize(
    ("kernel", "fmt", "group"),
    thinned(
        [case for case in INT4_CASES if case[0] != "codes_tpu" or case[2] != 64],
        [("codes_tpu", "float8_e4m3fn", 128), ("codes_triton", "float8_e5m2", 256)],
    ),
)
def test_int4_weights_in_groups(kernel, fmt, group):
    """The kernel unpacks the codes of b. They are exact in float8 and in int8."""
    (a, _), _ = operands(fmt, 20, 200, 512, (jaxq.PerGroup(group),) * 2)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(512, 200)), jnp.float32)
    b = jaxq.quantize(w, jaxq.QuantSpec("int4", jaxq.PerGroup(group)))
    expected = decoded(a) @ np.asarray(jaxq.dequantize(b), np.float64)
    call, leaves = call_of(a, b)
    y = _codes_product.codes_kernel_form(
        *leaves, call=call, kernel=kernel, interpret=True
    )
    assert error(y[0], expected) < 1e-6
    for block_bytes in (None, 2**28):  # on a CPU and on an accelerator
        meta = dataclasses.replace(call.b_meta, block_bytes=block_bytes)
        form = dataclasses.replace(call, b_meta=meta)
        xla = _codes_product.codes_xla_form(*leaves, call=form)
        assert error(xla[0], expected) < 1e-6


@pytest.mark.parametrize(
    ("changes", "platform", "device", "reason"),
    [
        ({"codes": "float8_e4m3fnuz"}, "tpu", None, "reads int8"),
        ({"codes": "float8_e4m3fnuz"}, "cuda", None, "reads int8"),
        ({"group": 64}, "tpu", None, "multiple of 128"),
        ({"group": 16}, "cuda", None, "multiple of 32"),
        ({"group": 32, "b_codes": "int4"}, "cuda", None, "multiple of 64 int4"),
        ({"k": 128 * 401}, "tpu", None, "VMEM"),
        ({}, "cuda", "NVIDIA A100-SXM4-80GB", "no float8"),
        ({}, "cpu", None, "no kernels for cpu"),
    ],
)
def test_other_problems_have_a_reason(changes, platform, device, reason):
    problem = CodesProblem(1, 64, 512, 1024, 128, "float8_e4m3fn", 8, 8)
    problem = dataclasses.replace(problem, **changes)
    choice = kernels.choose(problem, platform, device, family="codes")
    assert choice.backend == "xla"
    assert reason in choice.reason


@pytest.mark.parametrize(
    "device", ["NVIDIA H200", "NVIDIA L4", "NVIDIA B200", "NVIDIA GeForce RTX 4090"]
)
def test_gpus_with_float8(device):
    problem = CodesProblem(1, 64, 512, 1024, 128, "float8_e4m3fn", 8, 8)
    assert _codes_triton.why_not(problem, device) is None


# Products.


def block_scaled(m: int = 16, n: int = 256, k: int = 512, batch: tuple = ()):
    """x, and float8 weights `[k, n]` in blocks of 128 x 128, as in DeepSeek-V3."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(*batch, k, n)), jnp.bfloat16)
    spec = jaxq.QuantSpec("float8_e4m3fn", jaxq.PerBlock((128, 128)))
    axes = tuple(range(len(batch)))
    qt = jaxq.quantize(w, spec, contracting=-2, batch=axes)
    activation = jaxq.QuantSpec("float8_e4m3fn", jaxq.PerGroup(128))
    x = jnp.asarray(rng.normal(size=(*batch, m, k)), jnp.bfloat16)
    return x, qt.with_activation(activation)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_block_scaled_product_is_two_kernels(platform):
    x, w = block_scaled()
    name = {"tpu": "codes_tpu", "cuda": "codes_triton"}[platform]
    assert jaxq.explain(x, w, platform=platform).kernel == name
    dot = jax.jit(lambda x, w: x @ w)
    text = dot.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert "jaxq_quantize_activation" in text
    assert "jaxq_codes_matmul" in text
    assert "stablehlo.dot_general" not in text


def int4_with_groups(fmt: str = "float8_e4m3fn", weight="int4", size: int = 128):
    """x, and weights `[k, n]` in groups, whose activations are in groups as well."""
    x, _ = block_scaled()
    w = jaxq.quantize(normal_with_outliers(512, 256, dtype="bfloat16"), weight)
    return x, w.with_activation(jaxq.QuantSpec(fmt, jaxq.PerGroup(size)))


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_int4_in_groups_is_two_kernels(platform, fmt):
    x, w = int4_with_groups(fmt)
    name = {"tpu": "codes_tpu", "cuda": "codes_triton"}[platform]
    assert jaxq.explain(x, w, platform=platform).kernel == name
    swapped = jaxq.explain(w.T, x.T, platform=platform)
    assert swapped.kernel == name
    text = lowered_for(platform, jaxq.matmul, x, w)
    assert "jaxq_quantize_activation" in text
    assert "jaxq_codes_matmul" in text
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(
    ("weight", "size"),
    [("int4", 128), ("uint4", 128), ("mxfp4", 32), ("int4", 512)],
)
def test_narrow_weights_in_groups_against_float64(weight, size):
    x, w = int4_with_groups(weight=weight, size=size)
    x8 = jaxq.quantize(x, w.meta.activation, contracting=-1)
    expected = np.asarray(jaxq.dequantize(x8, dtype=jnp.float32), np.float64) @ (
        np.asarray(jaxq.dequantize(w, dtype=jnp.float32), np.float64)
    )
    assert jaxq.explain(x, w).path == "codes"
    dims = (((1,), (0,)), ((), ()))
    y = jaxq.dot_general(x, w, dims, preferred_element_type=jnp.float32)
    assert error(y, expected) < 1e-6
    y = jaxq.dot_general(w.T, x.T, dims, preferred_element_type=jnp.float32)
    assert error(y, expected.T) < 1e-6


def test_groups_without_a_kernel_warn():
    x, w = int4_with_groups(weight="mxfp4", size=32)
    assert "not float8_e4m3fn by float4" in str(jaxq.explain(x, w, platform="cuda"))
    with pytest.warns(kernels.FallbackWarning, match="by float4_e2m1fn"):
        text = lowered_for("cuda", jaxq.matmul, x, w)
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all(line.count("f8E4M3FN") == 2 for line in dots)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "int8"])
def test_int4_with_one_scale_and_activations_in_groups_has_a_remedy(fmt, platform):
    x, _ = int4_with_groups(fmt)
    spec = jaxq.QuantSpec("int4", jaxq.PerChannel())
    _, w = int4_with_groups(fmt, weight=spec)
    remedy = r"quantize the weight in the same groups, with PerGroup\(128\)"
    with pytest.warns(kernels.FallbackWarning, match=remedy):
        lowered_for(platform, jaxq.matmul, x, w)
    plan = jaxq.explain(x, w, platform=platform)
    assert "PerGroup(128)" in plan.why_no_kernel


def test_kernels_do_not_overflow_int32():
    granularities = (jaxq.PerToken(), jaxq.PerToken())
    (a, b), _ = operands("int8", 1, 1, 2**17, granularities)
    call, leaves = call_of(a, b)
    assert "int32 can sum 131071 products" in str(call.problem(leaves))


def test_a_block_scaled_product_on_a_cpu():
    x, w = block_scaled()
    x8 = jaxq.quantize(x, w.meta.activation, contracting=-1)
    expected = np.asarray(jaxq.dequantize(x8, dtype=jnp.float32), np.float64) @ (
        np.asarray(jaxq.dequantize(w, dtype=jnp.float32), np.float64)
    )
    dims = (((1,), (0,)), ((), ()))
    y = jaxq.dot_general(x, w, dims, preferred_element_type=jnp.float32)
    assert error(y, expected) < 1e-6


def test_stacked_products_and_gradients():
    """vmap joins the stack, and scales of both operands have derivatives."""
    x, w = block_scaled(batch=(3,))
    y = x @ w
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        np.testing.assert_allclose(y[i], x[i] @ one, rtol=1e-2, atol=1e-2)
    (a, b), _ = operands("int8", 4, 8, 256, GROUPS["groups"])

    def total(a_scale, b_scale):
        lhs = dataclasses.replace(a, scale=a_scale)
        rhs = dataclasses.replace(b, scale=b_scale)
        return jaxq.dot_general(lhs, rhs, (((1,), (1,)), ((), ()))).sum()

    def total_of_floats(a_scale, b_scale):
        lhs = dataclasses.replace(a, scale=a_scale)
        rhs = dataclasses.replace(b, scale=b_scale)
        return (jaxq.dequantize(lhs) @ jaxq.dequantize(rhs).T).sum()

    got = jax.grad(total, (0, 1))(a.scale, b.scale)
    expected = jax.grad(total_of_floats, (0, 1))(a.scale, b.scale)
    for gradient, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-2)


def test_a_missing_kernel_warns_and_a_native_product_does_not():
    x, _ = block_scaled()
    spec = jaxq.QuantSpec("float8_e4m3fn", jaxq.PerGroup(64))
    grouped = jaxq.quantize(jnp.ones((512, 256), jnp.bfloat16), spec)
    dot = jax.jit(lambda x, w: x @ w)
    with pytest.warns(kernels.FallbackWarning, match="multiple of 128"):
        dot.trace(x, grouped.with_activation(spec)).lower(lowering_platforms=("tpu",))
    native = jaxq.quantize(jnp.ones((512, 256), jnp.bfloat16), "fp8")
    dot.trace(x, native.with_activation("fp8")).lower(lowering_platforms=("tpu",))
    plan = jaxq.explain(x, native.with_activation("fp8"), platform="tpu")
    assert "natively" in str(plan)
