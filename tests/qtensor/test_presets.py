"""The default scale rule of the presets int4 and int3, and what their names mean."""

import jax.numpy as jnp
import pytest

import jaxq
from jaxq.metrics import sqnr
from jaxq.qtensor import as_activation_spec
from tests.arrays import normal


@pytest.mark.parametrize(
    ("name", "least", "absmax"), [("int4", 19.7, 18.62), ("int3", 13.6, 11.26)]
)
def test_signed_extremes_use_the_most_negative_code(name, least, absmax):
    """Figures in dB on normal numbers, at the same number of bytes."""
    w = normal(1024, 256)
    qt = jaxq.quantize(w, name)
    plain = jaxq.quantize(w, f"{name}_absmax")
    assert qt.nbytes == plain.nbytes
    assert float(sqnr(w, jaxq.dequantize(qt))) > least
    assert float(sqnr(w, jaxq.dequantize(plain))) == pytest.approx(absmax, abs=0.05)
    smallest = int(qt.spec.fmt.min)
    codes = qt.codes()
    # The extreme number of each of the 8 * 256 blocks has this code.
    assert int((codes == smallest).sum()) >= 8 * 256
    assert int(plain.codes().min()) == smallest + 1


@pytest.mark.parametrize("name", ["int4", "int3"])
def test_the_name_of_an_activation_means_absmax(name):
    absmax = jaxq.presets()[f"{name}_absmax"]
    signed = jaxq.presets()[name]
    weight = jaxq.quantize(normal(128, 4), "int8")
    assert as_activation_spec(name, "test") == absmax
    assert as_activation_spec(signed, "test") == signed
    assert weight.with_activation(name).meta.activation == absmax
    assert weight.with_activation(signed).meta.activation == signed
    assert jaxq.Rule(weight=name, activation=name).activation == absmax
    assert jaxq.Rule(weight=name, activation=name).weight == signed
    recipe = jaxq.recipes.get("w4a4")
    assert recipe.rules[-1].activation == jaxq.presets()["int4_absmax"]


@pytest.mark.parametrize("axis", [7, 64, 10**18, 1, -1])
def test_the_spec_of_an_activation_names_no_axis(axis):
    weight = jaxq.quantize(normal(128, 4), "int8")
    scale = jaxq.QuantSpec("uint8", jaxq.PerChannel(axis=axis))
    specs = [
        jaxq.QuantSpec("int8", jaxq.PerChannel(axis=axis)),
        jaxq.QuantSpec("int8", jaxq.PerGroup(32, axis=axis)),
        jaxq.QuantSpec("int8", jaxq.PerGroup(32), scale=scale),
    ]
    for spec in specs:
        with pytest.raises(ValueError, match="^with_activation: .* names an axis"):
            weight.with_activation(spec)
        with pytest.raises(ValueError, match="activation: .* names an axis"):
            jaxq.Rule(weight="int8", activation=spec)


def test_groups_of_an_activation_divide_its_contracted_axis():
    spec = jaxq.QuantSpec("int8", jaxq.PerGroup(48))
    weight = jaxq.quantize(normal(128, 4), "int8")
    message = r"PerGroup\(size=48.* 128 .* PerGroup\(48, pad=True\)"
    with pytest.raises(ValueError, match=message):
        weight.with_activation(spec)
    padded = spec.replace(granularity=jaxq.PerGroup(48, pad=True))
    assert (normal(2, 128) @ weight.with_activation(padded)).shape == (2, 4)
    # A convolution contracts other axes of its input than of its kernel.
    kernel = jaxq.quantize(normal(3, 8, 4), "int8", contracting=(0, 1))
    assert kernel.with_activation(spec).meta.activation == spec


def test_given_bounds_have_no_sign():
    x = jnp.array([-1.0, 1.0, 0.25])
    qt = jaxq.quantize(x, "int4", bounds=(-1.0, 1.0))
    assert qt.spec.scale_rule == "absmax"
    expected = jaxq.quantize(x, "int4_absmax", bounds=(-1.0, 1.0))
    assert (jaxq.dequantize(qt) == jaxq.dequantize(expected)).all()


@pytest.mark.parametrize(
    "scale",
    [
        jaxq.QuantSpec("int8", jaxq.PerFlat(256)),
        jaxq.QuantSpec("int8", jaxq.PerFlat(256), scale_rule="signed_extreme"),
        jaxq.QuantSpec("float8_e4m3fn", jaxq.PerTensor()),
    ],
)
def test_quantized_scales_keep_their_sign(scale):
    """Blocks of numbers far below the largest keep a scale that is not 0."""
    w = normal(512, 4) * jnp.where(jnp.arange(512) < 256, 1.0, 1e-6)[:, None]
    spec = jaxq.presets()["int4"].replace(scale=scale)
    plain = jaxq.quantize(w, spec.replace(scale="float32"))
    # The numbers of these blocks are lost, but their scales have the right sign.
    with pytest.warns(UserWarning, match="8 of 16 scales of w are too small"):
        qt = jaxq.quantize(w, spec)
    scales = jaxq.qtensor.scale_values(qt)
    assert (jnp.sign(scales) == jnp.sign(plain.scale)).all()
    large = jaxq.dequantize(qt)[:256]
    assert float(sqnr(w[:256], large)) > 19
