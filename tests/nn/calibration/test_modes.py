"""Calibration runs in eval mode, or says that it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxq
from tests.arrays import assert_same, normal

STATIC = jaxq.Recipe([jaxq.Rule(weight="int8", activation="int8", observer="absmax")])
BATCHES = [normal(16, 8, seed=seed) + 1 for seed in range(2)]


class Network(nnx.Module):
    """Dropout and batch normalization before a layer: [b, 8] -> [b, 4]."""

    def __init__(self):
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.linear = nnx.Linear(8, 4, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.linear(self.dropout(self.norm(x)))


def test_statistics_are_those_of_eval_mode():
    model, evaluated = Network(), Network()
    evaluated.eval()
    stats = jaxq.nn.calibrate(model, BATCHES)
    assert_same(stats, jaxq.nn.calibrate(evaluated, BATCHES))
    # The running averages of a new norm are 0 and 1: its outputs are its inputs.
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    np.testing.assert_allclose(stats["linear"].absmax.max(), largest, rtol=1e-4)


def test_the_quantized_model_has_the_mode_of_the_model():
    model, evaluated = Network(), Network()
    evaluated.eval()
    arrays = (nnx.Param, nnx.BatchStat)
    before = nnx.state(model, arrays)
    qmodel, report = jaxq.quantize_model(model, STATIC, calibration=BATCHES)
    assert_same(nnx.state(model, arrays), before)
    for network in (model, qmodel):
        assert network.dropout.deterministic is False
        assert network.norm.use_running_average is False
    assert_same(nnx.state(qmodel, nnx.BatchStat), nnx.state(model, nnx.BatchStat))
    note = "the model is in train mode (dropout, norm)"
    assert any(text.startswith(note) for text in report.notes)
    qevaluated, eval_report = jaxq.quantize_model(
        evaluated, STATIC, calibration=BATCHES
    )
    assert qevaluated.dropout.deterministic is True
    assert not any("mode" in text for text in eval_report.notes)
    assert_same(qmodel.linear.kernel[...], qevaluated.linear.kernel[...])
    assert report.output_sqnr == eval_report.output_sqnr
    assert report.output_sqnr > 35


class Forced(nnx.Module):
    """A network whose own code or arguments set train mode: [b, 8] -> [b, 4].

    Args:
      force: "call" calls its dropout with deterministic=False. "norm" does the same to
        its batch normalization. "flag" draws random numbers, as its flag says.
    """

    def __init__(self, force=""):
        self.force, self.training = force, True
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.linear = nnx.Linear(8, 4, rngs=nnx.Rngs(2))

    def __call__(self, x, deterministic=None):
        if self.force == "call":
            deterministic = False
        if self.force == "flag" and self.training:
            keep = jax.random.bernoulli(self.dropout.rngs(), 0.5, x.shape)
            x = jnp.where(keep, 2 * x, 0)
        average = False if self.force == "norm" else None
        x = self.norm(x, use_running_average=average)
        return self.linear(self.dropout(x, deterministic=deterministic))


ARGUMENTS = [{"x": x, "deterministic": False} for x in BATCHES]
RANDOM, NORM = "random numbers are drawn", "the running averages of norm change"


@pytest.mark.parametrize(
    ("force", "batches", "action"),
    [
        ("call", BATCHES, RANDOM),
        ("flag", BATCHES, RANDOM),
        ("norm", BATCHES, NORM),
        ("", ARGUMENTS, RANDOM),
        ("", [BATCHES[0], ARGUMENTS[1]], RANDOM),
    ],
)
def test_train_mode_that_a_call_sets_is_said(force, batches, action):
    model = Forced(force)
    arrays = (nnx.Param, nnx.BatchStat, nnx.RngCount)
    before = jax.tree.map(jnp.copy, nnx.state(model, arrays))
    _, report = jaxq.quantize_model(model, STATIC, calibration=batches)
    assert_same(nnx.state(model, arrays), before)
    notes = [note for note in report.notes if "eval mode" in note]
    assert len(notes) == 1
    assert (
        f"did not run in eval mode, although model.eval() was called: {action}"
        in (notes[0])
    )


def test_calibrate_warns_of_train_mode_that_a_call_sets():
    with pytest.warns(UserWarning, match="calibrate: .*random numbers are drawn"):
        jaxq.nn.calibrate(Forced(), iter(ARGUMENTS))
    stats = jaxq.nn.calibrate(Forced("norm"), [BATCHES[0]], forward=eval_forward)
    assert float(stats["linear"].count) == 14


def eval_forward(model, x):
    """Runs the layers without the method that sets train mode."""
    return model.linear(model.norm(x))


class LinenNetwork(linen.Module):
    """The same network in linen. `train` sets the modes of its layers."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.Dropout(0.5, name="dropout")(x, deterministic=not train)
        return linen.Dense(4, name="dense")(x)


@pytest.fixture(scope="module")
def variables():
    return LinenNetwork().init(jax.random.key(0), BATCHES[0])


def training(x):
    """A batch that runs in train mode."""
    rngs = {"dropout": jax.random.key(1)}
    return {"x": x, "train": True, "rngs": rngs, "mutable": ["batch_stats"]}


def test_linen_says_that_a_batch_runs_in_train_mode(variables):
    batches = [training(x) for x in BATCHES]
    expected = "norm normalizes by the statistics of each batch, dropout drops numbers"
    with pytest.warns(UserWarning, match=expected):
        jaxq.nn.linen.calibrate(LinenNetwork(), variables, batches)
    _, _, report = jaxq.nn.linen.quantize_model(
        LinenNetwork(), variables, STATIC, calibration=batches
    )
    assert sum(expected in note for note in report.notes) == 1


@pytest.mark.filterwarnings("error")
def test_linen_in_eval_mode_says_nothing(variables):
    stats = jaxq.nn.linen.calibrate(LinenNetwork(), variables, BATCHES)
    assert float(stats["dense"].count) == 28
    _, _, report = jaxq.nn.linen.quantize_model(
        LinenNetwork(), variables, STATIC, calibration=BATCHES
    )
    assert not any("mode" in note for note in report.notes)
    assert report.output_sqnr > 35


@pytest.mark.filterwarnings("error")
def test_linen_dropout_of_rate_zero_is_eval_mode():
    module = linen.Sequential([linen.Dropout(0.0, deterministic=False), linen.Dense(4)])
    variables = module.init(jax.random.key(0), BATCHES[0])
    jaxq.nn.linen.calibrate(module, variables, BATCHES)


def test_linen_code_that_draws_random_numbers_is_train_mode():
    class Noisy(linen.Module):
        """Its own dropout."""

        @linen.compact
        def __call__(self, x):
            keep = jax.random.bernoulli(self.make_rng("noise"), 0.5, x.shape)
            return linen.Dense(4)(jnp.where(keep, 2 * x, 0))

    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    variables = Noisy().init(keys, BATCHES[0])
    batch = {"x": BATCHES[0], "rngs": {"noise": jax.random.key(2)}}
    with pytest.warns(UserWarning, match="train mode: random numbers are drawn"):
        jaxq.nn.linen.calibrate(Noisy(), variables, [batch])


def test_linen_attention_that_drops_is_train_mode():
    module = linen.MultiHeadDotProductAttention(2, dropout_rate=0.5)
    x = normal(2, 4, 8)
    variables = module.init(jax.random.key(0), x, deterministic=True)
    batch = {"inputs_q": x, "deterministic": False}
    batch["rngs"] = {"dropout": jax.random.key(1)}
    with pytest.warns(UserWarning, match="drops numbers at random"):
        jaxq.nn.linen.calibrate(module, variables, [batch])
