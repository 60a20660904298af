"""kept_slice: some outputs of a weight, with the same codes and scales."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxq
from jaxq.qtensor import kept_slice

W = jax.random.normal(jax.random.key(0), (2, 64, 48))
SPECS = {
    "int4": "int4",
    "offset": jaxq.QuantSpec("uint4", jaxq.PerGroup(32), offset="min"),
    "mean": jaxq.QuantSpec("int8", jaxq.PerChannel(), offset="mean"),
    "zero point": jaxq.QuantSpec("uint4", jaxq.PerGroup(32), symmetric=False),
    "one scale": jaxq.QuantSpec("int8", jaxq.PerTensor()),
    "quantized scales": "nvfp4",
    "blocks": jaxq.QuantSpec("float8_e4m3fn", jaxq.PerBlock((16, 16))),
}


@pytest.mark.parametrize("name", SPECS)
def test_floats_are_a_slice(name):
    qt = jaxq.quantize(W, SPECS[name], contracting=-2, batch=0)
    floats = np.asarray(jaxq.dequantize(qt))
    part = slice(16, 48) if name == "blocks" else slice(1, 48, 2)
    result = kept_slice(qt, -1, part)
    assert result.shape == (2, 64, len(range(48)[part]))
    np.testing.assert_array_equal(jaxq.dequantize(result), floats[..., part])
    # A transposed weight, as a torch layer has it.
    result = kept_slice(qt.swapaxes(-1, -2), -2, part).swapaxes(-1, -2)
    np.testing.assert_array_equal(jaxq.dequantize(result), floats[..., part])


def test_columns():
    qt = jaxq.relayout(jaxq.quantize(W[0], "int8"), "columns")
    result = kept_slice(qt, -1, slice(0, 5))
    assert result.data.shape == (64, 5)
    np.testing.assert_array_equal(jaxq.dequantize(result), jaxq.dequantize(qt)[:, :5])


def test_codebooks_of_rows():
    spec = jaxq.QuantSpec("uint3", jaxq.PerChannel(), offset="min")
    qt = jaxq.quantize(W[0], spec)
    # A codebook for each output.
    codebook = jax.random.normal(jax.random.key(1), (48, 1, 8))
    qt = dataclasses.replace(qt, codebook=codebook)
    result = kept_slice(qt, -1, slice(0, 48, 3))
    np.testing.assert_array_equal(jaxq.dequantize(result), jaxq.dequantize(qt)[:, ::3])


def test_errors():
    blocks = jaxq.quantize(W[0], SPECS["blocks"])
    for part in (slice(8, 32), slice(0, 40), slice(0, 48, 2)):
        with pytest.raises(ValueError, match="the entries are not whole blocks of 16"):
            kept_slice(blocks, -1, part)
    with pytest.raises(ValueError, match=r"its kept axes are \[-1\]"):
        kept_slice(blocks, -2, slice(0, 16))
    flat = jaxq.quantize(W[0], jaxq.QuantSpec("int8", jaxq.PerFlat(64)))
    with pytest.raises(ValueError, match="its blocks cross rows"):
        kept_slice(flat, -1, slice(0, 8))
