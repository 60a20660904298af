"""Compiles the GPU kernels for products; `ahead_of_time.py` says how.

    python -m tests.kernels.aot_gpu KERNEL [word ...]

KERNEL is mosaic_gpu, triton, triton_int8 for int8 activations, or triton_transposed,
the kernel of the backward pass. With words, only cases run whose name has all of the
words.
"""

import dataclasses
import itertools
import sys

from jaxq.kernels import Problem
from jaxq.kernels._registry import kernel_module
from tests.kernels.ahead_of_time import compile_kernel, run_cases, target_of
from tests.kernels.problems import CODES, for_kernel, problem, specs


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


def main(kernel_name: str = "mosaic_gpu", *words: str) -> None:
    kernel = kernel_module(kernel_name)
    target = target_of(("cuda", *words))
    is_transposed = kernel_name.endswith("_transposed")

    def default_tiles(p: Problem) -> dict:
        return kernel.default_tiles(p, target.device.device_kind)

    def compile_case(p: Problem) -> None:
        p = dataclasses.replace(p, transposed=is_transposed)
        shapes = for_kernel(kernel, specs(p))
        compile_kernel(kernel, p, target.device, shapes, default_tiles)

    run_cases(target, cases(), compile_case)


if __name__ == "__main__":
    main(*sys.argv[1:])
