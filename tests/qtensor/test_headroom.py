"""Headroom: with it, the mean of stochastically rounded arrays has no bias."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerGroup, QuantSpec
from jaxq.qtensor import scale_values
from tests.arrays import assert_same, normal

# By preset: the least headroom without bias. The second column derives it.
UNBIASED = {
    "nvfp4": 17 / 16,  # a float8 scale loses at most 1/17 of itself
    "mxfp4": 8 / 6,  # numbers of a block reach 2^3, the format reaches 6
    "mxfp6_e2m3": 8 / 7.5,
    "mxfp6_e3m2": 32 / 28,
    "mxfp8": 512 / 448,
    "mxfp8_e5m2": 65536 / 57344,
    "mxint8": 128 / 127,
    "vsq4": 1.5,  # a scale just below 1.5 is stored as 1
    "int4_absmax": 257 / 256,  # a bfloat16 scale loses at most 1/257 of itself
    "int4": 8 / 7 * 257 / 256,  # and the number opposite to the extreme reaches 8
    "int8": 1.0,
}
over_presets = pytest.mark.parametrize("preset", UNBIASED)


def stochastic(preset: str, headroom: float | str) -> QuantSpec:
    return jaxq.presets()[preset].replace(rounding="stochastic", headroom=headroom)


@functools.partial(jax.jit, static_argnames=("spec", "num_draws"))
def error_of_mean(w, spec, num_draws):
    """The root mean square of `mean over draws - w`."""

    def draw(key):
        return jaxq.dequantize(jaxq.quantize(w, spec, key=key))

    keys = jax.random.split(jax.random.key(7), num_draws)
    return jnp.sqrt(jnp.mean((jax.lax.map(draw, keys).mean(0) - w) ** 2))


@over_presets
def test_the_unbiased_factor(preset):
    spec = stochastic(preset, "unbiased")
    assert spec.headroom_factor == pytest.approx(UNBIASED[preset], rel=1e-12)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("preset", ["nvfp4", "mxfp4", "mxfp8", "mxfp6_e2m3", "vsq4"])
def test_four_times_the_draws_give_one_more_bit(preset):
    w = normal(128, 16)
    spec = stochastic(preset, "unbiased")
    errors = [float(error_of_mean(w, spec, n)) for n in (64, 256, 1024)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    # Without headroom the clipped numbers keep an error.
    assert float(error_of_mean(w, stochastic(preset, 1.0), 1024)) > 1.5 * errors[2]


@over_presets
def test_no_number_is_clipped(preset):
    """Blocks whose largest number fills a whole binade, with both signs."""
    largest = np.linspace(1.0, 2.0, 257, dtype=np.float32)
    x = np.zeros((128, 257), np.float32)
    x[::16], x[8::16] = largest, -largest  # in each group of 16, both
    spec = stochastic(preset, "unbiased")
    qt = jaxq.quantize(x, spec, key=jax.random.key(0))
    scale = np.abs(np.asarray(scale_values(qt)))
    reach = spec.fmt.max
    size = 128 // scale.shape[-1]
    assert (largest[:, None] / scale <= reach * (1 + 1e-6)).all(), size


def test_headroom_is_a_factor_of_the_scale():
    w = normal(64, 8)
    spec = QuantSpec("int8", PerGroup(32))
    qt = jaxq.quantize(w, spec.replace(headroom=1.25))
    expected = np.asarray(jaxq.quantize(w, spec).scale) * np.float32(1.25)
    np.testing.assert_allclose(qt.scale, expected, rtol=2e-7)
    unchanged = jaxq.quantize(w, spec.replace(headroom=1))
    assert_same(unchanged.scale, jaxq.quantize(w, spec).scale)


def test_headroom_of_the_largest_numbers_is_finite():
    w = jnp.full((32, 1), 3.4e38)
    qt = jaxq.quantize(w, QuantSpec("float4_e2m1fn", headroom=4 / 3))
    assert math.isfinite(float(qt.scale[0, 0]))
    assert jnp.isfinite(jaxq.dequantize(qt)).all()
