"""How good a language model is on a text, and how far it is from a reference model.

A model is any callable that maps tokens int32[b, t] to logits [b, t, vocab]. An nnx
module is compiled here, once per shape. Any other callable is called as it is, so jit
it yourself.

Both functions cut `tokens` into windows of `context` tokens that do not overlap. An
incomplete last window is dropped. In each window every token except the first is
predicted from the tokens before it in the same window. So `n` windows give
`n * (context - 1)` predictions. Log-probabilities are float32, and their sums are
float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.processes import to_numpy

__all__ = ["Comparison", "compare", "perplexity"]

# The exponential of a larger float64 number overflows.
_LARGEST_EXPONENT = 700


class Comparison(NamedTuple):
    """The result of `compare`, over the same predictions for both models.

    Attributes:
        perplexity: of the model.
        reference_perplexity: of the reference model.
        kl: mean KL(reference || model) in nats per token.
        top1_agreement: share of predictions for which both models rank the same token
            first.

    Example:
        >>> logits = lambda tokens: jnp.zeros((*tokens.shape, 50))
        >>> compare(logits, logits, np.arange(40), context=8).top1_agreement
        1.0
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float


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
    logits_of = _callable(model)
    total, count = 0.0, 0
    for batch in _batches("perplexity", tokens, batch_size, context):
        logits = _checked_logits("perplexity", logits_of, batch)
        losses = _negative_log_likelihood(logits, batch)  # [b, context - 1]
        total += to_numpy(losses).astype(np.float64).sum()
        count += batch.shape[0] * (context - 1)
    return _exp(total / count)


def compare(
    reference: Callable,
    model: Callable,
    tokens: Any,
    *,
    batch_size: int = 8,
    context: int = 256,
) -> Comparison:
    """Perplexities of two models on one text, and how much their predictions differ.

    Args:
        reference: the float model; maps int32[b, context] to logits
            [b, context, vocab].
        model: the quantized model, with the same vocabulary.
        tokens: integers [n], with n at least `context`.
        batch_size: windows per call. The last call may have fewer.
        context: window length in tokens, at least 2.

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
    totals, count = np.zeros(4, np.float64), 0
    for batch in _batches("compare", tokens, batch_size, context):
        expected = _checked_logits("compare", reference_logits_of, batch)
        logits = _checked_logits("compare", logits_of, batch)
        if expected.shape != logits.shape:
            raise ValueError(
                f"compare: the reference returns logits {list(expected.shape)}, the "
                f"model {list(logits.shape)}. Both must have the same vocabulary."
            )
        parts = _distances(expected, logits, batch)
        totals += [to_numpy(part).astype(np.float64).sum() for part in parts]
        count += batch.shape[0] * (context - 1)
    loss, reference_loss, kl, agreement = totals / count
    return Comparison(_exp(loss), _exp(reference_loss), float(kl), float(agreement))


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
) -> Iterator[jax.Array]:
    """Checks the tokens and yields their windows: int32[<= batch_size, context]."""
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
    for start in range(0, num_windows, batch_size):
        yield jnp.asarray(windows[start : start + batch_size])


def _checked_logits(caller: str, logits_of: Callable, batch: jax.Array) -> jax.Array:
    """The model's logits for a batch.

    A token id outside the vocabulary is an error here. Otherwise it would read NaN or
    the logit of another token.
    """
    logits = logits_of(batch)
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
def _distances(
    expected: jax.Array, logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, ...]:
    """Compares `logits` with the logits of the reference model, `expected`.

    Returns:
      Four float32 `[b, t - 1]`: the loss of `logits`, the loss of `expected`, the KL
      divergence, and top-1 agreement.
    """
    log_p = jax.nn.log_softmax(expected[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    # A token with p = 0 adds 0, also if q is 0. Banned tokens have the logit -inf.
    terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
    agreement = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    return (
        _negative_log_likelihood(logits, tokens),
        _negative_log_likelihood(expected, tokens),
        terms.sum(axis=-1),
        agreement.astype(jnp.float32),
    )


def _exp(mean: float) -> float:
    """The exponential of a mean loss; infinity if it overflows."""
    if math.isnan(mean):
        return math.nan
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
