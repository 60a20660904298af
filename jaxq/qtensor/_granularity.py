"""Granularities: where scales vary, described by the roles of axes.

Groups run along the contracted axis. Channels are the kept axes. For a kernel
`w: [k, n]` that contracts `k`, the scales in logical order are:

| granularity | scale | one scale for |
|---|---|---|
| `PerTensor()` | `[1, 1]` | the whole array, or each element of its batch axes |
| `PerChannel()` | `[1, n]` | one output channel |
| `PerGroup(size=g)` | `[k/g, n]` | g neighbours along the contracted axis |
| `PerBlock((a, b))` | `[k/a, n/b]` | a tile |
| `PerFlat(g)` | `[k*n/g]` | g neighbours of the flattened array, across rows |

`PerToken()` is for an activation `x: [t, k]`, whose last axis is contracted. Its scales
are `[t, 1]`: one for each row.

The argument `axis=` of `PerChannel` and `PerGroup` is another way to name the kept or
the contracted axis. It must agree with `contracting=` if both are given.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Base class of all granularities.

    Example:
      >>> import jaxq
      >>> isinstance(jaxq.PerTensor(), jaxq.qtensor.Granularity)
      True
    """


@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole array, or one for each batch element.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int8", jaxq.PerTensor())
      >>> jaxq.quantize(jnp.ones((64, 8)), spec).scale.shape
      (1, 1)
    """


@dataclasses.dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of the kept axes, shared along the contracted axes.

    Args:
      axis: the kept axis. All other axes except the batch axes are contracted. With
        None, `contracting=` decides which axes are contracted.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int8", jaxq.PerChannel())
      >>> jaxq.quantize(jnp.ones((64, 8)), spec).scale.shape
      (8, 1)
    """

    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row of an activation `[..., k]`.

    It is `PerChannel` with another default: the last axis is contracted.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int8", jaxq.PerToken())
      >>> jaxq.quantize(jnp.ones((2, 5, 64)), spec).scale.shape
      (2, 5, 1)
    """


@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `size` neighbours along the contracted axis.

    Args:
      size: number of elements of a group, at least 1.
      axis: the contracted axis. With None, `contracting=` decides which axes are
        contracted.
      pad: what `quantize` does if `size` does not divide the axis. True makes the last
        group shorter: zeros fill it while it is computed, and are not stored. False
        raises ValueError.

    Raises:
      ValueError: `size` is not a whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int4", jaxq.PerGroup(size=32))
      >>> jaxq.quantize(jnp.ones((64, 8)), spec).scale.shape
      (8, 2)
    """

    size: int
    axis: int | None = None
    pad: bool = False

    def __post_init__(self):
        object.__setattr__(self, "size", _block_size("PerGroup", self.size))


@dataclasses.dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each tile of the last logical axes, 128 x 128 for example.

    Args:
      shape: tile sizes of the last `len(shape)` axes of the array. All axes before
        these have one scale for each index.
      pad: what `quantize` does if a size does not divide its axis. True makes the last
        tiles smaller: zeros fill them while they are computed, and are not stored.
        False raises ValueError.

    Raises:
      TypeError: `shape` is not a tuple or list.
      ValueError: a size is not a whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int8", jaxq.PerBlock((32, 4)))
      >>> jaxq.quantize(jnp.ones((64, 8)), spec).scale.shape
      (2, 2)
    """

    shape: tuple[int, ...]
    pad: bool = False

    def __post_init__(self):
        if not isinstance(self.shape, tuple | list):
            raise TypeError(
                f"PerBlock: shape must be a tuple of sizes, got {self.shape!r}."
            )
        sizes = tuple(_block_size("PerBlock", size) for size in self.shape)
        object.__setattr__(self, "shape", sizes)


@dataclasses.dataclass(frozen=True)
class PerFlat(Granularity):
    """One scale for `size` neighbours of the array flattened in storage order.

    The last block may have fewer elements. Storage order has the kept axes first and
    the contracted axes last. So an `[in, out]` kernel has the same blocks as in
    bitsandbytes, which stores this weight as `[out, in]`.

    Args:
      size: number of elements of a block, at least 1.

    Raises:
      ValueError: `size` is not a whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("nf4", jaxq.PerFlat(64))
      >>> jaxq.quantize(jnp.ones((24, 10)), spec).scale.shape
      (4,)
    """

    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", _block_size("PerFlat", self.size))


def _block_size(owner: str, size: Any) -> int:
    """`size` as an int of at least 1."""
    is_whole = hasattr(size, "__index__") and not isinstance(size, bool)
    if is_whole and operator.index(size) >= 1:
        return operator.index(size)
    raise ValueError(f"{owner}: sizes are whole numbers of at least 1, got {size!r}.")
