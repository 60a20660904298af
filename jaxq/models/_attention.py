"""Grouped-query attention with rotary positions, windows and caches.

References:
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023.
    Gemma team, Gemma 2: Improving Open Language Models at a Practical Size, 2024
    (soft caps, alternating windows).
    Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023 (norms
    of queries and keys).
    Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2024.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models._config import DecoderConfig, LayerSwitches
from jaxq.models._layers import linear, norm, output_std
from jaxq.models._rope import RopeScaling, Rotation, rotate_heads, rotation_at


class TokenPlace(NamedTuple):
    """Where the tokens of one call are in their texts.

    Attributes:
        rotation: of queries and keys. None if the model rotates nothing.
        local_rotation: the same for layers with the sliding window.
        mask: bool [1 or b, t, s], which keys each token reads. None for a quantized
            cache, which determines this itself.
        window_mask: the same for layers with the sliding window.
        start: int32, the place of the first token; [b] for a quantized cache.
        count: int32[b], how many tokens enter a quantized cache; None means all.
    """

    rotation: Rotation | None
    local_rotation: Rotation | None
    mask: jax.Array | None
    window_mask: jax.Array | None
    start: jax.Array
    count: jax.Array | None

    def of_layer(self, layer: LayerSwitches) -> TokenPlace:
        """What a layer of some switches reads, in `rotation` and `mask`.

        The switches are Python booleans, or traced in a scan over different layers.
        """
        mask = _choose(layer.windowed, self.window_mask, self.mask)
        rotation = _choose(layer.windowed, self.local_rotation, self.rotation)
        if rotation is not None:
            rotation = _choose(layer.rotary, rotation, _identity(rotation, layer))
        return self._replace(rotation=rotation, mask=mask)


def token_place(
    config: DecoderConfig,
    positions: jax.Array,
    num_keys: int,
    start: jax.Array,
    *,
    padding: jax.Array | None = None,
    count: jax.Array | None = None,
) -> TokenPlace:
    """The places of new tokens.

    Args:
        config: of the model.
        positions: int32 [1 or b, t], of the tokens in their texts.
        num_keys: s, the number of keys. They begin at place 0.
        start: int32, the place of the first token; [b] for a quantized cache.
        padding: int32[b], how many keys at the start of each row belong to no token.
        count: int32[b], for a quantized cache.
    """
    rotation = local = None
    if not config.learned_positions:
        lengths = positions[:, -1] + 1
        if count is not None:  # the last tokens are not real
            lengths = positions[:, 0] + count
        rotate_at = functools.partial(rotation_at, positions, lengths)
        theta, h = config.rope_theta, config.head_dim
        rotation = local = rotate_at(theta, h, config.rope_scaling)
        if config.local_rope_theta is not None:
            local = rotate_at(config.local_rope_theta, h, RopeScaling())
    mask = window_mask = None
    if start.ndim == 0:
        queries = start + jnp.arange(positions.shape[1], dtype=jnp.int32)
        keys = jnp.arange(num_keys, dtype=jnp.int32)
        distance = (queries[:, None] - keys[None])[None]  # [1, t, s]
        mask = distance >= 0
        if padding is not None:
            mask = mask & (keys[None] >= padding[:, None])[:, None]  # [b, t, s]
        window_mask = mask
        if config.sliding_window is not None:
            window_mask = mask & (distance < config.sliding_window)
    return TokenPlace(rotation, local, mask, window_mask, start, count)


class Attention(nnx.Module):
    """Grouped-query attention: `o_proj(softmax(q k^T) v)`."""

    def __init__(
        self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d, h = config.hidden_size, config.head_dim
        n, m = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.q_proj = linear(d, n * h, bias, **types, rngs=rngs)
        self.k_proj = linear(d, m * h, bias, **types, rngs=rngs)
        self.v_proj = linear(d, m * h, bias, **types, rngs=rngs)
        std = output_std(config)
        out_bias = config.attention_output_bias
        self.o_proj = linear(n * h, d, out_bias, **types, rngs=rngs, std=std)
        if config.query_key_norm is not None:
            sizes = (h, h) if config.query_key_norm == "head" else (n * h, m * h)
            self.q_norm = norm(config, sizes[0], param_dtype=param_dtype, rngs=rngs)
            self.k_norm = norm(config, sizes[1], param_dtype=param_dtype, rngs=rngs)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((n,), param_dtype))
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, place: TokenPlace, cache: Any):
        b, t, _ = x.shape
        config = self.config
        n, m, h = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        q = self.q_proj(x).astype(jnp.float32)
        k = self.k_proj(x).astype(jnp.float32)
        if config.query_key_norm == "heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.reshape(b, t, n, h), k.reshape(b, t, m, h)
        v = self.v_proj(x).astype(self.dtype).reshape(b, t, m, h)
        if config.query_key_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if place.rotation is not None:
            q, k = rotate_heads(q, place.rotation), rotate_heads(k, place.rotation)
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        if place.mask is None:
            y = cache.attend(q, k, v, scale=config.attention_scale)  # [b, t, n, h]
            cache = cache.append(k, v, count=place.count)
        else:
            y, cache = self._attend(q, k, v, place, cache)
        return self.o_proj(y.reshape(b, t, n * h)).astype(jnp.float32), cache

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: TokenPlace, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Attention over float keys and values: `[b, t, n, h]`, and the new cache."""
        b, t, n, h = q.shape
        m = self.config.num_key_value_heads
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
        scores = jnp.einsum("bmqh,bmsh->bmqs", q, k, preferred_element_type=jnp.float32)
        weights = self._weights(scores.reshape(b, m, g, t, -1), place)
        y = jnp.einsum(
            "bmqs,bmsh->bmqh",
            weights.astype(self.dtype).reshape(b, m, g * t, -1),
            v,
            preferred_element_type=jnp.float32,
        )
        return y.reshape(b, n, t, h).transpose(0, 2, 1, 3), cache

    def _weights(self, scores: jax.Array, place: TokenPlace) -> jax.Array:
        """The softmax of products of queries and keys, float32 [b, m, g, t, s]."""
        config = self.config
        if config.attention_scale is None:
            scores = scores / math.sqrt(config.head_dim)
        else:
            scores = scores * config.attention_scale
        scores = soft_cap(scores, config.attention_softcap)
        assert place.mask is not None
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(place.mask[:, None, None], scores, lowest)
        if not config.attention_sinks:
            return jax.nn.softmax(scores, axis=-1)
        b, m, g, t, _ = scores.shape
        sinks = self.sinks[...].astype(jnp.float32).reshape(1, m, g, 1, 1)
        column = jnp.broadcast_to(sinks, (b, m, g, t, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)
        return weights[..., :-1]  # the sink has no value


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap tanh(x / cap)`, or x if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _choose(condition: Any, if_true: Any, if_false: Any) -> Any:
    """One of two trees by a Python boolean or a traced one."""
    if isinstance(condition, bool):
        return if_true if condition else if_false
    choose = lambda a, b: jnp.where(condition, a, b)  # noqa: E731
    return jax.tree.map(choose, if_true, if_false)


def _identity(rotation: Rotation, layer: LayerSwitches) -> Rotation | None:
    """A rotation by no angle, in the form that the switches need."""
    if isinstance(layer.rotary, bool):
        return None
    return Rotation(jnp.ones_like(rotation.cos), jnp.zeros_like(rotation.sin))
