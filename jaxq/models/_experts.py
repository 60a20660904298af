"""Mixtures of experts: a router, stacked experts, and an expert for all tokens.

The rows of a batch are sorted by expert. One ragged product then multiplies the rows of
each expert with its own matrix.

References:
    Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer, 2017.
    Jiang et al., Mixtral of Experts, 2024.
    OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025 (biased and clamped experts).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes

from jaxq.models._config import DecoderConfig
from jaxq.models._layers import ACTIVATIONS, linear, output_std
from jaxq.models._mlp import MLP


class SortedRows(NamedTuple):
    """Rows of a batch in the order of their experts.

    Attributes:
        x: [rows, d].
        group_sizes: int32 [e], the number of rows of each expert.
        expert: int32 [rows], the expert of each row, ascending.
    """

    x: jax.Array
    group_sizes: jax.Array
    expert: jax.Array


class ExpertLinear(nnx.Module):
    """A linear layer for each expert: `[rows, in]` to `[rows, out]`.

    Attributes:
        kernel: [e, in, out].
        bias: [e, out], or None.
        ragged_dot: the function that multiplies, `jax.lax.ragged_dot` or another one
            with the same arguments.
    """

    def __init__(
        self,
        num_experts: int,
        num_in: int,
        num_out: int,
        bias: bool,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ):
        shape = (num_experts, num_in, num_out)
        make_kernel = nnx.initializers.normal(std)
        self.kernel = nnx.Param(make_kernel(rngs.params(), shape, param_dtype))
        zeros = jnp.zeros((num_experts, num_out), param_dtype)
        self.bias: Any = nnx.Param(zeros) if bias else None
        self.dtype = dtype
        self.shape = shape
        self.promote_dtype: Any = flax_dtypes.promote_dtype
        self.ragged_dot: Any = jax.lax.ragged_dot

    def __call__(self, rows: SortedRows) -> jax.Array:
        kernel = self.kernel.get_value()
        x, kernel = self.promote_dtype((rows.x, kernel), dtype=self.dtype)
        y = self.ragged_dot(
            x, kernel, rows.group_sizes, preferred_element_type=jnp.float32
        )
        y = y.astype(jnp.float32)  # [rows, out]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[rows.expert]
        return y


class Experts(nnx.Module):
    """The stacked experts of a layer."""

    def __init__(
        self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        assert config.experts is not None
        e, f = config.experts.num_experts, config.experts.intermediate_size
        d, bias = config.hidden_size, config.experts.bias
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.gate_proj = ExpertLinear(e, d, f, bias, **options)
        self.up_proj = ExpertLinear(e, d, f, bias, **options)
        std = output_std(config)
        self.down_proj = ExpertLinear(e, f, d, bias, **options, std=std)
        self.activation = config.activation
        self.clamp = config.experts.clamp
        self.gate_slope = config.experts.gate_slope

    def __call__(self, rows: SortedRows) -> jax.Array:
        gate, up = self.gate_proj(rows), self.up_proj(rows)  # [rows, f]
        if self.clamp is None:
            inner = ACTIVATIONS[self.activation](gate) * up
        else:
            gate = jnp.minimum(gate, self.clamp)
            up = jnp.clip(up, -self.clamp, self.clamp)
            inner = (up + 1) * gate * jax.nn.sigmoid(self.gate_slope * gate)
        return self.down_proj(rows._replace(x=inner))  # [rows, d]


class MixtureOfExperts(nnx.Module):
    """The MLP of a layer with experts: the weighted sum of k experts of each token."""

    def __init__(
        self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        assert config.experts is not None
        experts = config.experts
        d = config.hidden_size
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        router_bias = experts.bias
        self.router = linear(d, experts.num_experts, router_bias, **types, rngs=rngs)
        self.experts = Experts(config, **types, rngs=rngs)
        shared = experts.shared_intermediate_size
        if shared is not None:
            self.shared_expert = MLP(config, width=shared, **types, rngs=rngs)
            self.shared_expert_gate = linear(d, 1, False, **types, rngs=rngs)
        self.config = experts

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, d = x.shape
        tokens = x.reshape(b * t, d)
        weights, experts = self._routes(tokens)  # [b t, k]
        y = self._run(tokens, weights, experts)  # [b t, d]
        if self.config.shared_intermediate_size is not None:
            gate = self.shared_expert_gate(tokens).astype(jnp.float32)  # [b t, 1]
            y = y + jax.nn.sigmoid(gate) * self.shared_expert(tokens)
        return y.reshape(b, t, d)

    def _routes(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights and the numbers of the k experts of each token."""
        logits = self.router(tokens).astype(jnp.float32)  # [b t, e]
        weights = jax.nn.softmax(logits, axis=-1)
        k = self.config.num_experts_per_token
        weights, experts = jax.lax.top_k(weights, k)
        if self.config.normalizes_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def _run(
        self, tokens: jax.Array, weights: jax.Array, experts: jax.Array
    ) -> jax.Array:
        """The weighted sum of the experts of each token, float32 [b t, d]."""
        num_tokens, k = experts.shape
        expert = experts.reshape(-1)  # [b t k]
        order = jnp.argsort(expert)
        rows = SortedRows(
            tokens[order // k],
            jnp.bincount(expert, length=self.config.num_experts).astype(jnp.int32),
            expert[order],
        )
        y = self.experts(rows)[jnp.argsort(order)]  # [b t k, d]
        return jnp.sum(y.reshape(num_tokens, k, -1) * weights[:, :, None], axis=1)
