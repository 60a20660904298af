"""relayout: the order of the codes of a QTensor in memory."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.qtensor._meta import LAYOUTS
from jaxq.qtensor._qtensor import QTensor


def relayout(qt: QTensor, target: formats.Packing | str) -> QTensor:
    """Stores the codes of a QTensor in another order; its values do not change.

    Args:
      qt: any QTensor.
      target: the new order of codes in bytes, or the new order of axes.
        A `jaxq.formats.Packing` or its value, for example "low_first", changes the
        order of codes in bytes. NONE stores one code in each byte.
        "rows" stores `[*batch, *kept, k]`, the order that `quantize` stores. All
        kernels read it. "columns" stores `[*batch, k, *kept]`, which only the TPU
        kernel reads, in less time than rows.

    Raises:
      TypeError: `qt` is not a QTensor.
      ValueError: the target is unknown; the packing does not exist for codes of this
        width; the target is "columns" and blocks cross rows (`PerFlat`); or the packing
        needs more blocks and the scales are quantized.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.eye(64), "int4")
      >>> jaxq.relayout(qt, "columns").data.shape
      (32, 64)
    """
    if not isinstance(qt, QTensor):
        raise TypeError(
            f"relayout: expected a QTensor, got {type(qt).__name__}. Pass the result "
            "of jaxq.quantize, or quantize() of a TrainedWeight."
        )
    if target in LAYOUTS:
        return _with_layout(qt, cast(Literal["rows", "columns"], target))
    if isinstance(target, str):
        names = [packing.value for packing in formats.Packing]
        formats.check_choice("relayout: target", target, [*names, *LAYOUTS])
    rows = _with_layout(qt, "rows")
    packed = _with_packing(rows, formats.Packing(target))
    return _with_layout(packed, qt.meta.layout)


def _with_layout(qt: QTensor, layout: Literal["rows", "columns"]) -> QTensor:
    if layout == qt.meta.layout:
        return qt
    if qt.meta.geometry.flat:
        raise ValueError(
            f"relayout: the blocks of {qt!r} cross rows, so 'columns' is not possible. "
            "Quantize with a granularity other than PerFlat."
        )
    first = len(qt.batch_shape)
    source, destination = (-1, first) if layout == "columns" else (first, -1)
    data = jnp.moveaxis(qt.data, source, destination)
    return dataclasses.replace(qt.with_meta(layout=layout), data=data)


def without_padding(qt: QTensor) -> QTensor:
    """The QTensor without the codes that pad its last blocks; its values do not change.

    Files of earlier versions hold codes for the padding of blocks. Such codes are not
    stored any more.

    Args:
      qt: a QTensor with the layout "rows". If the shape of its data is not that of
        padded codes, it is returned as it is.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jaxq
      >>> spec = jaxq.QuantSpec("int8", jaxq.PerGroup(4, pad=True))
      >>> qt = jaxq.quantize(jnp.ones((6, 1)), spec)
      >>> old = dataclasses.replace(qt, data=jnp.pad(qt.data, ((0, 0), (0, 2))))
      >>> jaxq.qtensor.without_padding(old).data.shape
      (1, 6)
    """
    meta, padded = qt.meta, qt.meta.geometry.padded_shape
    fmt, is_packed = qt.spec.fmt, meta.packing is not formats.Packing.NONE
    row = padded[-1] * fmt.bits // 8 if is_packed else padded[-1]
    padded_shape = (*padded[:-1], row)
    num_batch = qt.data.ndim - len(padded_shape)
    is_padded = tuple(qt.data.shape[num_batch:]) == padded_shape
    if not is_padded or padded_shape == meta.stored_shape or num_batch < 0:
        return qt
    codes = formats.unpack(qt.data, fmt.bits, meta.packing, unit=meta.pack_unit)
    return qt.with_stored_codes(codes)


# Compiled as a whole: outside jit, many small programs take longer to compile and run.
@functools.partial(jax.jit, static_argnames="packing", inline=True)
def _with_packing(qt: QTensor, packing: formats.Packing) -> QTensor:
    bits = qt.spec.fmt.bits
    geometry = qt.meta.geometry
    # Whole blocks of a row fill whole bytes in the first packing. Another packing may
    # need more blocks for that.
    multiple = math.lcm(geometry.multiple, formats.codes_per_pack(bits, packing))
    wider = dataclasses.replace(geometry, multiple=multiple)
    changed = qt.with_meta(packing=packing)
    if wider != geometry:
        changed = dataclasses.replace(changed, meta=changed.meta.with_geometry(wider))
    codes = _pad_axis(qt.stored_codes(), wider.padded_shape[-1], qt.spec.fmt.zero_code)
    changed = changed.with_stored_codes(codes)

    num_blocks = wider.num_blocks[-1]
    added = num_blocks - geometry.num_blocks[-1]
    if added == 0:
        return changed
    if isinstance(qt.scale, QTensor):
        raise ValueError(
            f"relayout: {packing.value!r} needs {added} more blocks to fill whole "
            f"bytes of {qt!r}, and quantized scales cannot grow. Quantize with "
            f"packing={packing.value!r}."
        )
    scale = _pad_axis(qt.scale, num_blocks)
    zero_point, offset, codebook = qt.zero_point, qt.offset, qt.codebook
    if zero_point is not None:
        zero_point = _pad_axis(zero_point, num_blocks)
    if offset is not None and qt.spec.offset == "min":
        offset = _pad_axis(offset, num_blocks)
    if codebook is not None:
        codebook = _pad_axis(codebook, num_blocks, axis=-2)
    return dataclasses.replace(
        changed, scale=scale, zero_point=zero_point, offset=offset, codebook=codebook
    )


def _pad_axis(leaf: jax.Array, size: int, value: int = 0, axis: int = -1) -> jax.Array:
    """Pads one axis at its end to `size`."""
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, size - leaf.shape[axis])
    return jnp.pad(leaf, widths, constant_values=np.asarray(value, leaf.dtype))
