"""A decoder-only language model in plain flax nnx.

One class covers the families of `jaxq.models.model_types()`. The switches of
`DecoderConfig` say what differs between them. Nothing here is quantized: every
projection is an ordinary `nnx.Linear`. One layer of a Llama, with d = hidden_size,
n query heads, m key heads, h = head_dim and f = intermediate_size, computes

    q, k, v = q_proj(norm(x)), k_proj(norm(x)), v_proj(norm(x))
    x = x + o_proj(attention(rope(q), rope(k), v))                     # [b, t, d]
    x = x + down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))     # [b, t, d]

Matrix products read `dtype` (bfloat16 or float32), accumulate in float32 and return
float32, as matrix units do. Everything between them is float32: the residual stream,
norms, rotary embedding, softmax and logits.

References:
    Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2).
    Gemma team, Gemma 3 Technical Report, 2025 (local and global layers).
    OLMo team, 2 OLMo 2 Furious, 2025 (norms after attention and the MLP).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models._attention import Attention, TokenPlace, soft_cap, token_place
from jaxq.models._config import DecoderConfig, LayerSwitches
from jaxq.models._experts import MixtureOfExperts
from jaxq.models._layers import linear, norm
from jaxq.models._mlp import MLP
from jaxq.models._rope import RopeScaling

__all__ = ["Decoder", "DecoderCache", "DecoderConfig", "RopeScaling"]

# Makes an empty quantized cache for one layer. jaxq.models sets it, so that this file
# imports nothing quantized.
_new_quantized_cache: Callable[..., Any] | None = None


def set_quantized_cache(make: Callable[..., Any]) -> None:
    """Sets the function by which `Decoder.init_cache` makes a quantized cache.

    Args:
        make: makes an empty cache for one layer. It has the arguments of
            `jaxq.ops.KVCache.empty`: `make(cache, batch=, num_heads=, length=,
            head_dim=, window=, dtype=)`.
    """
    global _new_quantized_cache
    _new_quantized_cache = make


class DecoderCache(NamedTuple):
    """Keys (after rotary embedding) and values of earlier tokens, for all layers.

    Attributes:
        layers: one cache per layer. It is a pair `(keys, values)`, each `[b, m, length,
            h]`, or a `jaxq.ops.KVCache` if it is quantized. With `scan_layers` there is
            one cache for all layers, and its arrays have a leading layer axis.
        used: int32, number of tokens in the cache. It is a scalar for a float cache. It
            is `[b]` for a quantized cache, because each row has its own length.
        padding: int32[b], how many places at the start of each row hold no token. None
            means that all places hold tokens. It is only for a float cache: set it with
            `cache._replace(padding=...)` before the first `decode`.

    Example:
        >>> from jaxq.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> cache = Decoder(config, rngs=nnx.Rngs(0)).init_cache(2, 8)
        >>> cache.layers[0][0].shape, int(cache.used)
        ((2, 1, 8, 16), 0)
    """

    layers: Any
    used: jax.Array
    padding: jax.Array | None = None

    def reset(self, slots: Any) -> DecoderCache:
        """A quantized cache in which some rows of the batch are empty again.

        Args:
            slots: indices of the rows, or bool `[b]` with True for a row to empty.

        Raises:
            ValueError: the cache is not quantized. All rows of a float cache have the
                same length.
        """
        if self.used.ndim == 0:
            raise ValueError(
                "DecoderCache.reset: all rows of a float cache have one length. "
                'Use init_cache(..., cache="int8").'
            )
        is_stacked = hasattr(self.layers, "lengths")
        if is_stacked:
            layers = self.layers.reset(slots)
            return DecoderCache(layers, layers.lengths[0])
        layers = tuple(layer.reset(slots) for layer in self.layers)
        return DecoderCache(layers, layers[0].lengths)


class Decoder(nnx.Module):
    """A decoder-only language model: token ids in, logits of the next token out.

    Args:
        config: a `DecoderConfig`.
        dtype: dtype that matrix products read. They accumulate in float32.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters: normal numbers with standard deviation
            0.02. The projections that write into the residual stream are divided by
            `sqrt(2 * num_hidden_layers)`.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2,
        ...                        num_key_value_heads=1, head_dim=16)
        >>> model = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> logits = model(jnp.zeros((2, 16), jnp.int32))
        >>> logits.shape, logits.dtype
        ((2, 16, 64), dtype('float32'))
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        # The table is read in float32. Then the lookup is exact, and a tied head
        # returns float32 logits.
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        if config.learned_positions:
            self.embed_positions = nnx.Embed(
                config.max_position_embeddings,
                config.hidden_size,
                dtype=jnp.float32,
                param_dtype=param_dtype,
                embedding_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

        expert_layers = config.expert_layers()
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def make_layer(rngs: nnx.Rngs, has_experts: bool) -> DecoderLayer:
            return DecoderLayer(config, has_experts=has_experts, **types, rngs=rngs)

        self.layers: Any
        num_layers = config.num_hidden_layers
        if config.scan_layers:
            make = functools.partial(make_layer, has_experts=expert_layers[0])
            make_stack = nnx.vmap(make, in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=num_layers)(make_stack)(rngs)
        else:
            self.layers = nnx.List([make_layer(rngs, has) for has in expert_layers])
        d, vocab = config.hidden_size, config.vocab_size
        self.norm = norm(config, d, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(d, vocab, False, **types, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            tokens: int32[b, t], each in [0, vocab_size). There is no padding mask: pad
                on the right, and ignore the logits of the padding.

        Returns:
            float32[b, t, vocab_size].

        Raises:
            ValueError: `tokens` is not an integer matrix.
        """
        return self._forward(tokens, None)[0]

    def init_cache(self, batch: int, length: int, *, cache: Any = None) -> DecoderCache:
        """An empty cache for `batch` rows of at most `length` tokens.

        Args:
            batch: number of rows.
            length: the largest number of tokens in a row.
            cache: how keys and values are stored. None keeps them in the compute dtype.
                A preset name ("int8", "int4", "int2", "fp8", "nf4", ...), a
                `jaxq.QuantSpec` or a `jaxq.ops.KVCacheSpec` quantizes all tokens except
                the newest. If the model has a sliding window, a quantized cache stores
                no more tokens than the window.

        Raises:
            ValueError: no preset has this name; a size is below 1; or a quantized cache
                cannot do what the config asks for: soft caps, sinks, or layers with
                and without a window in one stack.
        """
        if cache is None:
            return self._float_cache(batch, length)
        return self._quantized_cache(batch, length, cache)

    def decode(
        self, tokens: jax.Array, cache: DecoderCache, *, count: jax.Array | None = None
    ) -> tuple[jax.Array, DecoderCache]:
        """Logits of the next token for tokens that follow those in the cache.

        With a quantized cache, the new tokens read the quantized earlier tokens, and
        each other in full precision.

        Args:
            tokens: int32[b, t], the next t tokens. Tokens beyond learned positions give
                NaN.
            cache: from `init_cache` or an earlier `decode`. `used + t` must not exceed
                its length. This cannot be checked here, because `used` is traced.
            count: int32[b], for a quantized cache: how many of the t tokens are real in
                each row. Real tokens come first, and the row grows by their number. The
                logits after them have no meaning. None means all t.

        Returns:
            Logits float32[b, t, vocab_size], and the cache with the new tokens.

        Raises:
            ValueError: `tokens` is not an integer matrix, or `count` is given for a
                cache that is not quantized.

        Example:
            >>> config = DecoderConfig(vocab_size=64, hidden_size=32,
            ...                        intermediate_size=48, num_hidden_layers=1,
            ...                        num_attention_heads=2, num_key_value_heads=1,
            ...                        head_dim=16)
            >>> model = Decoder(config, rngs=nnx.Rngs(0))
            >>> cache = model.init_cache(batch=2, length=8)
            >>> logits, cache = model.decode(jnp.zeros((2, 3), jnp.int32), cache)
            >>> logits.shape, int(cache.used)
            ((2, 3, 64), 3)
        """
        if count is not None and cache.used.ndim == 0:
            raise ValueError(
                "Decoder.decode: count needs a cache with a separate length for each "
                'row. Use init_cache(..., cache="int8").'
            )
        return self._forward(tokens, cache, count)

    def _float_cache(self, batch: int, length: int) -> DecoderCache:
        config = self.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        layers: Any
        if config.scan_layers:
            shape = (config.num_hidden_layers, *shape)
            layers = (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        else:
            layers = tuple(
                (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
                for _ in range(config.num_hidden_layers)
            )
        return DecoderCache(layers, jnp.zeros((), jnp.int32))

    def _quantized_cache(self, batch: int, length: int, cache: Any) -> DecoderCache:
        assert _new_quantized_cache is not None  # jaxq.models sets it at import
        config = self.config
        self._check_quantized_cache()
        sizes: dict[str, Any] = {
            "batch": batch,
            "num_heads": config.num_key_value_heads,
            "length": length,
            "head_dim": config.head_dim,
            "dtype": self.dtype,
        }
        caches = []
        for layer in config.layer_switches():
            window = config.sliding_window if layer.windowed else None
            caches.append(_new_quantized_cache(cache, window=window, **sizes))
        layers: Any = tuple(caches)
        if config.scan_layers:
            layers = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (len(caches), *leaf.shape)),
                caches[0],
            )
        return DecoderCache(layers, jnp.zeros((batch,), jnp.int32))

    def _check_quantized_cache(self) -> None:
        """Raises a ValueError for what attention over a quantized cache cannot do."""
        config = self.config
        if config.attention_softcap is not None:
            raise ValueError(
                "Decoder.init_cache: attention over a quantized cache has no soft cap, "
                f"and attention_softcap is {config.attention_softcap}. Use cache=None."
            )
        if config.attention_sinks:
            raise ValueError(
                "Decoder.init_cache: attention over a quantized cache has no sinks, "
                "and attention_sinks is True. Use cache=None."
            )
        if config.scan_layers and config.window_layers is not None:
            raise ValueError(
                "Decoder.init_cache: layers with and without a window need quantized "
                "caches of different sizes, and a stack has one size. Use "
                "jaxq.models.unrolled(model), or cache=None."
            )

    def _check_length(self, length: int) -> None:
        """Raises a ValueError for a text that is longer than the learned positions."""
        longest = self.config.max_position_embeddings
        if self.config.learned_positions and length > longest:
            raise ValueError(
                f"Decoder: {length} tokens are more than the model's {longest} learned "
                "positions (max_position_embeddings). Use a shorter text."
            )

    def _forward(
        self,
        tokens: jax.Array,
        cache: DecoderCache | None,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits, and the grown cache if there is one."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Decoder: tokens is {tokens.dtype}{list(tokens.shape)}; expected "
                "int32[b, t]. Add a batch axis with tokens[None]."
            )
        t = tokens.shape[1]
        if cache is None:  # a cache may have padding, which has no position
            self._check_length(t)
        positions, start = self._positions(t, cache)
        num_keys = t
        if cache is not None and start.ndim == 0:
            num_keys = jax.tree.leaves(cache.layers)[0].shape[-2]
        padding = None if cache is None else cache.padding
        place = token_place(
            self.config, positions, num_keys, start, padding=padding, count=count
        )
        x = self._embed(tokens, positions)  # [b, t, d]
        x, layer_caches = self._run_layers(
            x, place, None if cache is None else cache.layers
        )
        logits = self._logits(self.norm(x))
        if cache is None:
            return logits, None
        if count is None:
            num_new: Any = t
        else:
            num_new = jnp.clip(jnp.asarray(count, start.dtype), 0, t)
        return logits, DecoderCache(layer_caches, start + num_new, padding)

    def _positions(
        self, t: int, cache: DecoderCache | None
    ) -> tuple[jax.Array, jax.Array]:
        """The positions [1 or b, t] of t new tokens, and the place of the first one."""
        start = jnp.zeros((), jnp.int32) if cache is None else cache.used
        # [1, t]; [b, t] if each row of a quantized cache has a length of its own.
        positions = start.reshape(-1, 1) + jnp.arange(t, dtype=jnp.int32)[None]
        if cache is not None and cache.padding is not None:
            positions = jnp.maximum(positions - cache.padding[:, None], 0)
        return positions, start

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The input of the first layer, float32 [b, t, d]."""
        x = self.embed_tokens(tokens).astype(jnp.float32)
        x = x * self.config.embedding_multiplier
        if self.config.learned_positions:
            x = x + self.embed_positions(positions).astype(jnp.float32)
        return x

    def _logits(self, x: jax.Array) -> jax.Array:
        """The logits of the last stream, float32 [b, t, vocab]."""
        if self.config.tie_word_embeddings:
            logits = self.embed_tokens.attend(x)
        else:
            logits = self.lm_head(x)
        logits = logits.astype(jnp.float32) / self.config.logits_scaling
        return soft_cap(logits, self.config.logits_softcap)

    def _run_layers(
        self, x: jax.Array, place: TokenPlace, caches: Any
    ) -> tuple[jax.Array, Any]:
        switches = self.config.layer_switches()
        if self.config.scan_layers:
            return _scan(self.layers, x, caches, place, switches)
        new_caches = []
        for number, layer in enumerate(self.layers):
            layer_cache = None if caches is None else caches[number]
            x, new_cache = layer(x, place, layer_cache, switches[number])
            new_caches.append(new_cache)
        return x, tuple(new_caches)


class DecoderLayer(nnx.Module):
    """Attention, then the MLP. Each reads the stream and adds to it."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        has_experts: bool,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def make_norm() -> Any:
            size = config.hidden_size
            return norm(config, size, param_dtype=param_dtype, rngs=rngs)

        self.has_input_norms = config.norm_places in ("before", "both")
        self.has_output_norms = config.norm_places in ("after", "both")
        if self.has_input_norms:
            self.input_layernorm = make_norm()
        self.self_attn = Attention(config, **types, rngs=rngs)
        if self.has_input_norms:
            self.post_attention_layernorm = make_norm()
        make_mlp = MixtureOfExperts if has_experts else MLP
        self.mlp = make_mlp(config, **types, rngs=rngs)
        if self.has_output_norms:
            self.attention_output_norm = make_norm()
            self.mlp_output_norm = make_norm()
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self, x: jax.Array, place: TokenPlace, cache: Any, switches: LayerSwitches
    ):
        inputs = self.input_layernorm(x) if self.has_input_norms else x
        y, cache = self.self_attn(inputs, place.of_layer(switches), cache)
        if self.has_output_norms:
            y = self.attention_output_norm(y)
        x = x + self.residual_multiplier * y  # [b, t, d]
        inputs = self.post_attention_layernorm(x) if self.has_input_norms else x
        y = self.mlp(inputs)
        if self.has_output_norms:
            y = self.mlp_output_norm(y)
        return x + self.residual_multiplier * y, cache  # [b, t, d]


def _scan(
    layers: Any,
    x: jax.Array,
    caches: Any,
    place: TokenPlace,
    switches: tuple[LayerSwitches, ...],
):
    """Runs stacked layers one after another.

    This is a plain scan over the state of the layers, so it also works inside another
    loop. Layers are only read, except that the counters of random streams advance if a
    layer draws from them (dropout of adapters, stochastic rounding).
    """
    graphdef, state = nnx.split(layers)
    are_equal = len(set(switches)) == 1
    arrays = LayerSwitches(
        windowed=jnp.array([layer.windowed for layer in switches]),
        rotary=jnp.array([layer.rotary for layer in switches]),
    )

    def step(x, sliced):
        layer_state, cache, layer_switches = sliced
        own = switches[0] if are_equal else layer_switches
        layer = nnx.merge(graphdef, layer_state)
        before = jax.tree.leaves(nnx.state(layer, nnx.RngCount))
        x, cache = layer(x, place, cache, own)
        counts = nnx.state(layer, nnx.RngCount)
        after = jax.tree.leaves(counts)
        is_drawn = any(a is not b for a, b in zip(after, before, strict=True))
        return x, (cache, counts if is_drawn else None)

    x, (caches, counts) = jax.lax.scan(step, x, (state, caches, arrays))
    if counts is not None:
        nnx.update(layers, counts)
    return x, caches
