"""Float arrays that are freed as soon as their quantized weights exist."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import jax

from jaxq.qtensor import QTensor


class Donated:
    """Arrays to be freed after their last use: one that has several names, or stays in floats under one, has several.

    Args:
      arrays: all that there are, each as often as it is used; they must stay alive while this is used.
    """

    def __init__(self, arrays: Iterable[Any]):
        self._uses = collections.Counter(map(id, arrays))

    def quantized(self, array: Any, qt: QTensor) -> None:
        """One use of an array has ended: `qt` is made of it."""
        self._uses[id(array)] -= 1
        if not self._uses[id(array)] and isinstance(array, jax.Array):
            jax.block_until_ready(qt)
            array.delete()
