"""array_from_parts: an array on several devices, from the parts of a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding


def array_from_parts(
    shape: tuple[int, ...],
    dtype: Any,
    at: Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    put: Callable[[np.ndarray, Any], jax.Array] = jax.device_put,
) -> jax.Array:
    """Returns an array whose parts are read one after the other.

    Each part of a device of this process is read once, also if several devices have it.
    Parts of other processes are not read.

    Args:
      shape: of the whole array.
      dtype: of the array.
      at: its sharding.
      read: `read(index)` returns the part at an index with a slice for each axis.
      put: `put(part, at)` returns the part on one device.
    """
    parts: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in at.addressable_devices_indices_map(shape).items():
        index = index or ()
        # Slices have no hash before Python 3.12.
        bounds = tuple((axis.start, axis.stop) for axis in index)
        parts.setdefault(bounds, (index, []))[1].append(device)
    arrays = []
    for index, devices in parts.values():
        part = read(index)
        arrays += [
            put(part, SingleDeviceSharding(device, memory_kind=at.memory_kind))
            for device in devices
        ]
    return jax.make_array_from_single_device_arrays(shape, at, arrays, dtype=dtype)
