"""What `why_not` says is what happens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, methods
from tests.tables import thinned

IN, OUT, TOKENS = 32, 16, 24
W, X = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((IN, OUT), (TOKENS, IN)))
# The fewest steps: what is asked is whether it works at all.
STEPS = {"adaround": {"num_steps": 1}, "awq": {"num": 2}, "clip": {"num": 2}, "hqq": {"num_steps": 1}}
STEPS["kmeans"] = {"num_steps": 1}
STOCHASTIC = QuantSpec("int4", rounding="stochastic")
OFFSET = QuantSpec("uint4", offset="min")
# (method, spec, options) that are refused beside presets.
REFUSED = [
    *((method, STOCHASTIC, {}) for method in methods.names() if method != "kmeans"),
    ("adaround", QuantSpec("ternary", scale_rule="twn"), {}),
    ("clip", OFFSET, {"rule": "entropy"}),
    ("awq", QuantSpec("int4"), {"rule": "percentile"}),
]
PRODUCT = [(method, preset) for method in methods.names() for preset in jaxq.presets()]
SAMPLE = [(method, preset) for method, preset in PRODUCT if methods.why_not(method, preset)]
SAMPLE += [("hqq", "mxfp4"), ("rtn", "ttq"), ("kmeans", "nf4_dq")]


@functools.cache
def stats():
    """Of the inputs, as calibration finds them."""
    update = jax.jit(lambda *new: methods.update_stats(methods.empty_stats(IN), *new))
    return update(X, np.ones(TOKENS, bool), np.arange(TOKENS, dtype=np.int32))


@pytest.mark.parametrize(("method", "preset"), thinned(PRODUCT, SAMPLE))
def test_presets(method, preset):
    why = methods.why_not(method, preset)

    def solve():
        return methods.solve(method, jnp.asarray(W), stats(), jaxq.presets()[preset], options=STEPS.get(method))

    if why:
        with pytest.raises(ValueError) as raised:
            solve()
        assert why in str(raised.value)
        return
    qt = solve().qt
    assert qt.shape == W.shape
    assert np.isfinite(jaxq.dequantize(qt)).all()


def test_every_method_serves_most_presets():
    for method in methods.names():
        assert sum(not methods.why_not(method, preset) for preset in jaxq.presets()) > len(jaxq.presets()) / 2


@pytest.mark.parametrize(("method", "spec", "options"), REFUSED)
def test_refused(method, spec, options):
    said = methods.why_not(method, spec, options)[:30]
    assert said
    with pytest.raises(ValueError) as raised:
        methods.solve(method, jnp.asarray(W), stats(), spec, options=STEPS.get(method, {}) | options)
    # Methods that are made of others, as awq of clip, are refused by those, in their words.
    assert said in str(raised.value) or method == "awq"


def test_names_are_checked():
    with pytest.raises(ValueError, match="why_not: method.*gptp"):
        methods.why_not("gptp", "int4")
    assert methods.why_not("clip", OFFSET) == methods.why_not("kmeans", STOCHASTIC) == ""
