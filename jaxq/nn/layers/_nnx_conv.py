"""Flax nnx Conv: its kind, and the quantized layer.

The layer multiplies with the hook `conv_general_dilated`. Inputs are
`[n, *spatial, channels]`. Kernels are `[*window, channels, features]`.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import lax

from jaxq.nn.layers._call_inputs import conv_rows
from jaxq.nn.layers._conv_patches import conv_patches
from jaxq.nn.layers._conv_product import (
    MASKED,
    conv_general_dilated,
    num_channels,
)
from jaxq.nn.layers._kind import LayerKind, foreign_hook, register_layer
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import accept_qtensors, promotion_problem
from jaxq.nn.layers._roles import Roles, roles_of_conv


class QConv(nnx.Conv):
    """`nnx.Conv` with a quantized kernel.

    Arguments and errors are those of `QLinear` and `nnx.Conv`. Dynamic activation
    quantization uses one scale for each example, because a window covers several
    spatial positions.

    Raises:
      ValueError: `mask` is given and `weight` is not None.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> layer = jaxq.nn.QConv(8, 16, (3, 3), activation="int8", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 6, 6, 8))).shape
      (1, 6, 6, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        *args: Any,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, *args, **kwargs)
        quantize_own_weight(self, weight, activation)


def _roles(layer: Any) -> Roles:
    return roles_of_conv(tuple(layer.kernel_shape))


def _attach(layer: Any) -> None:
    accept_qtensors(layer, "kernel")
    layer.conv_general_dilated = conv_general_dilated


def _problem(layer: Any) -> str | None:
    if layer.mask is not None:
        return MASKED
    replaceable = (lax.conv_general_dilated, conv_general_dilated)
    return foreign_hook(
        layer, "conv_general_dilated", replaceable
    ) or promotion_problem(layer, "kernel", _roles(layer).shape)


register_layer(
    LayerKind(
        name="Conv",
        cls=nnx.Conv,
        weight="kernel",
        roles=_roles,
        attach=_attach,
        problem=_problem,
        hook="conv_general_dilated",
        read_rows=conv_rows,
        num_channels=num_channels,
        read_patches=conv_patches,
    )
)
