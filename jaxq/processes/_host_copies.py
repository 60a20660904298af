"""HostCopies: whole arrays in the host memory of one process.

An array is sent part by part, and a part in blocks. So no device ever holds a whole
array that is sharded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.processes._arrays import spans_processes

# Bytes of a block. Few sizes need few programs.
_BLOCK_SIZES = tuple(1 << power for power in range(12, 25, 2))
_Bounds = tuple[tuple[int, int], ...]


class HostCopies:
    """Copies arrays to the host memory of one process.

    Args:
      devices: the devices of all arrays. All of their processes call `copy` for the
        same arrays in the same order.
      process: the process that gets the arrays.
    """

    def __init__(self, devices: Iterable[Any], process: int):
        self._devices = sorted(devices, key=lambda device: device.id)
        self._process = process
        self._is_mine = process == jax.process_index()
        # Blocks of zeros by size, for the devices that send nothing.
        self._zeros: dict[int, jax.Array] = {}

    def copy(self, x: jax.Array) -> np.ndarray | None:
        """The numbers of an array. None in the other processes.

        Raises:
          MemoryError: the host cannot hold the array. The parts were sent anyway, so
            the other processes do not wait.
        """
        if not spans_processes(x):
            return np.asarray(x) if self._is_mine else None
        shards = {_bounds(s.index, x.shape): s.data for s in x.addressable_shards}
        whole, error = None, None
        if self._is_mine:
            try:
                whole = _whole(x.shape, x.dtype)
            except MemoryError as problem:
                error = problem
        for bounds, device in self._holders(x).items():
            part = None
            if device.process_index == jax.process_index():
                part = np.asarray(shards[bounds])
            if device.process_index != self._process:
                shape = tuple(stop - start for start, stop in bounds)
                part = self._send(part, shape, x.dtype, device)
            if whole is not None:
                whole[tuple(slice(*bound) for bound in bounds)] = part
        if error is not None:
            raise error
        return whole

    def _holders(self, x: jax.Array) -> dict[_Bounds, Any]:
        """For each part of an array, the device from which it is copied.

        Every process gets the same devices in the same order.
        """
        holders: dict[_Bounds, Any] = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            bounds = _bounds(index, x.shape)
            holder = holders.setdefault(bounds, device)
            if self._priority(device) < self._priority(holder):
                holders[bounds] = device
        return holders

    def _priority(self, device: Any) -> tuple[bool, int]:
        """Devices of the process that gets the arrays come first."""
        return device.process_index != self._process, device.id

    def _send(
        self, part: np.ndarray | None, shape: tuple[int, ...], dtype: Any, source: Any
    ) -> np.ndarray | None:
        """Sends a part, and returns it in the process that gets it.

        Args:
          part: the numbers in the process of `source`, and None in all others.
          shape: of the part.
          dtype: of the part.
          source: the device from which it is sent.
        """
        data = None
        if part is not None:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        num_bytes = math.prod(shape) * dtype.itemsize
        copy = np.empty(num_bytes, np.uint8) if self._is_mine else None
        start = 0
        while start < num_bytes:
            rest = num_bytes - start
            sizes = [size for size in _BLOCK_SIZES if size <= rest]
            size = max(sizes, default=_BLOCK_SIZES[0])
            block = None if data is None else data[start : start + size]
            block = self._send_block(block, size, source)
            if copy is not None and block is not None:
                copy[start : start + size] = block[:rest]
            start += size
        return None if copy is None else copy.view(dtype).reshape(shape)

    def _send_block(
        self, block: np.ndarray | None, size: int, source: Any
    ) -> np.ndarray | None:
        """Sends a block of bytes. All other devices take part with zeros."""
        mesh = Mesh(np.array(self._devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))
        shape = (mesh.size, size // 4)
        if size not in self._zeros:
            zeros = np.zeros((1, size // 4), np.uint32)
            self._zeros[size] = jax.make_array_from_callback(
                shape, sharding, lambda _: zeros
            )
        rows = {s.device: s.data for s in self._zeros[size].addressable_shards}
        if block is not None:
            padded = np.zeros(size, np.uint8)
            padded[: block.size] = block
            rows[source] = jax.device_put(padded.view(np.uint32)[None], source)
        x = jax.make_array_from_single_device_arrays(
            shape, sharding, list(rows.values())
        )
        target = next(d for d in self._devices if d.process_index == self._process)
        places = self._devices.index(source), self._devices.index(target)
        with jax.set_mesh(mesh):  # instead of the mesh of the caller
            y = _sender(mesh, *places)(x)
        # The next block waits, so a device holds one block at a time.
        y.block_until_ready()
        if not self._is_mine:
            return None
        [row] = [s.data for s in y.addressable_shards if s.device == target]
        return np.asarray(row).reshape(-1).view(np.uint8)


@functools.lru_cache(maxsize=256)
def _sender(mesh: Mesh, source: int, target: int) -> Any:
    """A program that sends the row of one device to another device."""

    def send(row: jax.Array) -> jax.Array:
        return jax.lax.ppermute(row, "devices", [(source, target)])

    spec = PartitionSpec("devices")
    return jax.jit(jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec))


def _whole(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The memory for a whole array."""
    return np.empty(shape, dtype)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
    """Start and stop of a part along each axis."""
    sizes = shape[: len(index)]
    return tuple(
        axis.indices(size)[:2] for axis, size in zip(index, sizes, strict=True)
    )
