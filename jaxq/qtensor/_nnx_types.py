"""Recognizes the types of Flax without importing Flax.

A value of such a type exists only if the user has imported Flax.
"""

from __future__ import annotations

import sys
from typing import Any


def is_nnx_variable(value: Any) -> bool:
    """Whether `value` is an `nnx.Variable`."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)


def is_nnx_module(value: Any) -> bool:
    """Whether `value` is an `nnx.Module`."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def is_linen_module(value: Any) -> bool:
    """Whether `value` is a `linen.Module`."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(value, linen.Module)


def is_nnx_state(value: Any) -> bool:
    """Whether `value` is an `nnx.State`."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.State)
