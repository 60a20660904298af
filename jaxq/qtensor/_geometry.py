"""Every step between an array as its user sees it and the order its codes and scales are stored in.

Three arrangements of one array, batch axes in front of each:

| name | axes | what it is for |
|---|---|---|
| logical | as the user has them | the outside |
| storage | `[*kept, K]`, contracted axes flattened last; `[F]` if blocks cross rows | codes and scales at rest |
| view | storage with K moved back to where it is in memory | working on floats without transposing them |

Blocks cut each view axis in two, `n -> (n / size, size)`. All padding, blocking and broadcasting happens here.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.qtensor._granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static facts about one array's axes; compared by value.

    Attributes:
      shape: logical sizes of the non-batch axes.
      order: those axes in storage order, as negative numbers: kept ones, then the contracted ones.
      num_contracted: how many of them are contracted.
      block_shape: block size of each storage axis `[*kept, K]`, None for a whole axis; one entry where `flat`.
      multiple: the stored last axis is padded to a multiple of this, so that codes fill whole bytes.
      flat: the non-batch axes are flattened in storage order, and blocks run across rows.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    num_contracted: int
    block_shape: tuple[int | None, ...]
    multiple: int = 1
    flat: bool = False

    @property
    def kept(self) -> tuple[int, ...]:
        """Kept axes in storage order, as negative numbers."""
        return self.order[: len(self.order) - self.num_contracted]

    @property
    def contracted(self) -> tuple[int, ...]:
        """Contracted axes in storage order, as negative numbers."""
        return self.order[len(self.order) - self.num_contracted :]

    @property
    def contracted_size(self) -> int:
        return math.prod(self.shape[a] for a in self.contracted)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Sizes of the storage axes before padding."""
        if self.flat:
            return (math.prod(self.shape),)
        return (*(self.shape[a] for a in self.kept), self.contracted_size)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Sizes of the storage axes as stored: whole blocks, and whole bytes along the last one."""
        sizes = [
            _round_up(n, b or 1)
            for n, b in zip(self.storage_shape, self.block_shape, strict=True)
        ]
        sizes[-1] = _round_up(
            sizes[-1], math.lcm(self.multiple, self.block_shape[-1] or 1)
        )
        return tuple(sizes)

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Number of blocks along each storage axis: the shape of the scales."""
        return tuple(
            1 if b is None else n // b
            for n, b in zip(self.padded_shape, self.block_shape, strict=True)
        )

    @property
    def k_position(self) -> int:
        """Where the flattened contraction stands among the view's axes."""
        if self.flat or not self._contiguous:
            return len(self.storage_shape) - 1
        first = min(self.contracted)
        return sum(a < first for a in self.kept)

    @property
    def _contiguous(self) -> bool:
        """True where view and logical order hold the same numbers in the same order."""
        first = min(self.contracted, default=-1)
        merged = tuple(range(first, first + self.num_contracted))
        return self.contracted == merged and self.kept == tuple(sorted(self.kept))

    def to_view(self, x: jax.Array) -> jax.Array:
        """`[*batch, *shape] -> [*batch, *view]`; free of data movement for contiguous contractions."""
        batch = x.shape[: x.ndim - len(self.shape)]
        if self.flat or not self._contiguous:
            x = jnp.transpose(
                x, (*range(len(batch)), *(x.ndim + a for a in self.order))
            )
        return x.reshape(*batch, *self._view(self.storage_shape))

    def from_view(self, view: jax.Array) -> jax.Array:
        """The inverse of `to_view`."""
        batch = view.shape[: view.ndim - len(self.storage_shape)]
        if not (self.flat or not self._contiguous):
            return view.reshape(*batch, *self.shape)
        x = view.reshape(*batch, *(self.shape[a] for a in self.order))
        back = np.argsort([a + len(self.shape) for a in self.order])
        return jnp.transpose(
            x, (*range(len(batch)), *(len(batch) + int(i) for i in back))
        )

    def pad(self, view: jax.Array, mode: str = "constant") -> jax.Array:
        """Fills a view up to whole blocks and whole bytes: with zeros, or the nearest number (`mode="edge"`)."""
        extra = self._view(
            tuple(
                p - n
                for n, p in zip(self.storage_shape, self.padded_shape, strict=True)
            )
        )
        if not any(extra):
            return view
        batch = view.ndim - len(extra)
        return jnp.pad(view, [(0, 0)] * batch + [(0, n) for n in extra], mode=mode)

    def unpad(self, view: jax.Array) -> jax.Array:
        """Cuts the padding of `pad` off again."""
        sizes = self._view(self.storage_shape)
        if view.shape[view.ndim - len(sizes) :] == sizes:
            return view
        return view[(..., *(slice(n) for n in sizes))]

    def to_blocks(self, padded: jax.Array) -> jax.Array:
        """`[*batch, n, ...] -> [*batch, n / size, size, ...]`, each view axis cut in two."""
        batch = padded.shape[: padded.ndim - len(self.block_shape)]
        cut = [part for pair in self._block_pairs for part in pair]
        return padded.reshape(*batch, *cut)

    def from_blocks(self, blocks: jax.Array) -> jax.Array:
        """The inverse of `to_blocks`."""
        batch = blocks.shape[: blocks.ndim - 2 * len(self.block_shape)]
        return blocks.reshape(*batch, *(n * b for n, b in self._block_pairs))

    @property
    def block_axes(self) -> tuple[int, ...]:
        """The axes of `to_blocks` that lie inside a block, as negative numbers."""
        return tuple(range(1 - 2 * len(self.block_shape), 0, 2))

    def scale_to_blocks(self, scale: jax.Array) -> jax.Array:
        """Scales `[*batch, *num_blocks]` (or ones) in storage order, shaped to broadcast against `to_blocks`."""
        batch = scale.shape[: scale.ndim - len(self.block_shape)]
        scale = jnp.moveaxis(scale, -1, len(batch) + self.k_position)
        return scale.reshape(
            *batch, *(part for n in scale.shape[len(batch) :] for part in (n, 1))
        )

    def scale_from_blocks(self, scale: jax.Array) -> jax.Array:
        """The inverse of `scale_to_blocks`."""
        batch = scale.shape[: scale.ndim - 2 * len(self.block_shape)]
        scale = scale.reshape(*batch, *(n for n, _ in self._block_pairs))
        return jnp.moveaxis(scale, len(batch) + self.k_position, -1)

    def to_storage(self, view: jax.Array) -> jax.Array:
        """Moves the contraction of a view last."""
        return jnp.moveaxis(
            view, view.ndim - len(self.block_shape) + self.k_position, -1
        )

    def to_view_order(self, storage: jax.Array) -> jax.Array:
        """Moves the last axis of storage back to its place in the view."""
        return jnp.moveaxis(
            storage, -1, storage.ndim - len(self.block_shape) + self.k_position
        )

    def counts(self) -> np.ndarray:
        """How many true numbers each block holds, shaped to broadcast against `to_blocks`; float32."""
        out = np.ones((), np.float32)
        for (n, b), true in zip(
            self._block_pairs, self._view(self.storage_shape), strict=True
        ):
            along = np.clip(true - b * np.arange(n), 0, b).astype(np.float32)
            out = out[..., None, None] * along[:, None]
        return out

    def follows(self, granularity: Granularity) -> bool:
        """True where the blocks are those of `granularity`, wherever transposes and reshapes have moved the axes."""
        if isinstance(granularity, PerBlock):
            return not self.flat and {
                b for b in self.block_shape if b and b > 1
            } <= set(granularity.shape)
        free = {"axis": None, "pad": True}
        names = {field.name for field in dataclasses.fields(granularity)}
        granularity = dataclasses.replace(
            granularity, **{k: v for k, v in free.items() if k in names}
        )
        wanted = resolve(
            self.shape,
            granularity,
            self.contracted,
            (),
            caller="follows",
            what="",
            multiple=1,
        )

        def blocks(geometry: Geometry) -> tuple:
            rows = zip(
                geometry.kept, geometry.block_shape, strict=False
            )  # an axis of size 1 is as good as whole
            kept = (
                {} if geometry.flat else {a: b for a, b in rows if self.shape[a] != 1}
            )
            return geometry.flat, kept, geometry.block_shape[-1]

        return blocks(self) == blocks(wanted)

    @property
    def _block_pairs(self) -> tuple[tuple[int, int], ...]:
        """(number of blocks, block size) of each view axis."""
        pairs = tuple(
            (n, p // n if n else 1)
            for n, p in zip(self.num_blocks, self.padded_shape, strict=True)
        )
        return self._view(pairs)

    def _view(self, per_storage_axis: tuple) -> tuple:
        """Reorders something given for each storage axis to view order."""
        k, out = self.k_position, list(per_storage_axis)
        out.insert(k, out.pop())
        return tuple(out)


def resolve(
    shape: tuple[int, ...],
    granularity: Granularity,
    contracting: tuple[int, ...] | int | None,
    batch: tuple[int, ...] | int,
    *,
    caller: str,
    what: str,
    multiple: int,
) -> Geometry:
    """The geometry of an array of `shape`, from its granularity and the roles of its axes.

    Args:
      shape: logical shape, batch axes included.
      granularity: where scales vary.
      contracting: contracted axes; None takes `granularity.axis`, else -2 of a matrix and the only axis of a row.
      batch: leading axes each with statistics of their own.
      caller: public function, for error messages.
      what: the array with dtype and shape, for error messages.
      multiple: codes that fill whole bytes.

    Raises:
      ValueError: axes out of range, repeated or contradictory, no default to go by, a size that does not divide.
    """
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(
            f"{caller}: a 0-d array has no axis to share a scale along ({what}). Pass x.reshape(1)."
        )
    batch_axes = _normalize(batch, ndim, f"{caller}: batch", what)
    if batch_axes != tuple(range(-ndim, len(batch_axes) - ndim)):
        raise ValueError(
            f"{caller}: batch axes must be the leading ones, got batch={batch!r} ({what}). "
            "Use jnp.moveaxis to bring them to the front."
        )
    inner = tuple(range(len(batch_axes) - ndim, 0))
    if not inner:
        raise ValueError(
            f"{caller}: every axis is a batch axis, none is left to quantize along ({what})."
        )
    contracted = _contracted(granularity, contracting, inner, ndim, caller, what)
    kept = tuple(a for a in inner if a not in contracted)
    sizes = shape[len(batch_axes) :]
    k = math.prod(sizes[a] for a in contracted)
    flat = isinstance(granularity, PerFlat)
    if isinstance(granularity, PerTensor):
        block: tuple[int | None, ...] = (None,) * (len(kept) + 1)
    elif isinstance(granularity, PerChannel | PerToken):
        block = (1,) * len(kept) + (None,)
    elif isinstance(granularity, PerGroup):
        along = "axis " + ", ".join(map(str, contracted)) + " of"
        block = (1,) * len(kept) + (
            _group(granularity.size, k, granularity.pad, "group", along, caller, what),
        )
    elif isinstance(granularity, PerFlat):
        block = (
            _group(granularity.size, math.prod(sizes), True, "block", "", caller, what),
        )
    elif isinstance(granularity, PerBlock):
        block = _tiles(granularity, sizes, kept, contracted, caller, what)
    else:
        raise TypeError(
            f"{caller}: granularity must be one of jaxq's Per... classes, got {granularity!r}."
        )
    return Geometry(sizes, (*kept, *contracted), len(contracted), block, multiple, flat)


def _contracted(granularity, contracting, inner, ndim, caller, what) -> tuple[int, ...]:
    axis = getattr(granularity, "axis", None)
    named = None
    if axis is not None:
        (axis,) = _normalize(axis, ndim, f"{caller}: granularity axis", what)
        if axis not in inner:
            raise ValueError(f"{caller}: {granularity} names a batch axis ({what}).")
        named = (
            (axis,)
            if isinstance(granularity, PerGroup)
            else tuple(a for a in inner if a != axis)
        )
    if contracting is None:
        if named is not None:
            return named
        if isinstance(granularity, PerToken) or len(inner) == 1:
            return (-1,)
        if len(inner) == 2:
            return (-2,)
        raise ValueError(
            f"{caller}: which axes are contracted? Only a matrix has a default, -2 ({what}). "
            "Pass contracting=(-2,) for stacked [..., in, out] matrices, (-1,) for activations, (-3, -2) for an "
            "attention output [heads, dim, out]; name leading stacked axes with batch=."
        )
    given = _normalize(contracting, ndim, f"{caller}: contracting", what)
    if not given or not set(given) <= set(inner):
        raise ValueError(
            f"{caller}: contracting={contracting!r} must name at least one axis, and none of the batch axes ({what})."
        )
    if named is not None and set(named) != set(given):
        raise ValueError(
            f"{caller}: {granularity} contracts axes {list(named)}, but contracting={contracting!r} says "
            f"{list(given)} ({what}). Name the role once."
        )
    return given


def _normalize(
    axes: tuple[int, ...] | int, ndim: int, name: str, what: str
) -> tuple[int, ...]:
    try:
        given = (
            tuple(axes)
            if isinstance(axes, Sequence) and not isinstance(axes, str)
            else (axes,)
        )
        if any(isinstance(a, bool) for a in given):
            raise TypeError
        whole = [operator.index(a) for a in given]  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"{name} must be an axis or a tuple of axes, got {axes!r} ({what})."
        ) from None
    out = tuple(sorted(a - ndim if a >= 0 else a for a in whole))
    if any(not -ndim <= a < 0 for a in out) or len(set(out)) != len(out):
        raise ValueError(
            f"{name} axes {whole} must be distinct axes of the array ({what})."
        )
    return out


def _group(
    size: int, n: int, pad: bool, kind: str, along: str, caller: str, what: str
) -> int | None:
    if n % size and not pad:
        even = [d for d in range(1, n + 1) if n % d == 0 and (d % 2 == 0 or n % 2)]
        near = [
            max((d for d in even if d < size), default=None),
            min((d for d in even if d > size), default=None),
        ]
        use = " or ".join(str(d) for d in near if d)
        raise ValueError(
            f"{caller}: {along} {what.split(':')[0]} has size {n}, not a multiple of {kind} size {size} ({what}). "
            f"Pass pad=True{f' or use size={use}' if use else ''}."
        )
    return None if n <= size else size


def _tiles(
    granularity: PerBlock, sizes, kept, contracted, caller, what
) -> tuple[int | None, ...]:
    if len(contracted) > 1 or len(granularity.shape) > len(sizes):
        raise ValueError(
            f"{caller}: {granularity} needs one contracted axis and at most {len(sizes)} sizes; "
            f"contracted are {list(contracted)} ({what})."
        )
    tile = dict(
        zip(
            range(-1, -1 - len(granularity.shape), -1),
            reversed(granularity.shape),
            strict=True,
        )
    )
    out = []
    for axis in (*kept, *contracted):
        size = tile.get(axis, 1)
        out.append(
            _group(
                size,
                sizes[axis],
                granularity.pad,
                "block",
                f"axis {axis} of",
                caller,
                what,
            )
        )
    return tuple(
        1 if b is None and tile.get(a, 1) == 1 else b
        for a, b in zip((*kept, *contracted), out, strict=True)
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def describe(dtype: str, shape: tuple[int, ...]) -> str:
    """`float32[4,8]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"
