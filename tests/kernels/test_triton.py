"""The Triton kernel: arithmetic in the interpreter, and the lowering of every case."""

import dataclasses
import itertools

import pytest

from jaxq.kernels import _triton as kernel
from tests.kernels.problems import CODES, error, lowered, operands, problem
from tests.tables import thinned

K = 256


def run(p, **tiles):
    assert kernel.why_not(p, "NVIDIA A100-SXM4-40GB") is None
    arrays, expected = operands(p)
    y = kernel.matmul(
        *arrays, problem=p, tiles=kernel.default_tiles(p, None) | tiles, interpret=True
    )
    assert y.shape == (p.e, p.m, p.n)
    assert y.dtype == p.out_dtype
    return error(y, expected)


@pytest.mark.parametrize(
    ("codes", "group"),
    thinned(itertools.product(CODES, (32, 64, 128, K)), [("int4", 128), ("uint4", 32)]),
)
def test_every_code_by_every_group(codes, group):
    assert run(problem(codes, m=8, k=K, n=64, group=group)) < 5e-3


@pytest.mark.parametrize(
    ("codes", "facts", "tiles"),
    [
        ("int4", {"m": 5, "n": 71, "e": 2, "group": 96, "k": 192}, {}),
        (
            "codebook4",
            {"m": 3, "n": 40, "e": 2, "group": 32, "scale_dtype": "bfloat16"},
            {"splits": 3},
        ),
        (
            "uint4",
            {"m": 19, "n": 70, "group": 64, "scale_dtype": "float16"},
            {"splits": 2},
        ),
        (
            "int4",
            {"m": 5, "n": 64, "group": 202, "k": 202},
            {},
        ),  # k ends within a chunk
        ("uint8", {"m": 9, "n": 64, "group": 64}, {}),
        # The last group is not full.
        ("uint4", {"m": 3, "n": 20, "group": 128, "k": 330}, {"splits": 2}),
    ],
)
def test_edges_and_dtypes(codes, facts, tiles):
    assert run(problem(codes, **{"k": K} | facts), **tiles) < 5e-3


@pytest.mark.parametrize("codes", CODES)
def test_float32_is_exact(codes):
    assert (
        run(
            problem(
                codes, m=8, k=K, n=64, group=64, x_dtype="float32", out_dtype="float32"
            )
        )
        < 1e-6
    )


FACTS = [
    (32, "bfloat16", 1),
    (64, "float32", 512),
    (128, "float16", 1),
    (4096, "bfloat16", 512),
]
FACTS += [(group, x_dtype, 512 if m == 1 else 1) for group, x_dtype, m in FACTS]


@pytest.mark.parametrize(
    ("codes", "group", "x_dtype", "m"),
    thinned(
        [(codes, *facts) for codes in CODES for facts in FACTS],
        [
            (codes, *FACTS[(3 * i + j) % 8])
            for i, codes in enumerate(CODES)
            for j in range(2)
        ],
    ),
)
def test_lowers_for_cuda(codes, group, x_dtype, m):
    p = problem(codes, m=m, group=group, x_dtype=x_dtype)
    assert "triton" in lowered(kernel, p, kernel.default_tiles(p, None))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": "columns"}, "columns"),
        ({"x_dtype": "int8"}, "no int8 x"),
        ({"scale_dtype": None}, "no int8 x"),
        ({"bits": 8, "codebook": True}, "codebook8"),
        ({"group": 16}, "not 16"),
        ({"m": 0}, "empty"),
    ],
)
def test_why_not_names_the_reason(change, reason):
    p = problem("int4", m=8, group=64)
    assert kernel.why_not(p, None) is None
    assert reason in kernel.why_not(dataclasses.replace(p, **change), None)
