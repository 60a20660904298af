"""Compiles the kernels for codes with scales in groups; see `ahead_of_time.py`.

python -m tests.kernels.aot_codes tpu v6e:2x2
python -m tests.kernels.aot_codes cuda
"""

import itertools
import sys

import jax

from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._registry import kernel_module
from tests.kernels.ahead_of_time import compile_kernel, run_cases, target_of

KERNEL = {"tpu": "codes_tpu", "cuda": "codes_triton"}


def cases() -> dict[str, CodesProblem]:
    """Every format for few and many rows, and one case of each other fact."""
    out = {}
    formats = ("float8_e4m3fn", "float8_e5m2", "int8")
    for codes, m in itertools.product(formats, (1, 16, 512, 2048)):
        out[f"{codes} m={m}"] = CodesProblem(1, m, 4096, 4096, 128, codes, 32, 32)
    e4m3 = "float8_e4m3fn"
    for k in (512, 1536, 7168, 18432, 128 * 86):
        groups = k // 128
        problem = CodesProblem(1, 128, 2048, k, 128, e4m3, groups, groups)
        out[f"{e4m3} k={k}"] = problem
    out[f"{e4m3} one scale of a row"] = CodesProblem(1, 64, 512, 1024, 128, e4m3, 1, 8)
    out[f"{e4m3} one scale of b"] = CodesProblem(1, 64, 512, 1024, 128, e4m3, 8, 1)
    out[f"{e4m3} tails"] = CodesProblem(3, 70, 1000, 1024, 128, e4m3, 8, 8)
    out["int8 group=32"] = CodesProblem(1, 64, 512, 1024, 32, "int8", 32, 32)
    out["int8 group=256"] = CodesProblem(1, 64, 512, 2048, 256, "int8", 8, 8)
    for codes, m in itertools.product(("float8_e4m3fn", "int8"), (16, 512, 2048)):
        out[f"{codes} by int4 m={m}"] = CodesProblem(
            1, m, 4096, 4096, 128, codes, 32, 32, "int4"
        )
    out[f"{e4m3} by int4 group=64"] = CodesProblem(
        3, 70, 1000, 1024, 64, e4m3, 16, 16, "int4"
    )
    out["float8_e5m2 by int4 tails"] = CodesProblem(
        3, 70, 1000, 1024, 256, "float8_e5m2", 4, 4, "int4"
    )
    return out


def shapes_of(p: CodesProblem) -> list[jax.ShapeDtypeStruct]:
    """Shapes of a, a_scale, b and b_scale."""
    dtype = "int8" if p.is_integer else "uint8"
    return [
        jax.ShapeDtypeStruct((p.e, p.m, p.k), dtype),
        jax.ShapeDtypeStruct((p.e, p.m, p.a_groups), "float32"),
        _shape_of_b(p, dtype),
        jax.ShapeDtypeStruct((p.e, p.n, p.b_groups), "float32"),
    ]


def _shape_of_b(p: CodesProblem, dtype: str) -> jax.ShapeDtypeStruct:
    if p.is_packed:
        return jax.ShapeDtypeStruct((p.e, p.n, p.k // 2), "uint8")
    return jax.ShapeDtypeStruct((p.e, p.n, p.k), dtype)


def main(*arguments: str) -> None:
    target = target_of(arguments)
    kernel = kernel_module(KERNEL[target.platform])

    def compile_case(p: CodesProblem) -> None:
        shapes = shapes_of(p)
        compile_kernel(kernel, p, target.device, shapes, kernel.default_tiles)

    run_cases(target, cases(), compile_case)


if __name__ == "__main__":
    main(*sys.argv[1:])
