"""The geometry of a QTensor inside `jax.shard_map`, where a device sees its part.

`shard_map` cuts each leaf, and knows nothing of the geometry. So the geometry of the
part is derived from the shape of its codes, and compared with that of its scales.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxq import formats
from jaxq.qtensor._geometry import Geometry
from jaxq.qtensor._meta import Meta
from jaxq.qtensor._storage_axes import storage_axes


def meta_of_part(meta: Meta, data: Any, scale: Any) -> Meta:
    """The meta of a device's part of a QTensor; `meta` itself outside `shard_map`.

    It is also `meta` itself if the leaves are whole, or are no part that can be
    computed with. In the last case, a use of the QTensor raises an error.

    Args:
      meta: the meta of the whole QTensor.
      data: its `data` on this device.
      scale: its `scale` on this device: an array, or a QTensor with the meta of a part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return meta
    shape = getattr(data, "shape", None)
    if not isinstance(shape, tuple):
        return meta  # a tree of other values, such as specs
    num_batch = len(shape) - len(meta.stored_shape)
    if num_batch < 0 or shape[num_batch:] == meta.stored_shape:
        return meta
    mesh_sizes = [mesh.shape[name] for name in mesh.manual_axes]
    geometry = _geometry_of_part(meta, shape[num_batch:], mesh_sizes)
    if geometry is None:
        return meta
    scale_shape = tuple(getattr(scale, "shape", ()))
    if scale_shape != (*shape[:num_batch], *geometry.num_blocks):
        return meta
    return dataclasses.replace(meta, geometry=geometry, whole=meta.geometry)


def _geometry_of_part(
    meta: Meta, stored_shape: Sequence[int], mesh_sizes: Sequence[int]
) -> Geometry | None:
    """The geometry of a part whose codes have the shape `stored_shape`.

    None if the part would cut a group or a byte, or if the number of parts along an
    axis is not a product of sizes of manual mesh axes.
    """
    geometry, bits = meta.geometry, meta.spec.fmt.bits
    *rows, last = stored_shape
    if meta.layout == "columns":
        last, *rows = stored_shape
    if meta.packing is not formats.Packing.NONE:
        if last * 8 % bits:
            return None
        last = last * 8 // bits
    possible = {
        math.prod(sizes)
        for count in range(len(mesh_sizes) + 1)
        for sizes in itertools.combinations(mesh_sizes, count)
    }
    sizes = list(geometry.shape)
    for axis, stored, size in zip(
        storage_axes(meta), meta.stored_sizes, (*rows, last), strict=True
    ):
        if size == stored:
            continue
        whole = math.prod(axis.sizes)
        if size == 0 or whole % size:
            return None
        shards = whole // size
        if shards not in possible or axis.why_cut(shards):
            return None
        sizes[axis.axes[axis.first]] //= shards
    return dataclasses.replace(geometry, shape=tuple(sizes))
