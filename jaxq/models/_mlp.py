"""The MLP of a decoder layer.

References:
    Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models._config import DecoderConfig
from jaxq.models._layers import ACTIVATIONS, linear, output_std


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        width: int | None = None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        d, bias = config.hidden_size, config.mlp_bias
        f = config.intermediate_size if width is None else width
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        if config.gated_mlp:
            self.gate_proj = linear(d, f, bias, **types, rngs=rngs)
        self.up_proj = linear(d, f, bias, **types, rngs=rngs)
        std = output_std(config)
        self.down_proj = linear(f, d, bias, **types, rngs=rngs, std=std)
        self.activation = config.activation
        self.is_gated = config.gated_mlp

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        up = self.up_proj(x).astype(jnp.float32)  # [b, t, f]
        if self.is_gated:
            inner = activation(self.gate_proj(x).astype(jnp.float32)) * up
        else:
            inner = activation(up)
        return self.down_proj(inner).astype(jnp.float32)  # [b, t, d]
