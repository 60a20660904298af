"""Compiles the GPU kernels for an H200 without a GPU, and prints each case's result.

    python -m tests.kernels.aot_gpu KERNEL [word ...]

KERNEL is mosaic_gpu, triton, triton_int8 for int8 activations, or triton_transposed,
the kernel of the backward pass. With words, only cases run whose name has all of the
words.

It needs jax-cuda13-plugin and jax-cuda13-pjrt of the same version as jax, installed
with `--no-deps`. They contain the compiler. CUDA and a driver are not needed. The file
h200.txtpb, a GpuTargetConfigProto of XLA, describes the target.
"""

import dataclasses
import functools
import importlib
import itertools
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = (
    "cpu"  # before the import of jax, which would look for a GPU
)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.kernels import Problem
from tests.kernels.problems import CODES, for_kernel, problem, specs

DEVICE = "NVIDIA H200"


def cases() -> dict[str, Problem]:
    """Every code by every group for 1 to 512 tokens, and a case of all other facts."""
    out = {}
    for codes, m, group in itertools.product(CODES, (1, 16, 512), (32, 64, 128, 4096)):
        out[f"{codes} m={m} group={group}"] = problem(codes, m=m, group=group)
    for codes in CODES:
        out[f"{codes} float16"] = problem(
            codes, m=16, group=128, x_dtype="float16", scale_dtype="float16"
        )
        out[f"{codes} float32"] = problem(
            codes, m=16, group=128, x_dtype="float32", out_dtype="float32"
        )
    out["int4 tails"] = problem("int4", m=5, group=32, e=3, k=4160, n=1000)
    out["int4 odd n"] = problem("int4", m=5, group=32, e=3, k=4160, n=1001)
    # The last group is not full.
    partial = {"group": 128, "unit": 128, "e": 3, "k": 4160, "n": 1000}
    out["int4 wide tails"] = problem("int4", m=300, **partial)
    out["int4 m=300"] = problem("int4", m=300, group=128)
    out["int4 m=64"] = problem("int4", m=64, group=128, unit=128)
    out["int4 m=256 n=14336"] = problem("int4", m=256, group=128, unit=128, n=14336)
    out["int8 m=64"] = problem("int8", m=64, group=4096)
    out["int4 m=300 n=4104"] = problem("int4", m=300, group=128, n=4104)
    out["int8 zero points"] = problem(
        "int8", m=16, group=128, zero_point=True, scale_dtype="bfloat16"
    )
    for codes, m in itertools.product(("int4", "int8"), (16, 64, 512)):
        facts = {"m": m, "group": 128, "unit": 128, "out_dtype": "float32"}
        out[f"{codes} int8 x m={m}"] = problem(codes, x_dtype="int8", **facts)
        out[f"{codes} float8 x m={m}"] = problem(
            codes, x_codes="float8_e4m3fn", **facts
        )
    one_scale = {"group": 4096, "unit": 4096, "x_dtype": "int8"}
    out["int4 int8 x one scale"] = problem("int4", m=16, **one_scale)
    return out


def compiled(kernel, p: Problem, shapes: list, mesh: Mesh) -> tuple[str, str]:
    """Compiles one case. Returns "ok", "FAILED" or "not served", and the reason."""
    reason = kernel.why_not(p, DEVICE)
    if reason is not None:
        return "not served", reason
    tiles = kernel.default_tiles(p, DEVICE)
    matmul = functools.partial(kernel.matmul, problem=p, tiles=tiles)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(matmul).lower(*shapes).compile()
    except Exception as error:  # any error of the compiler is this case's result
        first_line = str(error).splitlines()[0]
        return "FAILED", f"{type(error).__name__}: {first_line[:300]}"
    return "ok", ""


def main(kernel_name: str = "mosaic_gpu", *words: str) -> None:
    kernel = importlib.import_module(f"jaxq.kernels._{kernel_name}")
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    device = topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=target
    ).devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    counts = dict.fromkeys(("ok", "FAILED", "not served"), 0)
    for name, p in cases().items():
        if not all(word in name for word in words):
            continue
        p = dataclasses.replace(p, transposed=kernel_name.endswith("_transposed"))
        shapes = [
            None
            if a is None
            else a.update(sharding=NamedSharding(mesh, PartitionSpec()))
            for a in for_kernel(kernel, specs(p))
        ]
        result, reason = compiled(kernel, p, shapes, mesh)
        counts[result] += 1
        separator = ": " if result == "not served" else " "
        print(f"{result}{separator}{name} {reason}".strip(), flush=True)
    print(
        f"jax {jax.__version__} {kernel_name}:",
        ", ".join(f"{count} {what}" for what, count in counts.items()),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
