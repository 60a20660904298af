"""Flax linen Einsum: its kind, and the quantized layer.

The subscripts come from the layer or from its call. The subscripts determine which axes
of the kernel are contracted.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen

from jaxq import ops
from jaxq.nn.layers._call_inputs import InputRows, einsum_rows
from jaxq.nn.layers._linen_kind import LinenKind, register_linen_layer
from jaxq.nn.layers._linen_own_weight import check_layer, own_weight
from jaxq.nn.layers._linen_stand_in import promote
from jaxq.nn.layers._roles import Roles, einsum_roles


class QEinsum(linen.Einsum):
    """`nn.Einsum` with a quantized kernel.

    `weight`, `activation` and errors are those of `QDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> layer = jaxq.nn.linen.QEinsum((64, 4, 16), "btd,dhk->bthk")
      >>> x = jnp.ones((2, 3, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 3, 4, 16)
    """

    weight: Any = "int8"
    activation: Any = None

    @linen.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        check_layer(self, EINSUM, inputs, einsum_str)
        roles = _roles(self, tuple(self.shape), inputs, einsum_str)
        kernel = own_weight(self, "kernel", roles, self.kernel_init, self.param_dtype)
        return _einsum(self, kernel, inputs, einsum_str)


def _einsum(
    layer: Any, weight: Any, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    """`Einsum.__call__` with an array or a QTensor as kernel."""
    subscripts = _subscripts(layer, inputs, einsum_str)
    operands, out = subscripts.split("->")
    left, right = operands.split(",")
    size = dict(zip(right, weight.shape, strict=True))
    bias = None
    if layer.use_bias:
        # Flax gives the bias the kernel's axes that are in the result.
        bias_shape = tuple(size[index] for index in out if index in size)
        bias = layer.param("bias", layer.bias_init, bias_shape, layer.param_dtype)
    inputs, weight, bias = promote(layer, inputs, weight, bias, dtype=layer.dtype)
    y = ops.einsum(
        subscripts,
        inputs,
        weight,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    if bias is None:
        return y
    # An ellipsis stands for axes of the input, over which the bias broadcasts.
    num_unnamed = inputs.ndim - len(left.replace("...", ""))
    named_out = out.replace("...", "\0" * num_unnamed)
    return y + bias.reshape([size.get(index, 1) for index in named_out])


def _subscripts(layer: Any, inputs: Any, einsum_str: str | None = None) -> str:
    """The subscripts, from the layer or from its call."""
    subscripts = linen.merge_param("einsum_str", layer.einsum_str, einsum_str)
    return subscripts.replace(" ", "")


def _roles(layer: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Roles:
    return einsum_roles(_subscripts(layer, *args, **kwargs), shape)


def _input_rows(layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> InputRows:
    return einsum_rows(_subscripts(layer, x, *args, **kwargs), x)


def _problem(layer: Any, *args: Any, **kwargs: Any) -> str | None:
    subscripts = _subscripts(layer, *args, **kwargs)
    operands, arrow, out = subscripts.partition("->")
    if not arrow or operands.count(",") != 1:
        return f"{subscripts!r} must name two operands and the result (a,b->c)"
    left, right = operands.split(",")
    if "..." in right:
        return f"the kernel's axes in {subscripts!r} are not all named"
    if not any(index in left and index not in out for index in right):
        return f"{subscripts!r} contracts no axis of the kernel"
    try:
        ops.einsum_numbers(subscripts, len(left.replace("...", "")), len(right))
    except ValueError as error:
        return str(error)
    return None


EINSUM = register_linen_layer(
    LinenKind(
        name="Einsum",
        weight="kernel",
        roles=_roles,
        methods={linen.Einsum.__call__: _einsum},
        problem=_problem,
        read_rows=_input_rows,
    )
)
