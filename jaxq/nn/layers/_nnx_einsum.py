"""Flax nnx Einsum: its kind, and the quantized layer.

The layer multiplies with the hook `einsum_op(einsum_str, input, kernel)`. `einsum_str`
determines which axes of the kernel are contracted.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxq import ops
from jaxq.nn.layers._call_inputs import einsum_input, einsum_rows
from jaxq.nn.layers._kind import LayerKind, foreign_hook, register_layer
from jaxq.nn.layers._own_weight import quantize_own_weight
from jaxq.nn.layers._promotion import accept_qtensors, promotion_problem
from jaxq.nn.layers._roles import Roles, einsum_roles
from jaxq.ops import einsum


class QEinsum(nnx.Einsum):
    """`nnx.Einsum` with a quantized kernel.

    Arguments and errors are those of `QLinear` and `nnx.Einsum`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from flax import nnx
      >>> layer = jaxq.nn.QEinsum("btd,dhk->bthk", (64, 4, 16), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3, 64))).shape
      (2, 3, 4, 16)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Any,
        *,
        weight: Any = "int8",
        activation: Any = None,
        **kwargs: Any,
    ):
        super().__init__(einsum_str, kernel_shape, **kwargs)
        quantize_own_weight(self, weight, activation)


def _roles(layer: Any) -> Roles:
    return einsum_roles(layer.einsum_str, tuple(layer.kernel_shape))


def _attach(layer: Any) -> None:
    accept_qtensors(layer, "kernel")
    layer.einsum_op = einsum


def _problem(layer: Any) -> str | None:
    if layer.einsum_str is None:
        return (
            "its einsum_str is given at each call, so the contracted axes are not "
            "known before a call"
        )
    kernel_indices = layer.einsum_str.split("->")[0].split(",")[1]
    if "..." in kernel_indices:
        return f"the kernel's axes in {layer.einsum_str!r} are not all named"
    roles = _roles(layer)
    if not roles.contracting:
        return f"{layer.einsum_str!r} contracts no axis of the kernel"
    num_input_axes = roles.subscripts.replace("...", "").index(",")
    try:
        ops.einsum_numbers(roles.subscripts, num_input_axes, len(kernel_indices))
    except ValueError as error:
        return str(error)
    return foreign_hook(layer, "einsum_op", (jnp.einsum, einsum)) or promotion_problem(
        layer, "kernel", roles.shape
    )


register_layer(
    LayerKind(
        name="Einsum",
        cls=nnx.Einsum,
        weight="kernel",
        roles=_roles,
        attach=_attach,
        problem=_problem,
        hook="einsum_op",
        read_input=einsum_input,
        read_rows=einsum_rows,
    )
)
