"""Arrays in programs that run in several processes.

With `jax.distributed`, each process holds only its own part of an array that is sharded
over all devices. So `numpy.asarray` of such an array raises an error, and an array that
one process holds alone cannot be put on the devices of all processes by
`jax.device_put`. The functions here do both. In one process they are `numpy.asarray`
and `jax.device_put`.

Every process runs the same program. So all of them call these functions in the same
order, as they do with every computation on a sharded array.
"""

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


def put(x: Any, sharding: Sharding) -> jax.Array:
    """Puts an array on the devices of a sharding, also on those of other processes.

    If the devices are those of several processes, the array is either on them already,
    or every process holds the whole array. In the second case no numbers are sent
    between processes, only checksums.

    Args:
      x: an array.
      sharding: where its parts belong.

    Raises:
      ValueError: the processes hold different arrays.
    """
    is_local = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not is_local:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    numbers = np.asarray(x)
    _check_same(numbers, sharding)
    return jax.make_array_from_callback(
        numbers.shape, sharding, lambda index: numbers[index]
    )


def first_owner(x: jax.Array) -> int:
    """The first process that holds a part of an array."""
    return min(device.process_index for device in x.sharding.device_set)


def is_true_everywhere(condition: bool, x: jax.Array) -> bool:
    """True if a condition is true in every process that holds a part of an array.

    Waits until each of them has made the call.
    """
    mesh = Mesh(_devices_of(x.sharding), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    conditions = jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.array([condition])
    )
    with jax.set_mesh(mesh):  # instead of the mesh of the caller
        return bool(jnp.all(conditions))


def _on_every_device(sharding: Sharding) -> NamedSharding:
    """The whole array on each device of a sharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return NamedSharding(Mesh(_devices_of(sharding), ("devices",)), PartitionSpec())


def _devices_of(sharding: Sharding) -> np.ndarray:
    return np.array(sorted(sharding.device_set, key=lambda device: device.id))


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
