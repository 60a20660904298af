"""Kernels that quantize activations give the bits of `jaxq.quantize`."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxq
from jaxq import kernels
from jaxq.kernels import _activation_triton
from jaxq.kernels._activation_problem import activation_problem
from jaxq.kernels._quantize_activation import activation_kernel_form
from jaxq.qtensor import row_codes
from tests.kernels.activation_cases import activation_call, rows_of
from tests.tables import thinned

FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")
KERNELS = ("activation_tpu", "activation_triton")
NAN_CODES = {"float8_e4m3fn": (0x7F, 0xFF), "float8_e5m2": (0x7E, 0xFE)}


def assert_same_bits(got, expected: jaxq.QTensor) -> None:
    """Compares codes and scales. The sign of a NaN is not defined, so it may differ."""
    codes, scale = (np.asarray(a) for a in got)
    assert codes.dtype == expected.data.dtype
    assert scale.dtype == expected.scale.dtype
    wanted = np.asarray(expected.data)
    for nan in NAN_CODES.get(expected.meta.spec.fmt.name, ())[1:]:
        codes, wanted = (np.where(c == nan, nan & 0x7F, c) for c in (codes, wanted))
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(
        scale.astype(np.float32), np.asarray(expected.scale).astype(np.float32)
    )


def quantized(x, call) -> jaxq.QTensor:
    return jaxq.quantize(x, call.spec, contracting=(-1,), on_nonfinite="propagate")


CASES = list(
    itertools.product(
        KERNELS,
        FORMATS,
        ("float32", "bfloat16", "float16"),
        (None, 32, 128),
        ("float32", "bfloat16"),
    )
)


@pytest.mark.parametrize(
    ("kernel", "fmt", "dtype", "group", "scale"),
    thinned(
        CASES,
        [
            ("activation_tpu", "int8", "bfloat16", None, "float32"),
            ("activation_tpu", "float8_e4m3fn", "float32", 128, "float32"),
            ("activation_tpu", "float8_e5m2", "float16", 32, "bfloat16"),
            ("activation_triton", "int8", "float16", None, "bfloat16"),
            ("activation_triton", "float8_e4m3fn", "bfloat16", 128, "float32"),
            ("activation_triton", "float8_e5m2", "float32", 32, "bfloat16"),
        ],
    ),
)
def test_kernels_have_the_bits_of_quantize(kernel, fmt, dtype, group, scale):
    """With zeros, NaN, infinities, and rows that fill no tile."""
    shape = (70, 384)
    call, x = activation_call(shape, fmt, group, scale), rows_of(shape, dtype)
    got = activation_kernel_form(x, call=call, kernel=kernel, interpret=True)
    assert_same_bits(got, quantized(x, call))


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_numbers(kernel):
    """The largest, the smallest normal and the smallest subnormal float32 numbers."""
    extremes = np.float32([3.4e38, 2.0**-126, 2.0**-149, 2.0**121, 2.0**-100, 1])
    x = jnp.asarray(extremes[:, None] * np.linspace(-1, 1, 128, dtype=np.float32))
    call = activation_call(x.shape, "int8", None)
    got = activation_kernel_form(x, call=call, kernel=kernel, interpret=True)
    assert_same_bits(got, quantized(x, call))


def test_whole_codes_round_every_half_to_even():
    """Triton has no operation that rounds, so the kernel rounds by integers."""
    spec = activation_call((1, 128), "int8", None).spec
    patterns = np.arange(2**16, dtype=np.uint16)
    numbers = jnp.asarray(patterns.view(np.float16).astype(np.float32))
    halves = jnp.arange(-128, 129, dtype=jnp.float32) + np.float32(0.5)
    for y in (numbers, halves, jnp.nextafter(halves, 0), jnp.nextafter(halves, np.inf)):
        expected = row_codes(y, spec)
        np.testing.assert_array_equal(
            _activation_triton._whole_codes(y, spec), expected
        )


def test_reciprocals_are_rounded_to_nearest():
    """For every mantissa, and from quotients that are off by as much as four."""
    divisor = np.arange(2**23, 2**24, dtype=np.int64)
    nearest = np.rint(2.0**47 / divisor).astype(np.int64)
    remainder = 2**47 - nearest * divisor  # exact in int64
    assert np.all(2 * np.abs(remainder) < divisor)
    correct = jax.jit(_activation_triton.nearest_quotient)
    for off in (-4, -1, 0, 3, 4):
        got = correct(jnp.asarray(nearest + off, jnp.int32), jnp.int32(divisor))
        np.testing.assert_array_equal(got, nearest)
    x = np.float32([1, 256, 2.0**-126, 2.0**120, 3, 0.1, 1.9999999, np.inf, np.nan])
    got = _activation_triton.nearest_reciprocal(jnp.asarray(x))
    expected = np.float32(1 / np.float64(x))
    np.testing.assert_array_equal(got, expected)


# The primitive.


def test_the_primitive_is_quantize_on_a_cpu():
    """Eager, jitted, mapped, and with several contracted axes."""
    x = rows_of((6, 4, 64), "bfloat16")
    call = activation_call(x.shape, "int8", None)

    def quantize(x):
        return kernels.quantize_activation(x, call.spec, call.geometry)

    expected = quantized(x, call)
    for run in (quantize, jax.jit(quantize)):
        qt = run(x)
        assert_same_bits((qt.data, qt.scale), expected)
        assert qt.meta == expected.meta
    inner = activation_call((6, 64), "int8", None)

    def quantize_inner(x):
        return kernels.quantize_activation(x, inner.spec, inner.geometry)

    mapped = jax.jit(jax.vmap(quantize_inner, in_axes=1))(x)
    expected = jax.vmap(lambda x: quantized(x, inner), in_axes=1)(x)
    assert_same_bits((mapped.data, mapped.scale), expected)


def test_the_primitive_has_no_gradient():
    call = activation_call((2, 32), "int8", None)

    def total(x):
        return kernels.quantize_activation(x, call.spec, call.geometry).scale.sum()

    with pytest.raises(TypeError, match="quantize has no gradient"):
        jax.grad(total)(jnp.ones((2, 32)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "int4"}, "codes of"),
        ({"symmetric": False}, "no zero points"),
        ({"scale_rule": "absmean"}, "largest magnitude"),
        ({"rounding": "stochastic"}, "nearest even"),
        ({"headroom": 1.1}, "headroom"),
        ({"codes_from": "ideal"}, "stored scale"),
        ({"scale": "float8_e4m3fn"}, "stores scales"),
        ({"granularity": jaxq.PerTensor()}, "blocks cross rows"),
        ({"granularity": jaxq.PerBlock((2, 128))}, "blocks cross rows"),
        ({"granularity": jaxq.PerGroup(100, pad=True)}, "not full"),
    ],
)
def test_other_specs_have_a_reason(changes, reason):
    spec = jaxq.QuantSpec("int8", jaxq.PerToken()).replace(**changes)
    x = jnp.ones((8, 256))
    key = jax.random.key(0) if spec.needs_key else None
    geometry = jaxq.quantize(x, spec, contracting=(-1,), key=key).meta.geometry
    assert reason in str(activation_problem(x.shape, "float32", spec, geometry))


def test_other_axes_have_a_reason():
    spec = jaxq.QuantSpec("int8", jaxq.PerChannel())
    geometry = jaxq.quantize(jnp.ones((8, 256)), spec).meta.geometry  # contracts -2
    assert "last axes" in str(activation_problem((8, 256), "float32", spec, geometry))


@pytest.mark.parametrize("shape", [(0, 256), (8, 0)])
def test_nothing_to_compute_needs_no_kernel(shape):
    spec = jaxq.QuantSpec("int8", jaxq.PerToken())
    x = jnp.ones(shape)
    geometry = jaxq.quantize(x, spec, contracting=-1).meta.geometry
    problem = activation_problem(shape, "float32", spec, geometry)
    choice = kernels.choose(problem, "tpu", None, family="activation")
    assert choice == ("xla", "there is nothing to compute", True, "")


@pytest.mark.parametrize(
    ("platform", "k", "group", "scale", "reason"),
    [
        ("tpu", 1000, None, "float32", "multiple of 128"),
        ("tpu", 960, 192, "float32", "multiple of 128"),
        ("tpu", 768, 192, "float32", "divide 128"),
        ("tpu", 128 * 1024, None, "float32", "VMEM"),
        ("tpu", 256, None, "float16", "no float16"),
        ("cuda", 128 * 1024, None, "float32", "registers"),
        ("cpu", 256, None, "float32", "no kernels for cpu"),
    ],
)
def test_other_shapes_have_a_reason(platform, k, group, scale, reason):
    call = activation_call((64, k), "int8", group, scale)
    problem = activation_problem((64, k), "bfloat16", call.spec, call.geometry)
    choice = kernels.choose(problem, platform, None, family="activation")
    assert choice.backend == "xla"
    assert reason in choice.reason


# Products.


def product(fmt: str, granularity: jaxq.qtensor.Granularity, m: int = 16, k: int = 256):
    """x and a weight with dynamic activation quantization."""
    w = jaxq.quantize(jnp.ones((k, 128), jnp.bfloat16), jaxq.QuantSpec(fmt))
    spec = jaxq.QuantSpec(fmt, granularity)
    x = jax.ShapeDtypeStruct((2, m, k), jnp.bfloat16)
    return x, w.with_activation(spec)


def lowered_text(platform: str, x, w) -> str:
    dot = jax.jit(lambda x, w: x @ w)
    return dot.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("granularity", [jaxq.PerToken(), jaxq.PerGroup(128)], ids=str)
def test_one_launch_quantizes_an_activation(platform, fmt, granularity):
    """The program outside of kernels has no operation of a quantization."""
    text = lowered_text(platform, *product(fmt, granularity))
    call = "tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton"
    names = re.findall(r"custom_call @(\S+?)\(", text)
    assert call in names, names
    assert text.count("jaxq_quantize_activation") >= 1
    for operation in ("divide", "round_nearest_even", "maximum", "is_finite", "abs"):
        assert f"stablehlo.{operation} " not in text, operation
    # Groups leave one sum over groups. There is no maximum of magnitudes.
    assert "stablehlo.max" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_explain_names_the_kernel(platform):
    x, w = product("int8", jaxq.PerToken())
    plan = jaxq.explain(x, w, platform=platform)
    name = {"tpu": "activation_tpu", "cuda": "activation_triton"}[platform]
    assert plan.activation_kernel == name
    assert plan.why_no_activation_kernel is None
    assert f"the {name} kernel quantizes the activation" in str(plan)


def test_explain_gives_the_reason_without_a_kernel():
    x, w = product("int8", jaxq.PerToken(), k=200)
    plan = jaxq.explain(x, w, platform="tpu")
    assert plan.activation_kernel == "xla"
    assert "multiple of 128" in str(plan)
    assert jaxq.explain(x, w, platform="cpu").activation_kernel == "xla"
    bare = jaxq.explain(x, w.with_activation(None), platform="tpu")
    assert bare.activation_kernel is None
    static = w.with_activation("int8", bounds=(-1, 1))
    assert "static range" in str(jaxq.explain(x, static, platform="tpu"))


def test_a_missing_kernel_warns():
    x, w = product("float8_e4m3fn", jaxq.PerToken(), k=200)
    with pytest.warns(kernels.FallbackWarning, match="multiple of 128"):
        lowered_text("tpu", x, w)


def test_a_program_for_two_platforms():
    """A kernel for one of them, and plain XLA for the other."""
    x, w = product("float8_e4m3fn", jaxq.PerToken())
    dot = jax.jit(lambda x, w: x @ w)
    text = dot.trace(x, w).lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert "jaxq_quantize_activation" in text
    assert "stablehlo.divide" in text


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_sharded_rows_have_the_same_bits():
    mesh = jax.make_mesh((2,), ("d",))
    x = rows_of((8, 64), "float32")
    call = activation_call(x.shape, "int8", None)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))

    @jax.jit
    def quantize(x):
        return kernels.quantize_activation(x, call.spec, call.geometry)

    qt = quantize(sharded)
    assert_same_bits((qt.data, qt.scale), quantized(x, call))
