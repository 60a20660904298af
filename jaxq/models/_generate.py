"""Text generation with a cache of keys and values.

Two programs are compiled: one reads the prompts, and one adds tokens in a loop until
every row has a stop token. Their shapes are those of a length bucket, so prompts and
texts of other lengths in the same bucket need no other program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.models._prompts import bucket, joined, padded_rows, shifted_right, text_lists
from jaxq.models._sampling import Sampling, choose_token
from jaxq.models.decoder import Decoder
from jaxq.qtensor import is_traced


def generate(
    model: Any,
    tokens: Any,
    num_tokens: int,
    *,
    lengths: jax.typing.ArrayLike | None = None,
    key: jax.Array | int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    cache: Any = None,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Any:
    """Continues each row of `tokens` by up to `num_tokens` tokens.

    Lengths of prompts and of new texts are padded to 16, 32, 64 and so on. One pair of
    programs is compiled for each such length, batch size, `cache` and structure of the
    model. A model of your own class is compiled for each length.

    Args:
        model: a `Decoder`, or any nnx module with the same `init_cache` and `decode`.
        tokens: int32[b, t] with t >= 1, or a list of prompts, each a list of tokens.
            The prompts of a list may have different lengths.
        num_tokens: how many tokens to add, at least 1.
        lengths: int32[b], how many tokens of each row of an array are real. They come
            first. None means all.
        key: PRNG key, or an integer seed. Needed if `temperature > 0`.
        temperature: logits are divided by it before sampling. 0 takes the most probable
            token.
        top_k: draw among the k most probable tokens only.
        top_p: draw among the fewest most probable tokens only that together have at
            least this probability. It looks at what `top_k` leaves.
        stop_tokens: tokens that end a row. Generation ends when all rows have one.
        pad_token: what an array holds after the end of a row.
        cache: how keys and values of earlier tokens are stored, as in
            `Decoder.init_cache`. None stores them in the compute dtype. A preset name
            such as "int4", a `jaxq.QuantSpec` or a `jaxq.ops.KVCacheSpec` quantizes
            them. The given tokens read each other in full precision; later tokens read
            them quantized.
        on_token: called after each step with the new token of each row, int32[b]. A row
            that has ended gets `pad_token`. Not under jit.

    Returns:
        For an array: int32[b, t + num_tokens], in each row the real tokens, the new
        tokens, and `pad_token`. For a list: a list of texts, each the prompt and the
        new tokens up to its stop token.

    Raises:
        ValueError: `tokens` is not an integer matrix with t >= 1 or a list of prompts;
            `num_tokens` is below 1; an option of sampling is out of range, lacks a key,
            or is given without `temperature`; the text is longer than the model's
            learned positions; no preset has the name `cache`; or prompts have different
            lengths and the model is not a `Decoder`.

    Example:
        >>> from jaxq.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> model, tokens = Decoder(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]])
        >>> generate(model, tokens, 4).shape
        (1, 7)
        >>> texts = generate(model, [[1, 2, 3], [4]], 4, key=0, temperature=0.7)
        >>> [len(text) for text in texts]
        [7, 5]
    """
    prompts = tokens if isinstance(tokens, list | tuple) else None
    if prompts is not None:
        if lengths is not None:
            raise ValueError("generate: lengths= is for an array of tokens.")
        tokens, lengths = padded_rows(prompts)
    tokens = _checked_tokens(tokens, num_tokens)
    _check_sampling(temperature, top_k, top_p, key)
    if isinstance(stop_tokens, int):
        stop_tokens = (stop_tokens,)
    if on_token is not None and is_traced(tokens):
        raise ValueError("generate: on_token= does not work under jit.")
    run = _Run(
        capacity=_padded(model, num_tokens),
        samples=temperature > 0,
        filters=top_k is not None or top_p is not None,
        cache_kind=cache,
    )
    width = _padded(model, tokens.shape[1])
    row_lengths = _checked_lengths(model, tokens, lengths, num_tokens)
    options = _Options(
        # 2 is above every probability, so nothing is left out.
        Sampling(
            jnp.float32(temperature or 1.0),
            jnp.int32(top_k or np.iinfo(np.int32).max),
            jnp.float32(2.0 if top_p is None else top_p),
        ),
        _as_key(key),
        jnp.asarray(stop_tokens, jnp.int32).reshape(-1),
        jnp.int32(pad_token),
    )
    new_tokens = _new_tokens(
        model, tokens, row_lengths, width, options, run, num_tokens, on_token
    )
    if prompts is not None:
        return text_lists(prompts, new_tokens, stop_tokens)
    return joined(tokens, row_lengths, new_tokens, pad_token)


class _Run(NamedTuple):
    """What a program is compiled for.

    Attributes:
        capacity: the largest number of new tokens.
        samples: draw tokens at random.
        filters: by top-k or top-p.
        cache_kind: of `init_cache`.
    """

    capacity: int
    samples: bool
    filters: bool
    cache_kind: Any


class _Options(NamedTuple):
    """Numbers that a program gets.

    Attributes:
        sampling: how tokens are chosen.
        key: PRNG key.
        stop_tokens: int32 [k].
        pad_token: int32.
    """

    sampling: Sampling
    key: jax.Array
    stop_tokens: jax.Array
    pad_token: jax.Array


class _Progress(NamedTuple):
    """The texts so far.

    Attributes:
        cache: of the model. It does not hold the last token yet.
        text: int32 [b, capacity], the new tokens.
        last: int32 [b], the newest token.
        has_ended: bool [b].
        step: int32, the number of new tokens.
    """

    cache: Any
    text: jax.Array
    last: jax.Array
    has_ended: jax.Array
    step: jax.Array


def _new_tokens(
    model: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    width: int,
    options: _Options,
    run: _Run,
    num_tokens: int,
    on_token: Callable[[np.ndarray], None] | None,
) -> jax.Array:
    """The tokens behind each prompt, int32 [b, num_tokens]."""
    graphdef, state = nnx.split(model)
    tokens = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    progress = _read_prompts(graphdef, state, tokens, lengths, options, run)
    if on_token is None:
        limit = jnp.int32(num_tokens)
        progress = _add_tokens(graphdef, state, progress, limit, options, run)
        return progress.text[:, :num_tokens]
    on_token(np.asarray(progress.last))
    for limit in range(2, num_tokens + 1):
        if bool(progress.has_ended.all()):
            break
        progress = _add_tokens(
            graphdef, state, progress, jnp.int32(limit), options, run
        )
        on_token(np.asarray(progress.last))
    return progress.text[:, :num_tokens]


@functools.partial(jax.jit, static_argnames=("graphdef", "run"))
def _read_prompts(
    graphdef: Any,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    options: _Options,
    run: _Run,
) -> _Progress:
    """Reads the prompts `[b, width]` and chooses the first new tokens."""
    model = nnx.merge(graphdef, state)
    b, width = tokens.shape
    # A model of the user's own may have an init_cache without `cache=`.
    kind = {} if run.cache_kind is None else {"cache": run.cache_kind}
    cache = model.init_cache(b, width + run.capacity, **kind)
    last_place = jnp.full((b,), width - 1)
    if not isinstance(model, Decoder):
        logits, cache = model.decode(tokens, cache)
    elif run.cache_kind is None:
        cache = cache._replace(padding=width - lengths)
        shifted = shifted_right(tokens, lengths, width)
        logits, cache = model.decode(shifted, cache)
    else:
        logits, cache = model.decode(tokens, cache, count=lengths)
        last_place = lengths - 1
    logits = jnp.take_along_axis(logits, last_place[:, None, None], axis=1)[:, 0]
    text = jnp.full((b, run.capacity), options.pad_token)
    progress = _Progress(
        cache,
        text,
        jnp.zeros((b,), jnp.int32),
        jnp.zeros((b,), bool),
        jnp.zeros((), jnp.int32),
    )
    return _with_token(progress, logits, options, run)


@functools.partial(jax.jit, static_argnames=("graphdef", "run"))
def _add_tokens(
    graphdef: Any,
    state: Any,
    progress: _Progress,
    limit: jax.Array,
    options: _Options,
    run: _Run,
) -> _Progress:
    """Adds tokens until there are `limit`, or every row has ended."""
    model = nnx.merge(graphdef, state)

    def goes_on(progress: _Progress) -> jax.Array:
        return (progress.step < limit) & ~progress.has_ended.all()

    def step(progress: _Progress) -> _Progress:
        logits, cache = model.decode(progress.last[:, None], progress.cache)
        return _with_token(progress._replace(cache=cache), logits[:, -1], options, run)

    return jax.lax.while_loop(goes_on, step, progress)


def _with_token(
    progress: _Progress, logits: jax.Array, options: _Options, run: _Run
) -> _Progress:
    """The texts with one more token, chosen from logits `[b, vocab]`."""
    token = choose_token(
        logits,
        jax.random.fold_in(options.key, progress.step),
        options.sampling,
        samples=run.samples,
        filters=run.filters,
    )
    token = jnp.where(progress.has_ended, options.pad_token, token)
    stops = (token[:, None] == options.stop_tokens[None]).any(axis=-1)
    return _Progress(
        progress.cache,
        progress.text.at[:, progress.step].set(token),
        token,
        progress.has_ended | stops,
        progress.step + 1,
    )


def _padded(model: Any, length: int) -> int:
    return bucket(length) if isinstance(model, Decoder) else length


def _as_key(key: jax.Array | int | None) -> jax.Array:
    if key is None or isinstance(key, int | np.integer):
        return jax.random.key(0 if key is None else int(key))
    return key


def _checked_tokens(tokens: Any, num_tokens: int) -> jax.Array:
    """The tokens of prompts, int32 [b, t]."""
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
    return tokens.astype(jnp.int32)


def _checked_lengths(
    model: Any, tokens: jax.Array, lengths: Any, num_tokens: int
) -> jax.Array:
    """The number of tokens of each row, int32 [b]."""
    b, t = tokens.shape
    if isinstance(model, Decoder) and model.config.learned_positions:
        longest = model.config.max_position_embeddings
        # The model never reads the last token.
        if t + num_tokens - 1 > longest:
            raise ValueError(
                f"generate: {t} tokens and {num_tokens} new ones are more than the "
                f"model's {longest} learned positions. Use a shorter text."
            )
    if lengths is None:
        return jnp.full((b,), t, jnp.int32)
    lengths = jnp.asarray(lengths)
    if lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"generate: lengths is {lengths.dtype}{list(lengths.shape)}; expected "
            f"int32[{b}], one number for each row."
        )
    if not is_traced(lengths):
        if not bool(((lengths >= 1) & (lengths <= t)).all()):
            raise ValueError(
                f"generate: lengths are {lengths.tolist()}; expected 1 to {t}."
            )
        is_equal = bool((lengths == t).all())
        if not is_equal and not isinstance(model, Decoder):
            raise ValueError(
                "generate: prompts of different lengths need a jaxq.models.Decoder, "
                f"got {type(model).__name__}. Generate for each prompt alone."
            )
    return lengths.astype(jnp.int32)


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, key: Any
) -> None:
    if not temperature >= 0:
        raise ValueError(
            f"generate: temperature is {temperature}; it must be 0 (greedy) or "
            "positive."
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws tokens at random; pass key=0."
        )
    if temperature == 0 and not (top_k is None and top_p is None):
        raise ValueError(
            "generate: top_k= and top_p= need temperature=, because temperature=0 "
            "always takes the most probable token."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}; it must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; it must be above 0, at most 1.")
