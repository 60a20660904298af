"""Small causal models for the tests of this folder."""

import jax.numpy as jnp
from flax import nnx

from jaxq.models import Llama, LlamaConfig
from tests.arrays import normal

VOCAB = 16
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def llama(seed: int = 0) -> Llama:
    """A language model with a cache of keys and values."""
    model = Llama(CONFIG, rngs=nnx.Rngs(seed))
    # Larger embeddings, so that the most probable token is clear.
    model.embed_tokens.embedding[...] *= 50
    return model


def mean_logits(params, tokens):
    """A causal model: logits [b, n, vocab] from the mean of the tokens so far."""
    x = params["embed"][tokens]  # [b, n, d]
    counts = jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    return (jnp.cumsum(x, axis=1) / counts) @ params["head"]


def params(seed: int = 0):
    return {
        "embed": normal(VOCAB, 8, seed=seed),
        "head": 3 * normal(8, VOCAB, seed=seed + 1),
    }


class MeanModel(nnx.Module):
    """`mean_logits` as an nnx module."""

    def __init__(self, seed: int = 0):
        numbers = params(seed)
        self.embed = nnx.Param(numbers["embed"])
        self.head = nnx.Param(numbers["head"])

    def __call__(self, tokens):
        numbers = {"embed": self.embed[...], "head": self.head[...]}
        return mean_logits(numbers, tokens)


class Letters:
    """A tokenizer: "a" is 2, "b" is 3, and so on. 0 is padding, 1 is the end."""

    def encode(self, text):
        return [ord(letter) - ord("a") + 2 for letter in text]

    def decode(self, ids):
        assert 1 not in ids
        return "".join(chr(i - 2 + ord("a")) for i in ids)
