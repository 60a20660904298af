"""The tile sizes of a kernel, from a table by device or from the kernel's rule.

`tiles.json` holds the table, which `benchmarks/tune.py` fills. An entry has the keys
`{kernel, device, codes, x, group, layout, m, k, n, tiles, source}`. m is a power of
two: the largest number of rows of x that the entry is for. If k and n are missing, the
entry is for all k and n. `source` says how the tiles were found. "measured" means on
the device. "schedule" means by the compiler's static schedule. No entry is measured
yet. A problem without an entry gets the tiles of its kernel's `default_tiles`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from jaxq.kernels._problem import Problem
from jaxq.kernels._registry import kernel_module

_SMALLEST_BUCKET = 16
_LARGEST_BUCKET = 2048


def lookup(name: str, device: str | None, problem: Problem) -> Mapping[str, Any]:
    """Returns the tiles of kernel `name` for a problem, from the table or the rule.

    Args:
      name: name of the kernel.
      device: `jax.Device.device_kind`, or None if unknown.
      problem: the product. The kernel must be able to compute it.
    """
    return _lookup(name, device, problem)[0]


def source(name: str, device: str | None, problem: Problem) -> str:
    """Returns the source of `lookup`'s tiles: "measured", "schedule" or "rule"."""
    return _lookup(name, device, problem)[1]


@functools.cache
def table() -> list[dict[str, Any]]:
    """Returns every entry of `tiles.json`."""
    path = importlib.resources.files("jaxq.kernels").joinpath("tiles.json")
    return json.loads(path.read_text())


def bucket(m: int) -> int:
    """Returns the table's m for m rows of x: the next power of two, 16 to 2048."""
    power_of_two = 1 << max(m - 1, 0).bit_length()
    return min(max(_SMALLEST_BUCKET, power_of_two), _LARGEST_BUCKET)


@functools.cache
def _lookup(
    name: str, device: str | None, problem: Problem
) -> tuple[Mapping[str, Any], str]:
    facts = {
        "kernel": name,
        "device": device,
        "codes": problem.codes,
        "x": problem.x_codes or problem.x_dtype,
        "group": problem.group,
        "layout": problem.layout,
        "m": bucket(problem.m),
    }
    entries = [entry for entry in table() if facts.items() <= entry.items()]
    # An entry for exactly these sizes comes before an entry for all sizes.
    for sizes in ((problem.k, problem.n), (None, None)):
        for entry in entries:
            if (entry.get("k"), entry.get("n")) == sizes:
                return entry["tiles"], entry["source"]
    return kernel_module(name).default_tiles(problem, device), "rule"
