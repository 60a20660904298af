"""How good a language model is on a text, and how far a quantized one has moved from its reference.

Models are anything that maps int32[b, t] tokens to [b, t, vocab] logits: an nnx module (compiled here, once a shape),
or any other callable (called as it is: jit it yourself).

Both functions cut `tokens` into non-overlapping windows of `context` tokens, dropping a last partial window. In each
window every token but the first is predicted from those before it in the same window, so `n` windows give
`n * (context - 1)` predictions. Log-probabilities are float32, their sums float64.
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

__all__ = ["Comparison", "compare", "perplexity"]


class Comparison(NamedTuple):
    """What `compare` measures, over the same predictions for both models.

    Attributes:
        perplexity: of the model.
        reference_perplexity: of the reference.
        kl: mean KL(reference || model) in nats a token.
        top1_agreement: fraction of predictions where both rank the same token first.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float


def perplexity(
    model: Callable, tokens: Any, *, batch_size: int = 8, context: int = 256
) -> float:
    """`exp` of the mean negative log-likelihood a predicted token: `exp(-mean_i log p(x_i | x_<i))`.

    Args:
        model: maps int32[b, context] to logits [b, context, vocab].
        tokens: 1-D integers, at least `context` of them.
        batch_size: windows a call; the last call may hold fewer.
        context: window length in tokens, at least 2.

    Returns:
        The perplexity, >= 1; a uniform guess gives the vocabulary size.

    Raises:
        ValueError: tokens are too few, not 1-D, not integers or outside the vocabulary, or the logits are not
            [b, context, vocab].

    Example:
        >>> perplexity(lambda t: jnp.zeros((*t.shape, 50)), np.arange(40), context=8)
        50.0...
    """
    logits_of = _callable(model)
    total, count = 0.0, 0
    for batch in _batches("perplexity", tokens, batch_size, context):
        logits = _checked("perplexity", logits_of, batch)
        total += np.asarray(_nll(logits, batch), np.float64).sum()
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
    """Perplexities of two models on the same text, and the distance between their predictions.

    Args:
        reference: the float model; maps int32[b, context] to logits [b, context, vocab].
        model: the quantized model, over the same vocabulary.
        tokens: 1-D integers, at least `context` of them.
        batch_size: windows a call; the last call may hold fewer.
        context: window length in tokens, at least 2.

    Returns:
        A `Comparison`. `kl` is 0 and `top1_agreement` 1 for equal models.

    Raises:
        ValueError: as `perplexity`, or the vocabularies differ.

    Example:
        >>> table = jnp.linspace(0.0, 4.0, 50).reshape(5, 10)
        >>> result = compare(lambda t: table[t], lambda t: jnp.round(table)[t], np.arange(40) % 5, context=8)
        >>> 0 < result.kl < 0.1
        True
    """
    reference_logits_of, logits_of = _callable(reference), _callable(model)
    totals, count = np.zeros(4, np.float64), 0
    for batch in _batches("compare", tokens, batch_size, context):
        expected = _checked("compare", reference_logits_of, batch)
        logits = _checked("compare", logits_of, batch)
        if expected.shape != logits.shape:
            raise ValueError(
                f"compare: reference gives logits {list(expected.shape)}, model {list(logits.shape)}; "
                "both must have one vocabulary."
            )
        totals += [
            np.asarray(part, np.float64).sum()
            for part in _distances(expected, logits, batch)
        ]
        count += batch.shape[0] * (context - 1)
    nll, reference_nll, kl, same = totals / count
    return Comparison(_exp(nll), _exp(reference_nll), float(kl), float(same))


def _callable(model: Callable) -> Callable:
    return (
        functools.partial(_module_logits, model)
        if isinstance(model, nnx.Module)
        else model
    )


@nnx.jit
def _module_logits(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _batches(
    name: str, tokens: Any, batch_size: int, context: int
) -> Iterator[jax.Array]:
    """Yields int32[at most batch_size, context]."""
    array = np.asarray(tokens)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: tokens is {array.dtype}{list(array.shape)}; expected a 1-D integer array. "
            "Concatenate texts into one, such as np.asarray(tokenizer.encode(text).ids)."
        )
    if batch_size < 1 or context < 2:
        raise ValueError(
            f"{name}: batch_size={batch_size}, context={context}; expected batch_size >= 1 and context >= 2 "
            "(the first token of a window is not predicted)."
        )
    num_windows = len(array) // context
    if num_windows == 0:
        raise ValueError(
            f"{name}: {len(array)} tokens do not fill one window of context={context}; pass more tokens or, if there "
            "are at least 2, a shorter context."
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name}: tokens span [{array.min()}, {array.max()}]; ids are not negative and fit int32."
        )
    windows = (
        array[: num_windows * context].astype(np.int32).reshape(num_windows, context)
    )
    for start in range(0, num_windows, batch_size):
        yield jnp.asarray(windows[start : start + batch_size])


def _checked(name: str, logits_of: Callable, batch: jax.Array) -> jax.Array:
    """The model's logits. Ids beyond the vocabulary would read as NaN or as another token: an error instead."""
    logits = logits_of(batch)
    if getattr(logits, "ndim", None) != 3 or logits.shape[:2] != batch.shape:
        raise ValueError(
            f"{name}: the model gives {getattr(logits, 'shape', type(logits).__name__)} for tokens "
            f"{list(batch.shape)}; expected logits [{batch.shape[0]}, {batch.shape[1]}, vocab]."
        )
    if int(batch.max()) >= logits.shape[-1]:
        raise ValueError(
            f"{name}: token id {int(batch.max())} is outside the vocabulary of {logits.shape[-1]}; "
            "use the tokenizer the model was trained with."
        )
    return jnp.asarray(logits)


@jax.jit
def _nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Minus the log-probability of every token but the first.   # [b, t, vocab], [b, t] -> [b, t - 1]"""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _distances(
    expected: jax.Array, logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, ...]:
    """Model's and reference's nll, KL and top-1 agreement of every prediction, each float32[b, t - 1]."""
    log_p = jax.nn.log_softmax(expected[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    # p = 0 contributes 0 even where q is 0 too (-inf logits of banned tokens).
    kl = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q)).sum(
        axis=-1
    )
    same = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    return _nll(logits, tokens), _nll(expected, tokens), kl, same.astype(jnp.float32)


def _exp(mean: float) -> float:
    """Infinite where the mean is so large that its exponential is."""
    return math.exp(mean) if mean < 700 else math.inf if mean >= 700 else math.nan
