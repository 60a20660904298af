"""Cycles of a TPU kernel by its static schedule, on a machine without a TPU: for ranking tiles, not a speed.

libtpu's compiler writes the final schedule of a program: how many instruction bundles one grid step takes. A step can
end no sooner than its bundles are through, nor before the next tile has come from HBM. Stalls and latencies are not in
that number.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Bytes per cycle from HBM, at the clock and bandwidth that the makers state: 819 GB/s at 1.5 GHz, 1640 at 1.75, 3690
# (one core) at 1.9.
HBM_BYTES_PER_CYCLE = {"TPU v5 lite": 546, "TPU v6 lite": 937, "TPU7x": 1942}


class Schedules:
    """The compiler of "v5e:2x2", "v6e:2x2" or "tpu7x:2x2x1"; one in a process, made before jax looks for devices."""

    def __init__(self, topology: str):
        self._dump = Path(tempfile.mkdtemp(prefix="jaxq-schedule-"))
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={self._dump} --xla_jf_dump_llo_text=true"
        )
        jax.config.update("jax_platforms", "cpu")
        device = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        ).devices[0]
        self.device_kind: str = device.device_kind
        self._sharding = SingleDeviceSharding(device)

    def bundles(self, matmul: Any, specs: list) -> int:
        """Of one grid step of the kernel in `matmul(*specs)`.

        Raises:
          Exception: whatever the compiler raises.
        """
        for path in self._dump.iterdir():
            path.unlink()
        jax.jit(
            matmul, in_shardings=self._sharding, out_shardings=self._sharding
        ).lower(*specs).compile()
        found = [0]
        for path in self._dump.glob("*schedule-analysis_final_bundles.txt"):
            text = path.read_text()
            if "tpu_custom_call" in text:
                found += [
                    int(n)
                    for n in re.findall(r"total scheduled bundles:\s*(\d+)", text)
                ]
        return max(found)

    def cycles(
        self, problem: Any, tiles: Mapping[str, Any], bundles: int
    ) -> tuple[int, int]:
        """Of the whole product: with these tiles, and for reading its codes and scales once."""
        p, (bm, bk, bn) = problem, (tiles[name] for name in ("bm", "bk", "bn"))
        per_weight = p.bits / 8 + (0 if p.group == p.k else 2 / p.group)
        rate = HBM_BYTES_PER_CYCLE[self.device_kind]
        steps = p.e * math.ceil(p.m / bm) * math.ceil(p.n / bn) * math.ceil(p.k / bk)
        step = max(bundles, bk * bn * per_weight / rate)
        return round(steps * step), round(p.e * p.k * p.n * per_weight / rate)

    def close(self) -> None:
        shutil.rmtree(self._dump, ignore_errors=True)
