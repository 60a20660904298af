"""read_shards: an array on several devices, of which a process reads its own shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

Index = tuple[slice, ...]
# `read(indices)` returns the place in `indices` and the numbers of each shard.
Read = Callable[[Sequence[Index]], Iterable[tuple[int, np.ndarray]]]


def read_shards(
    shape: tuple[int, ...],
    dtype: Any,
    at: Sharding,
    read: Read,
    put: Callable[[np.ndarray, Any], jax.Array] = jax.device_put,
) -> jax.Array:
    """Returns an array whose shards are put on their devices as they are read.

    A shard is read once, also if several devices have it. The shards of other processes
    are not read.

    Args:
      shape: of the whole array.
      dtype: of the array.
      at: its sharding.
      read: gets the index of each shard of this process, with a slice for each axis.
      put: `put(shard, at)` returns the shard on one device.
    """
    devices_of: dict[tuple, list[Any]] = {}
    indices = []
    for device, index in at.addressable_devices_indices_map(shape).items():
        index = index or ()
        # Slices have no hash before Python 3.12.
        bounds = tuple((axis.start, axis.stop) for axis in index)
        if bounds not in devices_of:
            indices.append(index)
        devices_of.setdefault(bounds, []).append(device)
    devices = list(devices_of.values())
    arrays = []
    for place, shard in read(indices):
        arrays += [
            put(shard, SingleDeviceSharding(device, memory_kind=at.memory_kind))
            for device in devices[place]
        ]
    return jax.make_array_from_single_device_arrays(shape, at, arrays, dtype=dtype)
