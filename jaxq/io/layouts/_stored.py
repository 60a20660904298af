"""Between a QTensor and its arrays in storage order, `[*batch, out, in]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.formats import Packing
from jaxq.qtensor import (
    ErrorContext,
    Meta,
    PerBlock,
    PerChannel,
    PerGroup,
    QTensor,
    QuantSpec,
    is_traced,
    relayout,
    resolve,
)

AnyScale = Any  # an array or a QTensor


def grouped(size: int | None) -> PerGroup | PerChannel:
    """Groups of `size` inputs; None is one scale for each output channel."""
    return PerChannel() if size is None else PerGroup(size, pad=True)


def qtensor(
    spec: QuantSpec,
    shape: tuple[int, int],
    data: jax.Array,
    scale: AnyScale,
    *,
    zero_point: jax.Array | None = None,
    offset: jax.Array | None = None,
    dtype: Any = None,
) -> QTensor:
    """A QTensor of a kernel `[*batch, in, out]` from its leaves.

    Args:
      spec: how the weight was quantized.
      shape: (in, out).
      data: stored codes in the packing of the spec, `[*batch, out, bytes]`, or flat for
        `PerFlat`. Bytes after the last whole code are left out.
      scale: array `[*batch, *num_blocks]`, or a QTensor.
      zero_point: as `scale`, or None.
      offset: as `scale`, or None.
      dtype: the dtype of the weight. None takes that of the scale.
    """
    meta = _meta(spec, shape, scale.dtype if dtype is None else dtype)
    return QTensor(
        data=data[..., : meta.stored_shape[-1]],
        scale=scale,
        zero_point=zero_point,
        offset=offset,
        codebook=None,
        meta=meta,
    )


def qtensor_of_codes(
    spec: QuantSpec,
    shape: tuple[int, int],
    codes: jax.Array,
    scale: AnyScale,
    **leaves: Any,
) -> QTensor:
    """`qtensor` from unpacked codes `[*batch, out, in]`, in the packing of the spec."""
    meta = _meta(spec, shape, "float32")
    codes = pad_last(codes, formats.codes_per_pack(spec.fmt.bits, spec.order))
    data = formats.pack(codes, spec.fmt.bits, spec.order, unit=meta.pack_unit)
    return qtensor(spec, shape, data, scale, **leaves)


def _meta(spec: QuantSpec, shape: tuple[int, int], dtype: Any) -> Meta:
    """The static facts about a kernel of `shape`, (in, out)."""
    context = ErrorContext("layouts", "the weight", f"{list(shape)}")
    multiple = formats.codes_per_pack(spec.fmt.bits, spec.order)
    geometry = resolve(
        shape, spec.granularity, (-2,), (), context=context, multiple=multiple
    )
    return Meta(spec, geometry, spec.order, jnp.dtype(dtype).name)


def quantized_scale(
    spec: QuantSpec,
    shape: tuple[int, ...],
    codes: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
) -> QTensor:
    """A scale that is quantized itself.

    Args:
      spec: how the scale was quantized. Groups run along its last axis.
      shape: the shape of the scale without batch axes.
      codes: unpacked codes, `[*batch, *shape]`.
      scale: the scale of the scale, `[*batch, *num_blocks]`.
      offset: the mean that was subtracted, `[*batch, 1]`, or None.
    """
    multiple = formats.codes_per_pack(spec.fmt.bits, spec.order)
    context = ErrorContext("layouts", "the scale", f"{list(shape)}")
    geometry = resolve(
        shape, spec.granularity, (-1,), (), context=context, multiple=multiple
    )
    meta = Meta(spec, geometry, spec.order, "float32")
    data = formats.pack(codes, spec.fmt.bits, spec.order, unit=meta.pack_unit)
    return QTensor(data, scale, None, offset, None, meta)


def pad_last(array: jax.Array, multiple: int, value: int = 0) -> jax.Array:
    """Pads the last axis at its end to a multiple."""
    missing = -array.shape[-1] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * (array.ndim - 1) + [(0, missing)]
    return jnp.pad(array, widths, constant_values=np.asarray(value, array.dtype))


class StoredWeight:
    """The leaves of a QTensor in storage order, with checks for a layout.

    Args:
      layout: the name of the layout, which error messages begin with.
      qt: the QTensor to write.
      has_batch: whether the layout has batch axes.

    Attributes:
      qt: the QTensor, stored as rows.
      spec: its spec.
      num_out: the size of its kept axis.
      num_in: the size of its contracted axis.
    """

    def __init__(self, layout: str, qt: QTensor, *, has_batch: bool = False):
        self.layout = layout
        if not isinstance(qt, QTensor):
            raise TypeError(
                f"{layout}: expected a QTensor, got {type(qt).__name__}. Use "
                "jaxq.quantize(w, jaxq.io.layouts.get(...).spec(...))."
            )
        self.qt, self.spec = relayout(qt, "rows"), qt.spec
        geometry = qt.meta.geometry
        if len(geometry.shape) != 2 or geometry.num_contracted != 1:
            raise self.problem(
                f"it has shape {list(qt.shape)} with {geometry.num_contracted} "
                "contracted axes, expected one kept and one contracted axis. Use "
                "qt.reshape"
            )
        if qt.batch_shape and not has_batch:
            raise self.problem(
                "it has batch axes. Write each slice: jax.tree.map(lambda a: a[i], qt)"
            )
        if qt.input_scale is not None:
            raise self.problem(
                "it has an input_scale. Fold the factors into the previous layer, or "
                "quantize jaxq.dequantize(qt)"
            )
        if qt.codebook is not None:
            raise self.problem("it has a codebook of its own")
        (kept,), (contracted,) = geometry.kept, geometry.contracted
        self.num_out = geometry.shape[kept]
        self.num_in = geometry.shape[contracted]

    def problem(self, text: str) -> ValueError:
        """The error that says why the layout cannot hold the QTensor."""
        return ValueError(
            f"{self.layout}: {self.qt!r} cannot be written: {text}. "
            f"jaxq.io.layouts.get({self.layout!r}).spec returns a spec that can."
        )

    def refuse_unless(self, fits: bool, text: str) -> None:
        """Raises `problem(text)` unless the condition holds."""
        if not fits:
            raise self.problem(text)

    def group_size(self) -> int:
        """The number of codes of a row that share a scale; that of a row is `num_in`.

        Raises:
          ValueError: rows share scales, or blocks cross rows.
        """
        geometry = self.qt.meta.geometry
        per_row = not geometry.flat and geometry.block_shape[0] == 1
        one_row = not geometry.flat and self.num_out == 1
        self.refuse_unless(
            per_row or one_row,
            f"its scales vary {self.spec.granularity}, expected groups along the "
            "contracted axis or one scale for each output channel",
        )
        return geometry.block_shape[-1] or self.num_in

    def group_setting(self) -> int:
        """The group size as a setting; -1 for one scale for each output channel."""
        size, granularity = self.group_size(), self.spec.granularity
        if isinstance(granularity, PerGroup):
            return granularity.size
        return -1 if self.num_groups() == 1 else size

    def block_setting(self) -> tuple[int, int]:
        """The sizes of a block, (out, in).

        A block that covers a whole axis may be larger than the axis. The granularity
        says its size if the block is a square.
        """
        geometry, granularity = self.qt.meta.geometry, self.spec.granularity
        square = None
        if isinstance(granularity, PerBlock) and len(granularity.shape) == 2:
            first, second = granularity.shape
            square = first if first == second else None
        sizes = []
        for block, size in zip(
            geometry.block_shape, geometry.storage_shape, strict=True
        ):
            sizes.append(block or square or size)
        return sizes[0], sizes[1]

    def num_groups(self) -> int:
        """The number of groups of a row."""
        return -(-self.num_in // self.group_size())

    def codes(self) -> jax.Array:
        """The unpacked codes without padding, `[*batch, out, in]` or flat."""
        sizes = self.qt.meta.geometry.storage_shape
        stored = self.qt.stored_codes()
        return stored[(..., *(slice(size) for size in sizes))]

    def packed(self, packing: Packing, multiple: int, unit: int | None = None):
        """The bytes of each row in a packing.

        Args:
          packing: the order of codes in bytes.
          multiple: rows are padded with zeros to a multiple of this number of codes.
          unit: as in `formats.pack`.
        """
        codes = self.codes()
        meta, fmt = self.qt.meta, self.spec.fmt
        same_unit = packing is not Packing.HALVES or meta.pack_unit == unit
        if meta.packing is packing and same_unit and codes.shape[-1] % multiple == 0:
            return self.qt.data
        if codes.dtype == jnp.int8:
            codes = codes.astype(jnp.uint8) & np.uint8((1 << fmt.bits) - 1)
        return formats.pack(pad_last(codes, multiple), fmt.bits, packing, unit=unit)

    def unsigned(self, multiple: int) -> tuple[jax.Array, jax.Array]:
        """The codes of integers and their zero points, both without a sign.

        Signed codes and zero points are moved by 2^(bits-1). Without a zero point, the
        zero point is the code of 0.

        Args:
          multiple: rows are padded with zeros to a multiple of this number of codes.

        Returns:
          (codes, zero points): uint8 `[out, in]`, and uint8 `[out, groups]` or
          `[1, 1]`.
        """
        bits, is_signed = self.spec.fmt.bits, self.spec.fmt.min < 0
        first = np.uint8(1 << (bits - 1) if is_signed else 0)
        mask = np.uint8((1 << bits) - 1)
        codes = (self.codes().astype(jnp.uint8) + first) & mask
        codes = pad_last(codes, multiple)
        zero = self.qt.zero_point
        if zero is None:
            return codes, jnp.full((1, 1), first, jnp.uint8)
        zero = zero.reshape(self.num_out, self.num_groups())
        moved = zero.astype(jnp.int32) + int(first)
        if not is_traced(moved):
            numbers = np.asarray(moved)
            self.refuse_unless(
                numbers.min() >= 0 and numbers.max() <= int(mask),
                f"it has zero points outside the range of {bits} bits",
            )
        return codes, moved.astype(jnp.uint8)

    def exact(self, name: str, values: Any, dtype: Any) -> jax.Array:
        """A float leaf in the dtype of the layout.

        Raises:
          ValueError: the conversion is not exact, or cannot be checked under jit.
        """
        dtype = jnp.dtype(dtype)
        self.refuse_unless(
            not isinstance(values, QTensor),
            f"its {name} is quantized, expected {dtype.name}",
        )
        if values.dtype == dtype:
            return values
        if dtype == jnp.float32:
            return values.astype(dtype)
        self.refuse_unless(
            not is_traced(values),
            f"its {name} is {values.dtype.name} and the layout has {dtype.name}. The "
            "conversion cannot be checked under jit",
        )
        converted = values.astype(dtype)
        same = np.asarray(converted.astype(jnp.float32) == values.astype(jnp.float32))
        self.refuse_unless(
            bool(same.all()),
            f"its {name} is {values.dtype.name}, and {int((~same).sum())} of "
            f"{same.size} numbers are not exact in {dtype.name}",
        )
        return converted

    def array_scale(self, dtype: Any) -> jax.Array:
        """The scale in the dtype of the layout."""
        return self.exact("scale", self.qt.scale, dtype)

    def quantized_scale(self, fmt: str) -> QTensor:
        """The scale, which must be a QTensor of a format."""
        scale = self.qt.scale
        right = isinstance(scale, QTensor) and scale.spec.fmt.name == fmt
        self.refuse_unless(right, f"expected a scale that is quantized to {fmt}")
        assert isinstance(scale, QTensor)
        return scale

    def plain(self) -> None:
        """Raises if there is a zero point or an offset."""
        qt = self.qt
        self.refuse_unless(qt.zero_point is None, "the layout has no zero point")
        self.refuse_unless(qt.offset is None, "the layout has no offset")
