"""Token generation with a key-value cache of static shape: one compiled prefill, one scan over decode steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def generate(
    model: Any,
    tokens: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    cache: Any = None,
) -> jax.Array:
    """Continues each row of `tokens` by `num_tokens` tokens.

    One compiled program per (model structure, shape of tokens, num_tokens, cache). There is no stop token: cut the
    result where yours appears.

    Args:
        model: a `Llama`, or any nnx module with its `init_cache` and `decode`.
        tokens: int32[b, t], t >= 1, rows of equal length.
        num_tokens: how many to add, at least 1.
        key: a jax random key, needed when `temperature > 0`.
        temperature: logits are divided by it before sampling; 0 takes the most probable token.
        cache: how keys and values of earlier tokens are stored, as for `Llama.init_cache`: None in the compute dtype, a
            preset name such as "int4", a `jaxq.QuantSpec` or a `jaxq.ops.KVCacheSpec` quantized. The given tokens are
            read in full precision while they are taken in, and quantized from then on.

    Returns:
        int32[b, t + num_tokens], the given tokens first.

    Raises:
        ValueError: tokens are not an integer matrix with t >= 1, num_tokens < 1, a negative temperature, or a
            temperature without a key; an unknown preset.

    Example:
        >>> from jaxq.models import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> generate(Llama(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]), 4).shape
        (1, 7)
        >>> generate(Llama(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]), 4, cache="int4").shape
        (1, 7)
    """
    tokens = jnp.asarray(tokens)
    if (
        tokens.ndim != 2
        or tokens.shape[1] < 1
        or not jnp.issubdtype(tokens.dtype, jnp.integer)
    ):
        raise ValueError(
            f"generate: tokens is {tokens.dtype}{list(tokens.shape)}; expected int32[b, t] with t >= 1. "
            "Add a batch axis with tokens[None]."
        )
    if num_tokens < 1:
        raise ValueError(
            f"generate: num_tokens is {num_tokens}; it must be at least 1."
        )
    if not temperature >= 0:
        raise ValueError(
            f"generate: temperature is {temperature}; it must be 0 (greedy) or positive."
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws tokens at random; pass key=jax.random.key(0)."
        )
    sample = temperature > 0
    key = key if sample else jax.random.key(0)
    new = _generate(
        model,
        tokens.astype(jnp.int32),
        key,
        jnp.float32(temperature),
        num_tokens=num_tokens,
        sample=sample,
        kind=cache,
    )
    return jnp.concatenate([tokens.astype(jnp.int32), new], axis=1)


@functools.partial(nnx.jit, static_argnames=("num_tokens", "sample", "kind"))
def _generate(
    model, tokens, key, temperature, *, num_tokens: int, sample: bool, kind: Any
):
    b, t = tokens.shape

    def choose(logits, key):  # [b, vocab] -> [b]
        if sample:
            return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    keys = jax.random.split(key, num_tokens)
    # The last token chosen is never read, so the cache holds one place less than the result.
    how = {} if kind is None else {"cache": kind}
    logits, cache = model.decode(tokens, model.init_cache(b, t + num_tokens - 1, **how))
    first = choose(logits[:, -1], keys[0])  # [b]

    def step(carry, key):
        cache, last = carry
        logits, cache = model.decode(last[:, None], cache)
        token = choose(logits[:, -1], key)
        return (cache, token), token

    _, rest = jax.lax.scan(step, (cache, first), keys[1:])  # [num_tokens - 1, b]
    return jnp.concatenate([first[None], rest]).T  # [b, num_tokens]
