"""What computes a problem on a platform: the choice of a kernel, and a plan with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxq import kernels
from jaxq.kernels import known_platform as named_platform
from jaxq.ops._plan import Plan


def known_platform(platform: str | None, caller: str) -> str:
    """The platform as jax names it when it lowers a program. None is the default."""
    if platform is None:
        platform = jax.default_backend()
        return "cuda" if platform == "gpu" else platform
    return named_platform(platform, caller)


def num_devices_of(*operands: Any) -> int:
    """The largest number of devices over which one operand is sharded."""
    num_devices = 1
    for leaf in jax.tree.leaves(list(operands)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):  # perhaps of an `AbstractMesh`
            num_devices = max(num_devices, sharding.mesh.size)
        else:
            devices = getattr(sharding, "device_set", ())
            num_devices = max(num_devices, len(devices))
    return num_devices


def choose_on(
    platform: str,
    problem: Any,
    num_devices: int,
    family: kernels.Family = "product",
) -> kernels.Choice:
    """The kernel for a problem on the devices that this process or a mesh names."""
    has_kernels = platform in kernels.PLATFORMS
    device_kind = kernels.device_kind(platform) if has_kernels else None
    return kernels.choose_kernel(
        problem, platform, device_kind, num_devices, family=family
    )


def with_choice(plan: Plan, choice: kernels.Choice, platform: str) -> Plan:
    """The plan with what computes its product on a platform."""
    return dataclasses.replace(
        plan,
        kernel=choice.backend,
        why_no_kernel=choice.reason,
        passed_over=choice.passed_over,
        platform=platform,
    )
