"""fit_to_shards: the same values, stored so that no shard cuts a group or a byte.

A group of g codes is stored as several groups with the same scale. This is exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxq import formats
from jaxq.qtensor import (
    PerBlock,
    PerGroup,
    QTensor,
    find_cuts,
    num_shards,
    relayout,
    scale_values,
    sharded_storage,
    storage_axes,
)
from jaxq.sharding._checks import check_spec, cut_message, mesh_of, problems_of
from jaxq.sharding._entries import single_entry


def fit_to_shards(qt: QTensor, spec: PartitionSpec, *, mesh: Any = None) -> QTensor:
    """Returns a QTensor of the same values that can be sharded by `spec`.

    It changes only what a shard would cut:

    - A group becomes several smaller groups with the same scale. Each small group costs
      the bits of a scale.
    - If HALVES packs a whole row as one unit, its codes are packed by LOW_FIRST.
    - Quantized scales become float32 scales if another packing of them is not enough.

    `specs`, `place` and products accept the result.

    Args:
      qt: a QTensor.
      spec: the mesh axes of each axis of the array.
      mesh: as in `specs`.

    Returns:
      A QTensor whose `dequantize` is bit for bit that of `qt`. `qt` itself if no shard
      cuts anything.

    Raises:
      ValueError: the number of shards does not divide an axis; the codes of a shard
        would not fill whole bytes; or several axes are stored as one, and an axis other
        than the first is sharded. The error says which numbers of shards work.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.AbstractMesh((4,), ("t",))
      >>> qt = jaxq.quantize(jnp.ones((256, 64)), "int4")  # groups of 128
      >>> qt = jaxq.sharding.fit_to_shards(qt, P("t", None), mesh=mesh)
      >>> qt.spec.granularity.size, qt.scale.shape
      (64, (64, 4))
    """
    entry = single_entry(qt, spec, "fit_to_shards")
    if not isinstance(qt, QTensor):
        raise TypeError(
            f"fit_to_shards: expected a QTensor, got {type(qt).__name__}. An array has "
            "no groups."
        )
    mesh = mesh_of([entry], mesh)
    check_spec(entry, spec, mesh, "fit_to_shards")
    qt = fitted(qt, spec, mesh)
    problems = problems_of(entry._replace(value=qt), spec, mesh)
    if problems:
        raise ValueError(cut_message(problems, "fit_to_shards"))
    return qt


def fitted(qt: QTensor, spec: PartitionSpec, mesh: Any) -> QTensor:
    """The QTensor in smaller groups. Shards may still cut it; `specs` finds out."""
    cuts = find_cuts(qt, spec, mesh)
    if any(cut.level for cut in cuts):
        qt = _with_fitted_scale(qt, spec, mesh)
    if not any(cut.level == 0 for cut in cuts):
        return qt
    entries = sharded_storage(qt, spec)
    blocks = []
    for axis, entry in zip(storage_axes(qt.meta), entries, strict=True):
        shards = num_shards(mesh, entry)
        part, remainder = divmod(math.prod(axis.sizes), shards)
        if axis.is_one_unit and shards > 1:
            qt = relayout(qt, formats.Packing.LOW_FIRST)
        block = axis.block
        if block is not None and not remainder:
            block = math.gcd(block, part)
        blocks.append(block)
    if tuple(blocks) == qt.meta.geometry.block_shape:
        return qt
    return _with_blocks(_with_float_scale(qt), tuple(blocks))


def _with_fitted_scale(qt: QTensor, spec: PartitionSpec, mesh: Any) -> QTensor:
    """The QTensor with its quantized scales in another packing, or as float32."""
    assert isinstance(qt.scale, QTensor)
    if any(axis.is_one_unit for axis in storage_axes(qt.scale.meta)):
        scale = relayout(qt.scale, formats.Packing.LOW_FIRST)
        changed = dataclasses.replace(qt, scale=scale)
        if not any(cut.level for cut in find_cuts(changed, spec, mesh)):
            return changed
    return _with_float_scale(qt)


def _with_float_scale(qt: QTensor) -> QTensor:
    """The QTensor with float32 scales in place of quantized scales."""
    if not isinstance(qt.scale, QTensor):
        return qt
    changed = qt.with_meta(spec=qt.spec.replace(scale="float32"))
    return dataclasses.replace(changed, scale=scale_values(qt))


def _with_blocks(qt: QTensor, block_shape: tuple[int | None, ...]) -> QTensor:
    """The QTensor with smaller blocks. Each has the scale of its former block."""
    old = qt.meta.geometry
    codes = qt.stored_codes()
    new = dataclasses.replace(old, block_shape=block_shape)
    num_batch = len(qt.batch_shape)

    def repeated(leaf: Any) -> Any:
        if leaf is None:
            return None
        for i, (before, after) in enumerate(
            zip(old.block_shape, block_shape, strict=True)
        ):
            if before == after or before is None or after is None:
                continue
            source = np.arange(new.num_blocks[i]) * after // before
            leaf = jnp.take(leaf, source, axis=num_batch + i)
        return leaf

    spec = qt.spec.replace(granularity=_granularity(qt, new.block_shape))
    offset = qt.offset if qt.spec.offset == "mean" else repeated(qt.offset)
    changed = dataclasses.replace(
        qt,
        scale=repeated(qt.scale),
        zero_point=repeated(qt.zero_point),
        offset=offset,
        codebook=repeated(qt.codebook),
        meta=dataclasses.replace(qt.meta.with_geometry(new), spec=spec),
    )
    # HALVES packs each group as a unit. The groups are new, so codes are packed again.
    return changed.with_stored_codes(codes)


def _granularity(qt: QTensor, block_shape: tuple[int | None, ...]) -> Any:
    """The granularity that describes the smaller blocks."""
    granularity = qt.spec.granularity
    if isinstance(granularity, PerBlock):
        geometry = qt.meta.geometry
        by_axis = dict(zip(geometry.order, block_shape, strict=True))
        num_tiled = len(granularity.shape)
        sizes = [
            by_axis[axis] or tile
            for axis, tile in zip(range(-num_tiled, 0), granularity.shape, strict=True)
        ]
        return dataclasses.replace(granularity, shape=tuple(sizes))
    assert block_shape[-1] is not None
    if isinstance(granularity, PerGroup):
        return dataclasses.replace(granularity, size=block_shape[-1], pad=True)
    return dataclasses.replace(granularity, size=block_shape[-1])
