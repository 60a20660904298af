"""Where scales vary, said in roles: groups run along the contracted axis, channels are the kept ones.

For a kernel `w: [k, n]` that contracts `k` (groups of `g`), the scales are, in logical order:

| granularity | scale | one scale for |
|---|---|---|
| `PerTensor()` | `[1, 1]` | everything but the batch axes |
| `PerChannel()` | `[1, n]` | one output channel |
| `PerGroup(size=g)` | `[k/g, n]` | g neighbours along the contraction |
| `PerBlock((a, b))` | `[k/a, n/b]` | a tile |
| `PerToken()` | `[k, 1]` | one row of an activation, whose last axis is contracted |
| `PerFlat(g)` | `[k*n/g]` | g neighbours of the flattened array, across rows (bitsandbytes' blocks) |

`axis=` is the other way to name the role; it must agree with `contracting=`.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Base of the granularities; see the module's table."""


@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole array (for each batch element, where there are batch axes)."""


@dataclasses.dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each kept index, shared along the contracted axes.

    Args:
      axis: the kept axis, where all others but the batch axes are contracted; None leaves it to `contracting=`.
    """

    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row of an activation `[..., k]`: `PerChannel` with the last axis contracted by default."""


@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `size` neighbours along the contraction.

    Args:
      size: numbers in a group, at least 1.
      axis: the contracted axis; None leaves it to `contracting=`.
      pad: fill the last group with zeros where `size` does not divide the axis; False raises.
    """

    size: int
    axis: int | None = None
    pad: bool = False

    def __post_init__(self):
        object.__setattr__(self, "size", _whole("PerGroup", self.size))


@dataclasses.dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each tile of the trailing logical axes, 128 x 128 for example.

    Args:
      shape: tile sizes of the last `len(shape)` axes of the array; axes before them have one scale an index.
      pad: fill the last tiles with zeros where a size does not divide its axis; False raises.
    """

    shape: tuple[int, ...]
    pad: bool = False

    def __post_init__(self):
        if not isinstance(self.shape, tuple | list):
            raise TypeError(
                f"PerBlock: shape must be a tuple of sizes, got {self.shape!r}."
            )
        object.__setattr__(
            self, "shape", tuple(_whole("PerBlock", size) for size in self.shape)
        )


@dataclasses.dataclass(frozen=True)
class PerFlat(Granularity):
    """One scale for `size` neighbours of the array flattened in storage order; the tail is padded.

    Storage order puts kept axes first and contracted ones last, so that a `[in, out]` kernel has the blocks
    bitsandbytes gives the same weight kept as `[out, in]`.
    """

    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", _whole("PerFlat", self.size))


def _whole(owner: str, size: Any) -> int:
    if (
        not isinstance(size, bool)
        and hasattr(size, "__index__")
        and operator.index(size) >= 1
    ):
        return operator.index(size)
    raise ValueError(f"{owner}: sizes are whole numbers of at least 1, got {size!r}.")
