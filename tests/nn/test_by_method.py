"""quantize_model by methods that look at data: what they gain on data they have not seen, and what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq import methods
from jaxq.models import Llama, LlamaConfig
from tests.ops.reference import normal

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


def correlated(num: int, k: int, seed: int = 0) -> jax.Array:
    """Rows of which a few directions are most."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(k, k)) * np.exp(-np.arange(k) / 6)[:, None]
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, k)) @ mix, jnp.float32)


class Pair(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
        self.second = nnx.LinearGeneral(24, (2, 8), rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


BATCHES = [correlated(128, 32, seed) for seed in range(3)]


def quantize(method, model=None, spec="int3", **how):
    options = how.pop("options", {})
    recipe = jaxq.Recipe([jaxq.Rule(weight=spec, method=method, options=options)])
    return jaxq.quantize_model(Pair() if model is None else model, recipe, **how)


OPTIONS = {"adaround": {"num_steps": 200}, "kmeans": {"granularity": jaxq.PerChannel()}}


@pytest.mark.parametrize("method", sorted(set(methods.names()) - {"awq", "smoothquant", "rtn", "llm_int8"}))
def test_every_method_runs_and_those_that_fit_outputs_gain_on_new_inputs(method):
    model, fresh = Pair(), correlated(256, 32, seed=99)
    qmodel, report = quantize(method, model, calibration=BATCHES, fallback="none", options=OPTIONS.get(method, {}))
    rounded, _ = quantize("rtn", model)
    error = [float(jnp.linalg.norm(q(fresh) - model(fresh))) for q in (qmodel, rounded)]
    if method in ("gptq", "adaround", "kmeans"):
        assert error[0] < error[1]
    assert {row.method for row in report.quantized} == {method}
    assert all(row.loss is not None for row in report.quantized)
    assert method in str(report)


def test_a_result_is_what_the_matrix_method_gives():
    model = Pair()
    qmodel, _ = quantize("gptq", model, calibration=BATCHES, fallback="none")
    stats = jaxq.nn.calibrate(model, BATCHES)
    for name, w in (("first", model.first.kernel[...]), ("second", model.second.kernel[...])):
        qt, _ = methods.gptq(w.reshape(w.shape[0], -1), stats[name].hessian, "int3")
        found = getattr(qmodel, name).kernel[...]
        assert found.shape == w.shape
        np.testing.assert_array_equal(found.codes().reshape(qt.shape), qt.codes())
        jax.tree.map(np.testing.assert_array_equal, jaxq.dequantize(found).reshape(qt.shape), jaxq.dequantize(qt))


def test_statistics_made_before_give_the_same_model(tmp_path):
    model = Pair()
    stats = jaxq.nn.calibrate(model, BATCHES)
    first, _ = quantize("gptq", model, calibration=BATCHES)
    second, _ = quantize("gptq", model, calibration=stats)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


def test_results_save_and_load_on_the_float_model(tmp_path):
    model = Pair()
    qmodel, _ = quantize("kmeans", model, options=OPTIONS["kmeans"])
    jaxq.save(tmp_path / "q.safetensors", qmodel)
    loaded = jaxq.load(tmp_path / "q.safetensors", into=model)
    np.testing.assert_array_equal(loaded(BATCHES[0]), qmodel(BATCHES[0]))


def test_worse_than_rounding_falls_back_and_says_so(monkeypatch):
    def bad(w, stats, spec, key):
        return methods.rtn(0.5 * w, spec)[0], ""

    monkeypatch.setitem(methods.METHODS, "gptq", methods.METHODS["gptq"]._replace(solve=bad))
    model = Pair()
    qmodel, report = quantize("gptq", model, calibration=BATCHES)
    rounded, _ = quantize("rtn", model)
    assert [row.method for row in report.quantized] == ["rtn", "rtn"]
    assert all("gptq is worse than rtn on held-out inputs" in row.note for row in report.quantized)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(qmodel), nnx.state(rounded))
    _, report = quantize("gptq", model, calibration=BATCHES, fallback="none")
    assert all(row.loss > 1 for row in report.quantized)
    with pytest.raises(ValueError, match="worse than rtn"):
        quantize("gptq", model, calibration=BATCHES, fallback="raise")


def test_sequential_quantizes_on_what_came_before():
    """The second layer's hessian is that of the inputs it really gets."""
    model = Pair()
    qmodel, _ = quantize("gptq", model, calibration=BATCHES, sequential=True, fallback="none", spec="int2")
    seen = jaxq.nn.calibrate(
        jaxq.quantize_model(
            model,
            jaxq.Recipe([jaxq.Rule("first", weight="int2", method="gptq"), jaxq.Rule("second", skip=True)]),
            calibration=BATCHES,
            fallback="none",
        )[0],
        BATCHES,
        layers=["second"],
    )
    qt, _ = methods.gptq(model.second.kernel[...].reshape(24, -1), seen["second"].hessian, "int2")
    np.testing.assert_array_equal(qmodel.second.kernel[...].codes().reshape(24, -1), qt.codes())


def test_fewer_rows_than_inputs_are_said():
    _, report = quantize("gptq", calibration=[correlated(16, 32)])
    assert all("only 14 rows for" in row.note or row.method == "rtn" for row in report.quantized)
    assert any("only 14 rows for 32 inputs" in row.note for row in report.quantized)


def test_what_cannot_be_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"(?s)first: method 'gptq' needs data.*second: method 'gptq' needs data"):
        quantize("gptq")
    with pytest.raises(ValueError, match="nothing is known of that in Pair"):
        quantize("awq", calibration=BATCHES)
    with pytest.raises(ValueError, match=r"(?s)Conv.*is for Linear, LinearGeneral and Einsum"):
        quantize("gptq", nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)), calibration=[normal(2, 8, 4)])
    with pytest.raises(ValueError, match="method must be one of"):
        jaxq.Rule(weight="int4", method="gpqt")
    with pytest.raises(ValueError, match=r"unknown option 'num_step'.*num_steps"):
        jaxq.Rule(weight="int4", method="hqq", options={"num_step": 1})
    with pytest.raises(ValueError, match="options .* need a method"):
        jaxq.Rule(weight="int4", options={"typo": 1})
    with pytest.raises(ValueError, match="takes no observer"):
        jaxq.Rule(weight="int8", activation="int8", method="llm_int8", observer="absmax")
    with pytest.raises(TypeError, match=r"pass \[x\]"):
        quantize("gptq", calibration=BATCHES[0])
    with pytest.raises(ValueError, match="no statistics of"):
        quantize("gptq", calibration={})
    with pytest.raises(ValueError, match="sequential=True needs calibration"):
        quantize("hqq", sequential=True)
    with pytest.raises(ValueError, match="fallback must be one of"):
        quantize("hqq", fallback="maybe")


# Methods that fold scales.


@pytest.fixture(scope="module")
def llama():
    return jaxq.models.with_outliers(Llama(CONFIG, rngs=nnx.Rngs(0)), channels=[3, 40], strength=64.0)


@pytest.fixture(scope="module")
def tokens():
    return [jnp.asarray(np.random.default_rng(seed).integers(0, 64, (8, 16)), jnp.int32) for seed in range(2)]


@pytest.mark.parametrize(
    ("recipe", "plain"), [("w8a8_smoothquant", "w8a8"), ("int4_awq", "int4"), ("llm_int8", "w8a8")]
)
def test_outliers_are_dealt_with(llama, tokens, recipe, plain):
    fresh = jnp.asarray(np.random.default_rng(9).integers(0, 64, (4, 16)), jnp.int32)
    expected = llama(fresh)
    qmodel, report = jaxq.quantize_model(llama, recipe, calibration=tokens)
    rounded, _ = jaxq.quantize_model(llama, plain)
    error = [float(jnp.linalg.norm(q(fresh) - expected)) for q in (qmodel, rounded)]
    assert error[0] < (0.5 if recipe != "int4_awq" else 1.0) * error[1]
    assert {row.method for row in report.quantized} <= {recipe.rpartition("_")[2], "llm_int8", "rtn"}


def test_statistics_cannot_be_folded(llama, tokens):
    stats = jaxq.nn.calibrate(llama, tokens)
    with pytest.raises(ValueError, match="needs the batches themselves"):
        jaxq.quantize_model(llama, "w8a8_smoothquant", calibration=stats)


def test_a_foreign_class_can_say_where_scales_fold(llama, tokens):
    class Mine(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, tokens):
            return self.inner(tokens)

    groups = [g._replace(source=f"inner/{g.source}", targets=tuple(f"inner/{t}" for t in g.targets))
              for g in llama.scale_groups()]  # fmt: skip

    def fold(model, scales):
        return Mine(model.inner.fold_scales({k.removeprefix("inner/"): s for k, s in scales.items()}))

    jaxq.nn.register_folding(Mine, lambda model: groups, fold)
    outer, _ = jaxq.quantize_model(Mine(llama), "w8a8_smoothquant", calibration=tokens)
    inner, _ = jaxq.quantize_model(llama, "w8a8_smoothquant", calibration=tokens)
    np.testing.assert_array_equal(outer(tokens[0]), inner(tokens[0]))


def test_a_held_out_row_that_is_not_finite_is_found():
    x = normal(16, 64).at[-1, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="held out for judging is not finite"):
        jaxq.nn.calibrate(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), [x])


def test_kmeans_falls_back_to_rounding_in_its_own_blocks():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    options = {"granularity": jaxq.PerTensor(), "num_steps": 0}
    rule = jaxq.Rule(weight=jaxq.QuantSpec("int4", jaxq.PerGroup(16)), method="kmeans", options=options)
    _, report = jaxq.quantize_model(layer, jaxq.Recipe([rule]), calibration=[normal(64, 64)])
    row = report.quantized[0]
    assert row.method in ("kmeans", "rtn")
    assert row.granularity.startswith("PerTensor")


def test_few_rows_are_said():
    rule = jaxq.Rule(weight="int4", method="adaround", options={"num_steps": 2})
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    _, report = jaxq.quantize_model(layer, jaxq.Recipe([rule]), calibration=[normal(16, 64)], fallback="none")
    assert "fitted to" in report.quantized[0].note
    assert "rows of 64 inputs" in report.quantized[0].note


def test_llm_int8_takes_the_rules_activation():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    spec = jaxq.QuantSpec("int8", symmetric=False)
    rule = jaxq.Rule(weight="int8", activation=spec, method="llm_int8", options={"threshold": 4.0})
    q, _ = jaxq.quantize_model(layer, jaxq.Recipe([rule]))
    meta = q.kernel[...].meta
    assert (meta.activation, meta.outliers) == (spec, 4.0)
