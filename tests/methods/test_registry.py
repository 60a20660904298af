"""The registry of methods: reasons of `why_not`, checks of options, new methods."""

import functools
import json

import jax
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, methods
from tests.arrays import assert_same, normal
from tests.tables import thinned

IN, OUT, TOKENS = 32, 16, 24
# As few steps as possible: the tests only ask whether a method works at all.
STEPS = {
    "adaround": {"num_steps": 1},
    "awq": {"num": 2},
    "clip": {"num": 2},
    "hqq": {"num_steps": 1},
    "kmeans": {"num_steps": 1},
}
STOCHASTIC = QuantSpec("int4", rounding="stochastic")
OFFSET = QuantSpec("uint4", offset="min")
# (method, spec, options) that are refused, in addition to presets.
ROUND_STOCHASTICALLY = ("kmeans", "rtn")
REFUSED = [
    *(
        (method, STOCHASTIC, {})
        for method in methods.names()
        if method not in ROUND_STOCHASTICALLY
    ),
    ("adaround", QuantSpec("ternary", scale_rule="twn"), {}),
    ("clip", OFFSET, {"rule": "entropy"}),
    ("clip", jaxq.presets()["fp8"], {"rule": "entropy"}),
    ("clip", QuantSpec("int4"), {"inputs": True, "power": 2.4}),
]
PRODUCT = [(method, preset) for method in methods.names() for preset in jaxq.presets()]
SAMPLE = [
    (method, preset) for method, preset in PRODUCT if methods.why_not(method, preset)
]
SAMPLE += [("hqq", "mxfp4"), ("rtn", "ttq"), ("kmeans", "nf4_dq")]


@functools.cache
def stats():
    """Statistics of the layer's inputs, as calibration collects them."""
    update = jax.jit(
        lambda *batch: jaxq.observers.update_stats(
            jaxq.observers.empty_stats(IN), *batch
        )
    )
    x = normal(TOKENS, IN)
    return update(x, np.ones(TOKENS, bool), np.arange(TOKENS, dtype=np.int32))


def solve(method, spec, options):
    return methods.solve(method, normal(IN, OUT), stats(), spec, options=options)


@pytest.mark.parametrize(("method", "preset"), thinned(PRODUCT, SAMPLE))
def test_solve_refuses_exactly_what_why_not_names(method, preset):
    spec, options = jaxq.presets()[preset], STEPS.get(method)
    reason = methods.why_not(method, preset)
    if reason:
        with pytest.raises(ValueError) as raised:
            solve(method, spec, options)
        assert reason in str(raised.value)
        return
    qt = solve(method, spec, options).qt
    assert qt.shape == (IN, OUT)
    assert np.isfinite(jaxq.dequantize(qt)).all()


def test_every_method_serves_most_presets():
    for method in methods.names():
        num_served = sum(
            not methods.why_not(method, preset) for preset in jaxq.presets()
        )
        assert num_served > len(jaxq.presets()) / 2


@pytest.mark.parametrize(("method", "spec", "options"), REFUSED)
def test_solve_raises_the_reason_of_why_not(method, spec, options):
    reason = methods.why_not(method, spec, options)
    assert reason
    with pytest.raises(ValueError) as raised:
        solve(method, spec, options or STEPS.get(method, {}))
    assert reason in str(raised.value)


def test_why_not_checks_the_name_of_the_method():
    with pytest.raises(ValueError, match="why_not: method.*gptp"):
        methods.why_not("gptp", "int4")
    assert methods.why_not("clip", OFFSET) == ""


@pytest.mark.parametrize("method", ROUND_STOCHASTICALLY)
def test_stochastic_rounding_is_solved_where_why_not_is_empty(method):
    assert methods.why_not(method, STOCHASTIC) == ""
    assert solve(method, STOCHASTIC, STEPS.get(method)).qt.shape == (IN, OUT)


def test_solve_rounds_stochastically_with_its_key():
    w, key = normal(2, IN, OUT), jax.random.key(3)
    solved = methods.solve("rtn", w, None, STOCHASTIC, key=key)
    expected = jaxq.quantize(w, STOCHASTIC, contracting=-2, batch=0, key=key)
    assert_same(solved.qt, expected)


@pytest.mark.parametrize(
    ("method", "options", "message"),
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
            "inputs=True is for rule='mse'",
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
def test_options_are_checked_when_a_rule_is_made(method, options, message):
    with pytest.raises(ValueError, match=message):
        jaxq.Rule(weight="int8", method=method, options=options)


def test_every_option_names_what_it_accepts():
    for name in methods.names():
        for option in methods.get(name).options.values():
            assert option.expected
            assert not option.accepts(object())


def test_options_survive_json():
    rule = jaxq.Rule(weight="int4", method="adaround", options={"beta": (20, 2)})
    loaded = jaxq.Rule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert loaded == rule
    assert hash(loaded) == hash(rule)


def test_a_registered_name_is_not_taken_over():
    gptq = methods.get("gptq")
    methods.register(gptq)  # the same record again changes nothing
    with pytest.raises(ValueError, match="'gptq' exists already"):
        methods.register(methods.Method("gptq", None))
    with pytest.raises(TypeError, match="must be a jaxq.methods.Method"):
        methods.register(methods.gptq)
    assert methods.get("gptq") is gptq


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": 3}, TypeError, "Method 3: name must be a non-empty string, got 3"),
        ({"name": ""}, TypeError, "name must be a non-empty string, got ''"),
        ({"solve": "text"}, TypeError, "solve must be a function or None, got 'text'"),
        ({"needs": ("hesian",)}, ValueError, r"needs must be .*hessian.*\('hesian',\)"),
        ({"needs": "hessian"}, TypeError, "needs must be a tuple .*got 'hessian'"),
        ({"needs": (1,)}, TypeError, r"needs must be a tuple .*got \(1,\)"),
        ({"options": {"speed": 2}}, TypeError, "options must be .*got {'speed': 2}"),
        ({"options": ["speed"]}, TypeError, r"options must be .*got \['speed'\]"),
        (
            {"options": {"speed": methods.Option(2, "2")}},
            TypeError,
            "options must be .*accepts=2",
        ),
        ({"check": 1}, TypeError, "check must be a function or None, got 1"),
        ({"why_not": None}, TypeError, "why_not must be a function, got None"),
        ({"needs_with": ()}, TypeError, r"needs_with must be .*got \(\)"),
        ({"granularity": "channel"}, TypeError, "granularity must be a function"),
        ({"folding": max}, TypeError, "folding must be a jaxq.methods.Folding or None"),
        ({"judged": "no"}, TypeError, "judged must be True or False, got 'no'"),
    ],
)
def test_a_record_with_an_invalid_field_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        methods.Method(**{"name": "fast", "solve": None} | fields)


def test_needs_may_name_each_statistic():
    fields = set(jaxq.observers.LayerStats._fields) - {"patches"}
    needs = (*sorted(fields), "absmax")
    assert methods.Method("fast", None, needs=needs).needs_data({})
    with pytest.raises(ValueError, match="needs must be a tuple of names"):
        methods.Method("fast", None, needs=("patches",))


def test_only_methods_of_users_can_be_unregistered():
    with pytest.raises(ValueError, match="'gptq' is one of jaxq's own methods"):
        methods.unregister("gptq")
    assert "gptq" in methods.names()
    with pytest.raises(ValueError, match=r"methods.unregister: name.*'gptp'.*'gptq'"):
        methods.unregister("gptp")


def test_check_options_names_its_caller():
    with pytest.raises(ValueError, match="^X: method must be one of .*got 'nope'"):
        methods.check_options("X", "nope", {})
    assert "check_options" not in methods.__all__


def test_an_unknown_method_is_named_with_similar_ones():
    with pytest.raises(ValueError, match=r"methods.get: name.*'gptp'.*'gptq'"):
        methods.get("gptp")
