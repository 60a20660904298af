"""Small models for tests of quantization-aware training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Mixed(nnx.Module):
    """Layers of several kinds, a matrix of its own, and a tied embedding."""

    def __init__(self, rngs: nnx.Rngs, dtype=None):
        self.embed = nnx.Embed(16, 32, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(32, 64, dtype=dtype, rngs=rngs)
        self.heads = nnx.LinearGeneral(64, (2, 16), dtype=dtype, rngs=rngs)
        self.mix = nnx.Einsum("...hd,hde->...e", (2, 16, 32), dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(32, 32, (3,), dtype=dtype, rngs=rngs)
        self.own = nnx.Param(jax.random.normal(rngs.params(), (32, 32)) / 6)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.mix(self.heads(nnx.gelu(self.up(x))))
        x = x + self.conv(x)
        x = x + (x @ self.own).astype(x.dtype)
        return self.embed.attend(x)


class Stack(nnx.Module):
    """Four equal layers, which a scan goes through."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.layers = layers(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return x + jnp.tanh(layer(x))

        return forward(self.layers, x)
