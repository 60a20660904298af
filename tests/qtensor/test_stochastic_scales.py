"""Scales that are quantized with stochastic rounding: keys, no bias, jit and vmap."""

import functools

import jax
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from jaxq.qtensor import requantize, scale_values
from tests.arrays import assert_same, normal

STOCHASTIC_SCALE = QuantSpec("uint8", rounding="stochastic")
# Only the scale is rounded stochastically.
SCALE_ONLY = QuantSpec("int4", PerGroup(16), scale=STOCHASTIC_SCALE)
# The codes, the scale, or both are, and the second level of three.
SPECS = {
    "scale": SCALE_ONLY,
    "codes": SCALE_ONLY.replace(rounding="stochastic", scale=QuantSpec("uint8")),
    "both": SCALE_ONLY.replace(rounding="stochastic"),
    "third level": SCALE_ONLY.replace(
        scale=QuantSpec("uint8", PerGroup(2), scale=STOCHASTIC_SCALE)
    ),
}
over_specs = pytest.mark.parametrize("name", SPECS)


@functools.partial(jax.jit, static_argnames="spec")
def compiled(w, spec, key):
    return jaxq.quantize(w, spec, key=key)


@over_specs
def test_the_same_key_gives_the_same_codes_eager_and_jitted(name):
    w, spec, key = normal(64, 4), SPECS[name], jax.random.key(3)
    qt = jaxq.quantize(w, spec, key=key)
    assert_same(compiled(w, spec, key), qt)
    assert_same(jaxq.quantize(w, spec, key=key), qt)
    other = compiled(w, spec, jax.random.key(4))
    assert np.any(jaxq.dequantize(other) != jaxq.dequantize(qt))
    assert_same(jaxq.fake_quant(w, spec, key=key), jaxq.dequantize(qt))


@over_specs
def test_mapping_over_keys(name):
    w, spec = normal(64, 4), SPECS[name]
    keys = jax.random.split(jax.random.key(5), 3)
    mapped = jax.vmap(lambda key: jaxq.quantize(w, spec, key=key))(keys)
    for i, key in enumerate(keys):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        assert_same(one, jaxq.quantize(w, spec, key=key))


def test_the_mean_over_keys_is_the_scale_before_rounding():
    w = normal(64, 4)
    ideal = np.asarray(jaxq.quantize(w, QuantSpec("int4", PerGroup(16))).scale)
    keys = jax.random.split(jax.random.key(6), 2000)
    scales = jax.jit(
        jax.vmap(lambda key: scale_values(jaxq.quantize(w, SCALE_ONLY, key=key)))
    )(keys)
    scales = np.asarray(scales, np.float64)
    # The scale of the scales: one for each channel of w, the largest of 255 steps.
    step = ideal.max(axis=1, keepdims=True) / 255
    assert np.all(abs(scales - ideal) <= step * 1.001)
    assert np.any(scales.std(axis=0) > 0.1 * step)
    # A mean of 2000 has a standard deviation of at most half a step over sqrt(2000).
    bound = 5 * step / 2 / 2000**0.5
    assert np.all(abs(scales.mean(axis=0) - ideal) <= bound)
    # Rounding to nearest is further away, so the bound can tell the two apart.
    nearest = SCALE_ONLY.replace(scale=QuantSpec("uint8"))
    nearest_error = abs(np.asarray(scale_values(jaxq.quantize(w, nearest))) - ideal)
    assert np.any(nearest_error > bound)


def test_which_level_gets_which_key():
    w, key = normal(64, 4), jax.random.key(7)
    # One stochastic level uses the key itself.
    plain = QuantSpec("int4", PerGroup(16), rounding="stochastic")
    nested = plain.replace(scale=QuantSpec("float8_e4m3fn"), codes_from="ideal")
    assert_same(
        jaxq.quantize(w, plain.replace(codes_from="ideal"), key=key).codes(),
        jaxq.quantize(w, nested, key=key).codes(),
    )
    # Several levels split the key, the outermost level first.
    both = SPECS["both"]
    codes_key, scale_key = jax.random.split(key, 2)
    qt = jaxq.quantize(w, both, key=key)
    assert_same(qt.scale, jaxq.quantize(w, SCALE_ONLY, key=scale_key).scale)
    assert_same(requantize(w, qt, key=codes_key).codes(), qt.codes())


def test_keys_that_are_missing_or_not_used():
    w, key = normal(64, 4), jax.random.key(8)
    assert {name: spec.needs_key for name, spec in SPECS.items()} == dict.fromkeys(
        SPECS, True
    )
    assert not QuantSpec("int4", scale=QuantSpec("uint8")).needs_key
    message = "rounding='stochastic' of the scale needs a PRNG key"
    for function in (jaxq.quantize, jaxq.fake_quant):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(w, SCALE_ONLY)
    # requantize keeps the scales, so only the rounding of the codes counts.
    qt = jaxq.quantize(w, SCALE_ONLY, key=key)
    assert_same(requantize(w, qt), qt)
    with pytest.raises(ValueError, match="requantize: key= was given but"):
        requantize(w, qt, key=key)
    with pytest.raises(ValueError, match="needs a key at every call"):
        qt.with_activation(QuantSpec("int8", scale=STOCHASTIC_SCALE))
