"""A method of the user's own: registered, named in a Rule, judged and reported.

Everything that the method needs is in this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import methods
from tests.arrays import assert_same, normal

IN, HIDDEN, OUT = 32, 24, 8
BATCHES = [normal(48, IN, seed=seed) for seed in range(2)]


def shrink(w, spec, *, factor=0.9):
    """Rounds a weight on a grid whose range is `factor` times the weight's range."""
    scales = methods.rtn(w * factor, spec)[0]
    return jaxq.qtensor.requantize(w, scales)


def solve_shrink(w, stats, spec, *, key, factor=0.9):
    qt = shrink(w, spec, factor=factor)
    num_rows = int(np.sum(stats.count))
    return methods.Solution(qt, note=f"shrunk by {factor:g} after {num_rows} rows")


def why_not_shrink(spec, options):
    return "" if spec.symmetric else "only symmetric specs have one range to shrink"


SHRINK = methods.Method(
    name="shrink",
    solve=solve_shrink,
    options={"factor": methods.Option(lambda v: 0 < v <= 1, "above 0, at most 1")},
    why_not=why_not_shrink,
    needs=("absmax",),
)


@pytest.fixture(autouse=True)
def registered():
    methods.register(SHRINK)
    yield
    methods.unregister("shrink")


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(IN, HIDDEN, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(HIDDEN, OUT, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def recipe(**options):
    first = jaxq.Rule("first", weight="int4", method="shrink", options=options)
    return jaxq.Recipe([first, jaxq.Rule("second", weight="int8")])


def test_the_method_has_a_name():
    assert "shrink" in methods.names()
    assert methods.get("shrink") is SHRINK


def test_a_rule_quantizes_by_it_and_the_report_shows_it():
    model = Net()
    qmodel, report = jaxq.quantize_model(
        model, recipe(factor=0.8), calibration=BATCHES, fallback="none"
    )
    kernel = model.first.kernel.get_value()
    spec = jaxq.presets()["int4"]
    assert_same(qmodel.first.kernel.get_value(), shrink(kernel, spec, factor=0.8))
    row = next(row for row in report.quantized if row.path.startswith("first"))
    assert row.method == "shrink"
    assert row.loss > 0  # judged on held-out inputs
    assert "shrunk by 0.8 after" in row.note
    assert "shrink" in str(report)
    np.testing.assert_allclose(qmodel(BATCHES[0]), model(BATCHES[0]), atol=1.0)


def test_it_falls_back_where_rounding_to_nearest_is_better():
    model = Net()
    _, report = jaxq.quantize_model(model, recipe(factor=0.2), calibration=BATCHES)
    row = next(row for row in report.quantized if row.path.startswith("first"))
    assert row.method == "rtn"
    assert "shrink is worse than rtn on held-out inputs" in row.note
    with pytest.raises(ValueError, match="shrink is worse than rtn"):
        jaxq.quantize_model(
            model, recipe(factor=0.2), calibration=BATCHES, fallback="raise"
        )


def test_its_options_are_checked():
    with pytest.raises(ValueError, match="factor must be above 0, at most 1, got 2"):
        recipe(factor=2)
    with pytest.raises(ValueError, match="unknown option 'strength'.*'factor'"):
        recipe(strength=0.5)


def test_a_rule_refuses_what_it_refuses():
    with pytest.raises(ValueError, match="method 'shrink': only symmetric specs"):
        jaxq.Rule(weight="uint4", method="shrink")
    assert methods.why_not("shrink", "int4") == ""


def test_a_method_that_only_rounds_may_refuse_too():
    plain = methods.Method(
        "plain", solve=None, why_not=lambda spec, options: "only for other specs"
    )
    methods.register(plain)
    try:
        with pytest.raises(ValueError, match="'plain': only for other specs"):
            jaxq.Rule(weight="int4", method="plain")
    finally:
        methods.unregister("plain")


def test_it_needs_data():
    with pytest.raises(ValueError, match="'shrink' needs data"):
        jaxq.quantize_model(Net(), recipe())


def test_it_runs_on_a_matrix_alone():
    w = normal(IN, OUT)
    update = jax.jit(jaxq.observers.update_stats)
    rows = np.arange(48, dtype=np.int32)
    stats = update(jaxq.observers.empty_stats(IN), BATCHES[0], np.ones(48, bool), rows)
    solved = methods.solve("shrink", w, stats, jaxq.presets()["int8"])
    assert solved.method in ("shrink", "rtn")


def test_its_name_is_free_after_it_is_unregistered():
    twice = methods.Method("shrink_twice", solve_shrink, needs=("absmax",))
    methods.register(twice)
    assert methods.get("shrink_twice") is twice
    jaxq.Rule(weight="uint4", method="shrink_twice")
    methods.unregister("shrink_twice")
    assert "shrink_twice" not in methods.names()
    with pytest.raises(ValueError, match="method must be one of"):
        jaxq.Rule(weight="uint4", method="shrink_twice")


def test_an_invalid_record_leaves_the_other_methods_as_they_are():
    before = methods.names()
    with pytest.raises(TypeError, match="name must be a non-empty string, got 3"):
        methods.register(methods.Method(3, None))
    assert methods.names() == before
    jaxq.Rule(weight="int8", method="gptq")
