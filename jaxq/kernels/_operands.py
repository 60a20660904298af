"""The operands of a primitive inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax


def varying_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Makes all operands vary over the same mesh axes.

    Inside `shard_map`, all operands of a primitive must vary over the same mesh axes.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in operands]
    all_axes = frozenset().union(*varying)
    alike = []
    for array, axes in zip(operands, varying, strict=True):
        missing = tuple(all_axes - axes)
        if missing:
            array = lax.pcast(array, missing, to="varying")
        alike.append(array)
    return alike
