"""The devices that a program is lowered for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxq.kernels import _tiles


def device_of(ctx, platform: str | None) -> tuple[str | None, int]:
    """The kind of device a program is lowered for, if known, and how many of them XLA partitions it over."""
    context = ctx.module_context.axis_context
    num_devices, devices = 1, None
    if hasattr(context, "num_devices"):  # ordinary jit
        num_devices, devices = context.num_devices, context.device_assignment
    elif hasattr(
        context, "mesh"
    ):  # inside shard_map; axes that are not manual are still XLA's
        manual = context.manual_axes | set(getattr(context.mesh, "manual_axes", ()))
        num_devices = math.prod(
            size for name, size in context.mesh.shape.items() if name not in manual
        )
    if devices and devices[0].platform in (
        platform,
        {"cuda": "gpu"}.get(platform or ""),
    ):  # not lowered for another
        return devices[0].device_kind, num_devices
    return _tiles.device_kind(platform), num_devices


def some_device(
    platform: str | None, avals: Sequence[Any]
) -> contextlib.AbstractContextManager:
    """From jax 0.11 on Triton's lowering wants to know a GPU: any will do where there is none and none is named."""
    meshes = [jax.sharding.get_abstract_mesh(), *(a.sharding.mesh for a in avals)]
    known = jax.default_backend() == "gpu" or not all(mesh.empty for mesh in meshes)
    if platform != "cuda" or jax.__version_info__ < (0, 11) or known:
        return contextlib.nullcontext()
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("_",), (AxisType.Auto,), abstract_device=device)
    )
