"""Arrays of several processes: to the host of each, and to all devices."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


def to_numpy(x: Any) -> np.ndarray:
    """Returns the numbers of an array, also if other processes hold parts of it.

    The parts are then gathered in every process.

    Args:
      x: an array, or anything that `numpy.asarray` accepts.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.processes import to_numpy
      >>> to_numpy(jnp.ones(2))
      array([1., 1.], dtype=float32)
    """
    if has_remote_parts(x):
        x = jax.device_put(x, _on_every_device(x.sharding))
    return np.asarray(x)


def has_remote_parts(x: Any) -> bool:
    """True if other processes hold parts of an array that this process does not."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return False
    return not x.is_fully_addressable and not x.is_fully_replicated


def spans_processes(x: Any) -> bool:
    """True if the devices of an array belong to several processes.

    All processes get the same answer, unlike that of `has_remote_parts`.
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return False
    return len({device.process_index for device in x.sharding.device_set}) > 1


def put(x: Any, sharding: Sharding, *, compares: bool = True) -> jax.Array:
    """Puts an array on the devices of a sharding, also on those of other processes.

    If the devices are those of several processes, the array is either on them already,
    or every process holds the whole array. In the second case no numbers are sent
    between processes, only checksums.

    Args:
      x: an array.
      sharding: where its parts belong.
      compares: False if it is known that the processes hold the same array. Then
        nothing is sent, and no process waits for another one.

    Raises:
      ValueError: the processes hold different arrays.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # device_put does not put keys on the devices of other processes.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding, compares=compares)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    numbers = np.asarray(x)
    if compares:
        _check_same(numbers, sharding)
    return jax.make_array_from_callback(
        numbers.shape, sharding, lambda index: numbers[index]
    )


def _on_every_device(sharding: Sharding) -> NamedSharding:
    """The whole array on each device of a sharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())


def _check_same(numbers: np.ndarray, sharding: Sharding) -> None:
    """Raises ValueError if the processes hold different arrays."""
    owners = {device.process_index for device in sharding.device_set}
    if len(owners) < jax.process_count():
        return  # the other processes do not make this call
    data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data
    checksum = np.uint32(zlib.crc32(data))
    checksums = multihost_utils.process_allgather(checksum)
    if (checksums != checksum).any():
        shown = f"{numbers.dtype.name}{list(numbers.shape)}"
        raise ValueError(
            f"The processes hold different numbers of an array {shown}, which is to be "
            "sharded over them. Every process must hold the same whole array: use the "
            "same seeds and files. To make an array of the parts that the processes "
            "hold, use jax.make_array_from_process_local_data."
        )
