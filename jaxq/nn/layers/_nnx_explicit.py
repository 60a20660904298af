"""Layers that are quantized from the start, for models written that way."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxq.nn.layers._nnx import quantize_own_weight


class QLinear(nnx.Linear):
    """`nnx.Linear` with a quantized kernel: int8 dot products accumulate in int32, floats in float32.

    Args:
      in_features: size of the contracted last axis of the input.
      out_features: size of the last axis of the result.
      weight: preset name or `QuantSpec` of the kernel; None keeps floats (bfloat16 products into float32).
      activation: preset name or `QuantSpec` the input is quantized with on the fly, one scale a token; None leaves it.
      **kwargs: as in `nnx.Linear`, `rngs` included.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> layer = jaxq.nn.QLinear(64, 8, weight="int8", activation="int8", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 64))).shape
      (2, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, **kwargs)
        quantize_own_weight(self, weight, activation)


class QLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with a quantized kernel; arguments as in `QLinear` and `nnx.LinearGeneral`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> jaxq.nn.QLinearGeneral(64, (4, 16), rngs=nnx.Rngs(0))(jnp.ones((2, 64))).shape
      (2, 4, 16)
    """

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs,
    ):
        super().__init__(in_features, out_features, **kwargs)
        quantize_own_weight(self, weight, activation)


class QEinsum(nnx.Einsum):
    """`nnx.Einsum` with a quantized kernel; arguments as in `QLinear` and `nnx.Einsum`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> jaxq.nn.QEinsum("btd,dhk->bthk", (64, 4, 16), rngs=nnx.Rngs(0))(jnp.ones((2, 3, 64))).shape
      (2, 3, 4, 16)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Any,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs,
    ):
        super().__init__(einsum_str, kernel_shape, **kwargs)
        quantize_own_weight(self, weight, activation)


class QConv(nnx.Conv):
    """`nnx.Conv` with a quantized kernel; arguments as in `QLinear` and `nnx.Conv`.

    Activations have one scale an example, since a window mixes places.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> jaxq.nn.QConv(8, 16, (3, 3), activation="int8", rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 8))).shape
      (1, 6, 6, 16)
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, *args: Any, weight: Any = "int8",
        activation: Any = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(in_features, out_features, kernel_size, *args, **kwargs)
        quantize_own_weight(self, weight, activation)
