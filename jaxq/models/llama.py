"""A decoder of the Llama family in plain flax nnx.

Nothing here is quantized: every projection is an ordinary `nnx.Linear`. One layer with
norms in front, d = hidden_size, n query heads, m key heads, h = head_dim and
f = intermediate_size computes

    q, k, v = q_proj(norm(x)), k_proj(norm(x)), v_proj(norm(x))
    x = x + o_proj(attention(rope(q), rope(k), v))                     # [b, t, d]
    x = x + down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))     # [b, t, d]

Matrix products read `dtype` (bfloat16 or float32), accumulate in float32 and return
float32, as matrix units do. Everything between them is float32: the residual stream,
norms, rotary embedding, softmax and logits.

References:
    Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes

from jaxq.models._config import LlamaConfig, RopeScaling

__all__ = ["Llama", "LlamaCache", "LlamaConfig", "RopeScaling"]

# Makes an empty quantized cache for one layer. jaxq.models sets it, so that this file
# imports nothing quantized.
_new_quantized_cache: Callable[..., Any] | None = None


def set_quantized_cache(make: Callable[..., Any]) -> None:
    """Sets the function by which `Llama.init_cache` makes a quantized cache.

    Args:
        make: makes an empty cache for one layer. It has the arguments of
            `jaxq.ops.KVCache.empty`: `make(cache, batch=, num_heads=, length=,
            head_dim=, window=, dtype=)`.
    """
    global _new_quantized_cache
    _new_quantized_cache = make


class LlamaCache(NamedTuple):
    """Keys (after rotary embedding) and values of earlier tokens, for all layers.

    Attributes:
        layers: one cache per layer. It is a pair `(keys, values)`, each `[b, m, length,
            h]`, or a `jaxq.ops.KVCache` if it is quantized. With `scan_layers` there is
            one cache for all layers, and its arrays have a leading layer axis.
        used: int32, number of tokens in the cache. It is a scalar for a float cache. It
            is `[b]` for a quantized cache, because each row has its own length.

    Example:
        >>> from jaxq.models import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, head_dim=16)
        >>> cache = Llama(config, rngs=nnx.Rngs(0)).init_cache(2, 8)
        >>> cache.layers[0][0].shape, int(cache.used)
        ((2, 1, 8, 16), 0)
    """

    layers: Any
    used: jax.Array

    def reset(self, slots: Any) -> LlamaCache:
        """A quantized cache in which some rows of the batch are empty again.

        Args:
            slots: indices of the rows, or bool `[b]` with True for a row to empty.

        Raises:
            ValueError: the cache is not quantized. All rows of a float cache have the
                same length.
        """
        if self.used.ndim == 0:
            raise ValueError(
                "LlamaCache.reset: all rows of a float cache have one length. "
                'Use init_cache(..., cache="int8").'
            )
        is_stacked = hasattr(self.layers, "lengths")
        if is_stacked:
            layers = self.layers.reset(slots)
            return LlamaCache(layers, layers.lengths[0])
        layers = tuple(layer.reset(slots) for layer in self.layers)
        return LlamaCache(layers, layers[0].lengths)


class Llama(nnx.Module):
    """A decoder-only language model: token ids in, logits of the next token out.

    Args:
        config: a `LlamaConfig`.
        dtype: dtype that matrix products read. They accumulate in float32.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters: normal numbers with standard deviation
            0.02. The projections that write into the residual stream are divided by
            `sqrt(2 * num_hidden_layers)`.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, head_dim=16)
        >>> model = Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> logits = model(jnp.zeros((2, 16), jnp.int32))
        >>> logits.shape, logits.dtype
        ((2, 16, 64), dtype('float32'))
    """

    def __init__(
        self,
        config: LlamaConfig,
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

        def make_layer(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.layers: Any
        num_layers = config.num_hidden_layers
        if config.scan_layers:
            make_stack = nnx.vmap(make_layer, in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=num_layers)(make_stack)(rngs)
        else:
            self.layers = nnx.List([make_layer(rngs) for _ in range(num_layers)])
        self.norm = _rms_norm(config, param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(
                config.hidden_size, config.vocab_size, False, dtype, param_dtype, rngs
            )

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

    def init_cache(self, batch: int, length: int, *, cache: Any = None) -> LlamaCache:
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
            ValueError: no preset has this name, or a size is below 1.
        """
        if cache is None:
            return self._float_cache(batch, length)
        return self._quantized_cache(batch, length, cache)

    def decode(
        self, tokens: jax.Array, cache: LlamaCache, *, count: jax.Array | None = None
    ) -> tuple[jax.Array, LlamaCache]:
        """Logits of the next token for tokens that follow those in the cache.

        With a quantized cache, the new tokens read the quantized earlier tokens, and
        each other in full precision.

        Args:
            tokens: int32[b, t], the next t tokens.
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
            >>> config = LlamaConfig(vocab_size=64, hidden_size=32,
            ...                      intermediate_size=48, num_hidden_layers=1,
            ...                      num_attention_heads=2, num_key_value_heads=1,
            ...                      head_dim=16)
            >>> model = Llama(config, rngs=nnx.Rngs(0))
            >>> cache = model.init_cache(batch=2, length=8)
            >>> logits, cache = model.decode(jnp.zeros((2, 3), jnp.int32), cache)
            >>> logits.shape, int(cache.used)
            ((2, 3, 64), 3)
        """
        if count is not None and cache.used.ndim == 0:
            raise ValueError(
                "Llama.decode: count needs a cache with a separate length for each "
                'row. Use init_cache(..., cache="int8").'
            )
        return self._forward(tokens, cache, count)

    def _float_cache(self, batch: int, length: int) -> LlamaCache:
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
        return LlamaCache(layers, jnp.zeros((), jnp.int32))

    def _quantized_cache(self, batch: int, length: int, cache: Any) -> LlamaCache:
        assert _new_quantized_cache is not None  # jaxq.models sets it at import
        config = self.config
        num_layers = config.num_hidden_layers
        sizes: dict[str, Any] = {
            "batch": batch,
            "num_heads": config.num_key_value_heads,
            "length": length,
            "head_dim": config.head_dim,
            "window": config.sliding_window,
            "dtype": self.dtype,
        }
        layers: Any
        if config.scan_layers:
            layers = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (num_layers, *leaf.shape)),
                _new_quantized_cache(cache, **sizes),
            )
        else:
            layers = tuple(
                _new_quantized_cache(cache, **sizes) for _ in range(num_layers)
            )
        return LlamaCache(layers, jnp.zeros((batch,), jnp.int32))

    def _forward(
        self,
        tokens: jax.Array,
        cache: LlamaCache | None,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits, and the grown cache if there is one."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Llama: tokens is {tokens.dtype}{list(tokens.shape)}; expected "
                "int32[b, t]. Add a batch axis with tokens[None]."
            )
        place = self._place(tokens.shape[1], cache, count)
        x = self.embed_tokens(tokens).astype(jnp.float32)  # [b, t, d]
        x, layer_caches = self._run_layers(
            x, place, None if cache is None else cache.layers
        )
        x = self.norm(x)
        if self.config.tie_word_embeddings:
            logits = self.embed_tokens.attend(x)
        else:
            logits = self.lm_head(x)
        logits = logits.astype(jnp.float32)  # [b, t, vocab]
        if cache is None:
            return logits, None
        t = tokens.shape[1]
        if count is None:
            num_new: Any = t
        else:
            num_new = jnp.clip(jnp.asarray(count, place.start.dtype), 0, t)
        return logits, LlamaCache(layer_caches, place.start + num_new)

    def _place(
        self, t: int, cache: LlamaCache | None, count: jax.Array | None
    ) -> TokenPlace:
        """The places of t new tokens, after the tokens in the cache."""
        start = jnp.zeros((), jnp.int32) if cache is None else cache.used
        steps = jnp.arange(t, dtype=jnp.int32)
        # [1, t]; [b, t] if each row of a quantized cache has a length of its own.
        positions = start.reshape(-1, 1) + steps[None]
        angles = _rope_angles(positions, self.config)  # [1 or b, t, h/2]
        mask = None
        if start.ndim == 0:
            num_keys = t
            if cache is not None:
                num_keys = jax.tree.leaves(cache.layers)[0].shape[-2]
            mask = _mask(positions[0], num_keys, self.config.sliding_window)  # [t, s]
        return TokenPlace(angles, mask, start, count)

    def _run_layers(
        self, x: jax.Array, place: TokenPlace, caches: Any
    ) -> tuple[jax.Array, Any]:
        if self.config.scan_layers:
            return _scan(self.layers, x, caches, place)
        new_caches = []
        for number, layer in enumerate(self.layers):
            layer_cache = None if caches is None else caches[number]
            x, new_cache = layer(x, place, layer_cache)
            new_caches.append(new_cache)
        return x, tuple(new_caches)


class TokenPlace(NamedTuple):
    """The positions of the tokens of one call in their texts.

    Attributes:
        angles: of the rotary embedding, float32 [1 or b, t, h/2].
        mask: bool [t, s], which keys each token reads. None for a quantized cache,
            which determines this itself.
        start: int32, the place of the first token; [b] for a quantized cache.
        count: int32[b], how many tokens enter a quantized cache; None means all.
    """

    angles: jax.Array
    mask: jax.Array | None
    start: jax.Array
    count: jax.Array | None


class DecoderLayer(nnx.Module):
    """Attention, then the gated MLP. Each reads a norm and adds to the stream."""

    def __init__(
        self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = _rms_norm(config, param_dtype, rngs)
        self.self_attn = Attention(config, **dtypes, rngs=rngs)
        self.post_attention_layernorm = _rms_norm(config, param_dtype, rngs)
        self.mlp = MLP(config, **dtypes, rngs=rngs)

    def __call__(self, x: jax.Array, place: TokenPlace, cache: Any):
        attended, cache = self.self_attn(self.input_layernorm(x), place, cache)
        x = x + attended  # [b, t, d]
        return x + self.mlp(self.post_attention_layernorm(x)), cache  # [b, t, d]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d, h = config.hidden_size, config.head_dim
        n, m = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = _linear(d, n * h, bias, dtype, param_dtype, rngs)
        self.k_proj = _linear(d, m * h, bias, dtype, param_dtype, rngs)
        self.v_proj = _linear(d, m * h, bias, dtype, param_dtype, rngs)
        self.o_proj = _linear(
            n * h,
            d,
            config.attention_output_bias,
            dtype,
            param_dtype,
            rngs,
            _output_std(config),
        )
        self.num_heads, self.num_kv_heads, self.head_dim = n, m, h
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, place: TokenPlace, cache: Any):
        b, t, _ = x.shape
        n, m, h = self.num_heads, self.num_kv_heads, self.head_dim
        q = self.q_proj(x).astype(jnp.float32).reshape(b, t, n, h)
        k = self.k_proj(x).astype(jnp.float32).reshape(b, t, m, h)
        v = self.v_proj(x).astype(self.dtype).reshape(b, t, m, h)
        q = _rotate(q, place.angles).astype(self.dtype)
        k = _rotate(k, place.angles).astype(self.dtype)
        if place.mask is None:
            y = cache.attend(q, k, v)  # [b, t, n, h]
            cache = cache.append(k, v, count=place.count)
        else:
            y, cache = self._attend(q, k, v, place, cache)
        return self.o_proj(y.reshape(b, t, n * h)).astype(jnp.float32), cache

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: TokenPlace, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Attention over float keys and values: `[b, t, n, h]`, and the new cache."""
        b, t, n, h = q.shape
        m = self.num_kv_heads
        g = n // m  # query heads per key head
        # The query heads of one key head become rows of one matrix. This gives two
        # plain batched products and no repeated keys.
        q = q.transpose(0, 2, 1, 3).reshape(b, m, g * t, h)
        k = k.transpose(0, 2, 1, 3)  # [b, m, t, h]
        v = v.transpose(0, 2, 1, 3)
        if cache is not None:
            put = jax.lax.dynamic_update_slice_in_dim
            k = put(cache[0], k, place.start, axis=2)  # [b, m, s, h]
            v = put(cache[1], v, place.start, axis=2)
            cache = (k, v)
        scores = jnp.einsum(
            "bmqh,bmsh->bmqs", q, k, preferred_element_type=jnp.float32
        ) / math.sqrt(h)
        scores = scores.reshape(b, m, g, t, -1)  # [b, m, g, t, s]
        assert place.mask is not None
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(place.mask[None, None, None], scores, lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = weights.reshape(b, m, g * t, -1)
        y = jnp.einsum(
            "bmqs,bmsh->bmqh", weights, v, preferred_element_type=jnp.float32
        )
        return y.reshape(b, n, t, h).transpose(0, 2, 1, 3), cache


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        std = _output_std(config)
        self.gate_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.up_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.down_proj = _linear(f, d, bias, dtype, param_dtype, rngs, std)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32))  # [b, t, f]
        up = self.up_proj(x).astype(jnp.float32)  # [b, t, f]
        return self.down_proj(gate * up).astype(jnp.float32)  # [b, t, d]


def _linear(
    num_in: int,
    num_out: int,
    bias: bool,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
    std: float = 0.02,
) -> nnx.Linear:
    promote: Any = _promote if bias else flax_dtypes.promote_dtype
    return nnx.Linear(
        num_in,
        num_out,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nnx.initializers.normal(std),
        promote_dtype=promote,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def _promote(arrays: tuple, *, dtype: Any, **_: Any) -> tuple:
    """Operands in the compute dtype, and the bias in float32.

    The bias is added to the product, which is float32.
    """
    x, kernel, bias = arrays
    if bias is not None:
        bias = bias.astype(jnp.float32)
    return x.astype(dtype), kernel.astype(dtype), bias


def _output_std(config: LlamaConfig) -> float:
    """Keeps the initial variance of the stream independent of depth (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.num_hidden_layers)


def _rms_norm(config: LlamaConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _scan(layers: Any, x: jax.Array, caches: Any, place: TokenPlace):
    """Runs stacked layers one after another.

    Layers are only read, so this is a plain scan over their state. It also works inside
    another loop.
    """
    graphdef, state = nnx.split(layers)

    def step(x, sliced):
        layer_state, cache = sliced
        return nnx.merge(graphdef, layer_state)(x, place, cache)

    return jax.lax.scan(step, x, (state, caches))


def _mask(positions: jax.Array, num_keys: int, window: int | None) -> jax.Array:
    """bool [t, s]: True if the query at `positions[i]` may read the key at place j."""
    distance = positions[:, None] - jnp.arange(num_keys, dtype=jnp.int32)[None]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _rope_angles(positions: jax.Array, config: LlamaConfig) -> jax.Array:
    """Angles in radians, position times frequency: `[b, t] -> [b, t, h/2]`."""
    frequencies = jnp.asarray(_rope_frequencies(config))
    return positions.astype(jnp.float32)[..., None] * frequencies[None, None]


def _rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per token, float32 [h/2]."""
    h, scaling = config.head_dim, config.rope_scaling
    exponents = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    frequencies = frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # Turns of each frequency over the length that the model was trained on.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        # 0 for low frequencies, which are divided by the factor; 1 for high ones.
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        scaled = (1 - keep) * frequencies / scaling.factor + keep * frequencies
        return scaled.astype(np.float32)
    return frequencies


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of every head: `[b, t, heads, h]`.

    Args:
        x: [b, t, heads, h].
        angles: [1 or b, t, h/2], in radians.
    """
    cos = jnp.cos(angles)[:, :, None]  # [1 or b, t, 1, h/2]
    sin = jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1)
