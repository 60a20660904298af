"""kept_slice: some entries of a kept axis of a QTensor, without dequantizing."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxq.qtensor._qtensor import QTensor


def kept_slice(qt: QTensor, axis: int, part: slice) -> QTensor:
    """Some entries of a kept axis. The codes and scales are those of `qt`.

    Args:
      qt: any QTensor.
      axis: the axis of the array, as a negative number. It is neither a contracted axis
        nor a batch axis.
      part: the entries, with a positive step.

    Returns:
      A QTensor with fewer entries along this axis.

    Raises:
      ValueError: the axis is not kept, or the entries are not whole blocks.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((64, 8)), "int4")
      >>> jaxq.qtensor.kept_slice(qt, -1, slice(0, 8, 2)).shape
      (64, 4)
    """
    geometry = qt.meta.geometry
    problem = f"kept_slice: axis {axis} of {qt!r} cannot be cut: "
    if axis not in geometry.kept:
        raise ValueError(f"{problem}its kept axes are {list(geometry.kept)}.")
    if geometry.flat:
        raise ValueError(f"{problem}its blocks cross rows.")
    entries = range(geometry.shape[axis])[part]
    position = geometry.kept.index(axis)
    block = geometry.block_shape[position]
    blocks = slice(None)  # one block covers the axis
    if block is not None:
        if not _is_whole(entries, block, geometry.shape[axis]):
            raise ValueError(f"{problem}the entries are not whole blocks of {block}.")
        num_blocks = -(-entries.stop // block)  # the last block may be short
        blocks = slice(entries.start // block, num_blocks, entries.step)
    shape = list(geometry.shape)
    shape[axis] = len(entries)
    meta = qt.meta.with_geometry(dataclasses.replace(geometry, shape=tuple(shape)))
    num_batch = len(qt.batch_shape)

    def cut(leaf: Any) -> Any:
        """The entries of these blocks, of an array with an entry for each block."""
        if leaf is None or leaf.shape[num_batch + position] == 1:
            return leaf
        return leaf[(slice(None),) * (num_batch + position) + (blocks,)]

    scale = qt.scale
    if not isinstance(scale, QTensor):
        scale = cut(scale)
    elif block is not None:
        scale = kept_slice(scale, position - len(geometry.block_shape), blocks)
    data_axis = num_batch + position + (qt.meta.layout == "columns")
    return dataclasses.replace(
        qt,
        data=qt.data[(slice(None),) * data_axis + (part,)],
        scale=scale,
        zero_point=cut(qt.zero_point),
        offset=cut(qt.offset),
        codebook=cut(qt.codebook),
        meta=meta,
    )


def _is_whole(entries: range, block: int, size: int) -> bool:
    """Whether entries of an axis are whole blocks. The axis may end in a short one."""
    if block == 1:
        return True
    ends_whole = entries.stop % block == 0 or entries.stop == size
    return entries.step == 1 and entries.start % block == 0 and ends_whole
