"""How the axes of a layer's weight take part in the layer's product.

Flax nnx and Flax linen layers share these roles. A layer kind states the roles of its
weight once. Quantization, calibration and reports read these roles.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# What a layer computes with its weight.
ProductKind = Literal["dot", "conv", "lookup"]


@dataclasses.dataclass(frozen=True)
class Roles:
    """How the axes of a layer's weight take part in the layer's product.

    Attributes:
      contracting: the axes that the product contracts, as negative numbers.
      shape: the shape of the weight of one layer. The weight of a stack of layers has
        more axes in front.
      num_batch: the number of leading axes of `shape` that are batch axes of the
        product. The experts of a mixture are an example.
      subscripts: the subscripts of the einsum that the layer computes, with the weight
        on the right. Empty if the layer computes no einsum.
      product: what the layer computes with the weight. "dot" is a matrix product or an
        einsum. "conv" is a convolution. "lookup" reads rows of a table.

    Example:
      >>> from jaxq.nn.layers import Roles
      >>> Roles(contracting=(-2,), shape=(64, 8)).num_batch
      0
    """

    contracting: tuple[int, ...]
    shape: tuple[int, ...]
    num_batch: int = 0
    subscripts: str = ""
    product: ProductKind = "dot"


def einsum_roles(subscripts: str, shape: tuple[int, ...]) -> Roles:
    """The roles of the right operand of an einsum.

    Args:
      subscripts: of an einsum with two operands and a named result, such as
        "btd,dhk->bthk".
      shape: of the right operand, one size for each of its indices.
    """
    subscripts = subscripts.replace(" ", "")
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    contracting = tuple(
        axis - len(right)
        for axis, index in enumerate(right)
        if index in left and index not in out
    )
    return Roles(contracting, shape, len(_leading_batch(left, right, out)), subscripts)


def _leading_batch(left: str, right: str, out: str) -> str:
    """The leading batch indices of `right`. They are in both operands and in `out`.

    Other batch indices of `right` do not count, because a QTensor keeps its batch axes
    in front. Calibration keeps separate statistics for each element of these axes.
    """
    for position, index in enumerate(right):
        if index not in left or index not in out:
            return right[:position]
    return right


def roles_of_conv(shape: tuple[int, ...], features_axis: int = -1) -> Roles:
    """The roles of a convolution's kernel.

    Args:
      shape: of the kernel: window sizes, then channels and features.
      features_axis: the axis of the result's features, -1 or -2.
    """
    contracting = tuple(axis for axis in range(-len(shape), 0) if axis != features_axis)
    return Roles(contracting, shape, product="conv")
