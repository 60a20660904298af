"""Compiles the kernels that quantize activations; `ahead_of_time.py` says how.

python -m tests.kernels.aot_activation tpu v6e:2x2
python -m tests.kernels.aot_activation cuda
"""

import functools
import itertools
import sys

import jax

from jaxq.kernels import choose
from jaxq.kernels._activation_problem import activation_problem
from jaxq.kernels._quantize_activation import activation_kernel_form
from tests.kernels.activation_cases import activation_call
from tests.kernels.ahead_of_time import (
    NotServedError,
    Target,
    compile_for,
    run_cases,
    target_of,
)


def cases() -> dict[str, tuple]:
    """Every format and dtype for rows and groups, and one case of each other fact.

    A case is (format, group, dtype of x, dtype of scales, m, k). No group means one
    scale for each row.
    """
    out = {}
    formats = ("int8", "float8_e4m3fn", "float8_e5m2")
    dtypes = ("bfloat16", "float32", "float16")
    for fmt, dtype, group in itertools.product(formats, dtypes, (None, 128)):
        out[f"{fmt} {dtype} group={group}"] = (fmt, group, dtype, "float32", 256, 4096)
    for group in (32, 64, 256):
        out[f"int8 group={group}"] = ("int8", group, "bfloat16", "float32", 256, 4096)
    for m in (1, 5, 40, 2048):
        for group in (None, 128):
            name = f"float8_e4m3fn m={m} group={group}"
            out[name] = ("float8_e4m3fn", group, "bfloat16", "float32", m, 4096)
    for scale in ("bfloat16", "float16"):
        for group in (None, 128):
            name = f"int8 scales in {scale} group={group}"
            out[name] = ("int8", group, "bfloat16", scale, 256, 4096)
    for k in (14336, 28672, 1024 * 128):
        out[f"int8 k={k}"] = ("int8", None, "bfloat16", "float32", 64, k)
    out["int8 k=14336 float32"] = ("int8", None, "float32", "float32", 64, 14336)
    out["int8 k=1000"] = ("int8", None, "bfloat16", "float32", 64, 1000)
    return out


def compile_case(target: Target, case: tuple) -> None:
    fmt, group, dtype, scale, m, k = case
    call = activation_call((m, k), fmt, group, scale)
    problem = activation_problem((m, k), dtype, call.spec, call.geometry)
    device_kind = target.device.device_kind
    choice = choose(problem, target.platform, device_kind, family="activation")
    if choice.reason is not None:
        raise NotServedError(choice.reason)
    form = functools.partial(activation_kernel_form, call=call, kernel=choice.backend)
    compile_for(target.device, form, jax.ShapeDtypeStruct((m, k), dtype))


def main(*arguments: str) -> None:
    target = target_of(arguments)
    run_cases(target, cases(), functools.partial(compile_case, target))


if __name__ == "__main__":
    main(*sys.argv[1:])
