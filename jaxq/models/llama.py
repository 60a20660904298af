"""A Llama-family decoder in plain flax nnx: no quantization inside, every projection an ordinary `nnx.Linear`.

One pre-norm layer, with d = hidden_size, n query heads, m key heads, h = head_dim, f = intermediate_size:

    x = x + o_proj(attention(rope(q_proj(norm(x))), rope(k_proj(norm(x))), v_proj(norm(x))))    # [b, t, d]
    x = x + down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))                             # [b, t, d]

`dtype` is what matrix products read (bfloat16 or float32); they accumulate and return float32, and everything between
them (the residual stream, norms, rotary embedding, softmax, logits) stays float32, as matrix units do it.

References:
    Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes

from jaxq.models._config import LlamaConfig, RopeScaling

__all__ = ["KVCache", "Llama", "LlamaConfig", "RopeScaling"]


class KVCache(NamedTuple):
    """Keys (after rotary embedding) and values of the tokens seen so far.

    Attributes:
        layers: one `(keys, values)` pair a layer, each `[b, m, length, h]`, or one `jaxq.ops.KVCache`; with
            `scan_layers` a single one with a leading layer axis.
        used: int32, how many of the `length` places are filled: a scalar, or `[b]` where the cache is quantized and
            every row a slot of its own.
    """

    layers: Any
    used: jax.Array

    def reset(self, slots: Any) -> KVCache:
        """A quantized cache with some slots empty, ready for other texts.

        Args:
            slots: indices, or bool `[b]`, True for slots to empty.

        Raises:
            ValueError: the cache is not quantized: its rows have one length.
        """
        if self.used.ndim == 0:
            raise ValueError(
                'KVCache.reset: rows of a float cache have one length. Use init_cache(..., cache="int8").'
            )
        if hasattr(self.layers, "lengths"):  # stacked
            layers = self.layers.reset(slots)
            return KVCache(layers, layers.lengths[0])
        layers = tuple(layer.reset(slots) for layer in self.layers)
        return KVCache(layers, layers[0].lengths)


class Llama(nnx.Module):
    """A decoder-only language model: token ids in, next-token logits out.

    Args:
        config: a `LlamaConfig`.
        dtype: what matrix products read; they accumulate in float32.
        param_dtype: what parameters are stored in.
        rngs: source of the initial parameters (normal, standard deviation 0.02; the projections that write
            into the residual stream are divided by `sqrt(2 * num_hidden_layers)`).

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
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
        # The table is read in float32: the lookup is exact, and a tied head gives float32 logits.
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
        if config.scan_layers:
            split = nnx.split_rngs(splits=config.num_hidden_layers)
            self.layers = split(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)
        else:
            self.layers = nnx.List(
                [make_layer(rngs) for _ in range(config.num_hidden_layers)]
            )
        self.norm = _rms_norm(config, param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(
                config.hidden_size, config.vocab_size, False, dtype, param_dtype, rngs
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every next token.

        Args:
            tokens: int32[b, t], each in [0, vocab_size). No padding mask: pad on the right, and ignore what
                follows.

        Returns:
            float32[b, t, vocab_size].

        Raises:
            ValueError: tokens are not an integer matrix.
        """
        return self._forward(tokens, None)[0]

    def init_cache(self, batch: int, length: int, *, cache: Any = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens.

        Args:
            batch: rows.
            length: most tokens of a row.
            cache: how keys and values are stored: None keeps them in the compute dtype; a preset name ("int8", "int4",
                "int2", "fp8", "nf4", ...), a `jaxq.QuantSpec` or a `jaxq.ops.KVCacheSpec` quantizes all but the newest
                ones. A model with a sliding window then stores no more than the window.

        Raises:
            ValueError: no such preset, or sizes below 1.
        """
        config = self.config
        if cache is not None:
            from jaxq.ops import KVCache as Quantized

            def one() -> Any:
                return Quantized.empty(
                    cache,
                    batch=batch,
                    num_heads=config.num_key_value_heads,
                    length=length,
                    head_dim=config.head_dim,
                    window=config.sliding_window,
                    dtype=self.dtype,
                )

            num = config.num_hidden_layers
            if config.scan_layers:
                layers = jax.tree.map(
                    lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), one()
                )
            else:
                layers = tuple(one() for _ in range(num))
            return KVCache(layers, jnp.zeros((batch,), jnp.int32))
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        if config.scan_layers:
            shape = (config.num_hidden_layers, *shape)
            layers = (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        else:
            layers = tuple(
                (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
                for _ in range(config.num_hidden_layers)
            )
        return KVCache(layers, jnp.zeros((), jnp.int32))

    def decode(
        self, tokens: jax.Array, cache: KVCache, *, count: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As a call, for tokens that follow those in the cache.

        Args:
            tokens: int32[b, t], the next t tokens. Of a quantized cache they read quantized tokens before them, and
                one another in full precision.
            cache: from `init_cache` or an earlier `decode`. The caller sees to it that `used + t` stays within its
                length: `used` is a traced number, so it cannot be checked here.
            count: int32[b], how many of the t tokens each row really has, the first ones; logits behind them mean
                nothing, and the row grows by that many. Only for a quantized cache, whose rows are slots of their own;
                None takes all.

        Returns:
            Logits float32[b, t, vocab_size] and the grown cache.

        Raises:
            ValueError: tokens are not an integer matrix; `count` for a cache that is not quantized.
        """
        if count is not None and cache.used.ndim == 0:
            raise ValueError(
                'Llama.decode: count needs a cache with slots; use init_cache(..., cache="int8").'
            )
        return self._forward(tokens, cache, count)

    def scale_groups(self) -> list[Any]:
        """Where a scale can move from one layer to the next ones: `jaxq.models.norm_groups`."""
        from jaxq.models import _outliers

        return _outliers.norm_groups(self)

    def fold_scales(self, scales: Any) -> Llama:
        """A copy in which scales have moved: `jaxq.models.fold_scales`."""
        from jaxq.models import _outliers

        return _outliers.fold_scales(self, scales)

    def rotated(self, orthogonal: Any, online: Any) -> Llama:
        """A copy in rotated coordinates, heads and the inputs of down_proj too: `jaxq.models.rotate`.

        Args:
          orthogonal: gives an orthogonal matrix `[n, n]`, from n.
          online: orthogonal linear map of the last axis of an array.
        """
        from jaxq.models import _rotate

        heads = orthogonal(self.config.head_dim)
        return _rotate.rotate(
            self, orthogonal(self.config.hidden_size), heads=heads, online=online
        )

    def _forward(
        self, tokens: jax.Array, cache: KVCache | None, count: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Llama: tokens is {tokens.dtype}{list(tokens.shape)}; expected int32[b, t]. "
                "Add a batch axis with tokens[None]."
            )
        t = tokens.shape[1]
        start = jnp.zeros((), jnp.int32) if cache is None else cache.used
        positions = (
            start.reshape(-1, 1) + jnp.arange(t, dtype=jnp.int32)[None]
        )  # [1, t], or [b, t] of slots
        angles, mask = _rope_angles(positions, self.config), None  # [1 or b, t, h/2]
        if start.ndim == 0:
            num_keys = (
                t if cache is None else jax.tree.leaves(cache.layers)[0].shape[-2]
            )
            mask = _mask(positions[0], num_keys, self.config.sliding_window)  # [t, s]
        place = _Place(angles, mask, start, count)

        x = self.embed_tokens(tokens).astype(jnp.float32)  # [b, t, d]
        layer_caches = None if cache is None else cache.layers
        if self.config.scan_layers:
            x, layer_caches = _scan(self.layers, x, layer_caches, place)
        else:
            new_caches = []
            for i, layer in enumerate(self.layers):
                x, new = layer(
                    x, place, None if layer_caches is None else layer_caches[i]
                )
                new_caches.append(new)
            layer_caches = tuple(new_caches)
        x = self.norm(x)
        head = (
            self.embed_tokens.attend
            if self.config.tie_word_embeddings
            else self.lm_head
        )
        logits = head(x).astype(jnp.float32)  # [b, t, vocab]
        grown = (
            start + t
            if count is None
            else start + jnp.clip(jnp.asarray(count, start.dtype), 0, t)
        )
        return logits, None if cache is None else KVCache(layer_caches, grown)


class _Place(NamedTuple):
    """Where the tokens of one call stand.

    Attributes:
        angles: of the rotary embedding, float32 [1 or b, t, h/2].
        mask: bool [t, s], what each reads; None for a quantized cache, which sees to that itself.
        start: int32, where the first one goes in the cache; [b] of a quantized one.
        count: int32[b], how many enter a quantized cache; None for all.
    """

    angles: jax.Array
    mask: jax.Array | None
    start: jax.Array
    count: jax.Array | None


class DecoderLayer(nnx.Module):
    """Attention, then the gated MLP, each read through a norm and added to the stream."""

    def __init__(
        self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        self.input_layernorm = _rms_norm(config, param_dtype, rngs)
        self.self_attn = Attention(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.post_attention_layernorm = _rms_norm(config, param_dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, place: _Place, cache: Any):
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

    def __call__(self, x: jax.Array, place: _Place, cache: Any):
        b, t, _ = x.shape
        m, h, g = self.num_kv_heads, self.head_dim, self.num_heads // self.num_kv_heads
        q = _rotate(
            self.q_proj(x).astype(jnp.float32).reshape(b, t, m * g, h), place.angles
        ).astype(self.dtype)
        k = _rotate(
            self.k_proj(x).astype(jnp.float32).reshape(b, t, m, h), place.angles
        ).astype(self.dtype)
        v = self.v_proj(x).astype(self.dtype).reshape(b, t, m, h)
        if place.mask is None:
            y = cache.attend(q, k, v)  # [b, t, m * g, h]
            cache = cache.append(k, v, count=place.count)
            return self.o_proj(y.reshape(b, t, m * g * h)).astype(
                jnp.float32
            ), cache  # [b, t, d]
        # The query heads of one key head become rows of one matrix: two plain batched products, no repeated keys.
        q = q.transpose(0, 2, 1, 3).reshape(b, m, g * t, h)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [b, m, t, h]
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(
                cache[0], k, place.start, axis=2
            )  # [b, m, s, h]
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, place.start, axis=2)
            cache = (k, v)
        scores = jnp.einsum(
            "bmqh,bmsh->bmqs", q, k, preferred_element_type=jnp.float32
        ) / math.sqrt(h)
        scores = scores.reshape(b, m, g, t, -1)
        scores = jnp.where(
            place.mask[None, None, None], scores, jnp.finfo(jnp.float32).min
        )  # [b, m, g, t, s]
        weights = (
            jax.nn.softmax(scores, axis=-1).astype(self.dtype).reshape(b, m, g * t, -1)
        )
        y = jnp.einsum(
            "bmqs,bmsh->bmqh", weights, v, preferred_element_type=jnp.float32
        )
        y = y.reshape(b, m * g, t, h).transpose(0, 2, 1, 3).reshape(b, t, m * g * h)
        return self.o_proj(y).astype(jnp.float32), cache  # [b, t, d]


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.up_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.down_proj = _linear(
            f, d, bias, dtype, param_dtype, rngs, _output_std(config)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32))  # [b, t, f]
        return self.down_proj(gate * self.up_proj(x).astype(jnp.float32)).astype(
            jnp.float32
        )  # [b, t, d]


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
    """Operands in the compute dtype, the bias in float32 like the product it is added to."""
    x, kernel, bias = arrays
    return (
        x.astype(dtype),
        kernel.astype(dtype),
        None if bias is None else bias.astype(jnp.float32),
    )


def _output_std(config: LlamaConfig) -> float:
    """Keeps the stream's variance independent of depth at the start of training (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.num_hidden_layers)


def _rms_norm(config: LlamaConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _scan(layers: Any, x: jax.Array, caches: Any, place: _Place):
    """Runs stacked layers. Layers are only read, so a plain scan over their state does, inside any other loop too."""
    graphdef, state = nnx.split(layers)

    def step(x, sliced):
        layer_state, cache = sliced
        return nnx.merge(graphdef, layer_state)(x, place, cache)

    return jax.lax.scan(step, x, (state, caches))


def _mask(positions: jax.Array, num_keys: int, window: int | None) -> jax.Array:
    """True where the query at `positions[i]` may read the key at position j.   # [t, s]"""
    distance = positions[:, None] - jnp.arange(num_keys, dtype=jnp.int32)[None]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _rope_angles(positions: jax.Array, config: LlamaConfig) -> jax.Array:
    """Angles in radians: position times frequency.   # [b, t] -> [b, t, h/2]"""
    inverse = _rope_frequencies(config)
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse)[None, None]


def _rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a token, float32[h/2]."""
    h, scaling = config.head_dim, config.rope_scaling
    exponents = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    inverse = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = (
            scaling.original_max_position_embeddings * inverse / (2 * np.pi)
        )  # over the training context
        keep = np.clip(
            (turns - low) / (high - low), 0.0, 1.0
        )  # 0: low frequency, 1: high
        return ((1 - keep) * inverse / scaling.factor + keep * inverse).astype(
            np.float32
        )
    return inverse


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of every head by its position's angles.   # [b, t, heads, h]"""
    cos, sin = (
        jnp.cos(angles)[:, :, None],
        jnp.sin(angles)[:, :, None],
    )  # [1 or b, t, 1, h/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
