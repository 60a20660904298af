"""Text generation with a cache of keys and values, as one compiled program."""

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

    One program is compiled per model structure, shape of `tokens`, `num_tokens` and
    `cache`. There is no stop token: cut the result where yours appears.

    Args:
        model: a `Decoder`, or any nnx module with the same `init_cache` and `decode`.
        tokens: int32[b, t] with t >= 1. All rows have t real tokens.
        num_tokens: how many tokens to add, at least 1.
        key: PRNG key. Needed if `temperature > 0`.
        temperature: logits are divided by it before sampling. 0 takes the most probable
            token.
        cache: how keys and values of earlier tokens are stored, as in
            `Decoder.init_cache`. None stores them in the compute dtype. A preset name
            such as "int4", a `jaxq.QuantSpec` or a `jaxq.ops.KVCacheSpec` quantizes
            them. The given tokens read each other in full precision; later tokens read
            them quantized.

    Returns:
        int32[b, t + num_tokens], the given tokens first.

    Raises:
        ValueError: `tokens` is not an integer matrix with t >= 1, `num_tokens` is below
            1, `temperature` is negative, `temperature > 0` has no key, or no preset has
            the name `cache`.

    Example:
        >>> from jaxq.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> model, tokens = Decoder(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]])
        >>> generate(model, tokens, 4).shape
        (1, 7)
        >>> generate(model, tokens, 4, cache="int4").shape
        (1, 7)
    """
    tokens = jnp.asarray(tokens)
    is_matrix = tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
    if not is_matrix or tokens.shape[1] < 1:
        raise ValueError(
            f"generate: tokens is {tokens.dtype}{list(tokens.shape)}; expected "
            "int32[b, t] with t >= 1. Add a batch axis with tokens[None]."
        )
    if num_tokens < 1:
        raise ValueError(
            f"generate: num_tokens is {num_tokens}; it must be at least 1."
        )
    if not temperature >= 0:
        raise ValueError(
            f"generate: temperature is {temperature}; it must be 0 (greedy) or "
            "positive."
        )
    samples = temperature > 0
    if samples and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws tokens at random; pass "
            "key=jax.random.key(0)."
        )
    new_tokens = _generate(
        model,
        tokens.astype(jnp.int32),
        key if samples else jax.random.key(0),
        jnp.float32(temperature),
        num_tokens=num_tokens,
        samples=samples,
        cache_kind=cache,
    )
    return jnp.concatenate([tokens.astype(jnp.int32), new_tokens], axis=1)


@functools.partial(nnx.jit, static_argnames=("num_tokens", "samples", "cache_kind"))
def _generate(
    model, tokens, key, temperature, *, num_tokens: int, samples: bool, cache_kind: Any
):
    b, t = tokens.shape

    def choose(logits, key):  # [b, vocab] -> [b]
        if samples:
            return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    keys = jax.random.split(key, num_tokens)
    # The model never reads the last token, so the cache has no place for it.
    length = t + num_tokens - 1
    # A model of the user's own may have an init_cache without `cache=`.
    kind = {} if cache_kind is None else {"cache": cache_kind}
    logits, cache = model.decode(tokens, model.init_cache(b, length, **kind))
    first = choose(logits[:, -1], keys[0])  # [b]

    def step(carry, key):
        cache, last = carry
        logits, cache = model.decode(last[:, None], cache)
        token = choose(logits[:, -1], key)
        return (cache, token), token

    _, rest = jax.lax.scan(step, (cache, first), keys[1:])  # [num_tokens - 1, b]
    return jnp.concatenate([first[None], rest]).T  # [b, num_tokens]
