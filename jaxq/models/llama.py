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
        layers: one `(keys, values)` pair a layer, each `[b, m, length, h]`; with `scan_layers` one pair with a
            leading layer axis.
        used: int32 scalar, how many of the `length` places are filled.
    """

    layers: Any
    used: jax.Array


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
        self, config: LlamaConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
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
            self.layers = nnx.List([make_layer(rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _rms_norm(config, param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False, dtype, param_dtype, rngs)

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

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens, in the compute dtype."""
        config = self.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        if config.scan_layers:
            shape = (config.num_hidden_layers, *shape)
            layers = (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        else:
            layers = tuple(
                (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(config.num_hidden_layers)
            )
        return KVCache(layers, jnp.zeros((), jnp.int32))

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """As a call, for tokens that follow those in the cache.

        Args:
            tokens: int32[b, t], the next t tokens.
            cache: from `init_cache` or an earlier `decode`. The caller sees to it that `used + t` stays within its
                length: `used` is a traced number, so it cannot be checked here.

        Returns:
            Logits float32[b, t, vocab_size] and the grown cache.
        """
        return self._forward(tokens, cache)

    def scale_groups(self) -> list[Any]:
        """Where a scale can move from one layer to the next ones: `jaxq.models.norm_groups`."""
        from jaxq.models import _outliers

        return _outliers.norm_groups(self)

    def fold_scales(self, scales: Any) -> Llama:
        """A copy in which scales have moved: `jaxq.models.fold_scales`."""
        from jaxq.models import _outliers

        return _outliers.fold_scales(self, scales)

    def _forward(self, tokens: jax.Array, cache: KVCache | None) -> tuple[jax.Array, Any]:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Llama: tokens is {tokens.dtype}{list(tokens.shape)}; expected int32[b, t]. "
                "Add a batch axis with tokens[None]."
            )
        t = tokens.shape[1]
        start = jnp.zeros((), jnp.int32) if cache is None else cache.used
        positions = start + jnp.arange(t, dtype=jnp.int32)  # [t]
        angles = _rope_angles(positions, self.config)  # [t, h/2]
        num_keys = t if cache is None else jax.tree.leaves(cache.layers)[0].shape[-2]
        mask = _mask(positions, num_keys, self.config.sliding_window)  # [t, s]

        x = self.embed_tokens(tokens).astype(jnp.float32)  # [b, t, d]
        layer_caches = None if cache is None else cache.layers
        if self.config.scan_layers:
            x, layer_caches = _scan(self.layers, x, layer_caches, angles, mask, start)
        else:
            new_caches = []
            for i, layer in enumerate(self.layers):
                x, new = layer(x, angles, mask, start, None if layer_caches is None else layer_caches[i])
                new_caches.append(new)
            layer_caches = tuple(new_caches)
        x = self.norm(x)
        head = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        logits = head(x).astype(jnp.float32)  # [b, t, vocab]
        return logits, None if cache is None else KVCache(layer_caches, start + t)


class DecoderLayer(nnx.Module):
    """Attention, then the gated MLP, each read through a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = _rms_norm(config, param_dtype, rngs)
        self.self_attn = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = _rms_norm(config, param_dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array, start: jax.Array, cache: Any):
        attended, cache = self.self_attn(self.input_layernorm(x), angles, mask, start, cache)
        x = x + attended  # [b, t, d]
        return x + self.mlp(self.post_attention_layernorm(x)), cache  # [b, t, d]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        n, m = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = _linear(d, n * h, bias, dtype, param_dtype, rngs)
        self.k_proj = _linear(d, m * h, bias, dtype, param_dtype, rngs)
        self.v_proj = _linear(d, m * h, bias, dtype, param_dtype, rngs)
        self.o_proj = _linear(n * h, d, config.attention_output_bias, dtype, param_dtype, rngs, _output_std(config))
        self.num_heads, self.num_kv_heads, self.head_dim = n, m, h
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array, start: jax.Array, cache: Any):
        b, t, _ = x.shape
        m, h, g = self.num_kv_heads, self.head_dim, self.num_heads // self.num_kv_heads
        q = self.q_proj(x).astype(jnp.float32).reshape(b, t, m * g, h)
        k = self.k_proj(x).astype(jnp.float32).reshape(b, t, m, h)
        v = self.v_proj(x).astype(self.dtype).reshape(b, t, m, h).transpose(0, 2, 1, 3)  # [b, m, t, h]
        # The query heads of one key head become rows of one matrix: two plain batched products, no repeated keys.
        q = _rotate(q, angles).astype(self.dtype).transpose(0, 2, 1, 3).reshape(b, m, g * t, h)
        k = _rotate(k, angles).astype(self.dtype).transpose(0, 2, 1, 3)  # [b, m, t, h]
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, start, axis=2)  # [b, m, s, h]
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, start, axis=2)
            cache = (k, v)
        scores = jnp.einsum("bmqh,bmsh->bmqs", q, k, preferred_element_type=jnp.float32) / math.sqrt(h)
        scores = scores.reshape(b, m, g, t, -1)
        scores = jnp.where(mask[None, None, None], scores, jnp.finfo(jnp.float32).min)  # [b, m, g, t, s]
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype).reshape(b, m, g * t, -1)
        y = jnp.einsum("bmqs,bmsh->bmqh", weights, v, preferred_element_type=jnp.float32)
        y = y.reshape(b, m * g, t, h).transpose(0, 2, 1, 3).reshape(b, t, m * g * h)
        return self.o_proj(y).astype(jnp.float32), cache  # [b, t, d]


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.up_proj = _linear(d, f, bias, dtype, param_dtype, rngs)
        self.down_proj = _linear(f, d, bias, dtype, param_dtype, rngs, _output_std(config))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32))  # [b, t, f]
        return self.down_proj(gate * self.up_proj(x).astype(jnp.float32)).astype(jnp.float32)  # [b, t, d]


def _linear(
    num_in: int, num_out: int, bias: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, std: float = 0.02
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
    return x.astype(dtype), kernel.astype(dtype), None if bias is None else bias.astype(jnp.float32)


def _output_std(config: LlamaConfig) -> float:
    """Keeps the stream's variance independent of depth at the start of training (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.num_hidden_layers)


def _rms_norm(config: LlamaConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.rms_norm_eps, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


def _scan(layers: Any, x: jax.Array, caches: Any, angles: jax.Array, mask: jax.Array, start: jax.Array):
    """Runs stacked layers. Layers are only read, so a plain scan over their state does, inside any other loop too."""
    graphdef, state = nnx.split(layers)

    def step(x, sliced):
        layer_state, cache = sliced
        return nnx.merge(graphdef, layer_state)(x, angles, mask, start, cache)

    return jax.lax.scan(step, x, (state, caches))


def _mask(positions: jax.Array, num_keys: int, window: int | None) -> jax.Array:
    """True where the query at `positions[i]` may read the key at position j.   # [t, s]"""
    distance = positions[:, None] - jnp.arange(num_keys, dtype=jnp.int32)[None]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _rope_angles(positions: jax.Array, config: LlamaConfig) -> jax.Array:
    """Angles in radians: position times frequency.   # [t, h/2]"""
    inverse = _rope_frequencies(config)
    return positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse)[None]


def _rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a token, float32[h/2]."""
    h, scaling = config.head_dim, config.rope_scaling
    exponents = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    inverse = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * inverse / (2 * np.pi)  # over the training context
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: low frequency, 1: high
        return ((1 - keep) * inverse / scaling.factor + keep * inverse).astype(np.float32)
    return inverse


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of every head by its position's angles.   # [b, t, heads, h]"""
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]  # [1, t, 1, h/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
