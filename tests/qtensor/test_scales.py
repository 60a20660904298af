"""Scales: each rule and each dtype, compared with its definition in float64."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, PerGroup, PerTensor, QuantSpec
from jaxq.qtensor import scale_values
from tests import tables
from tests.qtensor import oracle

# Element formats of the OCP microscaling specification, with the exponent of their
# largest number.
MX = oracle.EMAX


def mx(fmt: str, rule: str) -> QuantSpec:
    return QuantSpec(fmt, PerGroup(32), scale="float8_e8m0fnu", scale_rule=rule)


def blocks_of(largest) -> np.ndarray:
    """`[32, n]`: one block for each number, which is the largest of its block."""
    largest = np.asarray(largest, np.float32)
    x = (
        np.random.default_rng(0).uniform(-1, 1, (32, len(largest))).astype(np.float32)
        * largest
    )
    x[11] = largest * np.where(np.arange(len(largest)) % 2, -1, 1).astype(np.float32)
    return x


def scale_bytes(qt) -> np.ndarray:
    return np.asarray(qt.scale).view(np.uint8).ravel()


def test_floor_scale_bytes():
    x = blocks_of([1, 1.5, 1.99, 2, 6, 448, 0, 3e38])
    qt = jaxq.quantize(x, mx("float4_e2m1fn", "mx_floor"))
    assert scale_bytes(qt).tolist() == [125, 125, 125, 126, 127, 133, 0, 252]


# Numbers next to powers of two, where a logarithm can be off by one.
EDGES = [
    np.nextafter(np.float32(2.0**e), np.float32(np.inf if side > 0 else 0))
    if side
    else np.float32(2.0**e)
    for e in (-60, -7, 0, 1, 5, 100)
    for side in (-1, 0, 1)
]


RULES = [
    (rule, fmt)
    for rule in ("mx_floor", "mx_ceil", "mx_even", "mx_round_up")
    for fmt in MX
]


@pytest.mark.parametrize(
    ("rule", "fmt"),
    tables.thinned(
        RULES,
        [r for r in RULES if r[0] == "mx_even" or r[1] in ("float4_e2m1fn", "int8")],
    ),
)
def test_power_of_two_rules(rule, fmt):
    element = jaxq.formats.get(fmt)
    tops = [
        np.float32(element.max),
        np.nextafter(np.float32(element.max), np.float32(np.inf)),
        1.75,
        7.99,
        3.5,
        29,
    ]
    largest = np.asarray([*EDGES, *tops], np.float32)
    qt = jaxq.quantize(blocks_of(largest), mx(fmt, rule))
    got = scale_bytes(qt).astype(int) - 127
    exact = largest.astype(np.float64)
    if rule == "mx_floor":
        expected = np.floor(np.log2(exact)) - MX[fmt]
    elif rule == "mx_ceil":
        expected = np.ceil(np.log2(exact)) - MX[fmt]
    elif rule == "mx_even":
        # The largest number is first rounded to the mantissa of the element, ties up.
        unit = 2.0 ** (np.floor(np.log2(exact)) - element.mantissa_bits)
        expected = np.floor(np.log2(np.floor(exact / unit + 0.5) * unit)) - MX[fmt]
    else:  # the least power of two with which nothing is clipped
        expected = np.ceil(np.log2(exact / element.max))
        assert np.all(exact / 2.0**expected <= element.max)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("fmt", MX)
def test_microscaling_against_the_specification(fmt):
    random = np.random.default_rng(1)
    x = random.standard_normal((64, 40)).astype(np.float32) * 2.0 ** random.integers(
        -60, 60, (1, 40)
    )
    x = x.astype(np.float32)
    x[:32, 3] = 0
    qt = jaxq.quantize(x, mx(fmt, "mx_floor"))
    blocks = x.T.reshape(40, 2, 32)
    largest = abs(blocks).max(-1)
    shared = (
        np.frexp(largest)[1] - 1 - {**MX, "int8": 0}[fmt]
    )  # int8 elements are code / 64, up to 1.98
    if fmt == "int8":
        elements = (
            np.clip(
                np.rint(64 * np.ldexp(blocks.astype(np.float64), -shared[..., None])),
                -127,
                127,
            )
            / 64
        )
        assert np.all(
            scale_bytes(qt)[largest.ravel() > 0]
            == (shared - 6 + 127).ravel()[largest.ravel() > 0]
        )
    else:
        element = getattr(ml_dtypes, fmt)
        top = float(ml_dtypes.finfo(element).max)
        elements = (
            np.clip(np.ldexp(blocks, -shared[..., None]), -top, top)
            .astype(element)
            .astype(np.float64)
        )
        assert np.all(
            scale_bytes(qt)[largest.ravel() > 0]
            == (shared + 127).ravel()[largest.ravel() > 0]
        )
    values = np.ldexp(elements, shared[..., None]).reshape(40, 64).T
    np.testing.assert_array_equal(jaxq.dequantize(qt), values.astype(np.float32))
    assert len(np.unique(values)) > 100


def test_nvfp4_levels():
    # The block with the tensor's largest number has the largest E4M3 number as its
    # scale. The product of the two levels returns that number.
    x = np.random.default_rng(2).standard_normal((64, 8)).astype(np.float32)
    x[5, 2] = -9
    qt = jaxq.quantize(x, "nvfp4")
    assert qt.scale.scale.tolist() == [[pytest.approx(9 / (448 * 6), rel=1e-6)]]
    block = (
        np.asarray(qt.scale.codes()).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    assert (block[2, 0], block.max(), block.min() > 0) == (448, 448, True)
    np.testing.assert_allclose(jaxq.dequantize(qt)[5, 2], -9, rtol=1e-6)
    ideal = abs(x.T.reshape(8, 4, 16)).max(-1) / 6 / float(qt.scale.scale[0, 0])
    assert np.all(abs(block - ideal) <= ideal * 2.0**-4 + 2.0**-10)


def test_vsq4_levels():
    x = np.random.default_rng(3).standard_normal((64, 8)).astype(np.float32)
    x[16:32, 1] *= np.float32(1e-4)  # its ideal code is 0, which would erase it
    x[:16, 4] = 0
    with pytest.warns(UserWarning, match="1 of 32 scales of w are too small beside"):
        qt = jaxq.quantize(x, "vsq4")
    ideal = abs(x.T.reshape(8, 4, 16)).max(-1) / 7
    channel = ideal.max(1, keepdims=True) / 15
    np.testing.assert_allclose(qt.scale.scale, channel, rtol=1e-6)
    expected = np.where(ideal > 0, np.clip(np.rint(ideal / channel), 1, 15), 0)
    np.testing.assert_array_equal(qt.scale.codes(), expected)
    assert qt.scale.codes()[1, 1] == 1


def test_three_levels():
    spec = QuantSpec(
        "int4",
        PerGroup(8),
        scale=QuantSpec("uint8", PerGroup(2), scale=QuantSpec("uint4")),
    )
    x = np.random.default_rng(4).standard_normal((64, 4)).astype(np.float32)
    qt = jaxq.quantize(x, spec)
    top = np.asarray(qt.scale.scale.scale)  # [4, 1]
    second = np.asarray(qt.scale.scale.codes()) * top  # [4, 4]
    first = np.asarray(qt.scale.codes()) * np.repeat(second, 2, axis=1)  # [4, 8]
    np.testing.assert_allclose(scale_values(qt), first, rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(qt.codes()) * np.repeat(first, 8, axis=1).T,
        jaxq.dequantize(qt),
        rtol=1e-6,
    )
    assert abs(np.asarray(jaxq.dequantize(qt)) - x).max() < 0.2
    assert qt.nbytes == 64 * 4 // 2 + 4 * 8 + 4 * 4 // 2 + 4 * 4


def test_mean_offset_of_scales_keeps_signs():
    # Scales stored about their mean could be read back as negative.
    spec = QuantSpec(
        "nf4",
        PerGroup(64),
        scale=QuantSpec("dynamic8", jaxq.PerFlat(256), offset="mean"),
    )
    random = np.random.default_rng(2)
    x = (random.standard_normal((64, 256)) * random.random((1, 256)) ** 4).astype(
        np.float32
    )
    with pytest.warns(UserWarning, match="of w are too small beside the largest one"):
        qt = jaxq.quantize(x, spec)
    assert qt.scale.offset.shape == (1,)
    np.testing.assert_allclose(qt.scale.offset[0], abs(x).max(0).mean(), rtol=1e-6)
    assert np.asarray(jaxq.dequantize(qt.scale)).min() < 0  # so it can happen here
    assert np.asarray(scale_values(qt)).min() >= 0
    assert not np.any(np.asarray(jaxq.dequantize(qt)) * x < 0)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
    ],
)
def test_scales_are_rounded_into_their_dtype_before_use(dtype):
    x = np.random.default_rng(6).standard_normal((32, 16)).astype(np.float32) * 4
    qt = jaxq.quantize(x, QuantSpec("int4", PerGroup(32), scale=dtype))
    ideal = abs(x).max(0) * np.float32(1 / 7)
    stored = np.asarray(qt.scale)[:, 0]
    assert stored.dtype == dtype
    if dtype != "float32":
        ideal = ideal.astype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(stored.astype(np.float32), ideal.astype(np.float32))
    codes = np.clip(np.rint(x * (np.float32(1) / stored.astype(np.float32))), -7, 7)
    np.testing.assert_array_equal(qt.codes(), codes)


@pytest.mark.filterwarnings("ignore:quantize")
@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [("float16", 2.0**-24), ("float8_e4m3fn", 2.0**-9), ("bfloat16", None)],
)
def test_scales_are_clamped_into_their_dtype(dtype, smallest):
    # A scale below the smallest number of its dtype becomes that number, not 0. A scale
    # above the largest number becomes that number, not infinity.
    x = np.float32([[1e-12, 5e-13], [1e12, -1e12]]).T
    qt = jaxq.quantize(x, QuantSpec("int4", scale=dtype))
    scales = np.asarray(scale_values(qt)).ravel()
    assert np.isfinite(scales).all()
    if smallest is None:
        np.testing.assert_allclose(jaxq.dequantize(qt), x, rtol=0.3)
        return
    assert scales[0] == smallest
    assert scales[1] == float(ml_dtypes.finfo(dtype).max)
    assert jaxq.dequantize(qt)[:, 1].tolist() == [7 * scales[1], -7 * scales[1]]


def test_no_scale_is_subnormal():
    # XLA flushes subnormal numbers: a scale below 2^-126 would mean a division by zero.
    x = np.float32([[2e-38, -1e-38, 0, 1e-44]]).T
    for spec in ("int8", "nf4", "mxfp4", QuantSpec("int8", scale="bfloat16")):
        eager = jaxq.quantize(x, spec)
        scale = np.asarray(scale_values(eager))
        assert np.all((scale == 0) | (scale >= np.float32(2.0**-126)))
        assert np.isfinite(jaxq.dequantize(eager)).all()
        jitted = jax.jit(lambda x, spec=spec: jaxq.quantize(x, spec))(x)
        np.testing.assert_array_equal(eager.codes(), jitted.codes())


def test_absmean_counts_no_padding():
    x = jnp.asarray(np.random.default_rng(7).standard_normal((40, 3)), jnp.float32)
    qt = jaxq.quantize(
        x, QuantSpec("ternary", PerGroup(32, pad=True), scale_rule="absmean")
    )
    expected = np.stack(
        [abs(np.asarray(x[:32])).mean(0), abs(np.asarray(x[32:])).mean(0)], axis=1
    )
    np.testing.assert_allclose(qt.scale, expected, rtol=1e-6)


def test_ternary_weight_networks():
    # Li et al., 2016: a magnitude up to 0.7 of the mean magnitude becomes 0. The scale
    # is the mean of the other magnitudes.
    x = np.random.default_rng(8).standard_normal((100, 6)).astype(np.float32)
    x[:, 2] *= np.float32(1e37)  # sums of these leave float32's range
    x[:, 4] = 0
    spec = QuantSpec("ternary", PerGroup(64, pad=True), scale_rule="twn")
    for qt in (jaxq.quantize(x, spec), jax.jit(lambda x: jaxq.quantize(x, spec))(x)):
        scale = np.asarray(qt.scale)
        for block, rows in enumerate((x[:64], x[64:])):
            magnitude = abs(rows.astype(np.float64))
            above = magnitude > 0.7 * magnitude.mean(0)
            np.testing.assert_array_equal(
                qt.codes()[64 * block :][:64], np.sign(rows) * above
            )
            mean = (magnitude * above).sum(0) / np.maximum(above.sum(0), 1)
            np.testing.assert_allclose(scale[:, block], mean, rtol=1e-6)
    bad = jnp.asarray(x[:, 0]).at[5].set(jnp.nan)
    assert jnp.isnan(
        jaxq.dequantize(
            jaxq.quantize(
                bad, QuantSpec("ternary", scale_rule="twn"), on_nonfinite="propagate"
            )
        )
    ).all()
    with pytest.raises(
        ValueError, match="scale_rule='twn' is for the format ternary, not int4"
    ):
        QuantSpec("int4", scale_rule="twn")


def test_trained_ternary_quantization():
    # Zhu et al., 2017, equations 4 to 7. The gradient of each codebook value is the sum
    # over the numbers with its code.
    x = np.random.default_rng(8).standard_normal((100, 6)).astype(np.float32)
    x[:, 2] *= np.float32(1e37)
    x[:, 4] = 0
    x[:64, 5] = abs(x[:64, 5])  # a block without negative numbers
    spec = QuantSpec("ternary", PerGroup(64, pad=True), scale_rule="ttq")
    for qt in (jaxq.quantize(x, spec), jax.jit(lambda x: jaxq.quantize(x, spec))(x)):
        assert qt.codebook.shape == (6, 2, 3)
        for block, rows in enumerate((x[:64], x[64:])):
            largest = abs(rows).max(0)
            np.testing.assert_array_equal(qt.scale[:, block], largest)
            codes = np.sign(rows) * (
                abs(rows.astype(np.float64)) > 0.05 * largest.astype(np.float64)
            )
            np.testing.assert_array_equal(qt.codes()[64 * block :][:64], codes)
            for sign in (-1, 0, 1):
                count = np.maximum((codes == sign).sum(0), 1)
                mean = (rows / np.where(largest > 0, largest, 1) * (codes == sign)).sum(
                    0
                ) / count
                np.testing.assert_allclose(
                    qt.codebook[:, block, sign + 1], mean * (sign != 0), rtol=1e-5
                )
    assert "ttq" in repr(qt)

    def loss(codebook, values):
        return jnp.sum(
            values(dataclasses.replace(qt, codebook=codebook))
            * jnp.cos(jnp.arange(600.0).reshape(100, 6))
        )

    upstream, codes = np.cos(np.arange(600.0).reshape(100, 6)), np.asarray(qt.codes())
    expected = np.stack(
        [upstream * (codes == sign) * (sign != 0) for sign in (-1, 0, 1)], axis=-1
    )  # [100, 6, 3]
    expected = np.stack([expected[:64].sum(0), expected[64:].sum(0)], axis=1)
    for values in (jaxq.dequantize, lambda qt: jnp.eye(100) @ qt):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(qt.codebook, values)
        unit = np.where(qt.scale == 0, 1, qt.scale)[..., None]
        np.testing.assert_allclose(gradient / unit, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(
        ValueError, match="scale_rule='ttq' is for the format ternary, not int4"
    ):
        QuantSpec("int4", scale_rule="ttq")


@pytest.mark.filterwarnings("ignore:quantize")
def test_bitsandbytes_double_quantization():
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    bnb = pytest.importorskip("bitsandbytes", reason="compares bytes with bitsandbytes")
    random = np.random.default_rng(0)
    w = (
        random.standard_normal((512, 96)) * np.exp(random.standard_normal((1, 96)))
    ).astype(np.float32)
    packed, state = bnb.functional.quantize_4bit(
        torch.from_numpy(w.T.copy()),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
    )
    scales = QuantSpec("dynamic8", jaxq.PerFlat(256), offset="mean")
    spec = QuantSpec(
        "nf4", jaxq.PerFlat(64), packing="high_first", scale=scales, codes_from="ideal"
    )
    qt = jaxq.quantize(w, spec)
    np.testing.assert_array_equal(qt.data, packed.numpy().ravel())
    # bitsandbytes sums the mean in another order. For about one number in a thousand,
    # its 8-bit CPU kernel does not take the nearest entry of the table. So a few codes
    # differ by one.
    np.testing.assert_allclose(qt.scale.offset, [state.offset.item()], rtol=2e-7)
    np.testing.assert_allclose(
        qt.scale.scale.ravel(), state.state2.absmax.numpy(), rtol=1e-6
    )
    moved = np.asarray(qt.scale.codes()).ravel().astype(int) - state.absmax.numpy()
    assert (abs(moved) <= 1).all()
    assert np.mean(moved != 0) < 0.02
    reference = bnb.functional.dequantize_4bit(packed, state).numpy().T
    same = np.repeat(moved == 0, 64).reshape(96, 512).T & (
        np.asarray(scale_values(qt)).repeat(64).reshape(96, 512).T > 0
    )
    np.testing.assert_allclose(
        np.asarray(jaxq.dequantize(qt))[same], reference[same], rtol=1e-5, atol=1e-5
    )
    assert np.mean(same) > 0.9
    stored = jaxq.quantize(w, spec.replace(codes_from="stored"))
    errors = [np.linalg.norm(np.asarray(jaxq.dequantize(q)) - w) for q in (stored, qt)]
    assert errors[0] < errors[1], "codes made for the scale as it reads back fit better"


@pytest.mark.parametrize(
    ("dtype", "magnitude", "lost"),
    [
        ("float16", 1e8, 1),
        ("float16", 1e-6, 1),
        ("float16", 1.0, 0),
        ("float8_e4m3fn", 0.1, 2),
        ("bfloat16", 1e30, 0),
    ],
)
def test_a_warning_counts_clamped_scales(dtype, magnitude, lost):
    w = jnp.asarray([[1.0 if dtype == "float16" else magnitude, magnitude, 0.0]] * 2)
    spec = QuantSpec("int8", PerChannel(), scale=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jaxq.quantize(w, spec, name="layer/kernel")
    assert len(caught) == bool(lost)
    if lost:
        assert str(caught[0].message).startswith(
            f"quantize: {lost} of 3 scales of layer/kernel are outside the range of "
            f"{dtype}"
        )
        assert caught[0].filename == __file__
    # Under jit the scales are unknown, so there is no warning.
    jax.jit(lambda w: jaxq.quantize(w, spec).data)(w)


@pytest.mark.parametrize(
    ("preset", "factor", "num_lost"),
    [
        # float8_e4m3fn: the largest number over the smallest is 448 * 2^9.
        ("nvfp4", 1e-8, 2),
        ("nvfp4", 1e-4, 0),
        ("vsq4", 1e-4, 2),
        ("vsq4", 0.04, 0),
        ("nf4_dq", 1e-9, 1),
        ("nf4_dq", 1e-3, 0),
    ],
)
def test_a_warning_counts_quantized_scales_that_are_too_small(preset, factor, num_lost):
    # Blocks of 16 numbers, and of 64 for nf4_dq; the blocks of zeros lose nothing.
    block = 64 if preset == "nf4_dq" else 16
    w = np.random.default_rng(0).uniform(0.5, 1, (4 * block, 2)).astype(np.float32)
    w[:block, : num_lost or 2] *= np.float32(factor)
    w[block : 2 * block] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qt = jaxq.quantize(w, preset, name="layer/kernel")
        jax.jit(lambda w: jaxq.quantize(w, preset).data)(w)  # no warning under jit
    assert len(caught) == bool(num_lost)
    small = np.asarray(jaxq.dequantize(qt))[:block, : num_lost or 2]
    if not num_lost:
        assert np.abs(small / w[:block, :2] - 1).max() < 0.6
        return
    assert (small == 0).all()
    assert str(caught[0].message).startswith(
        f"quantize: {num_lost} of 8 scales of layer/kernel are too small beside the "
        "largest one"
    )
    assert caught[0].filename == __file__
    # The remedy of the message.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = jaxq.presets()[preset].replace(scale="float32")
        qt = jaxq.quantize(w, spec)
    assert float(jaxq.metrics.sqnr(w[:block], jaxq.dequantize(qt)[:block])) > 15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_offset_is_rounded_down(dtype):
    random = np.random.default_rng(0)
    for center in (100, -100, 0.3, -7.77, 3e4, -3e4):
        x = (center + 0.1 * random.uniform(-1, 1, (64, 2))).astype(np.float32)
        spec = QuantSpec("uint4", PerChannel(), offset="min", scale=dtype)
        qt = jaxq.quantize(x, spec)
        offset = np.asarray(qt.offset).astype(np.float32).ravel()
        assert qt.offset.dtype == dtype
        assert (offset <= x.min(0)).all()
        # It is the nearest number of the dtype that is not above the minimum.
        ulp = float(ml_dtypes.finfo(dtype).eps) * np.abs(x).max()
        assert (x.min(0) - offset < ulp).all()
        if dtype == "float32":
            np.testing.assert_array_equal(offset, x.min(0))
        half_a_step = (x.max(0) - offset) / 15 / 2
        error = np.abs(np.asarray(jaxq.dequantize(qt)) - x).max(0)
        # The scale is rounded too. That changes the largest numbers most.
        slack = 15 * 2 * half_a_step * float(ml_dtypes.finfo(dtype).eps)
        assert (error <= half_a_step * 1.01 + slack + 1e-6 * np.abs(x).max()).all()


@pytest.mark.parametrize("size", [1.0, 3e38])
def test_the_mean_of_a_batch_is_that_of_each_element(size):
    random = np.random.default_rng(0)
    for shape in ((3, 301, 7), (3, 1, 1), (2, 4096, 3)):
        x = np.float32(size) * random.uniform(0.5, 1, shape).astype(np.float32)
        spec = QuantSpec("int8", PerTensor(), offset="mean")
        together = jaxq.quantize(x, spec, contracting=-2, batch=0)
        y = np.asarray(jaxq.dequantize(together), np.float64)
        mean = x.astype(np.float64).mean((1, 2))
        np.testing.assert_allclose(together.offset.ravel(), mean, rtol=1e-6)
        half_a_step = 0.25 * size / 127
        assert np.abs(y - x).max() <= 1.1 * half_a_step
        for i, alone in enumerate(x):
            qt = jaxq.quantize(alone, spec, contracting=-2)
            np.testing.assert_array_equal(qt.offset, together.offset[i])
            np.testing.assert_array_equal(qt.codes(), together.codes()[i])


def test_differences_from_the_mean_are_finite():
    largest = np.finfo(np.float32).max
    x = np.full((200,), -largest, np.float32)
    x[3] = largest  # the mean is close to -largest, and the difference would overflow
    qt = jaxq.quantize(x, QuantSpec("int8", PerTensor(), offset="mean"))
    assert np.isfinite(qt.scale).all()
    np.testing.assert_allclose(jaxq.dequantize(qt), x, rtol=1e-6)
