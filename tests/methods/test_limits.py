"""What `why_not` says is what happens."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, methods
from tests.tables import thinned

IN, OUT, TOKENS = 32, 16, 24
W, X = (
    np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for shape in ((IN, OUT), (TOKENS, IN))
)
# The fewest steps: what is asked is whether it works at all.
STEPS = {
    "adaround": {"num_steps": 1},
    "awq": {"num": 2},
    "clip": {"num": 2},
    "hqq": {"num_steps": 1},
}
STEPS["kmeans"] = {"num_steps": 1}
STOCHASTIC = QuantSpec("int4", rounding="stochastic")
OFFSET = QuantSpec("uint4", offset="min")
# (method, spec, options) that are refused beside presets.
REFUSED = [
    *((method, STOCHASTIC, {}) for method in methods.names() if method != "kmeans"),
    ("adaround", QuantSpec("ternary", scale_rule="twn"), {}),
    ("clip", OFFSET, {"rule": "entropy"}),
    ("clip", jaxq.presets()["fp8"], {"rule": "entropy"}),
    ("awq", QuantSpec("int4"), {"rule": "percentile"}),
]
PRODUCT = [(method, preset) for method in methods.names() for preset in jaxq.presets()]
SAMPLE = [
    (method, preset) for method, preset in PRODUCT if methods.why_not(method, preset)
]
SAMPLE += [("hqq", "mxfp4"), ("rtn", "ttq"), ("kmeans", "nf4_dq")]


@functools.cache
def stats():
    """Of the inputs, as calibration finds them."""
    update = jax.jit(
        lambda *new: jaxq.observers.update_stats(jaxq.observers.empty_stats(IN), *new)
    )
    return update(X, np.ones(TOKENS, bool), np.arange(TOKENS, dtype=np.int32))


@pytest.mark.parametrize(("method", "preset"), thinned(PRODUCT, SAMPLE))
def test_presets(method, preset):
    why = methods.why_not(method, preset)

    def solve():
        return methods.solve(
            method,
            jnp.asarray(W),
            stats(),
            jaxq.presets()[preset],
            options=STEPS.get(method),
        )

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
        assert (
            sum(not methods.why_not(method, preset) for preset in jaxq.presets())
            > len(jaxq.presets()) / 2
        )


@pytest.mark.parametrize(("method", "spec", "options"), REFUSED)
def test_refused(method, spec, options):
    said = methods.why_not(method, spec, options)[:30]
    assert said
    with pytest.raises(ValueError) as raised:
        methods.solve(
            method,
            jnp.asarray(W),
            stats(),
            spec,
            options=options or STEPS.get(method, {}),
        )
    # Methods that are made of others, as awq of clip, are refused by those, in their words.
    assert said in str(raised.value) or method == "awq"


def test_names_are_checked():
    with pytest.raises(ValueError, match="why_not: method.*gptp"):
        methods.why_not("gptp", "int4")
    assert (
        methods.why_not("clip", OFFSET) == methods.why_not("kmeans", STOCHASTIC) == ""
    )


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("gptq", {"damp": 5}, "damp must be a share"),
        (
            "gptq",
            {"block_size": 0},
            "block_size must be a whole number of at least 1, got 0",
        ),
        ("gptq", {"act_order": 1}, "act_order must be True or False"),
        ("adaround", {"num_steps": 0}, "num_steps must be"),
        (
            "adaround",
            {"beta": (20.0, float("nan"))},
            "beta must be two positive numbers",
        ),
        ("awq", {"clip_num": 0}, "clip_num must be"),
        ("awq", {"max_shrink": 0.5}, "unknown option 'max_shrink'"),
        ("clip", {"rule": "power"}, "rule must be one of entropy, mse"),
        ("clip", {"max_shrink": float("nan")}, "max_shrink must be 0 to 1, got nan"),
        (
            "clip",
            {"inputs": True, "rule": "percentile"},
            "inputs=True is of rule='mse'",
        ),
        ("clip", {"inputs": True, "power": 2.4}, "inputs=True weighs"),
        ("equalize", {"power_of_two": "yes"}, "power_of_two must be True or False"),
        ("hqq", {"norm": float("nan")}, "norm must be above 0 and below 1"),
        ("hqq", {"beta": float("inf")}, "beta must be a positive number"),
        ("kmeans", {"granularity": "channel"}, "granularity must be a granularity"),
        ("llm_int8", {"threshold": -1}, "threshold must be at least 0"),
        ("smoothquant", {"alpha": 2}, "alpha must be 0 to 1"),
    ],
)
def test_options_are_checked_when_a_rule_is_made(method, options, said):
    with pytest.raises(ValueError, match=said):
        jaxq.Rule(weight="int8", method=method, options=options)


def test_every_option_that_a_rule_takes_is_checked():
    from jaxq.methods._limits import NUMBERS

    assert {
        method: set(found.options)
        for method, found in methods.METHODS.items()
        if found.options
    } == {
        method: set(checks) - ({"max_tokens"} if method == "awq" else set())
        for method, checks in NUMBERS.items()
    }


def test_options_survive_json():
    rule = jaxq.Rule(weight="int4", method="adaround", options={"beta": (20, 2)})
    again = jaxq.Rule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert hash(again) == hash(rule)
