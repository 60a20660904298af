"""quantize and dequantize.

Compared with numpy to the bit, and with other libraries. Properties. Hard inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxq
from jaxq import (
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    formats,
)
from jaxq.qtensor import scale_values
from tests import tables
from tests.arrays import assert_same
from tests.qtensor import oracle

PRESETS = tuple(jaxq.presets())
# The shape of the contract table, so that each preset is compiled once for both.
SHAPE = (100, 64)
over_presets = pytest.mark.parametrize("preset", PRESETS)


@functools.partial(jax.jit, static_argnames="preset")
def compiled(x, preset):
    qt = jaxq.quantize(x, preset)
    return qt, jaxq.dequantize(qt)


def uneven_columns(seed: int = 0, shape=SHAPE) -> np.ndarray:
    """Normal numbers; columns differ in magnitude, and column 3 is zero."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * np.exp(random.standard_normal((1, *shape[1:])))
    x[..., 3] = 0
    return x.astype(np.float32)


# Compared with numpy.


# Scale rules that compute a sum.
SUMMED = ("absmean", "ttq")


def assert_equals_oracle(qt, values, x, spec):
    reference = oracle.quantize(np.asarray(x, np.float32).T, spec)
    got = np.asarray(scale_values(qt)).ravel()
    if spec.scale_rule in SUMMED:  # numpy sums in another order
        np.testing.assert_allclose(got, reference.scale, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(values).T, reference.values, rtol=1e-6)
    else:
        assert_same(got, reference.scale + np.float32(0))  # + 0 turns -0 into 0
        expected = reference.values.astype(x.dtype)
        np.testing.assert_array_equal(
            np.asarray(values, np.float32).T, expected.astype(np.float32)
        )
    codes = np.asarray(qt.codes()).T
    if spec.fmt.kind == "float":  # -0 and 0 are two codes for one value
        codes, zero = codes.astype(np.int32), 1 << (spec.fmt.bits - 1)
        same = (codes == reference.codes) | (codes % zero + reference.codes % zero == 0)
        assert same.all()
    else:
        np.testing.assert_array_equal(codes, reference.codes)
    assert (qt.zero_point is None) == (reference.zero_point is None)
    if reference.zero_point is not None:
        np.testing.assert_array_equal(
            np.asarray(qt.zero_point).ravel(), reference.zero_point
        )


@over_presets
def test_equals_numpy_to_the_bit(preset):
    x = uneven_columns()
    assert_equals_oracle(*compiled(x, preset), x, jaxq.presets()[preset])


INTEGERS = [
    (name, symmetric, dtype)
    for name in ("int8", "int4", "uint8", "uint4")
    for symmetric in (True, False)
    for dtype in ("float32", "bfloat16", "float16")
]
NARROW = [
    ("int8", False, "bfloat16"),
    ("int4", True, "float16"),
    ("uint8", False, "float16"),
]
NARROW += [("uint4", False, "bfloat16")]


@pytest.mark.parametrize(
    ("name", "symmetric", "dtype"),
    tables.thinned(INTEGERS, [c for c in INTEGERS if c[2] == "float32"] + NARROW),
)
def test_integers_equal_numpy_to_the_bit(name, symmetric, dtype):
    if symmetric and name.startswith("u"):
        spec = QuantSpec(name)
        with pytest.raises(
            ValueError,
            match=f"{name} has no negative numbers.*symmetric=False or offset='min'",
        ):
            jaxq.quantize(jnp.ones(SHAPE), spec)
        return
    if name.endswith("8"):
        spec = QuantSpec(name, PerChannel(), symmetric=symmetric)
    else:
        spec = QuantSpec(
            name, PerGroup(32, pad=True), symmetric=symmetric, scale="bfloat16"
        )
    x = uneven_columns(1).astype(getattr(ml_dtypes, dtype, dtype))
    qt, values = compiled(x, spec)
    assert qt.dtype == x.dtype
    assert_equals_oracle(qt, values, x, spec)


def test_a_worked_example_of_integers():
    # The scale is 1: ties go to even, a symmetric spec does not use -8, and 0 stays 0.
    x = np.float32([[7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -3.5, 0.0]]).T
    qt = jaxq.quantize(x, QuantSpec("int4"))
    assert qt.codes().ravel().tolist() == [7, -7, 0, 2, 2, 0, -4, 0]
    assert qt.scale.ravel().tolist() == [1]
    # Jacob et al., 2018: range [-1, 3], step 4/255, zero point -128 + 64.
    x = np.float32([-1, -0.5, 0, 0.3, 1.27, 2, 3])
    qt = jaxq.quantize(x, QuantSpec("int8", symmetric=False))
    assert qt.zero_point.tolist() == [-64]
    assert qt.codes().tolist() == [-128, -96, -64, -45, 17, 63, 127]
    assert qt.scale.tolist() == pytest.approx([4 / 255])


def test_nf4_bytes_follow_its_definition():
    # A value on a midpoint gets the lower code. Blocks of 64 run over the flattened
    # [out, in] weight.
    spec = QuantSpec("nf4", PerFlat(64), packing="high_first")
    w = uneven_columns(2, (48, 20))
    w[5] = 0
    qt = jaxq.quantize(w, spec)
    flat = w.T.reshape(-1, 64)
    absmax = abs(flat).max(1)
    y = flat * (np.float32(1) / absmax)[:, None]
    middle = (oracle.NF4[1:] + oracle.NF4[:-1]) / np.float32(2)
    codes = (y[..., None] > middle).sum(-1).astype(np.uint8).ravel()
    np.testing.assert_array_equal(qt.data, codes[::2] << 4 | codes[1::2])
    np.testing.assert_array_equal(qt.scale, absmax)
    tie = np.float32([1.0, *middle])
    assert jaxq.quantize(tie, "nf4").codes().tolist() == [15, *range(15)]


STEPS = ((np.arange(256) * 37) % 101 - 50) / 16
# Bytes that bitsandbytes 0.50 wrote.
BITSANDBYTES = {
    "nf4, a line": (
        "nf4",
        np.linspace(-1, 1, 64),
        "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff",
    ),
    "nf4": (
        "nf4",
        STEPS,
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1",
    ),
    "fp4": (
        "float4_bitsandbytes",
        STEPS,
        "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5b",
    ),
}


@pytest.mark.parametrize(
    ("fmt", "x", "expected"), BITSANDBYTES.values(), ids=BITSANDBYTES
)
def test_stored_bytes_of_bitsandbytes(fmt, x, expected):
    qt = jaxq.quantize(
        x.astype(np.float32), QuantSpec(fmt, PerFlat(64), packing="high_first")
    )
    written = np.asarray(qt.data).tobytes().hex()[: len(expected)]
    if fmt == "float4_bitsandbytes":  # bitsandbytes writes -0 as 8, jaxq writes 0
        expected = "".join(
            "0" if a == "0" and b == "8" else b
            for a, b in zip(written, expected, strict=True)
        )
    assert written == expected
    if len(x) == 256:
        assert np.asarray(qt.scale).tolist() == [3.125] * 4


def test_nf4_bytes_equal_bitsandbytes():
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    bnb = pytest.importorskip("bitsandbytes", reason="compares bytes with bitsandbytes")
    w = uneven_columns(3, (128, 20))
    packed, state = bnb.functional.quantize_4bit(
        torch.from_numpy(w.T.copy()), blocksize=64, quant_type="nf4"
    )
    qt = jaxq.quantize(w, QuantSpec("nf4", PerFlat(64), packing="high_first"))
    np.testing.assert_array_equal(qt.data, packed.numpy().ravel())
    np.testing.assert_array_equal(qt.scale, state.absmax.numpy())
    reference = bnb.functional.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_array_equal(jaxq.dequantize(qt), reference)


def test_signed_extreme_is_gguf_q4_0():
    gguf = pytest.importorskip("gguf", reason="compares scales with the gguf package")
    spec = QuantSpec("int4", PerGroup(32), scale="float16", scale_rule="signed_extreme")
    rows = uneven_columns(4, (96, 8)).T.copy()
    rows[3] = 1e-3
    rows[3, 0] = -2e-3
    reference = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    scale = reference.reshape(8, 3, 18)[..., :2].copy().view(np.float16)[..., 0]
    qt = jaxq.quantize(rows.T, spec)
    assert qt.scale.dtype == jnp.float16
    np.testing.assert_array_equal(qt.scale, scale)
    # GGUF computes trunc(x / d + 8.5) with the scale before it is rounded. jaxq rounds
    # to nearest with the stored scale.
    signed = np.repeat(scale.astype(np.float32), 32, axis=1)
    step = abs(signed)
    actual = np.asarray(jaxq.dequantize(qt)).T
    values = gguf.quants.dequantize(reference, gguf.GGMLQuantizationType.Q4_0)
    assert np.all(abs(actual - values) <= step * 1.001)
    assert np.mean(actual == values) > 0.99
    y = rows / np.where(step, signed, 1)
    inside = (y >= -8.5) & (y <= 7.5)
    assert inside.mean() > 0.9
    assert np.all(abs(actual - rows)[inside] <= 0.5 * step[inside] * 1.001)


# Properties.


@pytest.mark.parametrize("exponent", [-60, -7, 40])
@over_presets
def test_scaling_by_a_power_of_two_scales_the_result(preset, exponent):
    x, factor = uneven_columns(5), np.float32(2.0**exponent)
    qt, values = compiled(x, preset)
    scaled, scaled_values = compiled(x * factor, preset)
    np.testing.assert_array_equal(scaled.codes(), qt.codes())
    scale = np.asarray(scale_values(qt))
    # E8M0 stores the scale of a block of zeros as 2^-127.
    is_zero = abs(scale) <= 2.0**-126
    np.testing.assert_array_equal(
        scale_values(scaled), np.where(is_zero, scale, scale * factor)
    )
    np.testing.assert_array_equal(scaled_values, np.asarray(values) * factor)


# These presets are not idempotent. With a rounded zero point, codes need not reach both
# ends of the range again (int2, uint4, uint8). The mean changes by rounding (ternary).
# A block whose integer scale was rounded up need not reach its largest code, so its
# scale is smaller the next time (vsq4).
NOT_IDEMPOTENT = {"int2", "uint4", "uint8", "ternary", "vsq4"}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - NOT_IDEMPOTENT))
def test_quantizing_again_changes_nothing(preset):
    qt, values = compiled(uneven_columns(6), preset)
    again, values_again = compiled(np.asarray(values), preset)
    changed = qt.codes() != again.codes()
    if qt.spec.fmt.kind == "float":
        changed &= np.asarray(values) != np.asarray(values_again)  # -0 became 0
    assert not np.any(changed)
    # The largest number of a block is max * scale, rounded. So the second scale may
    # differ in its last bit.
    np.testing.assert_allclose(values_again, values, rtol=1e-6)


@over_presets
def test_permuting_the_kept_axis_permutes_the_result(preset):
    x, order = uneven_columns(7), np.random.default_rng(0).permutation(SHAPE[1])
    _, values = compiled(x, preset)
    _, permuted = compiled(x[:, order], preset)
    summed = jaxq.presets()[preset].scale_rule == "ttq"  # along the permuted axis
    np.testing.assert_allclose(
        permuted, np.asarray(values)[:, order], rtol=1e-6 if summed else 0
    )


@over_presets
def test_order_is_kept_inside_a_block(preset):
    x = np.sort(uneven_columns(8), axis=0)
    qt, values = compiled(x, preset)
    size = getattr(qt.spec.granularity, "size", len(x))
    for start in range(0, len(x), size):
        assert np.all(np.diff(values[start : start + size], axis=0) >= 0)
    assert len(np.unique(np.asarray(values))) > 2


FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
BOUNDED = {
    "symmetric": (QuantSpec("int8"), 0.5),
    "asymmetric": (QuantSpec("uint4", symmetric=False), 0.5),
    "real minimum": (QuantSpec("uint8", offset="min"), 0.5),
    "bfloat16 scale": (QuantSpec("int4", scale="bfloat16"), 0.5),
    "nf4": (QuantSpec("nf4"), 0.1519036),  # half the widest gap of the table
    "e4m3": (QuantSpec("float8_e4m3fn"), 16.0),
}


@functools.partial(jax.jit, static_argnames="spec")
def round_trip(x, spec):
    qt = jaxq.quantize(x, spec)
    return jaxq.dequantize(qt), scale_values(qt)


@pytest.mark.parametrize("name", BOUNDED)
@given(st.lists(FINITE, min_size=16, max_size=16))
def test_error_is_at_most_half_a_step(name, numbers):
    spec, half = BOUNDED[name]
    x = np.array(numbers, np.float32)
    values, scale = (np.asarray(v, np.float64) for v in round_trip(x, spec))
    largest = abs(x.astype(np.float64)).max()
    # A zero point or a rounded scale can leave up to half a step at the ends of the
    # range uncovered.
    if not spec.symmetric:
        half = 1.0
    elif spec.scale == "bfloat16":
        half += 7 * 2.0**-8
    smallest = 2.0**-126 * 8  # XLA flushes subnormal float32 numbers
    assert np.all(abs(values - x) <= half * scale + 1e-6 * largest + smallest)
    steps = {
        "asymmetric": 15,
        "real minimum": 255,
        "nf4": 1,
        "bfloat16 scale": 7,
        "e4m3": 448,
        "symmetric": 127,
    }[name]
    assert np.all(scale <= 2 * largest / steps * (1 + 2.0**-8) + smallest)


def test_stochastic_rounding_needs_a_key_and_has_no_bias():
    spec = QuantSpec("int8", rounding="stochastic")
    x = np.float32([1.27, 0.123, -0.777, 0.005, 0.0])
    with pytest.raises(
        ValueError,
        match=r"rounding='stochastic' needs a PRNG key\. Pass key=jax\.random\.key",
    ):
        jaxq.quantize(x, spec)
    with pytest.raises(
        ValueError, match="key= was given but rounding='nearest_even' does not use it"
    ):
        jaxq.quantize(x, "int8", key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4000)
    values = np.asarray(
        jax.jit(jax.vmap(lambda key: jaxq.dequantize(jaxq.quantize(x, spec, key=key))))(
            keys
        )
    )
    step = 0.01
    assert np.all(abs(values - x) < step * 1.001)
    # The mean of 4000 has a standard deviation of at most half a step over sqrt(4000).
    np.testing.assert_allclose(values.mean(0), x, atol=5 * step / 2 / 4000**0.5)
    assert np.all((values.std(0) > 0.1 * step) == [False, True, True, True, False])
    a, b = (jaxq.quantize(x, spec, key=jax.random.key(7)) for _ in range(2))
    np.testing.assert_array_equal(a.codes(), b.codes())


# Granularities.


def test_tiles():
    w = uneven_columns(9, (64, 48))
    spec = QuantSpec("int8", PerBlock((16, 8)))
    qt = jaxq.quantize(w, spec)
    largest = abs(w.reshape(4, 16, 6, 8)).max((1, 3))  # [k / 16, n / 8]
    expected = largest * np.float32(1 / 127)
    np.testing.assert_array_equal(qt.scale, expected.T)
    values = np.asarray(jaxq.dequantize(qt))
    step = np.kron(expected, np.ones((16, 8)))
    assert np.all(abs(values - w) <= 0.501 * step)
    ragged = jaxq.quantize(w[:60, :44], QuantSpec("int8", PerBlock((16, 8), pad=True)))
    np.testing.assert_array_equal(ragged.scale[0, 0], qt.scale[0, 0])
    assert ragged.scale.shape == (6, 4)
    assert jaxq.dequantize(ragged).shape == (60, 44)


def test_tokens_of_a_batch_of_activations():
    x = uneven_columns(10, (3, 5, 32))
    qt = jaxq.quantize(x, QuantSpec("int8", PerToken()))
    np.testing.assert_array_equal(
        qt.scale[..., 0], abs(x).max(-1) * np.float32(1 / 127)
    )
    assert qt.shape == x.shape
    scale = np.asarray(qt.scale)
    assert np.all(abs(np.asarray(jaxq.dequantize(qt)) - x) <= 0.501 * scale)


def test_whole_tensor():
    x = uneven_columns(11, (32, 8))
    qt = jaxq.quantize(x, QuantSpec("int8", PerTensor()))
    assert np.asarray(qt.scale).tolist() == [[abs(x).max() * np.float32(1 / 127)]]
    stack = jaxq.quantize(
        np.stack([x, 2 * x]), QuantSpec("int8", PerTensor()), contracting=-2, batch=0
    )
    np.testing.assert_array_equal(
        stack.scale.ravel(), np.float32([1, 2]) * qt.scale.ravel()
    )


def test_a_real_minimum_needs_no_code_for_zero():
    # The numbers are about 100. The step is 103/15 with a zero point, and 3/15 with a
    # real minimum.
    x = np.float32([[100.0, 101.0, 101.7, 103.0, 100.4]]).T
    error = {}
    for name, spec in {
        "zero": QuantSpec("uint4", symmetric=False),
        "min": QuantSpec("uint4", PerGroup(4, pad=True), offset="min"),
    }.items():
        error[name] = abs(np.asarray(jaxq.dequantize(jaxq.quantize(x, spec))) - x).max()
    assert error["min"] <= 0.1001
    assert error["zero"] > 0.5


# Hard numbers. All have one shape, so that each preset is compiled at most once more.


def round_trip_of_corner(x: np.ndarray, preset) -> np.ndarray:
    """The values of `x` in the first rows and columns of an array of zeros."""
    full = np.zeros(SHAPE, x.dtype)
    full[: len(x), : x.shape[1]] = x
    return np.asarray(compiled(full, preset)[1], np.float32)[: len(x), : x.shape[1]]


@over_presets
def test_zeros(preset):
    # There is no NaN from 0 / 0, and all values are 0. (binary has no zero, but its
    # scale is 0.)
    qt, values = compiled(np.zeros(SHAPE, np.float32), preset)
    assert not np.any(np.asarray(values))
    assert np.isfinite(scale_values(qt)).all()


@pytest.mark.parametrize("constant", [3.0, -3.0, 1e-30, -7e-5])
@pytest.mark.parametrize(
    "preset",
    [*PRESETS, QuantSpec("uint8", offset="min"), QuantSpec("int8", symmetric=False)],
)
def test_constant_blocks(preset, constant):
    x = np.full(SHAPE, constant, np.float32)
    qt, values = compiled(x, preset)
    assert np.isfinite(scale_values(qt)).all()
    # The constant is the largest number of its block, so only the rounding of the scale
    # changes it.
    spec = qt.spec
    if not spec.symmetric:
        worst = 0.51 / (spec.fmt.max - spec.fmt.min) + 2.0**-8
    elif spec.scale_rule == "mx_floor":
        worst = 0.26
    else:
        worst = 2.0**-4
    np.testing.assert_allclose(values, x, rtol=worst)


def test_one_sided_groups_contain_zero():
    # If the range did not contain zero, [5, 6] would have the zero point -75, which is
    # not a uint4.
    x = np.float32([[5.0, 6.0]]).T
    values = round_trip_of_corner(x, QuantSpec("uint4", symmetric=False))
    assert abs(values - x).max() <= 0.2
    assert np.all(
        abs(round_trip_of_corner(-x, QuantSpec("uint4", symmetric=False)) + x) <= 0.2
    )
    assert np.all(
        abs(round_trip_of_corner(-x, QuantSpec("int4", symmetric=False)) + x) <= 0.2
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_subnormals_come_back_as_zero_or_near(preset):
    tiny = np.float32([[1e-38, -1e-38, 1e-40, -1e-42, 1e-45, 0, -1e-45]]).T
    values = round_trip_of_corner(tiny, preset)
    assert np.isfinite(values).all()
    assert np.all(abs(values - tiny) <= 1.3e-38)


@pytest.mark.parametrize("size", [1e30, 1e38])
@over_presets
def test_huge_numbers(preset, size):
    x = uneven_columns(12)
    x = (x / abs(x).max() * size).astype(np.float32)
    small = (x * np.float32(2.0**-90)).astype(np.float32)
    values, expected = (
        np.asarray(compiled(v, preset)[1], np.float64) for v in (x, small)
    )
    assert np.isfinite(values).all()
    np.testing.assert_allclose(
        values, expected * 2.0**90, rtol=1e-6, atol=size * 2.0**-100
    )


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"int2"}))
def test_numbers_near_the_end_of_float32(preset):
    # int2 is left out: its zero point is rounded to whole steps of 2e38, so one end of
    # its range is beyond float32.
    x = np.float32([[3e38, -3e38, 1e38, 0]]).T
    values = round_trip_of_corner(x, preset)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(np.sign(values)[:2], np.sign(x)[:2])


def test_sums_of_huge_numbers_do_not_overflow():
    x = np.full((128, 2), 3e38, np.float32)
    qt = jaxq.quantize(x, "ternary")
    np.testing.assert_allclose(qt.scale, np.full((2, 1), 3e38), rtol=1e-6)
    x[::2] *= -1
    np.testing.assert_allclose(
        jaxq.quantize(x, "uint8").scale, np.full((2, 1), 6e38 / 255), rtol=1e-6
    )


@pytest.mark.parametrize(
    "preset", ["int8", "int4", "nf4", "nf4_dq", "mxfp4", "nvfp4", "uint4", "fp8"]
)
def test_small_float16_weights_do_not_vanish(preset):
    # A scale computed in float16 would underflow: 1e-3 / 448 is subnormal in float16.
    x = (uneven_columns(13) * 1e-3).astype(np.float16)
    values = np.asarray(compiled(x, preset)[1], np.float64)
    wide = np.asarray(compiled(x.astype(np.float32), preset)[1], np.float64)
    np.testing.assert_allclose(values, wide, rtol=2.0**-11, atol=2.0**-25)
    assert np.mean(values != 0) > 0.5


def test_a_rounded_scale_does_not_push_float16_to_infinity():
    # A third of 65504 is rounded up to a bfloat16, and three times that is beyond
    # float16.
    x = np.full(SHAPE, 65504, np.float16)
    qt, values = compiled(x, "int3_absmax")
    assert float(np.asarray(scale_values(qt)).max()) * 3 > 65520
    np.testing.assert_array_equal(values, np.full(SHAPE, 65504, np.float16))
    assert np.isfinite(
        jaxq.dequantize(qt, dtype=jnp.float8_e4m3fn).astype(jnp.float32)
    ).all()


def test_double_quantization_keeps_signs_and_bounds_errors():
    # Blocks differ by orders of magnitude. Scales stored about their mean would be read
    # back as negative for the small ones.
    random = np.random.default_rng(0)
    x = (random.standard_normal((64, 256)) * random.random((1, 256)) ** 4).astype(
        np.float32
    )
    x[:, 7] *= np.float32(1e-3)
    with pytest.warns(UserWarning, match="scales of w are too small"):
        qt = jaxq.quantize(x, "nf4_dq")
    values = np.asarray(jaxq.dequantize(qt))
    assert not np.any(values * x < 0)
    plain = np.asarray(jaxq.dequantize(jaxq.quantize(x, "nf4")))
    errors, plain_errors = (
        np.linalg.norm(v - x, axis=0) / np.linalg.norm(x, axis=0)
        for v in (values, plain)
    )
    assert plain_errors.max() < 0.15
    # The dynamic map has 128 steps from a tenth of the largest to the largest number,
    # and half as many steps in each decade below.
    scales, exact = np.asarray(scale_values(qt)).ravel(), abs(x).max(0)
    decade = np.floor(-np.log10(exact / exact.max() * 0.999999))
    bound = 0.9 / 2 ** (7 - decade) / 2 / 0.1
    covered = decade < 7
    assert 200 < covered.sum() < 256
    assert np.all(abs(scales - exact)[covered] <= bound[covered] * exact[covered])
    assert np.all(errors[covered] <= 0.15 + bound[covered])
    # Blocks below the smallest number of the map, 3.3e-7 of the largest, are lost. The
    # error is not larger than that number.
    assert abs(values - x)[:, ~covered].max() <= 4e-7 * exact.max()


# NaN and infinities.


def test_a_non_finite_number_is_named():
    x = uneven_columns(14)
    x[3, 5], x[4, 0] = np.nan, np.inf
    message = (
        r"quantize: kernel\[3, 5\] is nan, one of 2 non-finite numbers "
        r"\(kernel: float32\[100,64\]\)\..*'zero'"
    )
    with pytest.raises(ValueError, match=message):
        jaxq.quantize(x, "int8", name="kernel")
    with pytest.raises(ValueError, match=r"w\[0\] is -inf, one of 1 non-finite"):
        jaxq.quantize(np.array([-np.inf, 1], ml_dtypes.bfloat16), "int8")
    with pytest.raises(
        ValueError,
        match="on_nonfinite must be one of raise, propagate, zero, .*; got 'ignore'",
    ):
        jaxq.quantize(x, "int8", on_nonfinite="ignore")


# More than 4096 numbers: for such arrays XLA's maximum ignores NaN on CPU.
LARGE = (128, 48)
NAN_CASES = {
    "int8": ("int8", "float32"),
    "bfloat16": ("int8", "bfloat16"),
    "float16": ("mxfp4", "float16"),
    "asymmetric": ("uint4", "float32"),
    "real minimum": (QuantSpec("uint8", PerGroup(32), offset="min"), "float32"),
    "nf4": ("nf4", "float32"),
    "mean magnitude": (
        QuantSpec("ternary", PerGroup(32), scale_rule="absmean"),
        "float32",
    ),
    "tiles": (QuantSpec("int8", PerBlock((32, 8))), "float32"),
    "one scale": (QuantSpec("int8", PerTensor()), "float32"),
    "scales with NaN": ("nvfp4", "float32"),
    # These scales have no code for NaN. The NaN reaches every block under the second
    # scale.
    "scales without NaN, a channel": ("vsq4", "float32"),
    "scales without NaN, flat": (
        QuantSpec("nf4", PerGroup(64), scale=QuantSpec("udynamic8", PerFlat(16))),
        "float32",
    ),
}
BLOCKS = {
    "int8": (slice(None), slice(17, 18)),
    "bfloat16": (slice(None), slice(17, 18)),
    "float16": (slice(64, 96), slice(17, 18)),
    "asymmetric": (slice(None), slice(17, 18)),
    "real minimum": (slice(64, 96), slice(17, 18)),
    "nf4": (slice(64, 128), slice(17, 18)),
    "mean magnitude": (slice(64, 96), slice(17, 18)),
    "tiles": (slice(64, 96), slice(16, 24)),
    "one scale": (slice(None), slice(None)),
    "scales with NaN": (slice(64, 80), slice(17, 18)),
    "scales without NaN, a channel": (slice(None), slice(17, 18)),
    "scales without NaN, flat": (slice(None), slice(16, 24)),
}


@pytest.mark.parametrize("case", NAN_CASES)
def test_a_non_finite_number_makes_only_its_block_nan(case):
    spec, dtype = NAN_CASES[case]
    clean = uneven_columns(15, LARGE).astype(getattr(ml_dtypes, dtype, dtype))
    expected = np.asarray(compiled(clean, spec)[1], np.float32)
    assert np.isfinite(expected).all()
    block = np.zeros(LARGE, bool)
    block[BLOCKS[case]] = True
    for bad in (np.nan, np.inf, -np.inf):
        x = clean.copy()
        x[70, 17] = bad
        values = np.asarray(compiled(x, spec)[1], np.float32)
        np.testing.assert_array_equal(np.isnan(values), block)
        if case not in ("scales with NaN", "scales without NaN, flat"):
            np.testing.assert_array_equal(values[~block], expected[~block])


def test_policies_for_non_finite_numbers():
    x = uneven_columns(16)
    x[:, 3] = 1.0
    bad = x.copy()
    bad[1, 2], bad[5, 2], bad[6, 4] = np.nan, -np.inf, np.inf
    zeroed = x.copy()
    zeroed[1, 2] = zeroed[5, 2] = zeroed[6, 4] = 0
    saturated = zeroed.copy()
    saturated[5, 2], saturated[6, 4] = -abs(zeroed[:, 2]).max(), abs(zeroed[:, 4]).max()
    for policy, same in {"zero": zeroed, "saturate": saturated}.items():
        expected = jaxq.quantize(same, "int8")
        for run in (
            jaxq.quantize,
            jax.jit(jaxq.quantize, static_argnames=("spec", "on_nonfinite")),
        ):
            got = run(bad, spec="int8", on_nonfinite=policy)
            np.testing.assert_array_equal(got.codes(), expected.codes())
            np.testing.assert_array_equal(got.scale, expected.scale)
    propagated = np.asarray(
        jaxq.dequantize(jaxq.quantize(bad, "int8", on_nonfinite="propagate"))
    )
    assert np.isnan(propagated[:, [2, 4]]).all()
    np.testing.assert_array_equal(
        propagated[:, 5:], jaxq.dequantize(jaxq.quantize(x, "int8"))[:, 5:]
    )
    everything = jaxq.quantize(
        np.full(8, np.nan, np.float32), "int8", on_nonfinite="saturate"
    )
    assert jaxq.dequantize(everything).tolist() == [0] * 8


# Errors, and shapes that are allowed.


def test_groups_that_do_not_divide():
    w = jnp.ones((100, 64))
    with pytest.raises(ValueError) as error:
        jaxq.quantize(w, QuantSpec("int4", PerGroup(size=32)))
    assert str(error.value) == (
        "quantize: axis -2 of w has size 100, not a multiple of group size 32 "
        "(w: float32[100,64]). Pass jaxq.PerGroup(size, pad=True) or use size=20 or 50."
    )
    with pytest.raises(
        ValueError,
        match=r"axis -1 of layers/0/kernel has size 7, not a multiple of group size 32",
    ):
        jaxq.quantize(
            jnp.ones(7), QuantSpec("int4", PerGroup(32)), name="layers/0/kernel"
        )
    with pytest.raises(
        ValueError,
        match=r"axis -3, -2 of w has size 64, not a multiple of group size 48",
    ):
        jaxq.quantize(
            jnp.ones((4, 16, 8)), QuantSpec("int4", PerGroup(48)), contracting=(-3, -2)
        )
    with pytest.raises(
        ValueError, match=r"axis -1 of w has size 64, not a multiple of block size 24"
    ):
        jaxq.quantize(w, QuantSpec("int8", PerBlock((20, 24))))
    padded = jaxq.quantize(w, QuantSpec("int4", PerGroup(32, pad=True)))
    assert (padded.shape, padded.scale.shape) == ((100, 64), (64, 4))


EMPTY_PRESETS = ("int8", "uint4", "nf4_dq", "mxfp4", "nvfp4", "ttq", "fp6_e2m3")
EMPTY = [(preset, shape) for preset in EMPTY_PRESETS for shape in ((0, 24), (64, 0))]


@pytest.mark.parametrize(("preset", "shape"), tables.thinned(EMPTY, EMPTY[::3]))
def test_no_elements(preset, shape):
    qt = jaxq.quantize(np.zeros(shape, np.float32), preset)
    assert (qt.shape, qt.size, qt.bits_per_element) == (shape, 0, 0)
    assert jaxq.dequantize(qt).shape == qt.codes().shape == shape
    assert np.isfinite(scale_values(qt)).all()


ODD = [
    (p, size)
    for p in ("int4", "int3", "nf4_dq", "mxfp6_e2m3", "nvfp4", "binary")
    for size in (1, 7, 33)
]
SMALL_OR_LARGE = [
    ("int4", 33),
    ("int3", 1),
    ("nf4_dq", 1),
    ("mxfp6_e2m3", 33),
    ("nvfp4", 1),
    ("binary", 33),
]


@pytest.mark.parametrize(
    ("preset", "size"),
    tables.thinned(ODD, SMALL_OR_LARGE + [c for c in ODD if c[1] == 7]),
)
def test_odd_sizes(preset, size):
    x = uneven_columns(17)[:size, :1].ravel()
    values = np.asarray(compiled(x, preset)[1])
    assert values.shape == (size,)
    assert np.all(values[x != 0] * x[x != 0] >= 0)
    assert abs(values - x).max() <= abs(x).max()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            jnp.float32(1),
            ValueError,
            r"a 0-d array has no axis .*\(w: float32\[\]\)\. Pass w\.reshape\(1\)",
        ),
        (
            jnp.arange(4),
            TypeError,
            r"must be float32, bfloat16 or float16, got w: int32\[4\]\. Pass w\.",
        ),
        (
            np.ones((2, 3), bool),
            TypeError,
            r"got w: bool\[2,3\]\. Pass w\.astype\(jnp\.float32\)",
        ),
        (
            np.ones(3, np.complex64),
            TypeError,
            r"got w: complex64\[3\]\. Pass the real and imaginary parts",
        ),
        (
            np.ones(3),
            TypeError,
            r"got w: float64\[3\]\. Pass w\.astype\(jnp\.float32\)",
        ),
        (np.ones(3, ml_dtypes.float8_e4m3fn), TypeError, r"got w: float8_e4m3fn\[3\]"),
        ([1, 2], TypeError, r"got w: int64\[2\]"),
        (
            jnp.ones((2, 3, 4)),
            ValueError,
            r"contracting= is missing.*\(w: float32\[2,3,4\]\)\. Pass contracting=",
        ),
    ],
)
def test_arrays_that_cannot_be_quantized(x, error, message):
    with pytest.raises(error, match=message):
        jaxq.quantize(x, "int8")
    with pytest.raises(error, match="fake_quant: "):
        jaxq.fake_quant(x, "int8")


def test_lists_of_python_floats_are_float32():
    assert jaxq.quantize([0.5, -1.0], "int8").dtype == jnp.float32
    with pytest.raises(TypeError, match="w is already a QTensor: QTensor"):
        jaxq.quantize(jaxq.quantize([1.0], "int8"), "int8")
    with pytest.raises(TypeError, match="dequantize: expected a QTensor, got ndarray"):
        jaxq.dequantize(np.ones(3))
    with pytest.raises(
        TypeError,
        match=r"dequantize: dtype must be a float dtype, got dtype=int8\. For the",
    ):
        jaxq.dequantize(jaxq.quantize([1.0], "int8"), dtype=jnp.int8)


def test_unknown_names():
    x = jnp.ones(4)
    with pytest.raises(
        ValueError, match=r"quantize: unknown preset 'nf4dq'\. Did you mean 'nf4_dq'"
    ):
        jaxq.quantize(x, "nf4dq")
    with pytest.raises(
        ValueError,
        match=r"unknown preset 'nf3'.*is a format: use jaxq\.QuantSpec\(format='nf3'",
    ):
        jaxq.quantize(x, "nf3")
    with pytest.raises(
        ValueError,
        match=r"fake_quant: unknown preset 'zzz'\. jaxq\.presets\(\) lists them all",
    ):
        jaxq.fake_quant(x, "zzz")
    words = "spec must be a preset name or a QuantSpec, got"
    with pytest.raises(TypeError, match=rf"{words} the format 'int8'\. Pass"):
        jaxq.quantize(x, formats.get("int8"))
    with pytest.raises(TypeError, match=f"{words} int"):
        jaxq.quantize(x, 8)


def test_dequantize_to_another_dtype():
    x = uneven_columns(18)
    qt, values = compiled(x, "int8")
    half = jaxq.dequantize(qt, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    assert_same(half, np.asarray(values).astype(ml_dtypes.bfloat16))


# Gradients.


def test_quantize_refuses_gradients():
    x, w = jnp.ones((2, 8)), jnp.asarray(uneven_columns(19, (8, 4)))

    def loss(x, w):
        return (x @ jaxq.dequantize(jaxq.quantize(w, "int8"))).sum()

    refusal = r"quantize has no gradient.*jaxq\.fake_quant.*jax\.lax\.stop_gradient"
    for run in (
        jax.grad(loss, 1),
        jax.grad(jax.jit(loss), 1),
        jax.jit(jax.grad(loss, (0, 1))),
    ):
        with pytest.raises(TypeError, match=refusal):
            run(x, w)
    with pytest.raises(TypeError, match=refusal):
        jax.jvp(lambda w: loss(x, w), (w,), (w,))
    # A constant weight and a weight under stop_gradient are allowed.
    expected = np.broadcast_to(
        np.asarray(jaxq.dequantize(jaxq.quantize(w, "int8"))).sum(1), (2, 8)
    )
    stopped = jax.grad(lambda x, w: loss(x, jax.lax.stop_gradient(w)), (0, 1))
    for got in (jax.grad(loss)(x, w), jax.jit(jax.grad(loss))(x, w), stopped(x, w)[0]):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not np.any(stopped(x, w)[1])


def test_constant_weights_inside_scan_and_checkpoint():
    stack = jnp.asarray(uneven_columns(20, (3, 8, 8)))

    def model(x, stack):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(x @ jaxq.dequantize(jaxq.quantize(w, "int8"))), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    def plain(x, stack):
        for w in stack:
            x = jnp.tanh(x @ jaxq.dequantize(jaxq.quantize(w, "int8")))
        return x.sum()

    x = jnp.full((2, 8), 0.1)
    np.testing.assert_allclose(
        jax.jit(jax.grad(model))(x, stack),
        jax.grad(plain)(x, stack),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("preset", ["int8", "nf4", "uint8"])
def test_gradient_of_dequantize_by_its_scale(preset):
    qt = jaxq.quantize(uneven_columns(21, (64, 4)), preset)
    direction = uneven_columns(22, (64, 4))

    def loss(scale):
        return (jaxq.dequantize(dataclasses.replace(qt, scale=scale)) * direction).sum()

    units = np.asarray(qt.spec.fmt.decode(qt.codes()))
    if qt.zero_point is not None:
        units = units - np.asarray(qt.zero_point).T.astype(np.float32)
    np.testing.assert_allclose(
        jax.grad(loss)(qt.scale),
        (units * direction).sum(0)[:, None],
        rtol=1e-5,
        atol=1e-5,
    )


def test_dequantize_does_not_overflow_float32():
    x = jnp.array([[3e38], [-3e38], [1e38], [0.0]])
    for spec in ("int2", "int4", "uint4", QuantSpec("int2", symmetric=False)):
        values = jaxq.dequantize(jaxq.quantize(x, spec))
        assert jnp.isfinite(values).all()
        assert values[3, 0] == 0


@pytest.mark.parametrize("preset", ["nvfp4", "nf4_dq", "mxfp4"])
def test_the_memory_beside_the_weight(preset):
    """Scales are quantized from maxima that are computed once."""
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    compiled = jax.jit(lambda w: jaxq.quantize(w, preset)).lower(w).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this platform does not report the memory of a program")
    num_bytes = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    assert num_bytes < 1.6 * 2 * 1024**2
