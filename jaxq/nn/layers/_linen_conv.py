"""Flax linen Conv: its kind, and the quantized layer.

The layer reads its product from the field `conv_general_dilated`. Inputs are
`[*leading, *spatial, channels]`. Kernels are `[*window, channels, features]`. ConvLocal
runs the same code, but cannot be quantized.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen
from jax import lax

from jaxq.nn.layers._call_inputs import InputRows
from jaxq.nn.layers._conv_patches import conv_patches
from jaxq.nn.layers._conv_product import MASKED
from jaxq.nn.layers._linen_kind import (
    LinenKind,
    code_of,
    foreign_function,
    register_linen_layer,
)
from jaxq.nn.layers._linen_own_weight import call_own_code
from jaxq.nn.layers._linen_stand_in import StandIn, with_own_code
from jaxq.nn.layers._roles import Roles, roles_of_conv


class QConv(linen.Conv):
    """`nn.Conv` with a quantized kernel.

    `weight`, `activation` and errors are those of `QDense`. Dynamic activation
    quantization uses one scale for each example, because a window covers several
    spatial positions.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QConv(16, (3, 3), activation="int8")
      >>> x = jnp.ones((1, 6, 6, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 6, 6, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return call_own_code(self, CONV, linen.Conv.__call__, inputs)


def _roles(layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Roles:
    return roles_of_conv(shape)


def _input_rows(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    return x, 0


class _PatchReader(StandIn):
    """Takes the place of a Conv, and keeps the patches that its product reads.

    Flax's own code pads the input and chooses strides and dilations.
    """

    # The layer's own call makes the bias.
    use_bias = False

    def __init__(self, layer: linen.Module):
        super().__init__(layer, "kernel", self._kernel)
        self.patches: Any = None

    def _kernel(self, init: Any, shape: Any, dtype: Any) -> jax.Array:
        return self._layer.get_variable("params", "kernel")

    def conv_general_dilated(
        self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        self.patches = conv_patches(lhs, rhs, *args, **kwargs)
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)


def _read_patches(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    reader = _PatchReader(layer)
    code_of(linen.Conv.__call__)(reader, x)
    return reader.patches


def _problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    if not layer.shared_weights:
        return (
            "every spatial position has its own kernel (ConvLocal), and jaxq has no "
            "product for such kernels"
        )
    if layer.mask is not None:
        return MASKED
    return foreign_function(layer, "conv_general_dilated", lax.conv_general_dilated)


CONV = register_linen_layer(
    LinenKind(
        name="Conv",
        weight="kernel",
        roles=_roles,
        methods={linen.Conv.__call__: with_own_code(linen.Conv.__call__, "kernel")},
        problem=_problem,
        read_rows=_input_rows,
        windowed=True,
        read_patches=_read_patches,
    )
)
