"""Patches: the rows that the kernel of a convolution multiplies as a matrix.

A convolution reads one window of its input for each position of its output. The window
as a vector is a patch. The outputs of a group of features are the product of the
patches with the kernel of the group as a matrix. So a method for matrices can quantize
the kernel, with the statistics of the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def conv_patches(
    lhs: jax.Array,
    rhs: Any,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **other_arguments: Any,
) -> jax.Array:
    """The patches of the input of `lax.conv_general_dilated(lhs, rhs, ...)`.

    Args:
      lhs: the input.
      rhs: the kernel. Only its shape is read.
      window_strides: as in `lax.conv_general_dilated`.
      padding: as in `lax.conv_general_dilated`.
      lhs_dilation: as in `lax.conv_general_dilated`.
      rhs_dilation: as in `lax.conv_general_dilated`.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: as in `lax.conv_general_dilated`.
      **other_arguments: arguments that do not change which numbers a window has.

    Returns:
      float32 `[groups, n, *spatial, K]`. K flattens the axes of `rhs` except that of
      its features, in the order in which `rhs` has them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.nn.layers import conv_patches
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> kernel, numbers = jnp.ones((2, 1, 8)), ("NWC", "WIO", "NWC")
      >>> patches = conv_patches(x, kernel, (1,), "VALID", dimension_numbers=numbers)
      >>> patches[0, 0].tolist()
      [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    _, channels, *window = numbers.rhs_spec
    sizes = [rhs.shape[axis] for axis in window]
    examples = jnp.transpose(lhs, numbers.lhs_spec).astype(jnp.float32)
    # A patch is picked by a convolution with zeros and ones. Lower precision would
    # round the numbers of the input.
    patches = lax.conv_general_dilated_patches(
        examples,
        sizes,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        precision=lax.Precision.HIGHEST,
    )  # [n, C * window, *spatial]
    n, _, *spatial = patches.shape
    patches = patches.reshape(n, feature_group_count, -1, *sizes, *spatial)
    # The position of each axis of the kernel among the axes of `patches`.
    positions = {channels: 2} | {axis: 3 + i for i, axis in enumerate(window)}
    in_order = [positions[axis] for axis in sorted(positions)]
    free = range(3 + len(sizes), patches.ndim)
    patches = jnp.transpose(patches, (1, 0, *free, *in_order))
    return patches.reshape(*patches.shape[: 2 + len(spatial)], -1)


def patches_shape(
    shape: Sequence[int], contracting: Sequence[int], num_channels: int
) -> tuple[int, int]:
    """The sizes (groups, K) of the patches of a Flax convolution.

    Args:
      shape: of the kernel.
      contracting: the axes of the window and, last, the axis of the channels.
      num_channels: of the input, in all groups.
    """
    k = 1
    for axis in contracting:
        k *= shape[axis]
    return num_channels // shape[max(contracting)], k
