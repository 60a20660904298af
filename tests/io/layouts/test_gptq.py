"""The layout of GPTQ, against golden words and a decoder in numpy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import kernel

GPTQ = layouts.get("gptq")


def fields_of(words, bits, axis):
    """Codes of int32 words along an axis: a little-endian stream of bits."""
    words = np.moveaxis(np.asarray(words), axis, -1).astype(np.int64) & 0xFFFFFFFF
    stream = (words[..., None] >> np.arange(32)) & 1
    stream = stream.reshape(*words.shape[:-1], -1, bits)
    return np.moveaxis((stream << np.arange(bits)).sum(-1), -1, axis)


def words_of(fields, bits, axis):
    """The inverse of `fields_of`."""
    fields = np.moveaxis(np.asarray(fields), axis, -1).astype(np.int64)
    stream = ((fields[..., None] >> np.arange(bits)) & 1).reshape(
        *fields.shape[:-1], -1, 32
    )
    words = (stream << np.arange(32)).sum(-1).astype(np.uint32).view(np.int32)
    return np.moveaxis(words, -1, axis)


# GPTQModel adds these to whole words when it reads the first version, and subtracts
# them when it writes it.
ONES = {2: np.uint32(0x55555555), 4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


def decoded(tensors, config):
    """float64 `[in, out]`, from the formula of the file format."""
    bits = config["bits"]
    codes = fields_of(tensors["qweight"], bits, 0)  # [in, out]
    words, first = tensors["qzeros"], config.get("checkpoint_format", "gptq") == "gptq"
    if first and bits != 3:
        words = (np.asarray(words).view(np.uint32) + ONES[bits]).view(np.int32)
    zeros = fields_of(words, bits, 1)  # [groups, out]
    if first and bits == 3:
        zeros = (zeros + 1) % (1 << bits)
    group = np.asarray(tensors["g_idx"])
    scale = np.asarray(tensors["scales"], np.float64)
    return scale[group] * (codes - zeros[group])


def random_weight(bits, *, size, version="gptq_v2", shuffled=False, shape=(96, 64)):
    """A weight with random codes and zero points."""
    random = np.random.default_rng(bits)
    num_in, num_out = shape
    num_groups = -(-num_in // size)
    group = np.arange(num_in) // size
    if shuffled:
        group = random.permutation(group)
    codes = random.integers(0, 1 << bits, shape)
    zeros = random.integers(0, 1 << bits, (num_groups, num_out))
    tensors = {
        "qweight": words_of(codes, bits, 0),
        "qzeros": words_of(zeros, bits, 1),
        "scales": random.uniform(0.5, 2, (num_groups, num_out)).astype(np.float16),
        "g_idx": group.astype(np.int32),
    }
    config = {
        "bits": bits,
        "group_size": size,
        "sym": False,
        "desc_act": shuffled,
        "checkpoint_format": version,
    }
    return tensors, config


def floats(qt):
    return np.asarray(jaxq.dequantize(qt, dtype=jnp.float32), np.float64)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_words_have_the_numbers_of_the_formula(bits, version):
    tensors, config = random_weight(bits, size=32, version=version)
    qt = GPTQ.to_qtensor(tensors, config)
    assert (qt.spec.fmt.name, qt.dtype) == (f"uint{bits}", jnp.float16)
    np.testing.assert_array_equal(floats(qt), decoded(tensors, config))


def test_golden_words():
    codes = np.tile(np.arange(8), 4)[:, None].repeat(32, axis=1)
    tensors = {
        "qweight": words_of(codes, 4, 0),
        "qzeros": np.full((1, 4), 0x77777777, np.int32),
        "scales": np.ones((1, 32), np.float16),
    }
    assert (tensors["qweight"] == 0x76543210).all()
    config = {"bits": 4, "group_size": -1, "sym": True}
    qt = GPTQ.to_qtensor(tensors, config)  # the first version stores 8 as 7
    assert qt.spec.fmt.name == "int4"
    assert qt.zero_point is None
    np.testing.assert_array_equal(qt.codes(), codes - 8)
    written, settings = GPTQ.from_qtensor(qt)
    np.testing.assert_array_equal(written["qweight"], tensors["qweight"])
    assert np.asarray(written["qzeros"]).view(np.uint32).tolist() == [[0x88888888] * 4]
    assert settings["checkpoint_format"] == "gptq_v2"
    assert (settings["sym"], settings["group_size"]) == (True, -1)


def test_three_bits_are_a_dense_stream():
    codes = np.arange(32)[:, None].repeat(32, axis=1) % 8
    qt = jaxq.quantize(jnp.ones((32, 32)), GPTQ.spec({"bits": 3, "sym": False}))
    tensors, _ = GPTQ.from_qtensor(qt.with_codes(jnp.asarray(codes, jnp.uint8)))
    assert tensors["qweight"].shape == (3, 32)
    column = np.asarray(tensors["qweight"])[:, 0].tobytes()
    bits = sum(int(code) << (3 * i) for i, code in enumerate(codes[:, 0]))
    assert column == bits.to_bytes(12, "little")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_one_borrows_for_the_zero_point_0(bits):
    tensors, config = random_weight(bits, size=32)
    zeros = fields_of(tensors["qzeros"], bits, 1)
    zeros[:, ::2] = 0
    words = words_of(zeros, bits, 1).view(np.uint32) - ONES[bits]
    tensors["qzeros"] = np.ascontiguousarray(words).view(np.int32)
    qt = GPTQ.to_qtensor(tensors, config | {"checkpoint_format": "gptq"})
    np.testing.assert_array_equal(np.asarray(qt.zero_point).T, zeros)


def symmetric(stored, version):
    tensors, config = random_weight(4, size=32)
    tensors["qzeros"] = words_of(np.full((3, 64), stored), 4, 1)
    return tensors, config | {"sym": True, "checkpoint_format": version}


def test_a_file_that_says_gptq_and_holds_version_two():
    tensors, config = symmetric(8, "gptq")
    with pytest.warns(UserWarning, match="It is read as 'gptq_v2'"):
        qt = GPTQ.to_qtensor(tensors, config)
    version_two = config | {"checkpoint_format": "gptq_v2"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = GPTQ.to_qtensor(tensors, version_two)
        as_stored = GPTQ.to_qtensor(tensors, config | {"sym": False})
    np.testing.assert_array_equal(qt.data, expected.data)
    np.testing.assert_array_equal(floats(qt), decoded(tensors, version_two))
    assert (np.asarray(as_stored.zero_point) == 9).all()


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_zero_points_that_are_not_symmetric_are_refused(version):
    tensors, config = symmetric(5, version)
    with pytest.raises(ValueError, match="qzeros holds numbers from 5 to 5, but with"):
        GPTQ.to_qtensor(tensors, config)


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_in_another_order(bits):
    tensors, config = random_weight(bits, size=32, shuffled=True)
    expected = decoded(tensors, config)
    with pytest.raises(ValueError, match="g_idx assigns .*dequantize=True"):
        GPTQ.to_qtensor(tensors, config)
    array = GPTQ.to_qtensor(tensors, config, dequantize=True, dtype=jnp.float32)
    np.testing.assert_array_equal(np.float64(array), expected)

    in_order, order = layouts.sort_inputs(tensors, config)
    qt = GPTQ.to_qtensor(in_order, config)
    np.testing.assert_array_equal(floats(qt), expected[order])
    x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
    np.testing.assert_allclose(
        x[:, order] @ jaxq.dequantize(qt, dtype=jnp.float32), x @ expected, rtol=1e-4
    )
    written, settings = GPTQ.from_qtensor(qt)
    restored, settings = layouts.restore_inputs(written, settings, order)
    assert settings["desc_act"]
    for name, array in tensors.items():
        np.testing.assert_array_equal(restored[name], array)


def test_sorting_under_jit():
    tensors, config = random_weight(4, size=32, shuffled=True)
    expected, order = layouts.sort_inputs(tensors, config)
    actual, traced_order = jax.jit(lambda t: layouts.sort_inputs(t, config))(tensors)
    np.testing.assert_array_equal(order, traced_order)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    with pytest.raises(ValueError, match="g_idx assigns neighbouring inputs"):
        jax.jit(lambda t: GPTQ.to_qtensor(t, config))(tensors)


def test_groups_of_other_sizes_have_floats_only():
    tensors, config = random_weight(4, size=32)
    tensors["g_idx"] = np.repeat([0, 1, 2], [40, 24, 32]).astype(np.int32)
    array = GPTQ.to_qtensor(tensors, config, dequantize=True, dtype=jnp.float32)
    np.testing.assert_array_equal(np.float64(array), decoded(tensors, config))
    with pytest.raises(ValueError, match="g_idx has 40 inputs in group 0, expected 32"):
        layouts.sort_inputs(tensors, config)
    tensors["g_idx"][5] = 3
    with pytest.raises(ValueError, match="g_idx holds groups from 0 to 3"):
        GPTQ.to_qtensor(tensors, config)


def test_a_last_group_that_is_shorter():
    tensors, config = random_weight(4, size=64)
    assert tensors["scales"].shape == (2, 64)
    qt = GPTQ.to_qtensor(tensors, config)
    np.testing.assert_array_equal(floats(qt), decoded(tensors, config))
    written, settings = GPTQ.from_qtensor(qt)
    assert settings["group_size"] == 64
    np.testing.assert_array_equal(written["qzeros"], tensors["qzeros"])


def test_presets_are_written():
    w = jnp.asarray(kernel(1, (256, 32)))
    for preset in ("int4", "uint4", "int2"):
        qt = jaxq.quantize(w, preset)
        tensors, config = GPTQ.from_qtensor(qt)
        np.testing.assert_array_equal(floats(qt), decoded(tensors, config))
    with pytest.raises(ValueError, match="numbers are not exact in float16"):
        GPTQ.from_qtensor(jaxq.quantize(w * 1e-6, "int4"))
    with pytest.raises(ValueError, match="are not multiples of 32"):
        GPTQ.from_qtensor(jaxq.quantize(w[:40], "int4"))
    traced = jaxq.quantize(w, "int4")
    with pytest.raises(ValueError, match="cannot be checked under jit"):
        jax.jit(lambda qt: GPTQ.from_qtensor(qt)[0])(traced)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 5}, "the setting bits must be one of 2, 3, 4, 8; got 5"),
        ({"bits": 4.0}, "the setting bits must be one of"),
        ({"bits": None}, "the setting bits must be one of"),
        ({"group_size": 0}, "the setting group_size must be a whole number above 0"),
        (
            {"group_size": 1 << 40},
            "the setting group_size must be a whole number above",
        ),
        ({"group_size": 1 << 20}, "scales is float16"),
        ({"group_size": 16}, "scales is float16"),
        ({"sym": "yes"}, "the setting sym must be one of True, False"),
        ({"checkpoint_format": "marlin"}, "the setting checkpoint_format must be one"),
    ],
)
def test_settings_that_contradict_the_arrays(changes, match):
    tensors, config = random_weight(4, size=32)
    del tensors["g_idx"]
    with pytest.raises(ValueError, match=match):
        GPTQ.to_qtensor(tensors, config | changes)
