"""The `promote_dtype` hook of a Flax layer, for a weight that is a QTensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxq.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class PromoteQTensors:
    """A `promote_dtype` that also takes QTensors.

    Flax's function works on arrays. A scalar of the same dtype takes the place of each
    QTensor. The QTensor is then cast to the dtype that the scalar got. Two of these
    objects are equal if `original` is equal, so `nnx.jit` does not compile again.

    Attributes:
      original: the layer's own `promote_dtype`.
    """

    original: Callable[..., Any]

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        scalars = tuple(
            jnp.zeros((), a.dtype) if isinstance(a, QTensor) else a for a in arrays
        )
        promoted = self.original(scalars, **kwargs)
        return tuple(
            a.astype(p.dtype) if isinstance(a, QTensor) else p
            for a, p in zip(arrays, promoted, strict=True)
        )
