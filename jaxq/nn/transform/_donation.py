"""Frees float arrays as soon as their quantized weights exist (`donate=True`)."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import jax

from jaxq.qtensor import QTensor, TrainedWeight, is_traced


class Donated:
    """Counts the uses of arrays, and frees an array when its last use has ended.

    An array may be used under several names. If one of these uses stays in floats, the
    array is never freed. An array that is not in `arrays` is never freed either.

    Args:
      arrays: all arrays of the model, each as often as it is used. `id`
        identifies an array, so all must stay alive as long as this object is used.
    """

    def __init__(self, arrays: Iterable[Any]):
        self._num_uses = collections.Counter(map(id, arrays))

    def end_use(self, array: Any, qt: QTensor | TrainedWeight) -> None:
        """Ends one use of `array`, and frees it after the last use.

        `qt` was made from `array`.
        """
        self._num_uses[id(array)] -= 1
        # A traced array has no memory of its own.
        is_freed = isinstance(array, jax.Array) and not is_traced(array)
        if not self._num_uses[id(array)] and is_freed:
            # The computation of `qt` may still read the array.
            jax.block_until_ready(qt)
            array.delete()
