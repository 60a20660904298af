"""Choosing the next token from logits: greedy, temperature, top-k and top-p.

References:
    Fan et al., Hierarchical Neural Story Generation, 2018 (top-k).
    Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """The numbers of one way to choose tokens. They may be traced.

    Attributes:
        temperature: logits are divided by it.
        top_k: how many of the most probable tokens are left.
        top_p: the smallest set of tokens with at least this probability is left.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def choose_token(
    logits: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    samples: bool,
    filters: bool,
) -> jax.Array:
    """One token for each row: `[b, vocab] -> int32[b]`.

    Args:
        logits: float32 [b, vocab].
        key: PRNG key.
        sampling: the numbers.
        samples: False takes the most probable token.
        filters: False leaves out the filters of `top_k` and `top_p`.
    """
    if not samples:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if filters:
        logits = filtered_logits(logits, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def filtered_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits with -inf for the tokens that may not be drawn.

    top-p looks at the probabilities of the tokens that top-k leaves. Tokens with the
    logit of the last token that is left are left as well.

    Args:
        logits: float32 [b, vocab].
        top_k: int32, at least 1.
        top_p: float32, above 0.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    in_top_k = (jnp.arange(logits.shape[-1]) < top_k)[None]  # [1, vocab]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, descending, -jnp.inf), axis=-1)
    # The probability of all tokens before each one.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    num_left = jnp.sum(in_top_k & (before < top_p), axis=-1, keepdims=True)  # [b, 1]
    last = jnp.take_along_axis(descending, jnp.maximum(num_left, 1) - 1, axis=-1)
    return jnp.where(logits >= last, logits, -jnp.inf)
