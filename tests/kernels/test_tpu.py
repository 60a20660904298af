"""The TPU kernel against float64. Its interpreter fills unwritten memory with NaN."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels import Problem
from jaxq.kernels import _tpu as kernel
from tests.kernels.problems import CODES, error, lowered, operands, problem
from tests.tables import thinned

INTEGERS = [codes for codes in CODES if codes != "codebook4"]
GROUPS = (32, 64, 128, None)
LAYOUTS = ("rows", "columns")
GENERATIONS = ["TPU v5 lite", "TPU v6 lite", "TPU7x"]


def small(codes: str, group: int | None = 64, **other) -> Problem:
    facts = {
        "k": 256,
        "n": 128,
        "layout": "rows",
        "scale_dtype": "bfloat16",
        "out_dtype": "float32",
    }
    return problem(codes, group=group, **facts | other)


def multiply(p: Problem, arrays: list, **tiles) -> np.ndarray:
    assert kernel.why_not(p, None) is None
    tiles = kernel.default_tiles(p, None) | tiles
    nan = pltpu.InterpretParams(uninitialized_memory="nan")
    run = functools.partial(kernel.matmul, problem=p, tiles=tiles, interpret=nan)
    y = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(*arrays)
    assert y.shape == (p.e, p.m, p.n)
    assert y.dtype == p.out_dtype
    return np.asarray(y, np.float64)


def check(p: Problem, limit: float, **tiles) -> None:
    arrays, expected = operands(p)
    actual = error(multiply(p, arrays, **tiles), expected)
    assert actual <= limit, f"{p}: {actual:.1e}"  # NaN fails too


@pytest.mark.parametrize(
    ("codes", "group", "layout"),
    thinned(
        itertools.product(CODES, GROUPS, LAYOUTS),
        [
            ("int4", 128, "rows"),
            ("codebook4", 64, "columns"),
            ("uint8", None, "rows"),
        ],
    ),
)
def test_every_code_group_and_layout(codes, group, layout):
    check(small(codes, group, layout=layout), 5e-3)


@pytest.mark.parametrize(
    ("codes", "m", "layout"),
    thinned(
        [
            (codes, m, layout)
            for codes, m in [*((codes, 21) for codes in CODES), ("int4", 1)]
            for layout in LAYOUTS
        ],
        [("uint4", 21, "rows")],
    ),
)
def test_tails_in_every_direction(codes, m, layout):
    p = small(codes, 32, m=m, k=346, n=200, layout=layout)
    check(p, 5e-3, bm=16, bk=256, bn=128)


@pytest.mark.parametrize(
    ("codes", "layout"),
    thinned(itertools.product(["int4", "uint8"], LAYOUTS), [("uint8", "rows")]),
)
def test_tails_of_one_scale_a_column(codes, layout):
    p = small(codes, None, k=330, n=40, out_dtype="bfloat16", layout=layout)
    check(p, 5e-3, bk=256)


BODIES = [("int4", "pre"), ("uint4", "pre"), ("int8", "pre"), ("uint8", "post")]


@pytest.mark.parametrize(
    ("codes", "body", "scale"),
    thinned(
        [(*case, scale) for case in BODIES for scale in ("float32", "float16")],
        [("uint4", "pre", "float16"), ("uint8", "post", "float32")],
    ),
)
def test_each_body_of_integers(codes, body, scale):
    check(
        small(codes, 64, m=3, k=576, n=130, scale_dtype=scale),
        5e-3,
        bk=512,
        bn=256,
        body=body,
    )


# With 16 rows of x the sums are scaled, with 32 rows the weights.
TABLE_BODIES = list(itertools.product(["gather", "select"], [16, 32]))


@pytest.mark.parametrize(
    ("body", "bm"), thinned(TABLE_BODIES, [("gather", 16), ("select", 32)])
)
def test_each_body_of_a_codebook(body, bm):
    check(
        small("codebook4", 64, m=20, k=576, n=130),
        5e-3,
        bm=bm,
        bk=512,
        bn=256,
        body=body,
    )


@pytest.mark.parametrize(
    ("codes", "x"),
    thinned(itertools.product(CODES, ("float32", "float16")), [("int4", "float32")]),
)
def test_wide_x_keeps_float32(codes, x):
    p = small(codes, 32, m=5, k=320, n=130, x_dtype=x, scale_dtype="float32")
    for body in ("select",) if p.codebook else ("pre", "post"):
        check(p, 1e-6, bk=256, body=body)


@pytest.mark.parametrize("codes", thinned(INTEGERS, ["uint8"]))
def test_integer_sums_are_exact(codes):
    p = small(
        codes,
        None,
        m=5,
        k=330,
        n=130,
        x_dtype="int8",
        scale_dtype=None,
        out_dtype="int32",
    )
    for zero_point in (False, True):
        p = dataclasses.replace(p, zero_point=zero_point)
        arrays, expected = operands(p)
        np.testing.assert_array_equal(multiply(p, arrays, bk=256), expected)


@pytest.mark.parametrize(
    ("codes", "group"),
    thinned(itertools.product(INTEGERS, (32, 128, None)), [("uint4", 32)]),
)
def test_integer_x_is_exact_within_a_group(codes, group):
    p = small(codes, group, m=5, k=384, n=130, x_dtype="int8", scale_dtype="float32")
    arrays, expected = operands(p, powers_of_two=True)
    np.testing.assert_array_equal(multiply(p, arrays), expected)


@pytest.mark.parametrize("codes", thinned(["int4", "codebook4"], ["codebook4"]))
def test_stacked_products_do_not_mix(codes):
    check(small(codes, 64, e=3, m=5, k=192, n=40), 5e-3)


@pytest.mark.parametrize("body", ["gather", "select"])
def test_every_entry_of_a_table_is_looked_up(body):
    """x selects single weights. Each is its entry, in both halves of a byte."""
    p = small("codebook4", None, k=32, n=16, m=32, layout="columns")
    codes = (np.arange(32)[:, None] + np.arange(16)) % 16
    data = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)[None]
    table = np.asarray(
        jnp.asarray(np.random.default_rng(0).normal(size=(1, 16)), jnp.bfloat16),
        np.float32,
    )
    x = jnp.eye(32, dtype=jnp.bfloat16)[None]
    arrays = [
        x,
        jnp.asarray(data),
        jnp.ones((1, 1, 16), jnp.bfloat16),
        None,
        jnp.asarray(table),
    ]
    np.testing.assert_array_equal(multiply(p, arrays, body=body)[0], table[0][codes])


@pytest.mark.parametrize(
    ("codes", "group", "m", "kind", "layout"),
    thinned(
        itertools.product(CODES, GROUPS, (16, 512), [*GENERATIONS, None], LAYOUTS),
        [
            (codes, 64, m, kind, layout)
            for codes in CODES
            for m, kind, layout in (
                (16, "TPU v5 lite", "rows"),
                (512, "TPU7x", "columns"),
            )
        ],
    ),
)
def test_lowers_for_tpu(codes, group, m, kind, layout):
    p = small(codes, group, m=m, k=4096, n=1024, layout=layout)
    assert "tpu_custom_call" in lowered(kernel, p, kernel.default_tiles(p, kind))


@pytest.mark.parametrize("kind", [*GENERATIONS, "TPU v5p"])
@pytest.mark.parametrize("codes", CODES)
def test_default_tiles_stay_below_12_mb(codes, kind):
    for x in ("bfloat16", "float32", "int8"):
        for m, k in ((1, 4096), (16, 14336), (200, 11008), (4096, 4096)):
            p = small(codes, 128, m=m, k=k, n=4096, x_dtype=x)
            if kernel.why_not(p, kind):
                continue
            tiles = kernel.default_tiles(p, kind)
            bm, bk, bn = (int(tiles[name]) for name in ("bm", "bk", "bn"))
            width = jnp.dtype(x).itemsize
            twice = (
                bm * bk * width
                + bk * bn * p.bits // 8
                + bk // p.group * bn * 4
                + bm * bn * 4
            )
            assert (
                2 * twice
                + bm * bn * 4
                + bk * bn * (4 if tiles["body"] == "select" else width)
                + bk * bn * p.bits // 8
                <= 12 * 2**20
            )


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"m": 0}, None, "empty"),
        ({"bits": 2}, None, "int2"),
        ({"group": 16}, None, "groups of 16"),
        ({"x_dtype": "float8_e4m3fn"}, None, "float8_e4m3fn"),
        ({"codebook": True, "x_dtype": "int8"}, None, "int8 x"),
        ({}, "TPU v4", "TPU v4"),
    ],
)
def test_why_not_names_the_reason(change, kind, reason):
    assert reason in (
        kernel.why_not(dataclasses.replace(small("int4"), **change), kind) or ""
    )


@pytest.mark.parametrize(
    ("codes", "change", "tiles", "match"),
    [
        ("int4", {}, {"bk": 256}, "multiples"),
        ("int4", {}, {"body": "gather"}, "does not decode int4"),
        ("codebook4", {"x_dtype": "float32"}, {"body": "gather"}, "too coarse"),
        ("int8", {"x_dtype": "int8"}, {"body": "pre"}, "int8 cannot hold"),
    ],
)
def test_tiles_that_do_not_fit_raise(codes, change, tiles, match):
    p = small(codes, **change)
    arrays, _ = operands(p)
    with pytest.raises(ValueError, match=match):
        multiply(p, arrays, **tiles)
