"""A user adds a 4-bit table format in one file, and then uses it by its name.

`CUBES` and the call of `register` are all that a user writes. They use public names.
"""

import jax
import numpy as np
import pytest

import jaxq
from jaxq.formats import CodebookFormat
from tests.arrays import assert_close, assert_same, normal

# 16 cubes from -1 to 1: seven negative numbers, zero, and eight positive numbers.
NEGATIVE = [-((i / 7) ** 3) for i in range(7, 0, -1)]
POSITIVE = [(i / 8) ** 3 for i in range(1, 9)]
CUBES = CodebookFormat("cubes4", (*NEGATIVE, 0.0, *POSITIVE))


@pytest.fixture(autouse=True)
def cubes_registered():
    """Registers the format, and removes it after the test."""
    jaxq.formats.register(CUBES)
    yield
    if "cubes4" in jaxq.formats.names():
        jaxq.formats.unregister("cubes4")


def spec(**options) -> jaxq.QuantSpec:
    return jaxq.QuantSpec("cubes4", jaxq.PerGroup(16), **options)


def test_found_by_name():
    assert "cubes4" in jaxq.formats.names()
    assert jaxq.formats.get("cubes4") is CUBES
    assert (CUBES.bits, len(CUBES.values())) == (4, 16)
    with pytest.raises(ValueError, match="Did you mean 'cubes4'"):
        jaxq.formats.get("cubes")


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("x", "fmt must be a jaxq.formats.Format, such as .*got 'x'"),
        (CodebookFormat, "fmt must be a jaxq.formats.Format"),
        (CodebookFormat(3, (-1.0, 1.0)), "must be a non-empty string, got 3"),
        (CodebookFormat("", (-1.0, 1.0)), "must be a non-empty string, got ''"),
    ],
)
def test_only_a_format_with_a_name_can_be_registered(fmt, message):
    before = jaxq.formats.names()
    with pytest.raises(TypeError, match=f"formats.register: .*{message}"):
        jaxq.formats.register(fmt)
    assert jaxq.formats.names() == before


def test_array_goes_to_the_nearest_entry():
    w = normal(64, 8)
    qt = jaxq.quantize(w, spec())
    assert qt.spec.fmt == CUBES
    # Two codes to a byte, and a float32 scale for 16 numbers.
    assert qt.nbytes == 64 * 8 // 2 + 64 * 8 // 16 * 4

    groups = np.asarray(w).T.reshape(8, 4, 16)
    scale = np.abs(groups).max(-1, keepdims=True) * np.float32(1 / CUBES.max)
    table = np.asarray(CUBES.table, np.float32)
    distance = np.abs(groups[..., None] / scale[..., None] - table)
    expected = (table[distance.argmin(-1)] * scale).reshape(8, 64).T
    assert_close(jaxq.dequantize(qt), expected)


def test_product_is_that_of_the_dequantized_weight():
    x, w = normal(4, 64), normal(64, 8)
    qt = jaxq.quantize(w, spec())
    expected = np.asarray(x, np.float64) @ np.asarray(jaxq.dequantize(qt), np.float64)
    assert_close(jax.jit(lambda x, qt: x @ qt)(x, qt), expected.astype(np.float32))


def test_jit_gives_the_same_codes():
    w = normal(64, 8)
    eager = jaxq.quantize(w, spec())
    assert_same(jax.jit(lambda w: jaxq.quantize(w, spec()))(w), eager)


def test_model_weight_is_quantized_saved_and_loaded(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    x = normal(4, 64)
    recipe = jaxq.Recipe([jaxq.Rule("**", weight=spec(scale="bfloat16"))])
    qmodel, report = jaxq.quantize_model(model, recipe)
    assert "cubes4" in str(report)
    # The quantized layer computes the product of the dequantized weight.
    qt = jaxq.quantize(model.kernel[...], spec(scale="bfloat16"))
    assert_close(qmodel(x), x @ jaxq.dequantize(qt))  # the bias is zero

    path = tmp_path / "model.safetensors"
    jaxq.save(path, qmodel)
    loaded = jaxq.load(path, into=nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    assert_same(loaded(x), qmodel(x))


def test_file_needs_the_format_to_be_registered(tmp_path):
    path = tmp_path / "weight.safetensors"
    jaxq.save(path, {"w": jaxq.quantize(normal(64, 8), spec())})
    assert jaxq.load(path)["w"].spec.fmt == CUBES
    jaxq.formats.unregister("cubes4")
    with pytest.raises(ValueError, match="unknown format 'cubes4'"):
        jaxq.load(path)
