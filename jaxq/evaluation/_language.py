"""How good a language model is on a text, and how far it is from a reference model.

A model is any callable that maps tokens int32[b, t] to logits [b, t, vocab]. An nnx
module is compiled here, once per shape. Any other callable is called as it is, so jit
it yourself.

All functions cut `tokens` into windows of `context` tokens that do not overlap. An
incomplete last window is dropped. In each window every token except the first is
predicted from the tokens before it in the same window. So `n` windows give
`n * (context - 1)` predictions. Log-probabilities are float32, and their sums are
float64.

Standard errors are those over windows. The predictions of one window depend on each
other, so an error over single predictions would be too small. With one window an error
is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.processes import to_numpy
from jaxq.progress import with_progress

# The exponential of a larger float64 number overflows.
_LARGEST_EXPONENT = 700


class Estimate(NamedTuple):
    """A number that was measured on windows of a text.

    Attributes:
        value: the number.
        error: its standard error over windows. NaN if there is one window.
        num_windows: how many windows of the text were read.
        num_predictions: how many tokens were predicted.

    Example:
        >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 50))
        >>> measured = estimate_perplexity(uniform, np.arange(40), context=8)
        >>> measured.num_windows, measured.num_predictions
        (5, 35)
    """

    value: float
    error: float
    num_windows: int
    num_predictions: int


class Comparison(NamedTuple):
    """The result of `compare`, over the same predictions for both models.

    KL is KL(reference || model) in nats. The names end in `_error` for standard errors
    over windows; they are NaN if there is one window.

    Attributes:
        perplexity: of the model.
        reference_perplexity: of the reference model.
        kl: mean KL per token.
        top1_agreement: share of predictions for which both models rank the same token
            first.
        perplexity_error: the error of `perplexity`.
        reference_perplexity_error: the error of `reference_perplexity`.
        perplexity_ratio: `perplexity / reference_perplexity`.
        perplexity_ratio_error: the error of the ratio. Both models read the same
            windows, so it is much smaller than the errors of the two perplexities.
        kl_error: the error of `kl`.
        kl_median: the median of KL over tokens.
        kl_p99: the 99th percentile of KL over tokens.
        kl_max: the largest KL of a token.
        flips_to_right: share of predictions where only the model ranks the token of the
            text first.
        flips_to_wrong: share of predictions where only the reference does.
        num_windows: how many windows of the text were read.
        num_predictions: how many tokens were predicted.

    Example:
        >>> logits = lambda tokens: jnp.zeros((*tokens.shape, 50))
        >>> compare(logits, logits, np.arange(40), context=8).top1_agreement
        1.0

    References:
        Dutta et al., Accuracy is Not All You Need, 2024 (flips).
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float
    perplexity_error: float
    reference_perplexity_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    kl_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    flips_to_right: float
    flips_to_wrong: float
    num_windows: int
    num_predictions: int


def perplexity(
    model: Callable, tokens: Any, *, batch_size: int = 8, context: int = 256
) -> float:
    """Perplexity of a model on a text: `exp(-mean_i log p(x_i | x_<i))`.

    Args:
        model: maps int32[b, context] to logits [b, context, vocab].
        tokens: integers [n], with n at least `context`.
        batch_size: windows per call. The last call may have fewer.
        context: window length in tokens, at least 2.

    Returns:
        The perplexity, at least 1. A model that guesses uniformly has the perplexity
        `vocab`.

    Raises:
        ValueError: `tokens` is too short, is not one-dimensional, does not hold
            integers, or holds an id outside the vocabulary; or the logits do not have
            the shape [b, context, vocab].

    Example:
        >>> perplexity(lambda t: jnp.zeros((*t.shape, 50)), np.arange(40), context=8)
        50.0...
    """
    losses = _losses("perplexity", model, tokens, batch_size, context, False)
    return _exp(float(losses.mean()))


def estimate_perplexity(
    model: Callable,
    tokens: Any,
    *,
    batch_size: int = 8,
    context: int = 256,
    progress: bool | None = False,
) -> Estimate:
    """Perplexity of a model on a text, with its standard error.

    Args:
        model: as in `perplexity`.
        tokens: as in `perplexity`.
        batch_size: as in `perplexity`.
        context: as in `perplexity`.
        progress: show a progress line. None shows it if stderr is a terminal.

    Returns:
        An `Estimate`. The error is `perplexity * e`, where e is the standard error of
        the mean loss over windows.

    Raises:
        ValueError: as for `perplexity`.

    Example:
        >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 50))
        >>> measured = estimate_perplexity(uniform, np.arange(40), context=8)
        >>> round(measured.value, 3), round(measured.error, 3)
        (50.0, 0.0)
    """
    caller = "estimate_perplexity"
    losses = _losses(caller, model, tokens, batch_size, context, progress)
    value = _exp(float(losses.mean()))
    return Estimate(value, value * _standard_error(losses), *_counts(losses))


def compare(
    reference: Callable,
    model: Callable,
    tokens: Any,
    *,
    batch_size: int = 8,
    context: int = 256,
    progress: bool | None = False,
) -> Comparison:
    """Perplexities of two models on one text, and how much their predictions differ.

    Args:
        reference: the float model; maps int32[b, context] to logits
            [b, context, vocab].
        model: the quantized model, with the same vocabulary.
        tokens: integers [n], with n at least `context`.
        batch_size: windows per call. The last call may have fewer.
        context: window length in tokens, at least 2.
        progress: show a progress line. None shows it if stderr is a terminal.

    Returns:
        A `Comparison`. Two equal models have `kl` 0 and `top1_agreement` 1.

    Raises:
        ValueError: as for `perplexity`; or the two vocabularies differ.

    Example:
        >>> table = jnp.linspace(0.0, 4.0, 50).reshape(5, 10)
        >>> result = compare(
        ...     lambda t: table[t], lambda t: jnp.round(table)[t], np.arange(40) % 5,
        ...     context=8)
        >>> 0 < result.kl < 0.1
        True
    """
    reference_logits_of, logits_of = _callable(reference), _callable(model)
    batches = _batches("compare", tokens, batch_size, context)
    parts = []
    for batch in with_progress(batches, "comparing, batch", progress):
        expected = _checked_logits("compare", reference_logits_of, batch)
        logits = _checked_logits("compare", logits_of, batch)
        if expected.shape != logits.shape:
            raise ValueError(
                f"compare: the reference returns logits {list(expected.shape)}, the "
                f"model {list(logits.shape)}. Both must have the same vocabulary."
            )
        parts.append(_host(_distances(expected, logits, batch)))
    # Each is float64 [windows, context - 1].
    joined = _Distances(*map(np.concatenate, zip(*parts, strict=True)))
    return _comparison(joined)


class _Distances(NamedTuple):
    """What `compare` measures of each prediction; each `[windows, context - 1]`."""

    loss: Any
    reference_loss: Any
    kl: Any
    agrees: Any
    becomes_right: Any
    becomes_wrong: Any


def _comparison(distances: _Distances) -> Comparison:
    """The numbers of all predictions together."""
    loss, reference_loss = distances.loss, distances.reference_loss
    perplexity, reference = _exp(float(loss.mean())), _exp(float(reference_loss.mean()))
    difference = loss - reference_loss
    ratio = _exp(float(difference.mean()))
    median, p99, largest = _quantiles(distances.kl)
    num_windows, num_predictions = _counts(loss)
    return Comparison(
        perplexity=perplexity,
        reference_perplexity=reference,
        kl=float(distances.kl.mean()),
        top1_agreement=float(distances.agrees.mean()),
        perplexity_error=perplexity * _standard_error(loss),
        reference_perplexity_error=reference * _standard_error(reference_loss),
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * _standard_error(difference),
        kl_error=_standard_error(distances.kl),
        kl_median=median,
        kl_p99=p99,
        kl_max=largest,
        flips_to_right=float(distances.becomes_right.mean()),
        flips_to_wrong=float(distances.becomes_wrong.mean()),
        num_windows=num_windows,
        num_predictions=num_predictions,
    )


def _losses(
    caller: str,
    model: Callable,
    tokens: Any,
    batch_size: int,
    context: int,
    progress: bool | None,
) -> np.ndarray:
    """The loss of each prediction in nats: float64 [windows, context - 1]."""
    logits_of = _callable(model)
    batches = _batches(caller, tokens, batch_size, context)
    parts = []
    for batch in with_progress(batches, "perplexity, batch", progress):
        logits = _checked_logits(caller, logits_of, batch)
        parts.append(to_numpy(_negative_log_likelihood(logits, batch)))
    return np.concatenate(parts).astype(np.float64)


def _standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of `[windows, predictions]`, over windows."""
    num_windows = len(values)
    if num_windows < 2:
        return math.nan
    # An infinite loss gives NaN, which is meant.
    with np.errstate(invalid="ignore"):
        deviation = np.std(values.mean(axis=1), ddof=1)
    return float(deviation / math.sqrt(num_windows))


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    """The median, the 99th percentile and the maximum."""
    if not np.isfinite(values).all():
        # A percentile between two infinities is NaN, and numpy would warn.
        return math.nan, math.nan, float(values.max())
    median, p99 = np.percentile(values, [50, 99])
    return float(median), float(p99), float(values.max())


def _counts(values: np.ndarray) -> tuple[int, int]:
    """The number of windows and of predictions."""
    return values.shape[0], values.size


def _host(distances: _Distances) -> _Distances:
    return _Distances(*(to_numpy(part).astype(np.float64) for part in distances))


def _callable(model: Callable) -> Callable:
    """A function of tokens; nnx modules are compiled."""
    if isinstance(model, nnx.Module):
        return functools.partial(_module_logits, model)
    return model


@nnx.jit
def _module_logits(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _batches(
    caller: str, tokens: Any, batch_size: int, context: int
) -> list[np.ndarray]:
    """Checks the tokens and returns their windows: int32[<= batch_size, context]."""
    array = to_numpy(tokens)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{caller}: tokens is {array.dtype}{list(array.shape)}; expected a "
            "one-dimensional integer array. Concatenate several texts, for example "
            "np.asarray(tokenizer.encode(text).ids)."
        )
    if batch_size < 1 or context < 2:
        raise ValueError(
            f"{caller}: batch_size={batch_size}, context={context}; expected "
            "batch_size >= 1 and context >= 2. The first token of a window is not "
            "predicted."
        )
    num_windows = len(array) // context
    if num_windows == 0:
        raise ValueError(
            f"{caller}: {len(array)} tokens do not fill one window of "
            f"context={context}. Pass more tokens, or a shorter context (at least 2)."
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{caller}: tokens are in [{array.min()}, {array.max()}]; token ids must "
            "not be negative and must fit in int32."
        )
    windows = array[: num_windows * context].astype(np.int32)
    windows = windows.reshape(num_windows, context)
    starts = range(0, num_windows, batch_size)
    return [windows[start : start + batch_size] for start in starts]


def _checked_logits(caller: str, logits_of: Callable, batch: np.ndarray) -> jax.Array:
    """The model's logits for a batch.

    A token id outside the vocabulary is an error here. Otherwise it would read NaN or
    the logit of another token.
    """
    logits = logits_of(jnp.asarray(batch))
    b, t = batch.shape
    if getattr(logits, "ndim", None) != 3 or logits.shape[:2] != (b, t):
        result = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(
            f"{caller}: the model returns {result} for tokens [{b}, {t}]; expected "
            f"logits [{b}, {t}, vocab]."
        )
    if int(batch.max()) >= logits.shape[-1]:
        raise ValueError(
            f"{caller}: token id {int(batch.max())} is outside the vocabulary of "
            f"{logits.shape[-1]} tokens. Use the tokenizer that the model was trained "
            "with."
        )
    return jnp.asarray(logits)


@jax.jit
def _negative_log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """`-log p` of every token except the first: [b, t, vocab], [b, t] -> [b, t - 1]."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _distances(expected: jax.Array, logits: jax.Array, tokens: jax.Array) -> _Distances:
    """Compares `logits` with the logits of the reference model, `expected`."""
    log_p = jax.nn.log_softmax(expected[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    # A token with p = 0 adds 0, also if q is 0. Banned tokens have the logit -inf.
    terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
    top, reference_top = log_q.argmax(axis=-1), log_p.argmax(axis=-1)  # [b, t - 1]
    is_right, reference_is_right = top == tokens[:, 1:], reference_top == tokens[:, 1:]
    return _Distances(
        loss=_negative_log_likelihood(logits, tokens),
        reference_loss=_negative_log_likelihood(expected, tokens),
        kl=terms.sum(axis=-1),
        agrees=top == reference_top,
        becomes_right=is_right & ~reference_is_right,
        becomes_wrong=reference_is_right & ~is_right,
    )


def _exp(mean: float) -> float:
    """The exponential of a mean loss; infinity if it overflows."""
    if math.isnan(mean):
        return math.nan
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
