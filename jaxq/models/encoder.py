"""An encoder of the BERT family in plain flax nnx, for sentence embeddings.

Every token reads all real tokens of its text. Norms come after the residual sums. With
d = hidden_size, one layer computes

    x = norm(x + o_proj(attention(q_proj(x), k_proj(x), v_proj(x))))   # [b, t, d]
    x = norm(x + down_proj(gelu(up_proj(x))))                          # [b, t, d]

Matrix products read `dtype` and accumulate in float32. Everything else is float32.

References:
    Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding, 2019.
    Reimers and Gurevych, Sentence-BERT: Sentence Embeddings using Siamese
    BERT-Networks, 2019 (pooling).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models._hf_config import read_encoder_entries, write_encoder_entries
from jaxq.models._layers import ACTIVATIONS, linear, output_std

__all__ = ["Encoder", "EncoderConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and switches of an `Encoder`. Most names are those of `config.json`.

    Args:
        vocab_size: number of token ids.
        hidden_size: width d of the stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads. It divides `hidden_size`.
        max_position_embeddings: the largest number of tokens of a text.
        type_vocab_size: number of token types.
        layer_norm_eps: the norms add it to the variance before they take the root.
        activation: of the MLP: "gelu", "gelu_tanh" or "silu".
        pooling: how `embed` makes one vector of a text: the "mean" of its tokens, their
            "max", or the first token, "cls".
        normalizes: `embed` divides each vector by its length.

    Raises:
        ValueError: a size is below 1, `num_attention_heads` does not divide
            `hidden_size`, or a name is unknown.

    Example:
        >>> from jaxq.models import EncoderConfig
        >>> EncoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...               num_hidden_layers=1, num_attention_heads=2).pooling
        'mean'
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: Literal["silu", "gelu", "gelu_tanh"] = "gelu"
    pooling: Literal["mean", "max", "cls"] = "mean"
    normalizes: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(
                    f"EncoderConfig: {field.name} is {value}; it must be at least 1."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"EncoderConfig: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        names = {"activation": tuple(ACTIVATIONS), "pooling": ("mean", "max", "cls")}
        for name, expected in names.items():
            if getattr(self, name) not in expected:
                raise ValueError(
                    f"EncoderConfig: {name} is {getattr(self, name)!r}; expected one "
                    f"of {', '.join(expected)}."
                )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **options: Any) -> EncoderConfig:
        """The config of a model that a Hugging Face `config.json` describes.

        Args:
            config: the parsed JSON, with `model_type` "bert".
            **options: other fields, such as `pooling`. The file does not have them.

        Raises:
            ValueError: a key is missing, has a value of another type, or has a value
                that this model does not support. One message lists all such keys.

        Example:
            >>> from jaxq.models import EncoderConfig
            >>> EncoderConfig.from_hf({
            ...     "model_type": "bert", "vocab_size": 64, "hidden_size": 32,
            ...     "intermediate_size": 48, "num_hidden_layers": 1,
            ...     "num_attention_heads": 2,
            ... }).max_position_embeddings
            512
        """
        return cls(**read_encoder_entries(config), **options)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a `config.json` that `transformers` reads as the same model.

        The dict has no `pooling` and no `normalizes`. `jaxq.models.save` writes them
        to other files, as sentence-transformers does.

        Example:
            >>> from jaxq.models import EncoderConfig
            >>> config = EncoderConfig(vocab_size=64, hidden_size=32,
            ...                        intermediate_size=48, num_hidden_layers=1,
            ...                        num_attention_heads=2)
            >>> EncoderConfig.from_hf(config.to_hf()) == config
            True
        """
        return write_encoder_entries(self)


class Encoder(nnx.Module):
    """A bidirectional encoder: token ids in, one vector a token or a text out.

    Args:
        config: an `EncoderConfig`.
        dtype: dtype that matrix products read. They accumulate in float32.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Example:
        >>> from jaxq.models import EncoderConfig
        >>> config = EncoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                        num_hidden_layers=1, num_attention_heads=2)
        >>> model, tokens = Encoder(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]])
        >>> model(tokens).shape, model.embed(tokens).shape
        ((1, 3, 32), (1, 32))
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)

        def table(num_rows: int) -> nnx.Embed:
            return nnx.Embed(
                num_rows,
                config.hidden_size,
                dtype=jnp.float32,
                param_dtype=param_dtype,
                embedding_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed_tokens = table(config.vocab_size)
        self.embed_positions = table(config.max_position_embeddings)
        self.embed_token_types = table(config.type_vocab_size)
        self.embed_norm = _norm(config, param_dtype, rngs)
        num_layers = config.num_hidden_layers
        layers = [EncoderLayer(config, **types, rngs=rngs) for _ in range(num_layers)]
        self.layers = nnx.List(layers)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """A vector for each token.

        Args:
            tokens: int32[b, t].
            mask: bool[b, t], which tokens are real. None means all. The vectors of
                other tokens have no meaning.
            token_types: int32[b, t]. None means 0.

        Returns:
            float32[b, t, d].

        Raises:
            ValueError: `tokens` is not an integer matrix, or a text has more tokens
                than there are learned positions.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Encoder: tokens is {tokens.dtype}{list(tokens.shape)}; expected "
                "int32[b, t]. Add a batch axis with tokens[None]."
            )
        t, longest = tokens.shape[1], self.config.max_position_embeddings
        if t > longest:
            raise ValueError(
                f"Encoder: {t} tokens are more than the model's {longest} learned "
                "positions (max_position_embeddings). Use a shorter text."
            )
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        positions = jnp.arange(t, dtype=jnp.int32)[None]
        x = self.embed_tokens(tokens) + self.embed_token_types(token_types)
        x = self.embed_norm(x + self.embed_positions(positions))  # [b, t, d]
        if mask is not None:
            mask = mask.astype(bool)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def embed(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """A vector for each text.

        Args:
            tokens: int32[b, t].
            mask: bool[b, t], which tokens are real. None means all.

        Returns:
            float32[b, d].

        Raises:
            ValueError: as in a call of the model.
        """
        x = self(tokens, mask)
        if self.config.pooling == "cls":
            y = x[:, 0]
        else:
            is_real = jnp.ones(tokens.shape, bool) if mask is None else mask
            is_real = is_real.astype(bool)[:, :, None]
            if self.config.pooling == "max":
                y = jnp.max(jnp.where(is_real, x, -jnp.inf), axis=1)
            else:
                num_real = jnp.maximum(jnp.sum(is_real, axis=1), 1).astype(jnp.float32)
                y = jnp.sum(jnp.where(is_real, x, 0), axis=1) / num_real
        if not self.config.normalizes:
            return y
        length = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
        return y / jnp.maximum(length, 1e-12)


class EncoderLayer(nnx.Module):
    """Attention, then the MLP. A norm follows each residual sum."""

    def __init__(
        self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.self_attn = EncoderAttention(config, **types, rngs=rngs)
        self.attention_output_norm = _norm(config, param_dtype, rngs)
        self.mlp = EncoderMLP(config, **types, rngs=rngs)
        self.mlp_output_norm = _norm(config, param_dtype, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = self.attention_output_norm(x + self.self_attn(x, mask))
        return self.mlp_output_norm(x + self.mlp(x))


class EncoderAttention(nnx.Module):
    """Attention of every token to all real tokens."""

    def __init__(
        self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d = config.hidden_size
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.q_proj = linear(d, d, True, **types, rngs=rngs)
        self.k_proj = linear(d, d, True, **types, rngs=rngs)
        self.v_proj = linear(d, d, True, **types, rngs=rngs)
        std = output_std(config)
        self.o_proj = linear(d, d, True, **types, rngs=rngs, std=std)
        self.num_heads = config.num_attention_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        b, t, d = x.shape
        h = d // self.num_heads

        def heads(y: jax.Array) -> jax.Array:
            return y.astype(self.dtype).reshape(b, t, self.num_heads, h)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        scores = jnp.einsum(
            "btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32
        ) / math.sqrt(h)
        if mask is not None:
            lowest = jnp.finfo(jnp.float32).min
            scores = jnp.where(mask[:, None, None], scores, lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum(
            "bnts,bsnh->btnh", weights, v, preferred_element_type=jnp.float32
        )
        return self.o_proj(y.reshape(b, t, d)).astype(jnp.float32)


class EncoderMLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(
        self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        d, f = config.hidden_size, config.intermediate_size
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.up_proj = linear(d, f, True, **types, rngs=rngs)
        std = output_std(config)
        self.down_proj = linear(f, d, True, **types, rngs=rngs, std=std)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = ACTIVATIONS[self.activation](self.up_proj(x).astype(jnp.float32))
        return self.down_proj(inner).astype(jnp.float32)


def _norm(config: EncoderConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        # The fast variance, mean(x^2) - mean(x)^2, cancels.
        use_fast_variance=False,
        rngs=rngs,
    )
