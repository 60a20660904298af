"""Counts the machine instructions of the GPU kernels, on a machine without a GPU.

    python benchmarks/sass.py                       # all cases, written to results/
    python benchmarks/sass.py --codes int4 --m 16   # some cases, printed only
    python benchmarks/sass.py --tiles bk=256 warpgroups=3 --m 16

All numbers are predicted from machine code. Nothing was timed. The script compiles the
product `quantized_matmul` for an H200 ahead of time, assembles the kernel's PTX with
`ptxas` for sm_90a, and disassembles it with `nvdisasm`. It counts the instructions of
the loop over steps of k, for each weight that a thread decodes, by the pipe that
executes them. It also counts the launches of the whole compiled program. It fails if
an instruction of the loop writes a register that the matrix unit still uses.

It needs jax-cuda13-plugin and jax-cuda13-pjrt of the same version as jax (installed
with `--no-deps`), and the packages nvidia-cuda-nvcc (`ptxas`) and nvidia-cuda-nvdisasm.
The two programs are looked for on PATH and in the installed packages.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Both must be set before jax is imported: it would look for a GPU, and the compilers
# read where to write the PTX when they start.
os.environ["JAX_PLATFORMS"] = "cpu"
DUMP = Path(tempfile.mkdtemp(prefix="jaxq-sass-"))
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"
# A program from the cache writes no PTX.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from tune import make_problem  # noqa: E402
from wgmma_operands import operand_problems  # noqa: E402

from jaxq import formats, kernels  # noqa: E402
from jaxq.kernels import _tiles  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sass-sm_90a.json"
TARGET = ROOT / "tests" / "kernels" / "h200.txtpb"
DEVICE = "NVIDIA H200"
NOTE = "Predicted from machine code; nothing was timed."

# The kinds of weights: the format, the group (None: one scale per column) and the dtype
# of the scales, as the presets of these names have them.
WEIGHTS = {
    "int4": ("int4", 128, "bfloat16"),
    "nf4": ("nf4", 64, "float32"),
    "int8": ("int8", None, "float32"),
}
KERNEL_NAMES = ("mosaic_gpu", "triton")
ROWS = (1, 16, 64, 256, 2048)

# The pipe that executes an instruction, by the start of its name. The first match
# counts. ALU instructions issue at 64 lanes a clock, FMA instructions at 128.
PIPES = {
    "matrix": ("HGMMA", "HMMA", "IMMA"),
    "conversion": ("I2F", "F2F", "F2I", "FRND", "I2I"),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "IDP"),
    "load_store": (
        "LDS",
        "LDG",
        "STS",
        "STG",
        "LDC",
        "LD",
        "ST",
        "ATOM",
        "RED",
        "SHFL",
    ),
    "sync": (
        "BAR",
        "SYNCS",
        "WARPSYNC",
        "WARPGROUP",
        "DEPBAR",
        "LDGDEPBAR",
        "FENCE",
        "MEMBAR",
        "ELECT",
        "NANOSLEEP",
        "UTMA",
        "CCTL",
        "ERRBAR",
        "BSSY",
        "BSYNC",
        "NOP",
    ),
    "branch": ("BRA", "BRX", "EXIT", "CALL", "RET", "JMP", "YIELD"),
    "uniform": ("U", "R2UR", "S2UR", "S2R", "VOTEU", "CS2R"),
    "alu": ("",),
}
# These names also start an entry of an earlier pipe.
EXCEPTIONS = {"LDGDEPBAR": "sync", "F2FP": "alu", "I2FP": "alu"}
HEADER = (
    "| kernel | weight | M | registers | spills | launches | weights a step "
    "| all | ALU | FMA | cvt | load/store | sync | uniform | matrix |"
)


SUBJECT = """\
Products `[M, 4096] @ [4096, 4096]` in bfloat16, compiled for sm_90a (H200)."""
EXPLANATION = """\
The last columns are instructions for each weight that a thread decodes, in the loop
over k. ALU instructions issue at half the rate of FMA instructions. "spills" is in
bytes. "launches" counts the kernels of the whole product. The kernel "xla" decodes the
weight and calls a dense product."""


def tool(name: str) -> str:
    """Returns the path of a program of CUDA, from PATH or from an installed package."""
    path = shutil.which(name)
    if path:
        return path
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for candidate in sorted(packages.glob(f"**/bin/{name}")):
        return str(candidate)
    raise SystemExit(
        f"{name} is missing. Install it with: pip install nvidia-cuda-nvcc "
        "nvidia-cuda-nvdisasm"
    )


def version(name: str) -> str:
    """Returns the release of `ptxas` or `nvdisasm`."""
    text = subprocess.run(
        [tool(name), "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match[1] if match else "unknown"


@functools.cache
def topology() -> Mesh:
    """A mesh of one H200 that is not here."""
    device = topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=TARGET.read_text()
    ).devices[0]
    return Mesh(np.array([device]), ("x",))


def compiled_text(weight: str, m: int, k: int, n: int, backend: str) -> str:
    """Compiles one product, and returns the HLO of the whole program."""
    name, group, scale_dtype = WEIGHTS[weight]
    fmt = formats.get(name)
    sharding = NamedSharding(topology(), PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    data_dtype = "uint8" if fmt.bits == 4 else fmt.code_dtype.name
    operands = (
        shape((m, k), jnp.bfloat16),
        shape((n, k * fmt.bits // 8), data_dtype),
        shape((n, k // (group or k)), scale_dtype),
    )
    product = functools.partial(kernels.quantized_matmul, format=name, backend=backend)
    with jax.sharding.use_abstract_mesh(topology().abstract_mesh):
        return jax.jit(product).lower(*operands).compile().as_text()


def launches(hlo: str) -> int:
    """Returns the number of kernels that the entry computation of a program starts."""
    entry = hlo[hlo.index("\nENTRY ") :]
    free = {
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "partition-id",
        "replica-id",
    }
    opcodes = re.findall(r"^  (?:ROOT )?%\S+ = .*? ([a-z][\w-]*)\(", entry, re.M)
    return sum(opcode not in free for opcode in opcodes)


def machine_code(ptx: Path) -> tuple[str, str]:
    """Assembles PTX. Returns the listing, and the report of `ptxas -v`."""
    cubin = ptx.with_suffix(".cubin")
    done = subprocess.run(
        [tool("ptxas"), "-arch", "sm_90a", "-v", str(ptx), "-o", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    )
    listing = subprocess.run(
        [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return listing, done.stderr


def facts_of(report: str, function: str) -> dict[str, int]:
    """Registers and bytes of spills of a kernel, as `ptxas -v` reports them."""
    part = report[report.index(f"'{function}'") :]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
    registers = re.search(r"Used (\d+) registers", part)
    assert spills, part
    assert registers, part
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
    }


class Instruction(NamedTuple):
    """An instruction of a kernel.

    Attributes:
      address: in bytes.
      text: the instruction and its operands, without a predicate.
      target: address that it may jump to, or None.
    """

    address: int
    text: str
    target: int | None

    @property
    def name(self) -> str:
        return self.text.split()[0]


def instructions(listing: str, function: str) -> list[Instruction]:
    """The instructions of a kernel."""
    part = listing[listing.index(f".text.{function}:") :]
    end = part.find("\n//-----")
    lines = part[: end if end >= 0 else None].splitlines()
    labels: dict[str, int] = {}
    pending: list[str] = []
    parsed = []
    for line in lines:
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            pending.append(label[1])
        code = re.match(
            r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*[^;]*)", line
        )
        if not code:
            continue
        address = int(code[1], 16)
        labels |= dict.fromkeys(pending, address)
        pending = []
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        parsed.append((address, code[2].strip(), branch[1] if branch else None))
    return [Instruction(a, text, labels.get(target)) for a, text, target in parsed]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions of the loop with most matrix instructions.

    Among loops with equally many, the shortest counts. A kernel without such a loop has
    been unrolled, and its code cannot be counted.
    """
    best: list[Instruction] = []
    for jump in code:
        if jump.target is None or jump.target >= jump.address:
            continue
        body = [i for i in code if jump.target <= i.address <= jump.address]
        if _num_matrix(body) == 0:
            continue
        is_more = _num_matrix(body) > _num_matrix(best)
        is_shorter = len(body) < len(best)
        if is_more or (_num_matrix(body) == _num_matrix(best) and is_shorter):
            best = body
    assert best, "no loop has a matrix instruction"
    return best


def _num_matrix(body: list[Instruction]) -> int:
    return sum(pipe_of(instruction.name) == "matrix" for instruction in body)


def pipe_of(name: str) -> str:
    """Returns the pipe that executes an instruction."""
    base = name.split(".")[0]
    if base in EXCEPTIONS:
        return EXCEPTIONS[base]
    return next(
        pipe for pipe, starts in PIPES.items() if any(map(base.startswith, starts))
    )


def weights_of_loop(
    kernel: str, tiles: dict[str, Any], group: int, body: list[Instruction]
) -> int:
    """Weights that a thread decodes in one pass of the loop.

    A wgmma of 128 threads multiplies 64 x 16 weights. A program of Triton multiplies
    `bn` columns by a chunk of 128 codes in one pass, or by a shorter group.
    """
    if kernel == "mosaic_gpu":
        return 8 * _num_matrix(body)
    return int(tiles["bn"]) * math.gcd(group, 128) // (32 * int(tiles["warps"]))


def count(weight: str, m: int, k: int, n: int, backend: str) -> dict[str, Any]:
    """Compiles one product, and returns its row of the table."""
    shutil.rmtree(DUMP)
    DUMP.mkdir()
    hlo = compiled_text(weight, m, k, n, backend)
    row: dict[str, Any] = {"weight": weight, "m": m, "k": k, "n": n}
    row["launches"] = launches(hlo)
    for ptx in DUMP.glob("*.ptx"):
        match = re.search(
            r"\.entry (kernel_mosaic_gpu_kernel\w*|jaxq_triton_matmul\w*)\(",
            ptx.read_text(),
        )
        if match:
            break
    else:
        return row | {"kernel": "xla"}
    listing, report = machine_code(ptx)
    kernel = "mosaic_gpu" if "mosaic" in match[1] else "triton"
    problem = _problem(weight, m, k, n)
    tiles = dict(_tiles.lookup(kernel, DEVICE, problem))
    body = main_loop(instructions(listing, match[1]))
    num_weights = weights_of_loop(kernel, tiles, problem.group, body)
    problems = operand_problems([instruction.text for instruction in body])
    assert not problems, problems
    pipes = collections.Counter(pipe_of(instruction.name) for instruction in body)
    names = collections.Counter(i.name.split(".")[0] for i in body)
    return row | {
        "kernel": kernel,
        "tiles": tiles,
        **facts_of(report, match[1]),
        "weights_per_thread": num_weights,
        "per_weight": {
            "all": round(len(body) / num_weights, 3),
            **{pipe: round(pipes[pipe] / num_weights, 3) for pipe in PIPES},
        },
        "instructions": dict(names.most_common()),
    }


def _problem(weight: str, m: int, k: int, n: int) -> kernels.Problem:
    name, group, scale_dtype = WEIGHTS[weight]
    fmt = formats.get(name)
    codes = f"{'int' if fmt.kind == 'integer' else 'codebook'}{fmt.bits}"
    problem = make_problem(codes, group, m, k, n, "mosaic_gpu")
    return dataclasses.replace(problem, scale_dtype=scale_dtype)


@contextlib.contextmanager
def changed_tiles(change: dict[str, int]) -> Iterator[None]:
    """Replaces sizes of the tiles that the kernels choose."""
    if not change:
        yield
        return
    lookup = _tiles.lookup

    def changed(name: str, device: str | None, problem: kernels.Problem) -> Any:
        return dict(lookup(name, device, problem)) | change

    _tiles.lookup = changed
    try:
        yield
    finally:
        _tiles.lookup = lookup


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"| {row['kernel']} | {row['weight']} | {row['m']} "
    if row["kernel"] == "xla":
        return f"{start}| | | {row['launches']} |" + " |" * 9
    per_weight = row["per_weight"]
    pipes = ("all", "alu", "fma", "conversion", "load_store", "sync", "uniform")
    figures = " | ".join(f"{per_weight[name]:.2f}" for name in (*pipes, "matrix"))
    return (
        f"{start}| {row['registers']} | {row['spill_bytes']} | {row['launches']} "
        f"| {row['weights_per_thread']} | {figures} |"
    )


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the figures, and the table made of them."""
    versions = {
        "jax": jax.__version__,
        "jax-cuda13-plugin": importlib.metadata.version("jax-cuda13-plugin"),
        "ptxas": version("ptxas"),
        "nvdisasm": version("nvdisasm"),
    }
    result = {"note": NOTE, "target": "sm_90a", "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    divider = "|---" * (HEADER.count("|") - 1) + "|"
    paragraphs = [
        f"**{NOTE}** {SUBJECT}",
        EXPLANATION,
        f"{shown}.",
        "\n".join([HEADER, divider, *map(line, rows)]),
    ]
    RESULTS.with_suffix(".md").write_text("\n\n".join(paragraphs) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNEL_NAMES)
    parser.add_argument("--codes", nargs="+", choices=WEIGHTS)
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--tiles", nargs="+", default=[], metavar="NAME=SIZE")
    parser.add_argument("--list", action="store_true", help="also print instructions")
    args = parser.parse_args()
    change = {name: int(size) for name, size in (t.split("=") for t in args.tiles)}
    print(NOTE)
    print(HEADER)
    rows = []
    cases = itertools.product(
        args.kernels or KERNEL_NAMES, args.codes or WEIGHTS, args.m or ROWS
    )
    for name, weight, m in cases:
        dense = m >= 512 and name == "mosaic_gpu"
        if m >= 512 and not dense:
            continue
        # By default the product with many rows is dense, for both kernels.
        backend = "auto" if name == "mosaic_gpu" else name
        with changed_tiles(change):
            row = count(weight, m, args.k, args.n, backend)
        rows.append(row)
        print(line(row), flush=True)
        if args.list and "instructions" in row:
            print("   ", row["instructions"], row["tiles"])
    is_whole = not (args.kernels or args.codes or args.m or change)
    if is_whole and (args.k, args.n) == (4096, 4096):
        write(rows)
    shutil.rmtree(DUMP, ignore_errors=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
