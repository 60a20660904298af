"""Patches of convolutions, against windows that numpy cuts out of the padded input."""

import itertools

import jax
import numpy as np
import pytest

from jaxq.nn.layers import conv_patches
from tests.arrays import normal


def explicit_patches(x, window, strides, padding, dilation, input_dilation, groups):
    """The patches `[groups, n, *out, K]` of `x [n, *spatial, C]`, one by one."""
    x = np.asarray(x)
    n, *spatial, num_channels = x.shape
    spread = [
        (size - 1) * d + 1 for size, d in zip(spatial, input_dilation, strict=True)
    ]
    dilated = np.zeros((n, *spread, num_channels), x.dtype)
    dilated[:, *(slice(None, None, d) for d in input_dilation)] = x
    padded = np.pad(dilated, [(0, 0), *padding, (0, 0)])
    reach = [(size - 1) * d + 1 for size, d in zip(window, dilation, strict=True)]
    out = [
        (size - r) // s + 1
        for size, r, s in zip(padded.shape[1:-1], reach, strides, strict=True)
    ]
    size = num_channels // groups
    patches = np.zeros((groups, n, *out, int(np.prod(window)) * size), x.dtype)
    for position in itertools.product(*map(range, out)):
        starts = [p * s for p, s in zip(position, strides, strict=True)]
        cut = [
            slice(start, start + r, d)
            for start, r, d in zip(starts, reach, dilation, strict=True)
        ]
        cube = padded[:, *cut]  # [n, *window, C]
        for group in range(groups):
            channels = cube[..., group * size : (group + 1) * size]
            patches[(group, slice(None), *position)] = channels.reshape(n, -1)
    return patches


ROWS = {
    "plain": {},
    "strides": {"strides": (2, 1)},
    "padding": {"padding": ((1, 2), (0, 1))},
    "dilation": {"dilation": (2, 1)},
    "input dilation": {"input_dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "strides": (2, 2), "padding": ((1, 1), (1, 1))},
}


@pytest.mark.parametrize("name", ROWS)
def test_patches_are_the_windows_of_the_padded_input(name):
    row = {
        "strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "dilation": (1, 1),
        "input_dilation": (1, 1),
        "groups": 1,
    } | ROWS[name]
    x, window, groups = normal(2, 6, 5, 4), (3, 2), row["groups"]
    kernel = normal(*window, 4 // groups, 8)
    arguments = (x, kernel, row["strides"], row["padding"])
    keywords = {
        "lhs_dilation": row["input_dilation"],
        "rhs_dilation": row["dilation"],
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": groups,
    }
    patches = conv_patches(*arguments, **keywords)
    expected = explicit_patches(
        x,
        window,
        row["strides"],
        row["padding"],
        row["dilation"],
        row["input_dilation"],
        groups,
    )
    np.testing.assert_array_equal(patches, expected)
    # The product of the patches with the kernel is the convolution.
    y = jax.lax.conv_general_dilated(*arguments, **keywords)
    matrices = np.float64(kernel).reshape(-1, groups, 8 // groups)
    product = np.einsum("gnhwk,kgo->nhwgo", np.float64(patches), matrices)
    np.testing.assert_allclose(product.reshape(y.shape), y, rtol=1e-4, atol=1e-4)


def test_patches_follow_the_order_of_the_kernels_axes():
    """Kernels of other code: `[features, channels, *window]`."""
    x, kernel = normal(2, 3, 6, 5), normal(8, 3, 2, 2)
    patches = conv_patches(x, kernel, (1, 1), "VALID")
    product = np.einsum("gnhwk,ok->nohw", patches, np.asarray(kernel).reshape(8, -1))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID")
    np.testing.assert_allclose(product, y, rtol=1e-4, atol=1e-4)


def test_patches_hold_the_numbers_of_a_narrow_input_exactly():
    x, kernel = normal(1, 6, 3, dtype="bfloat16"), normal(2, 3, 4, dtype="bfloat16")
    numbers = ("NWC", "WIO", "NWC")
    patches = conv_patches(x, kernel, (1,), "VALID", dimension_numbers=numbers)
    wide = np.asarray(x, np.float32)
    np.testing.assert_array_equal(patches[0, 0, 0], wide[0, :2].reshape(-1))
