"""Which tiles a kernel runs with: a table by device, filled by a tuner, and each kernel's own rule where it is silent.

`tiles.json` holds entries `{kernel, device, codes, x, group, m, k, n, tiles, source}`. m is the largest number of rows
an entry is for, a power of two; k and n may be missing. `source` says where the tiles are from: "measured" on that
device, or "schedule", ranked by the compiler's static schedule.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from jaxq.kernels._problem import Problem

LARGEST_BUCKET = 2048


def kernel(name: str) -> ModuleType:
    """The module of a kernel; Pallas is imported by the first."""
    return importlib.import_module(f"jaxq.kernels._{name}")


def device_kind(platform: str | None) -> str | None:
    """The kind of device of this platform that is here, or that an abstract mesh in use names; None if unknown."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    if platform is None or jax.default_backend() != {"cuda": "gpu"}.get(
        platform, platform
    ):
        return None
    return jax.devices()[0].device_kind


def lookup(name: str, device: str | None, problem: Problem) -> Mapping[str, Any]:
    """Tiles of kernel `name` for a problem: of the table, or by the kernel's rule."""
    return _lookup(name, device, problem)[0]


def source(name: str, device: str | None, problem: Problem) -> str:
    """Where those tiles are from: "measured", "schedule" or "rule"."""
    return _lookup(name, device, problem)[1]


@functools.cache
def _lookup(
    name: str, device: str | None, problem: Problem
) -> tuple[Mapping[str, Any], str]:
    key = (
        name,
        device,
        problem.codes,
        problem.x_dtype,
        problem.group,
        bucket(problem.m),
    )
    found = [
        e
        for e in table()
        if (e["kernel"], e["device"], e["codes"], e["x"], e["group"], e["m"]) == key
    ]
    for sizes in ((problem.k, problem.n), (None, None)):
        for entry in found:
            if (entry.get("k"), entry.get("n")) == sizes:
                return entry["tiles"], entry["source"]
    return kernel(name).default_tiles(problem, device), "rule"


@functools.cache
def table() -> list[dict[str, Any]]:
    """Every entry of `tiles.json`."""
    return json.loads(
        importlib.resources.files("jaxq.kernels").joinpath("tiles.json").read_text()
    )


def bucket(m: int) -> int:
    """Rows of x as the table counts them: the next power of two, from 16 to 2048."""
    return min(max(16, 1 << max(m - 1, 0).bit_length()), LARGEST_BUCKET)
