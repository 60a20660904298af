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


NUM_DRAWS = (1, 4, 16, 64, 256)


@functools.partial(jax.jit, static_argnames="spec")
def draws(w, spec):
    """`w`, quantized with 256 keys."""

    def draw(key):
        return jaxq.dequantize(jaxq.quantize(w, spec, key=key))

    return jax.lax.map(draw, jax.random.split(jax.random.key(7), max(NUM_DRAWS)))


def gained_bits(w, spec):
    """The effective bits that each fourfold number of averaged draws gains.

    The error of a mean of n draws is measured on all groups of n draws.
    """
    errors = np.asarray(draws(w, spec), np.float64) - np.asarray(w)
    of_means = [
        np.sqrt(np.mean(errors.reshape(-1, n, w.size).mean(1) ** 2)) for n in NUM_DRAWS
    ]
    return -np.diff(np.log2(of_means))


@over_presets
def test_the_unbiased_factor(preset):
    spec = stochastic(preset, "unbiased")
    assert spec.headroom_factor == pytest.approx(UNBIASED[preset], rel=1e-12)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@over_presets
def test_four_times_the_draws_give_one_more_bit(preset):
    bits = gained_bits(normal(256, 32), stochastic(preset, "unbiased"))
    assert bits == pytest.approx([1, 1, 1, 1], abs=0.05)


@pytest.mark.parametrize("preset", ["nvfp4", "mxfp4", "mxfp8", "mxfp6_e2m3", "vsq4"])
def test_clipped_numbers_keep_an_error(preset):
    bits = gained_bits(normal(256, 32), stochastic(preset, 1.0))
    assert bits.sum() < 3.9
    assert bits[-1] < 0.95


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
