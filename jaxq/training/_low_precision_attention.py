"""Dot-product attention whose two products follow a recipe of low precision."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes

from jaxq.training._low_precision_dot import multiply_arrays
from jaxq.training._precision_recipe import LowPrecision


def attend(
    recipe: LowPrecision,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    key: jax.Array | None = None,
    bounds: None = None,
) -> jax.Array:
    """`nnx.dot_product_attention` with products by a recipe.

    The left operands are the queries and the attention weights. The softmax and all
    other steps are in floats.

    Args:
      recipe: how operands are quantized, without delayed scaling.
      query: `[*batch, q, heads, d]`.
      keys: `[*batch, k, heads, d]`.
      values: `[*batch, k, heads, d]`.
      bias: as in `nnx.dot_product_attention`.
      mask: as in `nnx.dot_product_attention`.
      broadcast_dropout: as in `nnx.dot_product_attention`.
      dropout_rng: as in `nnx.dot_product_attention`.
      dropout_rate: as in `nnx.dot_product_attention`.
      deterministic: as in `nnx.dot_product_attention`.
      dtype: as in `nnx.dot_product_attention`.
      precision: has no effect.
      module: as in `nnx.dot_product_attention`.
      is_causal: as in `nnx.dot_product_attention`.
      key: PRNG key of the recipe, or None.
      bounds: must be None.

    Returns:
      `[*batch, q, heads, d]`.
    """
    assert bounds is None, "callers refuse delayed scaling"
    query, keys, values = flax_dtypes.promote_dtype((query, keys, values), dtype=dtype)
    repeats = query.shape[-2] // keys.shape[-2]
    if repeats > 1:  # grouped query attention
        keys, values = (jnp.repeat(x, repeats, axis=-2) for x in (keys, values))
    score_key, value_key = (None, None) if key is None else jax.random.split(key)
    batch, n = tuple(range(query.ndim - 3)), query.ndim
    heads_inside = (*batch, n - 2)  # [*batch, tokens, heads, d]
    heads_first = (*batch, n - 3)  # [*batch, heads, q, k]

    scale = jnp.asarray(1 / math.sqrt(query.shape[-1]), query.dtype)
    dims = (((n - 1,), (n - 1,)), (heads_inside, heads_inside))
    scores = multiply_arrays(recipe, query * scale, keys, dims, key=score_key)
    if bias is not None:
        scores = scores + bias
    lowest = jnp.finfo(scores.dtype).min
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(jnp.expand_dims(causal, heads_first), scores, lowest)
    if mask is not None:
        scores = jnp.where(mask, scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1)
    if module is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights)
    if not deterministic and dropout_rate > 0:
        assert dropout_rng is not None  # Flax passes it
        shape = weights.shape
        if broadcast_dropout:
            shape = (1,) * (n - 2) + shape[-2:]
        is_kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)
        factor = jnp.asarray(1 / (1 - dropout_rate), weights.dtype)
        weights = weights * jnp.where(is_kept, factor, jnp.zeros((), weights.dtype))
    dims = (((n - 1,), (n - 3,)), (heads_first, heads_inside))
    y = multiply_arrays(recipe, weights, values, dims, key=value_key)
    return jnp.swapaxes(y, -2, -3)
