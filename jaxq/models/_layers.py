"""The linear layers and norms of the models: ordinary flax nnx layers.

Products read `dtype` and accumulate in float32. Norms are computed in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(
    num_in: int,
    num_out: int,
    bias: bool,
    *,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
    std: float = 0.02,
) -> nnx.Linear:
    """A linear layer whose kernel starts with the standard deviation `std`."""
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


def norm(config: Any, size: int, *, param_dtype: Any, rngs: nnx.Rngs) -> Any:
    """The norm of a `DecoderConfig`, over the last axis of that size."""
    if config.unit_offset_norms:
        param_dtype = jnp.float32
    options: dict[str, Any] = {
        "epsilon": config.rms_norm_eps,
        "dtype": jnp.float32,
        "param_dtype": param_dtype,
        "rngs": rngs,
    }
    if config.norm == "layer":
        # The fast variance, mean(x^2) - mean(x)^2, cancels.
        return nnx.LayerNorm(size, use_fast_variance=False, **options)
    return nnx.RMSNorm(size, **options)


def output_std(config: Any) -> float:
    """Keeps the initial variance of the stream independent of depth (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.num_hidden_layers)


def _promote(arrays: tuple, *, dtype: Any, **_: Any) -> tuple:
    """Operands in the compute dtype, and the bias in float32.

    The bias is added to the product, which is float32.
    """
    x, kernel, bias = arrays
    if bias is not None:
        bias = bias.astype(jnp.float32)
    return x.astype(dtype), kernel.astype(dtype), bias
