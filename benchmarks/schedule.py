"""Cycles of a TPU kernel by its static schedule, on a machine without a TPU.

The numbers rank tiles. They are not a measured speed. libtpu's compiler writes the
final schedule of a program: how many instruction bundles one grid step takes. A step
takes at least as long as its bundles, and at least as long as the next tile needs from
HBM. Stalls and latencies are not part of the number.
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

# Bytes per cycle from HBM, from the clock and the bandwidth that the maker states: 819
# GB/s at 1.5 GHz, 1640 GB/s at 1.75 GHz, 3690 GB/s (one core) at 1.9 GHz.
HBM_BYTES_PER_CYCLE = {"TPU v5 lite": 546, "TPU v6 lite": 937, "TPU7x": 1942}


class Schedules:
    """The compiler of a TPU topology: "v5e:2x2", "v6e:2x2" or "tpu7x:2x2x1".

    A process can have only one, made before jax looks for devices.
    """

    def __init__(self, topology: str):
        self._dump = Path(tempfile.mkdtemp(prefix="jaxq-schedule-"))
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={self._dump} --xla_jf_dump_llo_text=true"
        )
        jax.config.update("jax_platforms", "cpu")
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
        device = description.devices[0]
        self.device_kind: str = device.device_kind
        self._sharding = SingleDeviceSharding(device)

    def bundles(self, matmul: Any, specs: list) -> int:
        """Returns the bundles of one grid step of the kernel in `matmul(*specs)`.

        Raises:
          Exception: The compiler raises it, for example if the tiles are too large.
        """
        for path in self._dump.iterdir():
            path.unlink()
        compiled = jax.jit(
            matmul, in_shardings=self._sharding, out_shardings=self._sharding
        )
        compiled.lower(*specs).compile()
        counts = [0]
        for path in self._dump.glob("*schedule-analysis_final_bundles.txt"):
            text = path.read_text()
            if "tpu_custom_call" in text:
                numbers = re.findall(r"total scheduled bundles:\s*(\d+)", text)
                counts += [int(number) for number in numbers]
        return max(counts)

    def cycles(
        self, problem: Any, tiles: Mapping[str, Any], bundles: int
    ) -> tuple[int, int]:
        """Returns the cycles of a whole product, and those of reading its weight.

        Args:
          problem: the product.
          tiles: "bm", "bk" and "bn".
          bundles: bundles of one grid step with these tiles.

        Returns:
          The cycles with these tiles, and the cycles that HBM needs to deliver codes
          and scales once.
        """
        p, (bm, bk, bn) = problem, (tiles[name] for name in ("bm", "bk", "bn"))
        scale_bytes = 0 if p.group == p.k else 2 / p.group
        bytes_per_weight = p.bits / 8 + scale_bytes
        rate = HBM_BYTES_PER_CYCLE[self.device_kind]
        steps = p.e * math.ceil(p.m / bm) * math.ceil(p.n / bn) * math.ceil(p.k / bk)
        step_cycles = max(bundles, bk * bn * bytes_per_weight / rate)
        read_cycles = p.e * p.k * p.n * bytes_per_weight / rate
        return round(steps * step_cycles), round(read_cycles)

    def close(self) -> None:
        shutil.rmtree(self._dump, ignore_errors=True)
