"""Cycles of a TPU kernel by its static schedule, on a machine without a TPU.

    python benchmarks/schedule.py v5e:2x2     # or v6e:2x2, tpu7x:2x2x1
    python benchmarks/schedule.py v5e:2x2 transposed
    python benchmarks/schedule.py tpu7x:2x2x1 float8

prints a table for the tiles that the kernel uses now. The second line prints it for the
kernel of the backward pass, with few and with many rows of x. The third line prints it
for float8 x and int4 weights, multiplied in bfloat16 and in float8. The numbers are
predictions that rank tiles and layouts. They are not a measured speed. libtpu's
compiler writes the final schedule of a program: how many instruction bundles one grid
step takes. A step takes at least as long as its bundles, as the next tile needs from
HBM, and as the matrix unit needs for the products of the tile. The first tile is read
before any step can overlap with it. Stalls and latencies are not part of the number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Bytes per cycle from HBM, from the clock and the bandwidth that the maker states: 819
# GB/s at 1.5 GHz, 1640 GB/s at 1.75 GHz, 3690 GB/s (one core) at 1.9 GHz.
HBM_BYTES_PER_CYCLE = {"TPU v5 lite": 546, "TPU v6 lite": 937, "TPU7x": 1942}
# Multiplications of bfloat16 numbers per cycle, likewise: 197 TFLOP/s, 918 TFLOP/s and
# 1153 TFLOP/s (one core).
PRODUCTS_PER_CYCLE = {"TPU v5 lite": 65536, "TPU v6 lite": 262144, "TPU7x": 303421}


class Cycles(NamedTuple):
    """Predicted cycles of one product.

    Attributes:
      total: the product, with the first tile.
      first: reading the first tile of x, codes and scales. Nothing overlaps with it.
      read: reading codes and scales once. No tiles can take less.
      dense: reading the same weight once in bfloat16.
      decoded: the memory traffic of a product without a kernel, if the decoded weight
        is written: reading the codes, writing the weight in bfloat16, and reading it.
      multiply: the matrix unit at its full speed.
    """

    total: int
    first: int
    read: int
    dense: int
    decoded: int
    multiply: int


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

    def cycles(self, problem: Any, tiles: Mapping[str, Any], bundles: int) -> Cycles:
        """Returns the predicted cycles of a whole product.

        Args:
          problem: the product.
          tiles: "bm", "bk" and "bn".
          bundles: bundles of one grid step with these tiles.
        """
        p, (bm, bk, bn) = problem, (tiles[name] for name in ("bm", "bk", "bn"))
        scale_bytes = 0 if p.group == p.k else 2 / p.group
        bytes_per_weight = p.bits / 8 + scale_bytes
        rate = HBM_BYTES_PER_CYCLE[self.device_kind]
        k_steps, n_steps = math.ceil(p.k / bk), math.ceil(p.n / bn)
        steps = p.e * math.ceil(p.m / bm) * n_steps * k_steps
        sum_steps, x_columns = (n_steps, bn) if p.transposed else (k_steps, bk)
        is_byte = p.x_dtype == "int8" or tiles.get("body") == "float8"
        x_bytes = bm * x_columns * (1 if is_byte else 2)
        weight_bytes = bk * bn * bytes_per_weight
        first_bytes = x_bytes + weight_bytes
        # A tile of x that the next step uses again is not read again.
        step_bytes = weight_bytes if sum_steps == 1 else first_bytes
        products = PRODUCTS_PER_CYCLE[self.device_kind]
        first = first_bytes / rate
        step = max(bundles, step_bytes / rate, bm * bk * bn / products)
        read = p.e * p.k * p.n * bytes_per_weight / rate
        dense = p.e * p.k * p.n * 2 / rate
        return Cycles(
            total=round(first + steps * step),
            first=round(first),
            read=round(read),
            dense=round(dense),
            decoded=round(read + 2 * dense),
            multiply=round(p.e * p.m * p.k * p.n / products),
        )

    def close(self) -> None:
        shutil.rmtree(self._dump, ignore_errors=True)


CASES = [("int4", 128), ("int4", 32), ("uint4", 128), ("codebook4", 64), ("int8", None)]
HEADER = (
    "| device | codes, group | layout | tiles | bundles a step | first tile | cycles "
    "| read codes | read bf16 | ratio to bf16 | write and read bf16 | matrix unit |"
)


def main(topology: str, product: str = "") -> None:
    """Prints the predicted cycles of products with a 4096 x 4096 weight."""
    from jaxq.kernels import _tiles
    from jaxq.kernels._registry import kernel_module

    name = "tpu_transposed" if product == "transposed" else "tpu"
    kernel, schedules = kernel_module(name), Schedules(topology)
    device = schedules.device_kind
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}", flush=True)
    for case, p, body in _problems(product):
        tiles = _tiles.lookup(name, device, p)
        if body is not None:
            tiles = {**tiles, "body": body}

        def product_of(*arrays: jax.Array, p=p, tiles=tiles) -> jax.Array:
            return kernel.matmul(*arrays, problem=p, tiles=tiles)

        bundles = schedules.bundles(product_of, _shapes(p, tiles))
        cycles = schedules.cycles(p, tiles, bundles)
        cells = [
            device,
            f"{case}, m={p.m}",
            p.layout,
            ", ".join(f"{name} {value}" for name, value in tiles.items()),
            bundles,
            cycles.first,
            cycles.total,
            cycles.read,
            cycles.dense,
            f"{cycles.dense / cycles.total:.2f}",
            cycles.decoded,
            cycles.multiply,
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    schedules.close()


def _problems(product: str) -> Iterator[tuple[str, Any, str | None]]:
    """The name, problem and body of each case. None is the usual body of the tiles."""
    from tune import make_problem

    name = "tpu_transposed" if product == "transposed" else "tpu"
    layouts = ("rows", "columns")
    if product != "float8":
        all_rows = (16, 2048) if product == "transposed" else (16,)
        for (codes, group), layout, m in itertools.product(CASES, layouts, all_rows):
            case = f"{codes}, {group or 'column'}"
            yield case, make_problem(codes, group, m, 4096, 4096, name, layout), None
        return
    for layout, m, group in itertools.product(layouts, (16, 512), (128, None)):
        p = make_problem("int4", group, m, 4096, 4096, name, layout)
        p = dataclasses.replace(p, x_codes="float8_e4m3fn", out_dtype="float32")
        for body, x in (("post", "bfloat16"), ("float8", "float8")):
            yield f"int4, {group or 'column'}, x in {x}", p, body


def _shapes(p: Any, tiles: Mapping[str, Any]) -> list:
    """The shapes of the operands. The body "float8" reads x as float8."""
    from tune import shapes_of

    x, *others = shapes_of(p)
    if tiles.get("body") == "float8":
        x = jax.ShapeDtypeStruct(x.shape, p.x_codes)
    return [x, *others]


if __name__ == "__main__":
    main(*sys.argv[1:])
