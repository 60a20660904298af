"""Flax nnx ConvTranspose: its kind, and the quantized layer.

The layer has no hook for its product. A quantized layer therefore becomes a
`QConvTranspose`. Calibration watches the hook `promote_dtype`, because the layer calls
this hook with its input. Kernels are `[*window, channels, features]`.
`transpose_kernel=True` swaps the last two axes.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.nn.layers._call_inputs import InputRows
from jaxq.nn.layers._conv_product import (
    MASKED,
    add_bias,
    convolved,
    features_axis,
    num_channels,
)
from jaxq.nn.layers._kind import LayerKind, register_layer
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import accept_qtensors, promotion_problem
from jaxq.nn.layers._roles import Roles, roles_of_conv
from jaxq.qtensor import QUANTIZED

# The attributes that `nnx.ConvTranspose.__call__` reads, without those that `_product`
# replaces.
_SETTINGS = (
    "dtype",
    "kernel_dilation",
    "kernel_shape",
    "kernel_size",
    "mask",
    "padding",
    "precision",
    "strides",
    "transpose_kernel",
)


class QConvTranspose(nnx.ConvTranspose):
    """`nnx.ConvTranspose` with a quantized kernel.

    Arguments and errors are those of `QConv` and `nnx.ConvTranspose`. Dynamic integer
    activations have one scale for each example. Static integer activations have one
    scale for all examples. Codes of integer activations and of an integer kernel are
    multiplied, and accumulate in int32. In all other cases, kernel and input are
    dequantized before the product.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jaxq.nn.QConvTranspose(8, 16, (3, 3), activation="int8", rngs=rngs)
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

    def __call__(self, inputs: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        arrays = (inputs, self.kernel[...], bias)
        x, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        dtype = self.preferred_element_type
        if isinstance(kernel, QUANTIZED):
            channel = features_axis(self)
            return convolved(
                self._product, x, kernel, bias, channel=channel, dtype=dtype
            )
        y = self._product(x, kernel, jnp.float32).astype(dtype or x.dtype)
        return add_bias(y, bias)

    def _product(self, x: jax.Array, kernel: jax.Array, accumulate: Any) -> jax.Array:
        """Flax's own product with another kernel of any dtype, without bias."""
        # Flax has no function for the product alone. Its method runs on an object with
        # the layer's settings and the given kernel.
        settings = {name: getattr(self, name) for name in _SETTINGS}
        layer: Any = types.SimpleNamespace(
            **settings,
            kernel=kernel,
            bias=None,
            use_bias=False,
            promote_dtype=lambda arrays, **_: arrays,
            preferred_element_type=accumulate,
        )
        return nnx.ConvTranspose.__call__(layer, x)


def _roles(layer: Any) -> Roles:
    return roles_of_conv(tuple(layer.kernel_shape), features_axis(layer))


def _attach(layer: Any) -> None:
    if not isinstance(layer, QConvTranspose):
        # `_problem` refuses subclasses, so this is a plain nnx.ConvTranspose.
        layer.__class__ = QConvTranspose
    accept_qtensors(layer, "kernel")


def _problem(layer: Any) -> str | None:
    if type(layer) not in (nnx.ConvTranspose, QConvTranspose):
        return (
            f"{type(layer).__name__} is a subclass of ConvTranspose, and may compute "
            "another product than ConvTranspose"
        )
    if layer.mask is not None:
        return MASKED
    return promotion_problem(layer, "kernel", _roles(layer).shape)


def _promoted_input(arrays: tuple, **kwargs: Any) -> jax.Array:
    """The input of a call `promote_dtype((input, kernel, bias), dtype=...)`."""
    return arrays[0]


def _promoted_rows(arrays: tuple, **kwargs: Any) -> InputRows:
    return arrays[0], 0


register_layer(
    LayerKind(
        name="ConvTranspose",
        cls=nnx.ConvTranspose,
        weight="kernel",
        roles=_roles,
        attach=_attach,
        problem=_problem,
        hook="promote_dtype",
        read_input=_promoted_input,
        read_rows=_promoted_rows,
        num_channels=num_channels,
    )
)
