"""GGUF blocks, against the package gguf and golden bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from jaxq.qtensor import scale_values
from tests.io.layouts.cases import GGUF_BITS, kernel
from tests.tables import thinned

GGUF = layouts.get("gguf")
# The position of each float16 in a block, its size in bytes, and its numbers.
BLOCKS = {
    "Q4_0": ((0,), 18, 32),
    "Q4_1": ((0, 2), 20, 32),
    "Q5_0": ((0,), 22, 32),
    "Q5_1": ((0, 2), 24, 32),
    "Q8_0": ((0,), 34, 32),
    "MXFP4": ((), 17, 32),
    "Q2_K": ((80, 82), 84, 256),
    "Q3_K": ((108,), 110, 256),
    "Q4_K": ((0, 2), 144, 256),
    "Q5_K": ((0, 2), 176, 256),
    "Q6_K": ((208,), 210, 256),
}


def random_blocks(name, num_out=6, num_blocks=2):
    """Random bytes whose scales are finite, uint8 `[out, bytes]`."""
    positions, size, _ = BLOCKS[name]
    random = np.random.default_rng(len(name))
    blocks = random.integers(0, 256, (num_out, num_blocks, size)).astype(np.uint8)
    for position in positions:
        blocks[..., position + 1] &= 0xBB
    if name == "MXFP4":
        blocks[..., 0] = random.integers(110, 135, blocks.shape[:-1])
    return blocks.reshape(num_out, -1)


def floats_of_package(blocks, name):
    gguf = pytest.importorskip("gguf", reason="compares numbers with gguf")
    return gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name))


@pytest.mark.parametrize("name", thinned(BLOCKS, ["Q5_1", "MXFP4", "Q3_K", "Q4_K"]))
def test_random_blocks_have_the_numbers_of_the_package(name):
    blocks = random_blocks(name)
    qt = GGUF.to_qtensor({"weight": blocks}, {"type": name})
    assert qt.shape == (2 * BLOCKS[name][2], 6)
    expected = floats_of_package(blocks, name)
    if qt.offset is None:
        np.testing.assert_array_equal(jaxq.dequantize(qt).T, expected)
    else:  # a product and a sum, which XLA may round once
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            jaxq.dequantize(qt).T, expected, rtol=1e-6, atol=1e-7 * size
        )


@pytest.mark.parametrize("name", thinned(GGUF_BITS, ["Q4_1", "Q5_0"]))
def test_random_blocks_are_written_with_the_same_bytes(name):
    blocks = random_blocks(name)
    qt = GGUF.to_qtensor({"weight": blocks}, {"type": name})
    tensors, config = GGUF.from_qtensor(qt)
    assert config == {"type": name}
    np.testing.assert_array_equal(tensors["weight"], blocks)


@pytest.mark.parametrize("name", thinned(GGUF_BITS, ["Q4_0", "Q8_0"]))
def test_the_package_reads_what_is_written(name):
    w = jnp.asarray(kernel(1, (96, 10)))
    qt = jaxq.quantize(w, GGUF.spec({"type": name}))
    tensors, _ = GGUF.from_qtensor(qt)
    floats = floats_of_package(np.asarray(tensors["weight"]), name)
    np.testing.assert_allclose(jaxq.dequantize(qt).T, floats, rtol=1e-6, atol=1e-6)


GOLDEN = {
    "Q4_0": "0030809191a2a2b3b3c4c4d5d5e6e6f7f7f8",
    "Q4_1": "443000bc80809191a2a2b3b3c4c4d5d5e6e6f7f7",
    "Q5_0": "002c0000ffff102132435465768798a9bacbdcedfeff",
    "Q8_0": "08208189919aa2aab2bac3cbd3dbe3ecf4fc040c141d252d353d464e565e666f777f",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    # The bytes of linspace(-1, 1, 32) that llama.cpp's package wrote.
    blocks = np.frombuffer(bytes.fromhex(GOLDEN[name]), np.uint8)[None]
    qt = GGUF.to_qtensor({"weight": blocks}, {"type": name})
    line = np.linspace(-1, 1, 32)
    step = abs(float(scale_values(qt)[0, 0]))
    # The last code of Q4_0 and Q5_0 is cut off, a whole step below 1.
    bound = (1.01 if name in ("Q4_0", "Q5_0") else 0.51) * step
    assert np.abs(np.asarray(jaxq.dequantize(qt))[:, 0] - line).max() <= bound
    tensors, _ = GGUF.from_qtensor(qt)
    assert np.asarray(tensors["weight"]).tobytes().hex() == GOLDEN[name]


@pytest.mark.parametrize(
    ("preset", "name"), [("mxfp4", "MXFP4"), ("mxfp4_16", None), ("int4", None)]
)
def test_presets(preset, name):
    w = jnp.asarray(kernel(2, (64, 8)))
    if preset == "mxfp4_16":
        spec = jaxq.presets()["mxfp4"].replace(granularity=jaxq.PerGroup(16))
        qt = jaxq.quantize(w, spec)
    else:
        qt = jaxq.quantize(w, preset)
    if name is None:
        with pytest.raises(ValueError, match=r"are not (blocks|groups) of 32"):
            GGUF.from_qtensor(qt)
        return
    assert GGUF.from_qtensor(qt)[1] == {"type": name}


def test_formats_without_a_type():
    w = jnp.asarray(kernel(3, (64, 8)))
    for spec, match in (
        (jaxq.QuantSpec("uint4", jaxq.PerGroup(32), symmetric=False), "no zero point"),
        (jaxq.QuantSpec("nf4", jaxq.PerGroup(32)), "no type holds the format nf4"),
        (jaxq.QuantSpec("int6", jaxq.PerGroup(32)), "no type holds the format int6"),
        (
            jaxq.QuantSpec("uint8", jaxq.PerGroup(32), offset="min"),
            "no type holds the format uint8 with an offset",
        ),
        (
            jaxq.QuantSpec("int4", jaxq.PerGroup(32), offset="mean"),
            "its offset is one number for the whole weight",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            GGUF.from_qtensor(jaxq.quantize(w, spec))


def test_k_quants_cannot_be_written():
    tensors = {"weight": random_blocks("Q4_K")}
    qt = GGUF.to_qtensor(tensors, {"type": "Q4_K"})
    with pytest.raises(ValueError, match=r"its (groups|scale) .* (blocks|quantized)"):
        GGUF.from_qtensor(qt)


@pytest.mark.parametrize("name", thinned(BLOCKS, ["Q8_0", "Q2_K"]))
def test_bad_blocks(name):
    blocks = random_blocks(name)
    with pytest.raises(ValueError, match=f"no whole number of {name} blocks"):
        GGUF.to_qtensor({"weight": blocks[:, :-1]}, {"type": name})
    for position in BLOCKS[name][0]:
        damaged = blocks.copy()
        damaged[:, position + 1] = 0x7C  # an infinity or a NaN
        with pytest.raises(ValueError, match="weight has a number that is not finite"):
            GGUF.to_qtensor({"weight": damaged}, {"type": name})


def test_types_that_are_not_known():
    for value in ("IQ4_XS", "q4_0", None, 2):
        with pytest.raises(ValueError, match="the setting type must be one of 'Q4_0'"):
            GGUF.to_qtensor({"weight": np.zeros((1, 18), np.uint8)}, {"type": value})


def test_k_quants_under_jit():
    tensors = {"weight": random_blocks("Q5_K")}
    config = {"type": "Q5_K"}
    expected = GGUF.to_qtensor(tensors, config)
    actual = jax.jit(lambda t: GGUF.to_qtensor(t, config))(tensors)
    assert actual.meta == expected.meta
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_k_quant_multiplies_and_slices():
    tensors = {"weight": random_blocks("Q6_K", num_out=4)}
    qt = GGUF.to_qtensor(tensors, {"type": "Q6_K"})
    x = jnp.asarray(kernel(4, (3, 512)))
    floats = np.asarray(jaxq.dequantize(qt), np.float64)
    expected = np.asarray(x, np.float64) @ floats
    size = abs(expected).max()
    np.testing.assert_allclose(x @ qt, expected, rtol=1e-4, atol=1e-5 * size)
    w = jax.eval_shape(lambda w: jaxq.quantize(w, qt.spec), jaxq.dequantize(qt))
    assert w.meta == qt.meta
    for fresh, leaf in zip(jax.tree.leaves(w), jax.tree.leaves(qt), strict=True):
        assert (fresh.shape, fresh.dtype) == (leaf.shape, leaf.dtype)
