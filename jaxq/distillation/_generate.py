"""Generates text with a model, token by token, in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.distillation._arguments import is_positive, number, whole_number
from jaxq.distillation._model import NnxFunction, as_model
from jaxq.distillation._rows import described
from jaxq.qtensor import is_traced


def generate(
    model: Any,
    tokens: Any,
    num_tokens: int,
    *,
    lengths: Any = None,
    key: jax.Array | None = None,
    temperature: Any = 0.0,
    stop_token: int | None = None,
    pad_token: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts, and returns which tokens are the responses.

    The teacher generates for sequence-level distillation. The student generates for
    on-policy distillation. One program is compiled for each structure of the model,
    shape of `tokens` and `num_tokens`. The loop ends early when every row has stopped.

    The model must be causal: logits at a position do not depend on later tokens. An nnx
    module with the methods `init_cache` and `decode`, such as `jaxq.models.Decoder`,
    uses a KV cache. Any other model reads the whole row again for each token.

    Args:
      model: maps int32 [b, n] to logits [b, n, vocab_size]. It is an nnx module, a pair
        `(apply, params)` or a function of the tokens. Modules run in eval mode.
      tokens: int [b, t], the prompts, with t >= 1. Short prompts are padded at the
        right.
      num_tokens: the largest number of tokens of a response, at least 1.
      lengths: int [b], the length of each prompt, from 1 to t. None means t.
      key: PRNG key. Needed if `temperature` is not 0.
      temperature: logits are divided by it before a token is drawn. 0 takes the most
        probable token. It may be traced. Then it must be positive, and the tokens have
        no meaning if it is not.
      stop_token: a response ends after this token.
      pad_token: fills the rest of each row after its response.

    Returns:
      tokens: int32 [b, t + num_tokens]. Each response follows its prompt directly.
      mask: bool [b, t + num_tokens], True for the tokens of the response, the stop
        token included.

    Raises:
      TypeError: the model is of another kind, `num_tokens`, `stop_token` or `pad_token`
        is not an integer, or the temperature is not one number.
      ValueError: the shape or dtype of `tokens` or `lengths` is wrong; `num_tokens` is
        below 1; the temperature is negative or not finite; a key is missing; the logits
        have another shape; or the logits have a NaN (this is not checked under jit).

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> def apply(table, tokens):
      ...     return table[tokens]
      >>> table = jnp.roll(jnp.eye(5), 1, axis=1)    # token i is followed by i + 1
      >>> prompts = jnp.array([[0, 1], [2, 0]])
      >>> tokens, mask = jaxq.distillation.generate(
      ...     (apply, table), prompts, 2, lengths=jnp.array([2, 1]))
      >>> tokens.tolist()
      [[0, 1, 2, 3], [2, 3, 4, 0]]
      >>> mask.tolist()
      [[False, False, True, True], [False, True, True, False]]
    """
    caller = "generate"
    tokens = _checked_tokens(tokens)
    num_tokens = whole_number(num_tokens, "num_tokens", caller)
    temperature = checked_temperature(temperature, caller)
    samples = _samples(temperature, key)
    b, t = tokens.shape
    if lengths is None:
        starts = jnp.full((b,), t, jnp.int32)
    else:
        starts = _checked_lengths(lengths, b, t)
    function, arrays = as_model(model, caller)
    tokens, ends, has_nan = _generate(
        function,
        arrays,
        tokens,
        starts,
        key if samples else jax.random.key(0),
        jnp.asarray(temperature, jnp.float32),
        jnp.int32(-1) if stop_token is None else _token(stop_token, "stop_token"),
        _token(pad_token, "pad_token"),
        num_tokens=num_tokens,
        samples=samples,
        has_lengths=lengths is not None,
    )
    if not is_traced(has_nan) and bool(has_nan):
        raise ValueError(
            f"{caller}: the model's logits have a NaN. Check the model's parameters "
            "and that the prompts hold tokens of its vocabulary."
        )
    return tokens, _between(starts, ends, t + num_tokens)


def response_mask(
    tokens: Any,
    prompt_lengths: Any,
    *,
    lengths: Any = None,
    stop_token: int | None = None,
) -> jax.Array:
    """Returns which tokens are the response, for rows with a prompt and its response.

    Args:
      tokens: int [b, t]: prompt, response, padding.
      prompt_lengths: int [b], the length of each prompt.
      lengths: int [b], the length of prompt and response together. None means t.
      stop_token: a response ends after its first stop token.

    Returns:
      bool [b, t].

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> tokens = jnp.array([[5, 6, 7, 1, 0]])
      >>> jaxq.distillation.response_mask(tokens, jnp.array([2]), stop_token=1).tolist()
      [[False, False, True, True, False]]
    """
    tokens, starts = jnp.asarray(tokens), jnp.asarray(prompt_lengths, jnp.int32)
    if tokens.ndim != 2 or starts.shape != tokens.shape[:1]:
        raise ValueError(
            f"response_mask: tokens is {described(tokens)}, prompt_lengths "
            f"{described(starts)}; expected [b, t] and [b]."
        )
    b, t = tokens.shape
    ends = jnp.full((b,), t, jnp.int32)
    if lengths is not None:
        ends = jnp.asarray(lengths, jnp.int32)
        if ends.shape != (b,):
            raise ValueError(
                f"response_mask: lengths is {described(ends)}; expected [{b}]."
            )
    mask = _between(starts, ends, t)
    if stop_token is None:
        return mask
    is_stop = mask & (tokens == stop_token)
    is_stop = is_stop.astype(jnp.int32)
    num_stops_before = jnp.cumsum(is_stop, axis=1) - is_stop
    return mask & (num_stops_before == 0)


def _between(starts: jax.Array, ends: jax.Array, t: int) -> jax.Array:
    """True for the positions from `starts` to before `ends`, bool [b, t]."""
    positions = jnp.arange(t, dtype=jnp.int32)[None]
    return (positions >= starts[:, None]) & (positions < ends[:, None])


class _State(NamedTuple):
    """The state of the loop.

    Attributes:
      position: int32, the position that gets the next token.
      tokens: int32 [b, t + num_tokens].
      ends: int32 [b], where each response ends.
      cache: keys and values, or None.
      has_nan: bool, whether logits that were read have a NaN.
    """

    position: jax.Array
    tokens: jax.Array
    ends: jax.Array
    cache: Any
    has_nan: jax.Array


@functools.partial(
    jax.jit, static_argnames=("function", "num_tokens", "samples", "has_lengths")
)
def _generate(
    function: Callable[[Any, Any], Any],
    arrays: Any,
    prompts: jax.Array,
    starts: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    stop_token: jax.Array,
    pad_token: jax.Array,
    *,
    num_tokens: int,
    samples: bool,
    has_lengths: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [b, t + num_tokens], ends [b], and whether logits had a NaN."""
    b, t = prompts.shape
    is_prompt = _between(jnp.zeros_like(starts), starts, t)
    tokens = jnp.full((b, t + num_tokens), pad_token)
    tokens = tokens.at[:, :t].set(jnp.where(is_prompt, prompts, pad_token))
    first = jnp.min(starts)
    next_logits, cache = _reader(function, arrays, tokens, t, first, has_lengths)

    def is_active(state: _State) -> jax.Array:
        return jnp.any(state.position < state.ends)

    def step(state: _State) -> _State:
        position = state.position
        logits, cache = next_logits(state.tokens, position, state.cache)
        if samples:
            # The key depends on the position only, with or without a cache.
            step_key = jax.random.fold_in(key, position)
            token = jax.random.categorical(step_key, logits / temperature)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = token.astype(jnp.int32)  # [b]
        # A row keeps its token if its prompt is longer, or if it has ended.
        writes = (position >= starts) & (position < state.ends)
        old = _column(state.tokens, position)
        new = jnp.where(writes, token, old)
        stops = writes & (token == stop_token)
        return _State(
            position + 1,
            state.tokens.at[:, position].set(new),
            jnp.where(stops, position + 1, state.ends),
            cache,
            state.has_nan | jnp.any(writes & jnp.isnan(logits).any(axis=-1)),
        )

    start = _State(first, tokens, starts + num_tokens, cache, jnp.zeros((), bool))
    end = jax.lax.while_loop(is_active, step, start)
    return end.tokens, end.ends, end.has_nan


def _reader(
    function: Any,
    arrays: Any,
    tokens: jax.Array,
    t: int,
    first: jax.Array,
    has_lengths: bool,
) -> tuple[Callable[..., tuple[jax.Array, Any]], Any]:
    """A function that computes the logits of the next token, and its first cache.

    Args:
      function: the function of the model.
      arrays: the arrays of the model.
      tokens: int32 [b, t + num_tokens], with the prompts.
      t: length of the longest prompt.
      first: int32, the first position that gets a new token.
      has_lengths: whether prompts may be shorter than t.
    """
    b, length = tokens.shape

    def read_whole_row(tokens: jax.Array, position: jax.Array, cache: Any):
        logits = _checked_logits(function(arrays, tokens), b, length)
        return _column(logits, position - 1), cache

    module = function.module(arrays) if isinstance(function, NnxFunction) else None
    if not (hasattr(module, "init_cache") and hasattr(module, "decode")):
        return read_whole_row, None
    assert module is not None
    cache = module.init_cache(b, length)
    if has_lengths and not _can_rewind(cache):
        return read_whole_row, None
    if t > 1:
        _, cache = module.decode(tokens[:, : t - 1], cache)
    if has_lengths:
        # Keys and values after `used` are not read, and later tokens overwrite them.
        cache = cache._replace(used=first - 1)

    def read_last_token(tokens: jax.Array, position: jax.Array, cache: Any):
        last = _column(tokens, position - 1)
        logits, cache = function.module(arrays).decode(last[:, None], cache)
        return _checked_logits(logits, b, 1)[:, 0], cache

    return read_last_token, cache


def _can_rewind(cache: Any) -> bool:
    """Whether a cache has one length for all rows, and this length can be set."""
    return hasattr(cache, "_replace") and getattr(cache, "used", jnp.ones(1)).ndim == 0


def _column(x: jax.Array, position: jax.Array) -> jax.Array:
    """`x[:, position]`."""
    return jax.lax.dynamic_index_in_dim(x, position, axis=1, keepdims=False)


def _checked_tokens(tokens: Any) -> jax.Array:
    tokens = jnp.asarray(tokens)
    is_matrix = tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
    if not is_matrix or tokens.shape[1] < 1:
        raise ValueError(
            f"generate: tokens is {described(tokens)}; expected int32[b, t] with "
            "t >= 1. Add a batch axis with tokens[None]."
        )
    return tokens.astype(jnp.int32)


def _checked_lengths(lengths: Any, b: int, t: int) -> jax.Array:
    lengths = jnp.asarray(lengths)
    if lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"generate: lengths is {described(lengths)}; expected int32[{b}], one "
            "length for each prompt."
        )
    is_length = (lengths >= 1) & (lengths <= t)
    if not is_traced(is_length) and not bool(is_length.all()):
        raise ValueError(
            f"generate: lengths is {lengths.tolist()}; each must be from 1 to {t}, the "
            "width of tokens. Begin empty prompts with a start token."
        )
    return lengths.astype(jnp.int32)


def checked_temperature(temperature: Any, caller: str) -> Any:
    """The temperature, after a check. A traced one that is not positive becomes NaN."""

    def is_allowed(temperature: Any) -> Any:
        # A traced 0 cannot choose the program that takes the most probable token.
        if is_traced(temperature):
            return is_positive(temperature)
        return temperature == 0 or is_positive(temperature)

    return number(
        temperature,
        "temperature",
        caller,
        is_allowed,
        "it must be 0 (the most probable token) or positive, and finite.",
    )


def _samples(temperature: Any, key: jax.Array | None) -> bool:
    """Whether tokens are drawn at random."""
    if is_traced(temperature):
        if key is None:
            raise ValueError(
                "generate: a traced temperature draws tokens at random; pass key=."
            )
        return True
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws tokens at random; pass "
            "key=jax.random.key(0)."
        )
    return temperature > 0


def _token(token: Any, name: str) -> jax.Array:
    """The number of a token, int32. It may be traced."""
    if not is_traced(token):
        token = whole_number(token, name, "generate", least=-(1 << 31))
    return jnp.asarray(token, jnp.int32)


def _checked_logits(logits: Any, b: int, length: int) -> jax.Array:
    """The logits in float32."""
    logits = jnp.asarray(logits)
    if logits.ndim != 3 or logits.shape[:2] != (b, length):
        raise ValueError(
            f"generate: the model returned {described(logits)} for tokens "
            f"int32[{b},{length}]; expected logits [{b}, {length}, vocab_size]."
        )
    return logits.astype(jnp.float32)
