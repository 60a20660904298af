"""The layout of AWQ, against a golden word and a decoder in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from tests.io.layouts.cases import kernel

AWQ = layouts.get("awq")
CONFIG = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def fields_of(words):
    """Codes `[n, out]`: the shift of a word is arithmetic, so it needs the mask."""
    stored = (np.asarray(words)[..., None] >> (4 * np.arange(8))) & 15
    return stored[..., ORDER].reshape(words.shape[0], -1)


def random_weight(num_in=96, num_out=24):
    random = np.random.default_rng(0)
    num_groups = -(-num_in // 32)

    def words(n):
        return random.integers(-(2**31), 2**31, (n, num_out // 8)).astype(np.int32)

    scales = random.uniform(0.5, 2, (num_groups, num_out)).astype(np.float16)
    return {"qweight": words(num_in), "qzeros": words(num_groups), "scales": scales}


@pytest.mark.parametrize("num_in", [96, 32, 40])
def test_random_words_have_the_numbers_of_the_formula(num_in):
    tensors = random_weight(num_in)
    qt = AWQ.to_qtensor(tensors, CONFIG)
    group = np.arange(num_in) // 32
    codes, zeros = (fields_of(tensors[name]) for name in ("qweight", "qzeros"))
    scale = np.asarray(tensors["scales"], np.float64)
    expected = scale[group] * (codes - zeros[group])
    np.testing.assert_array_equal(
        np.float64(jaxq.dequantize(qt, dtype=jnp.float32)), expected
    )
    written, config = AWQ.from_qtensor(qt)
    assert config["group_size"] == 32
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_golden_word():
    qt = jaxq.quantize(jnp.asarray(kernel(1, (32, 8))), AWQ.spec(CONFIG))
    codes = jnp.broadcast_to(jnp.arange(8, dtype=jnp.uint8), (32, 8))
    tensors, _ = AWQ.from_qtensor(qt.with_codes(codes))
    assert (np.asarray(tensors["qweight"]) == 0x75316420).all()


def test_symmetric_weights_are_written_with_the_zero_point_8():
    qt = jaxq.quantize(jnp.asarray(kernel(2, (128, 16))), "int4")
    tensors, config = AWQ.from_qtensor(qt)
    assert (fields_of(tensors["qzeros"]) == 8).all()
    back = AWQ.to_qtensor(tensors, config, dtype=jnp.float32)
    np.testing.assert_array_equal(jaxq.dequantize(back), jaxq.dequantize(qt))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 3}, "the setting bits must be one of 4; got 3"),
        ({"version": "gemv"}, "the setting version must be one of"),
        ({"zero_point": False}, "the setting zero_point must be one of True"),
        ({"group_size": 64}, "qzeros is int32"),
    ],
)
def test_settings_that_are_not_supported(changes, match):
    with pytest.raises(ValueError, match=match):
        AWQ.to_qtensor(random_weight(), CONFIG | changes)


def test_outputs_must_fill_whole_words():
    qt = jaxq.quantize(jnp.asarray(kernel(3, (32, 12))), AWQ.spec(CONFIG))
    with pytest.raises(ValueError, match="12 outputs fill no whole words"):
        AWQ.from_qtensor(qt)
