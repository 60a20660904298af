"""`jaxq convert`, against numpy's rounding."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxq

PATH = ("layers", 0, "mlp", "up_proj", "kernel")


def kernel(model):
    return np.asarray(dict(nnx.to_flat_state(nnx.state(model)))[PATH].get_value())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_rounded_to_nearest(run, model_dir, tmp_path, dtype):
    out = tmp_path / "out"
    result = run("convert", model_dir, "--dtype", dtype, "--out", out, "--json")
    assert result.code == 0, result.err
    model, tokenizer = jaxq.models.load(model_dir)
    converted, other = jaxq.models.load(out)
    expected = kernel(model).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(kernel(converted), expected)
    assert other.to_str() == tokenizer.to_str()
    assert f'"dtype": "{dtype}"' in (out / "config.json").read_text()
    back = tmp_path / "back"
    assert run("convert", out, "--dtype", "bfloat16", "--out", back).code == 0
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(kernel(jaxq.models.load(back)[0]), expected)


def test_wrong_arguments(run, model_dir, tmp_path):
    out = tmp_path / "out"
    assert run("convert", model_dir, "--dtype", "int8", "--out", out).code == 2
    model, _ = jaxq.models.load(model_dir)
    jaxq.models.save(tmp_path / "q", jaxq.quantize_model(model, "int8")[0])
    result = run("convert", tmp_path / "q", "--dtype", "float16", "--out", out)
    assert result.code == 2
    assert "has quantized weights" in result.err
    assert not out.exists()
