"""Compiles the TPU kernels for products; `ahead_of_time.py` says how.

    python -m tests.kernels.aot_tpu v6e:2x2 [word ...]
    python -m tests.kernels.aot_tpu v6e:2x2 transposed [word ...]

The second line compiles the kernel of the backward pass.
"""

import functools
import itertools
import sys

from jaxq.kernels import Problem, _tpu, _tpu_transposed
from tests.kernels.ahead_of_time import compile_kernel, run_cases, target_of
from tests.kernels.problems import CODES, problem, specs


def cases(*, transposed: bool) -> dict[str, Problem]:
    """Every code by every group for few and many rows, and one case of other facts.

    All of it for codes along rows and along columns. The kernel of the backward pass
    takes no int8 x.
    """
    out = {}
    for codes, layout in itertools.product(CODES, ("rows", "columns")):
        name = f"{codes} {layout}"
        make = functools.partial(
            problem,
            codes,
            layout=layout,
            scale_dtype="bfloat16",
            transposed=transposed,
        )
        for m, group in itertools.product((16, 512), (32, 64, 128, None)):
            out[f"{name} group={group} m={m}"] = make(m=m, group=group)
        if not transposed:
            for m in (32, 512):
                out[f"{name} int8 x m={m}"] = make(m=m, x_dtype="int8")
                exact = {"x_codes": "float8_e4m3fn", "out_dtype": "float32"}
                if codes != "codebook4":
                    out[f"{name} float8 x m={m}"] = make(m=m, **exact)
            sums = {"scale_dtype": None, "zero_point": False, "out_dtype": "int32"}
            out[f"{name} int32"] = make(m=32, group=None, x_dtype="int8", **sums)
        for m in (16, 512):
            wide = dict.fromkeys(("x_dtype", "scale_dtype", "out_dtype"), "float32")
            out[f"{name} float32 x m={m}"] = make(m=m, **wide)
        out[f"{name} float16"] = make(
            **dict.fromkeys(("x_dtype", "scale_dtype", "out_dtype"), "float16")
        )
        out[f"{name} tails"] = make(
            e=2, m=5, k=1130, n=96, group=64, scale_dtype="float32"
        )
    return out


def main(topology: str, *words: str) -> None:
    transposed = words[:1] == ("transposed",)
    kernel = _tpu_transposed if transposed else _tpu
    target = target_of(("tpu", topology, *words[transposed:]))

    def default_tiles(p: Problem) -> dict:
        return kernel.default_tiles(p, target.device.device_kind)

    def compile_case(p: Problem) -> None:
        compile_kernel(kernel, p, target.device, specs(p), default_tiles)

    run_cases(target, cases(transposed=transposed), compile_case)


if __name__ == "__main__":
    main(*sys.argv[1:])
