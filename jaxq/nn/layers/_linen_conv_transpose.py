"""Flax linen ConvTranspose: its kind, and the quantized layer.

The layer has no field for its product. Kernels are `[*window, channels, features]`.
`transpose_kernel=True` swaps the last two axes.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen

from jaxq.nn.layers._call_inputs import InputRows
from jaxq.nn.layers._conv_product import MASKED, convolved, features_axis
from jaxq.nn.layers._linen_kind import LinenKind, code_of, register_linen_layer
from jaxq.nn.layers._linen_own_weight import check_layer, own_weight
from jaxq.nn.layers._linen_stand_in import StandIn, promote
from jaxq.nn.layers._roles import Roles, roles_of_conv
from jaxq.qtensor import QTensor


class QConvTranspose(linen.ConvTranspose):
    """`nn.ConvTranspose` with a quantized kernel.

    `weight`, `activation` and errors are those of `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QConvTranspose(16, (3, 3), activation="int8")
      >>> x = jnp.ones((1, 6, 6, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 6, 6, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        check_layer(self, CONV_TRANSPOSE)
        if self.weight is None:
            return super().__call__(inputs)
        roles = _roles(self, self._kernel_shape(inputs.shape[-1]))
        kernel: Any = own_weight(
            self, "kernel", roles, self.kernel_init, self.param_dtype
        )
        return _conv_transpose(self, kernel, inputs)

    def _kernel_shape(self, num_channels: int) -> tuple[int, ...]:
        size = self.kernel_size
        window = (size,) if isinstance(size, int) else tuple(size)
        if self.transpose_kernel:
            return (*window, self.features, num_channels)
        return (*window, num_channels, self.features)


def _conv_transpose(layer: Any, weight: QTensor, inputs: jax.Array) -> jax.Array:
    """`ConvTranspose.__call__` with a quantized kernel."""
    bias = None
    if layer.use_bias:
        shape = (layer.features,)
        bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype)
    x, weight, bias = promote(layer, inputs, weight, bias, dtype=layer.dtype)

    def product(x: jax.Array, kernel: jax.Array, accumulate: Any) -> jax.Array:
        code = code_of(linen.ConvTranspose.__call__)
        return code(_WithoutBias(layer, kernel, accumulate), x)

    return convolved(
        product,
        x,
        weight,
        bias,
        channel=features_axis(layer),
        dtype=layer.preferred_element_type,
    )


class _WithoutBias(StandIn):
    """A ConvTranspose with another kernel, of any dtype, and without bias."""

    use_bias = False

    def __init__(self, layer: linen.Module, kernel: jax.Array, accumulate: Any):
        super().__init__(layer, "kernel", lambda *_: kernel)
        self.preferred_element_type = accumulate

    def promote_dtype(self, *arrays: Any, **kwargs: Any) -> tuple:
        return arrays


def _roles(layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Roles:
    return roles_of_conv(shape, features_axis(layer))


def _input_rows(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    return x, 0


def _problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    return None if layer.mask is None else MASKED


CONV_TRANSPOSE = register_linen_layer(
    LinenKind(
        name="ConvTranspose",
        weight="kernel",
        roles=_roles,
        methods={linen.ConvTranspose.__call__: _conv_transpose},
        problem=_problem,
        read_rows=_input_rows,
        windowed=True,
    )
)
