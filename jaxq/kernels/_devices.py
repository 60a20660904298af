"""Which devices a program is lowered for: their kind and their number."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

# jax calls the platform "cuda" when it lowers a program, and "gpu" when it names the
# backend of this process.
_BACKEND_OF = {"cuda": "gpu"}


def device_kind(platform: str | None) -> str | None:
    """Returns the kind of device that a platform has here, such as "NVIDIA H200".

    If the abstract mesh in use names a device, this is its kind. Otherwise it is the
    kind of this process's first device, if that device is of the given platform.

    Args:
      platform: "cpu", "tpu", "cuda", ..., or None if the platform is not known.

    Returns:
      `jax.Device.device_kind`, or None if the kind is not known.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    if platform is None:
        return None
    if jax.default_backend() != _BACKEND_OF.get(platform, platform):
        return None
    return jax.devices()[0].device_kind


@functools.cache
def num_cores() -> int:
    """Returns the number of CPU cores that this process may use, as XLA:CPU does."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def lowering_devices(ctx: Any, platform: str | None) -> tuple[str | None, int]:
    """Returns the device kind and the number of devices of a program in lowering.

    Args:
      ctx: the lowering context of the primitive.
      platform: the platform that the program is lowered for, or None in the lowering
        rule for all platforms without kernels.

    Returns:
      The kind of device, None if unknown, and the number of devices over which XLA
      partitions the program.
    """
    axis_context = ctx.module_context.axis_context
    num_devices, devices = 1, None
    if hasattr(axis_context, "num_devices"):  # ordinary jit
        num_devices = axis_context.num_devices
        devices = axis_context.device_assignment
    elif hasattr(axis_context, "mesh"):  # inside shard_map
        # XLA still partitions the program along the axes that are not manual.
        mesh = axis_context.mesh
        manual = axis_context.manual_axes | set(getattr(mesh, "manual_axes", ()))
        sizes = [size for name, size in mesh.shape.items() if name not in manual]
        num_devices = math.prod(sizes)
    # The devices may be of another platform: a program for TPU can be lowered on a CPU.
    platform_names = (platform, _BACKEND_OF.get(platform or ""))
    if devices and devices[0].platform in platform_names:
        return devices[0].device_kind, num_devices
    return device_kind(platform), num_devices


def assumed_gpu(
    platform: str | None, avals: Sequence[Any]
) -> contextlib.AbstractContextManager:
    """Returns a context that names a GPU if the lowering of a kernel needs one.

    From jax 0.11 on, Triton's lowering asks which GPU the program is for. If this
    process has no GPU and no mesh names one, the context names an H100.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [aval.sharding.mesh for aval in avals]
    has_device = jax.default_backend() == "gpu" or not all(m.empty for m in meshes)
    if platform != "cuda" or jax.__version_info__ < (0, 11) or has_device:
        return contextlib.nullcontext()
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("_",), (AxisType.Auto,), abstract_device=device)
    )
