"""Finds the fastest tiles of the kernels and writes them to jaxq/kernels/tiles.json.

    python benchmarks/tune.py                     # on this machine's accelerator
    python benchmarks/tune.py --codes int4 --k 8192 --n 8192 --m 1 16
    python benchmarks/tune.py --topology v6e:2x2  # for a TPU that is absent

The defaults are k = 4096, and n = 4096 and 14336. Entries of other devices stay in the
table. Each entry says how its tiles were found:

- "measured": on an accelerator. Every candidate is first checked against float64. Then
  a loop over enough weights to defeat the caches is timed, the candidates in turns.
- "schedule": without an accelerator. TPU tiles are ranked by the compiler's schedule,
  see schedule.py. This needs libtpu. It never replaces a measured entry.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import loop
from schedule import Schedules
from timing import interleaved, summary

from jaxq import kernels
from jaxq.kernels import _tiles
from jaxq.kernels._registry import (
    READS_SCALES_AS_STORED,
    READS_UNITS,
    kernel_module,
)

TABLE = Path(_tiles.__file__).with_name("tiles.json")
# The kinds of codes, and the group size that each is tuned for. None means one scale
# per column.
CODES = {"int4": 128, "uint4": 128, "codebook4": 64, "int8": None}
BUCKETS = (16, 64, 128, 256)
CACHE_BYTES = 256 * 2**20
LOOPS = 8
# The fields of an entry that say what it is for.
KEY = ("kernel", "device", "codes", "x", "group", "layout", "m", "k", "n")


def candidates(
    name: str, problem: kernels.Problem, device: str | None
) -> Iterator[dict[str, Any]]:
    """Yields the kernel's own tiles, and then tiles near them."""
    own = dict(kernel_module(name).default_tiles(problem, device))
    yield own
    bodies = (own.get("body"),) if problem.codebook else ("pre", "post")
    choices: dict[str, tuple] = {
        "tpu": {"bk": (2048, 4096), "bn": (256, 512, 1024), "body": bodies},
        "mosaic_gpu": {
            "bm": (own["bm"], 256) if problem.m >= 256 else (own["bm"],),
            "bk": (64, 128, 256),
            "warpgroups": (1, 2, 3, 4),
            "stages": (3, 4, 6),
            "splits": (1, 2, 4, 8),
        },
        "triton": {
            "bn": (32, 64, 128),
            "splits": (1, 2, 4, 8),
            "warps": (4, 8),
            "stages": (2, 3, 4),
        },
        "tpu_transposed": {"bk": (1024, 2048, 4096), "bn": (256, 512, 1024)},
        "triton_transposed": {
            "bn": (32, 64, 128),
            "splits": (1, 2, 4, 8),
            "warps": (4, 8),
            "stages": (2, 3, 4),
        },
    }[name]
    for values in itertools.product(*choices.values()):
        tiles = own | dict(zip(choices, values, strict=True))
        if tiles != own:
            yield tiles


def make_problem(
    codes: str,
    group: int | None,
    m: int,
    k: int,
    n: int,
    name: str,
    layout: str = "rows",
) -> kernels.Problem:
    """Returns a product in bfloat16 for a kernel. `group=None`: a scale per column.

    A kernel that reads codes as they are stored gets 4-bit codes in HALVES packing, a
    unit for each group, as the presets store them.
    """
    is_packed = codes.endswith("4") and name in READS_UNITS
    return kernels.Problem(
        e=1,
        m=m,
        k=k,
        n=n,
        bits=8 if codes.endswith("8") else 4,
        signed=codes.startswith("int"),
        codebook=codes.startswith("codebook"),
        group=group or k,
        zero_point=codes.startswith("uint"),
        layout=layout,  # pyright: ignore[reportArgumentType]
        x_dtype="bfloat16",
        scale_dtype="bfloat16",
        out_dtype="bfloat16",
        unit=(group or k) if is_packed else None,
        transposed=name.endswith("_transposed"),
    )


def random_operands(problem: kernels.Problem, seed: int) -> tuple[jax.Array, ...]:
    """Returns random x, data, scale, zero point and codebook, on the device.

    Arrays that the problem does not have are None.
    """
    p, rng = problem, np.random.default_rng(seed)
    width = p.k * p.bits // 8
    shape = (p.e, p.n, width) if p.layout == "rows" else (p.e, width, p.n)
    data = rng.integers(0, 256, shape, np.uint8)
    if p.bits == 8 and p.signed:
        data = data.view(np.int8)
    scales = (p.e, p.num_groups, p.n)
    zero = rng.integers(0, 2**p.bits, scales).astype(np.uint8)
    summed = p.n if p.transposed else p.k
    x_shape = (p.e, p.m, summed)
    if p.x_dtype == "int8":
        x = jnp.asarray(rng.integers(-127, 128, x_shape, np.int8))
    else:
        x = jnp.asarray(rng.standard_normal(x_shape), p.x_dtype)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, scales), jnp.bfloat16)
    codebook = None
    if p.codebook:
        entries = np.sort(rng.standard_normal((p.e, 16)))
        codebook = jnp.asarray(entries, jnp.float32)
    zero_point = jnp.asarray(zero) if p.zero_point else None
    operands = (x, jnp.asarray(data), scale, zero_point, codebook)
    return jax.tree.map(jax.device_put, operands)


def shapes_of(problem: kernels.Problem) -> list[jax.ShapeDtypeStruct | None]:
    """Returns the shapes of `random_operands`."""
    shapes = jax.eval_shape(lambda: random_operands(problem, 0))
    return [
        None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)
        for array in shapes
    ]


def exact_product(problem: kernels.Problem, operands: tuple) -> np.ndarray:
    """Returns the product in float64, `[e, m, n]` or `[e, m, k]`."""
    arrays = [None if array is None else np.asarray(array) for array in operands]
    products = [
        _exact_matrix(problem, [a if a is None else a[i] for a in arrays])
        for i in range(problem.e)
    ]
    return np.stack(products)


def _exact_matrix(p: kernels.Problem, arrays: list[np.ndarray | None]) -> np.ndarray:
    """The product of one matrix of a stack, `[m, n]` or `[m, k]`."""
    x, data, scale, zero, codebook = arrays
    assert x is not None
    assert data is not None
    assert scale is not None
    data = data.view(np.uint8)
    if p.layout == "columns":
        data = np.ascontiguousarray(data.T)
    codes = data
    if p.bits == 4:
        # [n, units, bytes]. A unit is a single byte if its halves are neighbours.
        units = data.reshape(p.n, -1, (p.unit or 2) // 2)
        codes = np.stack([units & 15, units >> 4], 2).reshape(p.n, p.k)
    codes = codes.astype(np.int32)
    if p.signed:
        codes -= (codes >= 2 ** (p.bits - 1)) * 2**p.bits
    numbers = codes.astype(np.float64) if codebook is None else codebook[codes]
    if zero is not None:
        numbers = numbers - np.repeat(zero.T.astype(np.float64), p.group, 1)
    weights = numbers * np.repeat(scale.T.astype(np.float64), p.group, 1)  # [n, k]
    return x.astype(np.float64) @ (weights if p.transposed else weights.T)


def as_kernel_reads(name: str, operands: tuple) -> tuple:
    """Returns the operands with scales and zero points as the kernel wants them."""
    if name not in READS_SCALES_AS_STORED:
        return operands
    x, data, *scales, codebook = operands
    rows = [None if a is None else jnp.swapaxes(a, 1, 2) for a in scales]
    return (x, data, *rows, codebook)


def loop_over(product: Callable, operands: list[tuple]) -> Callable[[], Any]:
    """A compiled call that multiplies x of the first operands by all weights."""
    x, weights = operands[0][0], [arrays[1:] for arrays in operands]
    return loop(lambda x, weight: product(x, *weight), x, weights, LOOPS)


def tune(name: str, problem: kernels.Problem, device: str) -> dict[str, Any] | None:
    """Returns the table's entry for a problem, measured on this device.

    None means that the kernel cannot compute the problem, or that no tiles work.
    """
    module = kernel_module(name)
    if module.why_not(problem, device) is not None:
        return None
    count = max(2, CACHE_BYTES // (problem.k * problem.n * problem.bits // 8))
    weights = [random_operands(problem, seed) for seed in range(count)]
    exact = exact_product(problem, weights[0])
    weights = [as_kernel_reads(name, operands) for operands in weights]
    calls, tiles_of = {}, {}
    for tiles in candidates(name, problem, device):
        label = json.dumps(tiles)
        product = functools.partial(module.matmul, problem=problem, tiles=tiles)
        try:
            y = np.asarray(jax.jit(product)(*weights[0]), np.float64)
        except Exception as error:  # the compiler refuses, for example too large tiles
            print(f"  {label}: {str(error).splitlines()[0][:90]}")
            continue
        relative_error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        if relative_error > 5e-3:
            print(f"  {label}: WRONG by {relative_error:.2g}")
            continue
        calls[label] = loop_over(product, weights)
        tiles_of[label] = tiles
    if not calls:
        return None
    figures = summary(interleaved(calls, rounds=7, seconds=10.0), next(iter(calls)))
    best = min(figures, key=lambda label: figures[label]["median_ms"])
    us = 1e3 * figures[best]["median_ms"] / LOOPS / count
    p = problem
    print(f"{name} {p.codes} m={p.m} n={p.n}: {best}, {us:.1f} us", flush=True)
    origin = {"source": "measured", "us": round(us, 2)}
    return _entry(name, device, problem, tiles_of[best], origin)


def rank(
    schedules: Schedules, problem: kernels.Problem, bundles_of: dict[str, int]
) -> dict[str, Any] | None:
    """Returns the table's entry for a problem, by the compiler's schedule.

    None means that the kernel cannot compute the problem.

    Args:
      schedules: the compiler.
      problem: the product.
      bundles_of: bundles of a grid step by problem and tiles, filled here. Problems
        that differ only in k and n share them. 0 means that the tiles do not compile.
    """
    module, p, device = kernel_module("tpu"), problem, schedules.device_kind
    if module.why_not(p, device) is not None:
        return None
    specs, cycles_of = shapes_of(p), {}
    for tiles in candidates("tpu", p, device):
        label = json.dumps(tiles)
        key = f"{p.codes} {p.group} {p.layout} {p.m} {label}"
        if key not in bundles_of:
            product = functools.partial(module.matmul, problem=p, tiles=tiles)
            try:
                bundles_of[key] = schedules.bundles(product, specs)
            except Exception as error:  # the compiler refuses, as in `tune`
                print(f"  {label}: {str(error).splitlines()[0][:90]}")
                bundles_of[key] = 0
        if bundles_of[key]:
            cycles_of[label] = schedules.cycles(p, tiles, bundles_of[key])
    own = next(iter(cycles_of))
    best = min(cycles_of, key=lambda label: cycles_of[label].total)
    cycles = cycles_of[best]
    print(
        f"{device} {p.codes} {p.layout} m={p.m} n={p.n}: {best}, {cycles.total} "
        f"cycles, {cycles.read} for reading, {cycles_of[own].total} by rule",
        flush=True,
    )
    origin = {
        "source": "schedule",
        "cycles": cycles.total,
        "hbm_cycles": cycles.read,
    }
    return _entry("tpu", device, p, json.loads(best), origin)


def _entry(
    name: str,
    device: str,
    p: kernels.Problem,
    tiles: dict[str, Any],
    origin: dict[str, Any],
) -> dict[str, Any]:
    facts = {
        "kernel": name,
        "device": device,
        "codes": p.codes,
        "x": p.x_dtype,
        "group": p.group,
        "layout": p.layout,
        "m": p.m,
        "k": p.k,
        "n": p.n,
    }
    return facts | {"tiles": tiles} | origin


def _key(entry: dict[str, Any]) -> str:
    """What an entry is for. Two entries with one key are for the same product."""
    return json.dumps([entry[name] for name in KEY])


def _write(table: dict[str, dict[str, Any]]) -> None:
    text = ",\n ".join(json.dumps(entry) for entry in table.values())
    TABLE.write_text(f"[{text}]\n")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--m", nargs="+", type=int, default=list(BUCKETS))
    parser.add_argument("--k", nargs="+", type=int, default=[4096])
    parser.add_argument("--n", nargs="+", type=int, default=[4096, 14336])
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=None,
        help="default: the first kernel of this platform",
    )
    parser.add_argument(
        "--topology",
        help="rank tiles for this TPU, such as v6e:2x2, by the compiler's schedule",
    )
    return parser


def main() -> None:
    parser = _arguments()
    args = parser.parse_args()
    schedules, platform = None, "tpu"
    if args.topology:
        schedules = Schedules(args.topology)
        device = schedules.device_kind
    else:
        backend = jax.default_backend()
        platform = {"gpu": "cuda"}.get(backend, backend)
        device = jax.devices()[0].device_kind
    if platform not in kernels.PLATFORMS:
        message = f"There are no kernels for {platform}, so nothing can be timed."
        parser.exit(1, f"{message} Use --topology to rank tiles for a TPU.\n")
    layouts = ("rows", "columns") if platform == "tpu" else ("rows",)
    table = {_key(entry): entry for entry in _tiles.table()}
    bundles_of: dict[str, int] = {}
    for name in args.kernels or kernels.KERNELS["product"][platform][:1]:
        for codes, layout, m, k, n in itertools.product(
            args.codes, layouts, args.m, args.k, args.n
        ):
            m = _tiles.bucket(m)
            problem = make_problem(codes, CODES[codes], m, k, n, name, layout)
            if schedules is None:
                entry = tune(name, problem, device)
            else:
                entry = rank(schedules, problem, bundles_of)
            if entry is None:
                continue
            old = table.get(_key(entry), entry)
            if schedules is not None and old["source"] == "measured":
                continue
            table[_key(entry)] = entry
            _write(table)  # after every problem, because a run may be cut short
    if schedules is not None:
        schedules.close()


if __name__ == "__main__":
    main()
