"""Perplexity and comparison against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxq.evaluation import compare, estimate_perplexity, perplexity


class Bigram(nnx.Module):
    """Logits are a row of a table, so that every figure can be computed by hand."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def __call__(self, tokens):
        return self.table[...][tokens]


def table(seed, vocab=13):
    return np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


TOKENS = np.random.default_rng(0).integers(0, 13, 100)
# 12 windows of 8; the last 4 tokens are dropped; 7 predictions a window.
WINDOWS = TOKENS[:96].reshape(12, 8)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_perplexity_by_hand(batch_size):
    log_p = log_softmax(table(1))
    nll = -log_p[WINDOWS[:, :-1], WINDOWS[:, 1:]].mean()
    got = perplexity(Bigram(table(1)), TOKENS, batch_size=batch_size, context=8)
    assert isinstance(got, float)
    assert got == pytest.approx(np.exp(nll), rel=1e-5)


def test_uniform_guess_has_the_vocabulary_as_perplexity():
    assert perplexity(
        lambda t: jnp.zeros((*t.shape, 50)), np.arange(40), context=8
    ) == pytest.approx(50, rel=1e-6)


def test_any_callable_works():
    log_p = table(1)
    by_numpy = perplexity(lambda t: log_p[np.asarray(t)], TOKENS, context=8)
    assert by_numpy == pytest.approx(
        perplexity(Bigram(log_p), TOKENS, context=8), rel=1e-6
    )


def test_half_precision_logits_are_summed_in_float32():
    low = perplexity(
        lambda t: jnp.asarray(table(1))[t].astype(jnp.bfloat16), TOKENS, context=8
    )
    exact = perplexity(
        lambda t: jnp.asarray(table(1)).astype(jnp.bfloat16).astype(jnp.float32)[t],
        TOKENS,
        context=8,
    )
    assert low == exact


def test_comparison_by_hand():
    p, q = log_softmax(table(1)), log_softmax(table(2))
    rows = WINDOWS[:, :-1]
    kl = (np.exp(p) * (p - q)).sum(axis=-1)[rows].mean()
    same = (p.argmax(axis=-1) == q.argmax(axis=-1))[rows].mean()
    got = compare(Bigram(table(1)), Bigram(table(2)), TOKENS, batch_size=5, context=8)
    assert got.kl == pytest.approx(kl, rel=1e-5)
    assert got.top1_agreement == pytest.approx(same)
    assert got.perplexity == pytest.approx(
        perplexity(Bigram(table(2)), TOKENS, context=8), rel=1e-6
    )
    assert got.reference_perplexity == pytest.approx(
        perplexity(Bigram(table(1)), TOKENS, context=8), rel=1e-6
    )


def standard_error(values):
    """The standard error of a mean over windows: `[windows, predictions]`."""
    means = [float(sum(row) / len(row)) for row in values]
    center = sum(means) / len(means)
    variance = sum((mean - center) ** 2 for mean in means) / (len(means) - 1)
    return (variance / len(means)) ** 0.5


def test_errors_quantiles_and_flips_by_hand():
    p, q = log_softmax(table(1)), log_softmax(table(2))
    rows, right = WINDOWS[:, :-1], WINDOWS[:, 1:]
    kl = (np.exp(p) * (p - q)).sum(axis=-1)[rows]
    loss, reference_loss = -q[rows, right], -p[rows, right]
    got = compare(Bigram(table(1)), Bigram(table(2)), TOKENS, batch_size=5, context=8)
    ordered = np.sort(kl.ravel())
    assert (got.num_windows, got.num_predictions) == (12, 84)
    assert got.kl_error == pytest.approx(standard_error(kl), rel=1e-4)
    assert got.kl_max == pytest.approx(ordered[-1], rel=1e-5)
    assert got.kl_median == pytest.approx((ordered[41] + ordered[42]) / 2, rel=1e-5)
    # 83 steps between 84 numbers: 99 % lies 0.17 of a step after number 82.
    p99 = 0.83 * ordered[82] + 0.17 * ordered[83]
    assert got.kl_p99 == pytest.approx(p99, rel=1e-5)
    error = got.perplexity * standard_error(loss)
    assert got.perplexity_error == pytest.approx(error, rel=1e-4)
    error = got.reference_perplexity * standard_error(reference_loss)
    assert got.reference_perplexity_error == pytest.approx(error, rel=1e-4)
    ratio = got.perplexity / got.reference_perplexity
    assert got.perplexity_ratio == pytest.approx(ratio, rel=1e-6)
    error = ratio * standard_error(loss - reference_loss)
    assert got.perplexity_ratio_error == pytest.approx(error, rel=1e-4)
    is_right = q.argmax(axis=-1)[rows] == right
    was_right = p.argmax(axis=-1)[rows] == right
    assert got.flips_to_right == pytest.approx((is_right & ~was_right).mean())
    assert got.flips_to_wrong == pytest.approx((~is_right & was_right).mean())
    assert got.flips_to_right > 0
    assert got.flips_to_wrong > 0


def test_perplexity_with_its_error_by_hand():
    loss = -log_softmax(table(1))[WINDOWS[:, :-1], WINDOWS[:, 1:]]
    got = estimate_perplexity(Bigram(table(1)), TOKENS, batch_size=5, context=8)
    assert got.value == perplexity(Bigram(table(1)), TOKENS, batch_size=5, context=8)
    assert got.error == pytest.approx(got.value * standard_error(loss), rel=1e-4)
    assert (got.num_windows, got.num_predictions) == (12, 84)
    one = estimate_perplexity(Bigram(table(1)), TOKENS[:8], context=8)
    assert np.isnan(one.error)


def test_a_model_agrees_with_itself():
    model = Bigram(table(1))
    got = compare(model, model, TOKENS, context=8)
    assert got.kl == 0
    assert got.top1_agreement == 1
    assert got.perplexity == got.reference_perplexity
    assert got.perplexity_ratio == 1
    assert got.kl_max == got.flips_to_right == got.flips_to_wrong == 0


def test_banned_tokens_do_not_make_kl_nan():
    banned = table(1)
    banned[:, 4] = -np.inf
    other = table(2)
    other[:, 4] = -np.inf
    tokens = TOKENS[TOKENS != 4]
    assert np.isfinite(compare(Bigram(banned), Bigram(other), tokens, context=8).kl)


def test_nan_logits_are_not_hidden():
    broken = table(1)
    broken[WINDOWS[0, 0]] = np.nan
    assert np.isnan(perplexity(Bigram(broken), TOKENS, context=8))
    got = compare(Bigram(table(1)), Bigram(broken), TOKENS, context=8)
    assert np.isnan([got.kl, got.kl_error, got.kl_p99, got.kl_max]).all()


def test_a_module_is_traced_once_a_shape():
    traces = []

    class Counting(Bigram):
        def __call__(self, tokens):
            traces.append(tokens.shape)
            return super().__call__(tokens)

    model = Counting(table(1))
    perplexity(model, TOKENS, batch_size=5, context=8)
    perplexity(model, TOKENS, batch_size=5, context=8)
    assert traces == [(5, 8), (2, 8)]


def test_works_on_jax_arrays_and_within_the_last_window():
    exact = perplexity(Bigram(table(1)), TOKENS[:96], context=8)
    assert perplexity(Bigram(table(1)), jnp.asarray(TOKENS), context=8) == exact
    assert perplexity(Bigram(table(1)), TOKENS[:8], context=8) > 1


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        (TOKENS[:7], {}, "7 tokens do not fill one window of context=8"),
        (TOKENS[:0], {}, "0 tokens do not fill one window"),
        (
            TOKENS.astype(np.float32),
            {},
            r"tokens is float32\[100\]; expected a one-dimensional integer array",
        ),
        (
            TOKENS[None],
            {},
            r"tokens is int64\[1, 100\]; expected a one-dimensional integer array",
        ),
        (np.where(TOKENS == 5, -1, TOKENS), {}, r"tokens are in \[-1, 12\]"),
        (
            np.where(TOKENS == 5, 13, TOKENS),
            {},
            "token id 13 is outside the vocabulary of 13",
        ),
        (TOKENS, {"context": 1}, "context >= 2"),
        (TOKENS, {"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_errors(tokens, kwargs, message):
    kwargs = {"context": 8} | kwargs
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(table(1)), tokens, **kwargs)
    with pytest.raises(ValueError, match=message):
        compare(Bigram(table(1)), Bigram(table(2)), tokens, **kwargs)


def test_logits_of_a_wrong_shape_are_an_error():
    with pytest.raises(ValueError, match=r"expected logits \[8, 8, vocab\]"):
        perplexity(lambda t: jax.nn.one_hot(t[:, 0], 13), TOKENS, context=8)


def test_different_vocabularies_are_an_error():
    with pytest.raises(ValueError, match="Both must have the same vocabulary"):
        compare(Bigram(table(1)), Bigram(table(1, vocab=17)), TOKENS, context=8)
