"""The notes of a report on how the product of a layer runs.

A reader expects that quantized activations multiply the codes of the weight, and that
no weight is dequantized as a whole. If a product does not run in this way, the report
says why.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq import ops
from jaxq.nn.layers import Roles
from jaxq.qtensor import QTensor

# The size of a convolution's input is unknown here. The assumed size is larger than any
# group of an activation spec.
_EXAMPLE_SIZE = 1 << 20


def product_note(qt: QTensor, roles: Roles | None = None) -> str:
    """Says why a product runs in floats, or why it dequantizes the whole weight.

    The note is empty if the product does neither.

    Args:
      qt: the weight. Its leaves may be `jax.ShapeDtypeStruct`s.
      roles: of the weight's axes in one layer. None for an array that is in no layer.

    Raises:
      TypeError: the activation spec cannot quantize the input, see `jaxq.quantize`.
      ValueError: the activation spec does not fit the axes that the product contracts.
        Sizes that only the input has are not checked.
    """
    weight = jax.tree.map(_as_shape, qt)
    product = "dot" if roles is None else roles.product
    quantizes_input = qt.meta.activation is not None
    if product == "conv":
        # Without quantized activations, a convolution has only one path.
        if not quantizes_input:
            return ""
        plan = _plan_of_conv(weight)
    else:
        plan = _plan_of_dot(weight, roles)
    if quantizes_input:
        return "" if plan.path == "codes" else f"computes in floats: {plan.reason}"
    # A lookup dequantizes only the rows it reads. If the table is multiplied too
    # (`attend`), its blocks run along the contracted axis.
    if plan.path != "dequantize" or product == "lookup":
        return ""
    return f"dequantized at each call: {plan.reason}"


def multiplies_input(qt: QTensor, roles: Roles | None = None) -> bool:
    """True if the product of a layer multiplies its input by `qt.input_scale`.

    Otherwise the product dequantizes the weight together with its factors.

    Args:
      qt: the weight with an `input_scale`, as in `product_note`.
      roles: as in `product_note`. The product is not a convolution.
    """
    plan = _plan_of_dot(jax.tree.map(_as_shape, qt), roles)
    return "scale_left" in plan.before or "scale_right" in plan.before


def _plan_of_conv(weight: QTensor) -> ops.Plan:
    """The plan of a convolution of one example."""
    kernel = _element_shapes(weight, len(weight.batch_shape))
    geometry = weight.meta.geometry
    num_spatial = len(geometry.contracted) - 1  # the other contracted axis: channels
    example = jax.ShapeDtypeStruct(
        (1, *(1 for _ in range(num_spatial)), _EXAMPLE_SIZE), jnp.float32
    )
    channel = geometry.kept[0] + len(geometry.shape)
    return ops.plan_conv(example, kernel, channel=channel)


def _plan_of_dot(weight: QTensor, roles: Roles | None) -> ops.Plan:
    """The plan of a product with one row of inputs."""
    if roles is not None and roles.subscripts:
        return _plan_of_einsum(weight, roles)
    batch = tuple(range(len(weight.batch_shape)))
    along = tuple(axis + weight.ndim for axis in weight.meta.geometry.contracted)
    shape = (*weight.batch_shape, 1, *(weight.shape[axis] for axis in along))
    x: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    dims = ((tuple(range(len(batch) + 1, x.ndim)), along), (batch, batch))
    return ops.explain(x, weight, dims, platform="cpu")


def _plan_of_einsum(weight: QTensor, roles: Roles) -> ops.Plan:
    """The plan of an einsum. Indices that only the input has get size 1."""
    kernel = _element_shapes(weight, weight.ndim - len(roles.shape))
    left, right = roles.subscripts.replace("...", "").split("->")[0].split(",")
    size = dict(zip(right, kernel.shape, strict=True))
    shape = tuple(size.get(index, 1) for index in left)
    x: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    dims, _ = ops.einsum_numbers(roles.subscripts, x.ndim, kernel.ndim)
    return ops.explain(x, kernel, dims, platform="cpu")


def _as_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _element_shapes(qt: QTensor, num_axes: int) -> QTensor:
    """The shapes of one element of a stack that has `num_axes` stack axes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[num_axes:], leaf.dtype), qt
    )
