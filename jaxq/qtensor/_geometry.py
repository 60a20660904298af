"""Geometry: from the axes of an array to the order of its codes and scales.

The axes of an array have three orders. Batch axes come first in each order.

| order | axes | purpose |
|---|---|---|
| logical | the axes of the user's array | input and output |
| storage | `[*kept, K]`, contracted axes flattened into K | stored codes, scales |
| view | storage axes, K in the position of the contracted axes | avoids transposes |

`PerFlat` has one storage axis, `[F]`: all axes flattened in storage order.

Blocks split each view axis in two, `n -> (n / size, size)`. All padding, blocking and
broadcasting of scales happens in this file.

A block that does not fill is padded while its numbers are computed. The padding is not
stored: `Meta.stored_sizes` says which codes are.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

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
    """The static facts about the axes of one array; compared by value.

    Attributes:
      shape: logical sizes of the axes that are not batch axes.
      order: these axes in storage order, as negative numbers: the kept axes, then the
        contracted axes.
      num_contracted: the number of contracted axes.
      block_shape: block size of each storage axis `[*kept, K]`. None means that one
        block covers the whole axis. If `flat` is True, there is one entry.
      multiple: whole blocks are padded to a multiple of this number along the last
        storage axis, so that their codes fill whole bytes.
      flat: True for `PerFlat`: all axes are flattened in storage order, and blocks
        cross rows.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int4", jaxq.PerGroup(32))
      >>> geometry = jaxq.quantize(jnp.ones((64, 8)), spec).meta.geometry
      >>> geometry.storage_shape, geometry.num_blocks
      ((8, 64), (8, 2))
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
    def storage_groups(self) -> tuple[tuple[int, ...], ...]:
        """The axes that are flattened into each storage axis, as negative numbers."""
        if self.flat:
            return (self.order,)
        return (*((axis,) for axis in self.kept), self.contracted)

    @property
    def contracted_size(self) -> int:
        """The product of the sizes of the contracted axes."""
        return math.prod(self.shape[a] for a in self.contracted)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Sizes of the storage axes before padding."""
        if self.flat:
            return (math.prod(self.shape),)
        return (*(self.shape[a] for a in self.kept), self.contracted_size)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Sizes of the storage axes after padding.

        Each axis has whole blocks, and the last axis has whole bytes.
        """
        *first, last = [
            _round_up(n, block or 1)
            for n, block in zip(self.storage_shape, self.block_shape, strict=True)
        ]
        whole = math.lcm(self.multiple, self.block_shape[-1] or 1)
        return (*first, _round_up(last, whole))

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Number of blocks along each storage axis: the shape of the scales."""
        return tuple(
            1 if block is None else n // block
            for n, block in zip(self.padded_shape, self.block_shape, strict=True)
        )

    @property
    def k_position(self) -> int:
        """The position in the view of K, the flattened contracted axis."""
        if self.flat or not self._contiguous:
            return len(self.storage_shape) - 1
        first = min(self.contracted)
        return sum(a < first for a in self.kept)

    @property
    def _contiguous(self) -> bool:
        """True if a reshape alone turns logical order into view order.

        The contracted axes are then neighbours in ascending order, and the kept axes
        are in ascending order.
        """
        first = min(self.contracted, default=-1)
        neighbours = tuple(range(first, first + self.num_contracted))
        return self.contracted == neighbours and self.kept == tuple(sorted(self.kept))

    # Logical order, view and storage.

    def to_view(self, x: jax.Array) -> jax.Array:
        """`[*batch, *shape] -> [*batch, *view]`.

        No data moves if the contracted axes are neighbours in ascending order and the
        kept axes are in ascending order.
        """
        batch = x.shape[: x.ndim - len(self.shape)]
        if self.flat or not self._contiguous:
            order = [x.ndim + a for a in self.order]
            x = jnp.transpose(x, (*range(len(batch)), *order))
        return x.reshape(*batch, *self._view(self.storage_shape))

    def from_view(self, view: jax.Array) -> jax.Array:
        """The inverse of `to_view`."""
        batch = view.shape[: view.ndim - len(self.storage_shape)]
        if not self.flat and self._contiguous:
            return view.reshape(*batch, *self.shape)
        x = view.reshape(*batch, *(self.shape[a] for a in self.order))
        inverse = np.argsort([a + len(self.shape) for a in self.order])
        inverse = [len(batch) + int(i) for i in inverse]
        return jnp.transpose(x, (*range(len(batch)), *inverse))

    def to_storage(self, view: jax.Array) -> jax.Array:
        """Moves the contracted axis of a view to the end."""
        position = view.ndim - len(self.block_shape) + self.k_position
        return jnp.moveaxis(view, position, -1)

    def to_view_order(self, storage: jax.Array) -> jax.Array:
        """Moves the last axis of storage to its place in the view."""
        position = storage.ndim - len(self.block_shape) + self.k_position
        return jnp.moveaxis(storage, -1, position)

    def contracted_to_view(self, values: jax.Array) -> jax.Array:
        """One number for each index of K, arranged to broadcast against a view.

        Args:
          values: `[*batch, K]`, with K in storage order.
        """
        batch, k = values.shape[:-1], values.shape[-1]
        if self.flat:
            num_rows = math.prod(self.shape[a] for a in self.kept)
            rows = jnp.broadcast_to(values[..., None, :], (*batch, num_rows, k))
            return rows.reshape(*batch, num_rows * k)
        sizes = [1] * len(self.block_shape)
        sizes[self.k_position] = k
        return values.reshape(*batch, *sizes)

    # Padding and blocks.

    def pad(self, view: jax.Array, mode: str = "constant") -> jax.Array:
        """Pads a view to whole blocks and whole bytes.

        Args:
          view: array in view order.
          mode: "constant" pads with zeros, "edge" repeats the last number.
        """
        missing = tuple(
            padded - n
            for n, padded in zip(self.storage_shape, self.padded_shape, strict=True)
        )
        missing = self._view(missing)
        if not any(missing):
            return view
        batch = view.ndim - len(missing)
        widths = [(0, 0)] * batch + [(0, n) for n in missing]
        return jnp.pad(view, widths, mode=mode)

    def unpad(
        self, view: jax.Array, storage_sizes: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Removes the padding of `pad`.

        Args:
          view: array in view order.
          storage_sizes: the sizes of the storage axes that the result has. None means
            `storage_shape`, which removes all padding.
        """
        sizes = self._view(storage_sizes or self.storage_shape)
        if view.shape[view.ndim - len(sizes) :] == sizes:
            return view
        return view[(..., *(slice(n) for n in sizes))]

    def to_blocks(self, padded: jax.Array) -> jax.Array:
        """`[*batch, n, ...] -> [*batch, n / size, size, ...]` for each view axis."""
        batch = padded.shape[: padded.ndim - len(self.block_shape)]
        split: list[int] = []
        for pair in self._block_pairs:
            split.extend(pair)
        return padded.reshape(*batch, *split)

    def from_blocks(self, blocks: jax.Array) -> jax.Array:
        """The inverse of `to_blocks`."""
        batch = blocks.shape[: blocks.ndim - 2 * len(self.block_shape)]
        return blocks.reshape(*batch, *(n * size for n, size in self._block_pairs))

    @property
    def block_axes(self) -> tuple[int, ...]:
        """The axes inside a block in the result of `to_blocks`, as negative numbers."""
        return tuple(range(1 - 2 * len(self.block_shape), 0, 2))

    def scale_to_blocks(self, scale: jax.Array) -> jax.Array:
        """Scales in storage order, reshaped to broadcast against `to_blocks`.

        Args:
          scale: `[*batch, *num_blocks]`; an axis may also have size 1.
        """
        batch = scale.shape[: scale.ndim - len(self.block_shape)]
        scale = jnp.moveaxis(scale, -1, len(batch) + self.k_position)
        split: list[int] = []
        for num_blocks in scale.shape[len(batch) :]:
            split.extend((num_blocks, 1))
        return scale.reshape(*batch, *split)

    def scale_from_blocks(self, scale: jax.Array) -> jax.Array:
        """The inverse of `scale_to_blocks`."""
        batch = scale.shape[: scale.ndim - 2 * len(self.block_shape)]
        scale = scale.reshape(*batch, *(n for n, _ in self._block_pairs))
        return jnp.moveaxis(scale, len(batch) + self.k_position, -1)

    def counts(self) -> np.ndarray:
        """The number of elements of each block without padding, float32.

        The array broadcasts against `to_blocks`.
        """
        counts = np.ones((), np.float32)
        sizes = self._view(self.storage_shape)
        for (num_blocks, block), size in zip(self._block_pairs, sizes, strict=True):
            starts = block * np.arange(num_blocks)
            along_axis = np.clip(size - starts, 0, block).astype(np.float32)
            counts = counts[..., None, None] * along_axis[:, None]
        return counts

    # Comparing.

    def follows(self, granularity: Granularity) -> bool:
        """True if the array has the blocks that `granularity` describes.

        Earlier transposes and reshapes of the QTensor do not matter.
        """
        if isinstance(granularity, PerBlock):
            tiles = {block for block in self.block_shape if block and block > 1}
            return not self.flat and tiles <= set(granularity.shape)
        fields = {field.name for field in dataclasses.fields(granularity)}
        # A transpose may have changed the number of the axis, and padding is allowed.
        changes = {k: v for k, v in {"axis": None, "pad": True}.items() if k in fields}
        expected = resolve(
            self.shape,
            dataclasses.replace(granularity, **changes),
            self.contracted,
            (),
            context=ErrorContext("Geometry.follows", "the array", str(self.shape)),
            multiple=1,
        )
        return self._blocks_by_axis() == expected._blocks_by_axis()

    def _blocks_by_axis(self) -> tuple[bool, dict[int, int | None], int | None]:
        """`flat`, the block size of each kept axis, and the block size of K."""
        kept = {}
        if not self.flat:
            # On an axis of size 1 a block of 1 is the same as a whole axis.
            kept = {
                axis: block
                for axis, block in zip(self.kept, self.block_shape, strict=False)
                if self.shape[axis] != 1
            }
        return self.flat, kept, self.block_shape[-1]

    @property
    def _block_pairs(self) -> tuple[tuple[int, int], ...]:
        """(number of blocks, block size) of each view axis."""
        pairs = tuple(
            (num, padded // num if num else 1)
            for num, padded in zip(self.num_blocks, self.padded_shape, strict=True)
        )
        return self._view(pairs)

    def _view(self, per_storage_axis: tuple) -> tuple:
        """Reorders one entry for each storage axis to view order."""
        *entries, last = per_storage_axis
        entries.insert(self.k_position, last)
        return tuple(entries)


@dataclasses.dataclass(frozen=True)
class ErrorContext:
    """The parts of error messages that describe a call.

    Attributes:
      caller: the public function, for example "quantize".
      name: the name of the array, for example "w".
      array: dtype and shape of the array, for example "float32[4,8]".
    """

    caller: str
    name: str
    array: str

    @property
    def subject(self) -> str:
        """`w: float32[4,8]`."""
        return f"{self.name}: {self.array}"


def resolve(
    shape: tuple[int, ...],
    granularity: Granularity,
    contracting: tuple[int, ...] | int | None,
    batch: tuple[int, ...] | int,
    *,
    context: ErrorContext,
    multiple: int,
) -> Geometry:
    """The geometry of an array, from its granularity and the roles of its axes.

    Args:
      shape: logical shape, with batch axes.
      granularity: where scales vary.
      contracting: contracted axes. None uses the axis of the granularity. If the
        granularity has no axis, None uses -1 for `PerToken`, -2 for a matrix and the
        only axis of a 1-D array.
      batch: leading axes that share no scales.
      context: the parts of error messages that describe the call.
      multiple: the number of codes that fill whole bytes.

    Raises:
      TypeError: an axis is not a whole number, or the granularity is not one of jaxq's.
      ValueError: the array has no axes; an axis is out of range or repeated; batch axes
        are not the leading axes, or no other axis is left; the contracted axes contain
        a batch axis or contradict the granularity; `contracting` is None and has no
        default; `PerBlock` has more sizes than the array has axes; `PerBlock` is used
        with several contracted axes; or a size does not divide its axis and `pad` is
        False.
    """
    ndim = len(shape)
    caller, subject = context.caller, context.subject
    if ndim == 0:
        raise ValueError(
            f"{caller}: a 0-d array has no axis along which to share a scale "
            f"({subject}). Pass {context.name}.reshape(1)."
        )
    batch_axes = _normalized_axes(batch, ndim, "batch", context)
    if batch_axes != tuple(range(-ndim, len(batch_axes) - ndim)):
        raise ValueError(
            f"{caller}: batch axes must be the leading axes, got batch={batch!r} "
            f"({subject}). Use jnp.moveaxis to move batch axes to the front."
        )
    inner = tuple(range(len(batch_axes) - ndim, 0))
    if not inner:
        raise ValueError(
            f"{caller}: every axis is a batch axis, so no axis is left to quantize "
            f"along ({subject}). Name fewer axes in batch=."
        )
    contracted = _contracted_axes(granularity, contracting, inner, ndim, context)
    kept = tuple(a for a in inner if a not in contracted)
    sizes = shape[len(batch_axes) :]
    block_shape = _block_shape(granularity, sizes, kept, contracted, context)
    return Geometry(
        shape=sizes,
        order=(*kept, *contracted),
        num_contracted=len(contracted),
        block_shape=block_shape,
        multiple=multiple,
        flat=isinstance(granularity, PerFlat),
    )


def _contracted_axes(
    granularity: Granularity,
    contracting: tuple[int, ...] | int | None,
    inner: tuple[int, ...],
    ndim: int,
    context: ErrorContext,
) -> tuple[int, ...]:
    """The contracted axes, as negative numbers in ascending order.

    `inner` are the axes that are not batch axes.
    """
    caller, subject = context.caller, context.subject
    from_granularity = _axes_of_granularity(granularity, inner, ndim, context)
    if contracting is None:
        if from_granularity is not None:
            return from_granularity
        if isinstance(granularity, PerToken) or len(inner) == 1:
            return (-1,)
        if len(inner) == 2:
            return (-2,)
        raise ValueError(
            f"{caller}: contracting= is missing, and only a matrix and a 1-D array "
            f"have a default ({subject}). Pass contracting=(-2,), batch=(0,) for a "
            "stack of matrices [layers, in, out], contracting=(-1,) for activations, "
            "contracting=(-3, -2) for an attention output [heads, dim, out]. Only axes "
            "in batch= can be indexed, scanned or mapped over."
        )
    axes = _normalized_axes(contracting, ndim, "contracting", context)
    if not axes or not set(axes) <= set(inner):
        raise ValueError(
            f"{caller}: contracting={contracting!r} must name at least one axis, and "
            f"no batch axis ({subject}). The axes {list(inner)} are possible."
        )
    if from_granularity is not None and set(from_granularity) != set(axes):
        raise ValueError(
            f"{caller}: {granularity} contracts axes {list(from_granularity)}, but "
            f"contracting={contracting!r} contracts axes {list(axes)} ({subject}). "
            "Leave out one of the two."
        )
    return axes


def _axes_of_granularity(
    granularity: Granularity, inner: tuple[int, ...], ndim: int, context: ErrorContext
) -> tuple[int, ...] | None:
    """The contracted axes that `granularity.axis` determines; None without an axis."""
    axis = getattr(granularity, "axis", None)
    if axis is None:
        return None
    (axis,) = _normalized_axes(axis, ndim, "granularity axis", context)
    if axis not in inner:
        raise ValueError(
            f"{context.caller}: {granularity} names a batch axis ({context.subject}). "
            f"The axes {list(inner)} are possible."
        )
    if isinstance(granularity, PerGroup):
        return (axis,)
    # The axis of PerChannel is the kept axis.
    return tuple(a for a in inner if a != axis)


def _normalized_axes(
    axes: tuple[int, ...] | int, ndim: int, argument: str, context: ErrorContext
) -> tuple[int, ...]:
    """Axes as negative numbers in ascending order."""
    name, subject = f"{context.caller}: {argument}", context.subject
    entries: tuple[Any, ...] = (axes,)
    if isinstance(axes, Sequence) and not isinstance(axes, str):
        entries = tuple(axes)
    try:
        if any(isinstance(axis, bool) for axis in entries):
            raise TypeError
        whole = [operator.index(axis) for axis in entries]
    except TypeError:
        raise TypeError(
            f"{name} must be an axis or a tuple of axes, got {axes!r} ({subject})."
        ) from None
    negative = tuple(sorted(a - ndim if a >= 0 else a for a in whole))
    in_range = all(-ndim <= a < 0 for a in negative)
    if not in_range or len(set(negative)) != len(negative):
        raise ValueError(
            f"{name} axes {whole} must be distinct axes of the array ({subject})."
        )
    return negative


def _block_shape(
    granularity: Granularity,
    sizes: tuple[int, ...],
    kept: tuple[int, ...],
    contracted: tuple[int, ...],
    context: ErrorContext,
) -> tuple[int | None, ...]:
    """`Geometry.block_shape`: one entry for each storage axis `[*kept, K]`."""
    if isinstance(granularity, PerTensor):
        return (None,) * (len(kept) + 1)
    if isinstance(granularity, PerChannel | PerToken):
        return (1,) * len(kept) + (None,)
    if isinstance(granularity, PerGroup):
        k = math.prod(sizes[a] for a in contracted)
        if not granularity.pad:
            axes = ", ".join(map(str, contracted))
            _check_divides(granularity.size, k, axes, "group", context)
        return (1,) * len(kept) + (_block_or_whole(granularity.size, k),)
    if isinstance(granularity, PerFlat):
        return (_block_or_whole(granularity.size, math.prod(sizes)),)
    if isinstance(granularity, PerBlock):
        return _tile_shape(granularity, sizes, kept, contracted, context)
    raise TypeError(
        f"{context.caller}: granularity must be one of jaxq's Per... classes, got "
        f"{granularity!r}."
    )


def _tile_shape(
    granularity: PerBlock,
    sizes: tuple[int, ...],
    kept: tuple[int, ...],
    contracted: tuple[int, ...],
    context: ErrorContext,
) -> tuple[int | None, ...]:
    """`_block_shape` of `PerBlock`, whose sizes belong to the last logical axes."""
    if len(contracted) > 1 or len(granularity.shape) > len(sizes):
        raise ValueError(
            f"{context.caller}: {granularity} needs one contracted axis and at most "
            f"{len(sizes)} sizes, got contracted axes {list(contracted)} and "
            f"{len(granularity.shape)} sizes ({context.subject}). Use PerGroup for "
            "several contracted axes."
        )
    num_tiled = len(granularity.shape)
    tile_sizes = dict(zip(range(-num_tiled, 0), granularity.shape, strict=True))
    block_shape: list[int | None] = []
    for axis in (*kept, *contracted):
        tile = tile_sizes.get(axis, 1)
        if not granularity.pad:
            _check_divides(tile, sizes[axis], str(axis), "block", context)
        # A tile of 1 stays 1 on an axis of size 1. None would mean a shared scale.
        block_shape.append(1 if tile == 1 else _block_or_whole(tile, sizes[axis]))
    return tuple(block_shape)


def _block_or_whole(size: int, axis_size: int) -> int | None:
    """The block size, or None if one block covers the whole axis."""
    return None if axis_size <= size else size


def _check_divides(
    size: int, axis_size: int, axes: str, kind: str, context: ErrorContext
) -> None:
    """Raises ValueError unless `size` divides the size of the axis."""
    if axis_size % size == 0:
        return
    # For an axis of even size, only even group sizes are proposed.
    divisors = [d for d in range(1, axis_size + 1) if axis_size % d == 0]
    if axis_size % 2 == 0:
        divisors = [d for d in divisors if d % 2 == 0]
    smaller = [d for d in divisors if d < size][-1:]
    larger = [d for d in divisors if d > size][:1]
    proposed = " or ".join(str(d) for d in smaller + larger)
    padded = "size, pad=True" if kind == "group" else "shape, pad=True"
    padded = f"jaxq.Per{kind.capitalize()}({padded})"
    remedy = f"Pass {padded} or use size={proposed}." if proposed else f"Pass {padded}."
    raise ValueError(
        f"{context.caller}: axis {axes} of {context.name} has size {axis_size}, not a "
        f"multiple of {kind} size {size} ({context.subject}). {remedy}"
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def describe(dtype: str, shape: tuple[int, ...]) -> str:
    """`float32[4,8]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"
