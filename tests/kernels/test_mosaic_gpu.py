"""The Hopper kernel: arithmetic in the interpreter, and the lowering of every case."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from jaxq.kernels import _mosaic_gpu as kernel
from tests.kernels.problems import (
    CODES,
    error,
    for_kernel,
    lowered,
    operands,
    problem,
    specs,
)
from tests.tables import thinned

K = 256  # two steps of the smallest tiles


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    """After an error the interpreter must be reset before it runs again."""
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def run(p, seed=0, **tiles):
    assert kernel.why_not(p, "NVIDIA H200") is None
    arrays, expected = operands(p, seed)
    tiles = kernel.default_tiles(p, None) | {"warpgroups": 1} | tiles
    arrays = for_kernel(kernel, arrays)
    y = kernel.matmul(*arrays, problem=p, tiles=tiles, interpret=True)
    assert y.shape == (p.e, p.m, p.n)
    assert y.dtype == p.out_dtype
    return error(y, expected)


@pytest.mark.parametrize(
    ("codes", "group"),
    thinned(itertools.product(CODES, (32, 64, 128, K)), [("int4", 128), ("uint4", 32)]),
)
def test_every_code_by_every_group(codes, group):
    assert run(problem(codes, m=8, k=K, n=64, group=group)) < 5e-3


EDGES = [
    (
        "int4",
        {"m": 5, "n": 72, "e": 2, "group": 64, "k": 192},
        {"warpgroups": 2},
    ),  # edges in m, n and k
    (
        "codebook4",
        {"m": 3, "n": 40, "e": 2, "group": 32, "scale_dtype": "bfloat16"},
        {},
    ),
    ("uint8", {"m": 8, "n": 64, "group": 64}, {}),
    ("uint4", {"m": 19, "n": 64, "group": 64, "scale_dtype": "float16"}, {"splits": 2}),
    (
        "int8",
        {"m": 9, "n": 64, "group": K, "zero_point": True},
        {"splits": 3},
    ),  # the last part is beyond k
    (
        "uint8",
        {"m": 8, "n": 64, "group": 64, "zero_point": False, "x_dtype": "float16"},
        {},
    ),
    ("int4", {"m": 8, "n": 64, "group": 192, "k": 384}, {}),  # three steps to a group
    ("uint4", {"m": 72, "n": 64, "group": 64, "unit": 64}, {}),  # weights with scales
    ("int4", {"m": 256, "n": 64, "group": 64}, {"bm": 256}),  # 256 rows at once
    # The last group is not full, and its unit is shorter.
    ("codebook4", {"m": 8, "n": 64, "k": 320, "group": 128, "unit": 128}, {}),
    ("codebook4", {"m": 130, "n": 72, "group": 128, "unit": 128}, {}),
]


@pytest.mark.parametrize(
    ("codes", "facts", "tiles"),
    thinned(EDGES, [EDGES[0], EDGES[-3], EDGES[-2]]),
)
def test_edges_and_dtypes(codes, facts, tiles):
    assert run(problem(codes, **{"k": K} | facts), **tiles) < 5e-3


@pytest.mark.heavy
@pytest.mark.parametrize("codes", CODES)
def test_float16_is_exact_except_for_the_codebook(codes):
    p = problem(codes, m=8, k=K, n=64, group=64, x_dtype="float16", out_dtype="float32")
    assert run(p) < (5e-4 if codes == "codebook4" else 1e-6)


@pytest.mark.heavy
def test_bfloat16_codes_are_exact():
    """Every code with every zero point: a sum of one product is the weight itself."""
    p = problem("int8", m=8, k=K, n=256, group=K, zero_point=True, out_dtype="float32")
    codes = np.broadcast_to(np.arange(-128, 128), (1, 256, K))
    zero = np.arange(-128, 128)[None, :, None]
    x = (
        jnp.zeros((1, 8, K), jnp.bfloat16)
        .at[0, np.arange(8), np.arange(0, K, 32)]
        .set(1)
    )
    ones = jnp.ones((1, 256, 1), jnp.float32)
    tiles = kernel.default_tiles(p, None)
    integers = [jnp.asarray(a, jnp.int8) for a in (codes, zero)]
    y = kernel.matmul(
        x, integers[0], ones, integers[1], None, problem=p, tiles=tiles, interpret=True
    )
    np.testing.assert_array_equal(y[0], codes[0, :, ::32].T - zero[0].T)


@pytest.mark.parametrize(
    ("codes", "group", "m"),
    thinned(
        itertools.product(CODES, (32, 64, 128, 4096), (1, 512)),
        [
            (codes, *case)
            for codes, case in zip(CODES, [(64, 1), (128, 512)], strict=False)
        ],
    ),
)
def test_lowers_for_cuda(codes, group, m):
    p = problem(codes, m=m, group=group)
    assert "mosaic_gpu" in lowered(kernel, p, kernel.default_tiles(p, None))


@pytest.mark.parametrize("m", [5, 12])
def test_any_number_of_rows_lowers(m):
    """More than 8 rows that are not a multiple of 8 are padded, else Mosaic refuses."""
    p = problem("int4", m=m, unit=128)
    text = lowered(kernel, p, kernel.default_tiles(p, None) | {"splits": 1})
    assert ("stablehlo.pad" in text) == (m == 12)


def test_weights_are_not_copied():
    """Only the kernel reads the codes: no pad, no change of dtype, no transpose."""
    p = problem("int4", m=3, group=64, k=4160, n=1000)
    tiles = kernel.default_tiles(p, None)
    jaxpr = jax.make_jaxpr(functools.partial(kernel.matmul, problem=p, tiles=tiles))(
        *(
            a if a is None else jnp.zeros(a.shape, a.dtype)
            for a in for_kernel(kernel, specs(p))
        )
    )
    data = jaxpr.jaxpr.invars[1]
    (user,) = [eqn for eqn in jaxpr.jaxpr.eqns if any(v is data for v in eqn.invars)]
    assert user.outvars[0].aval.shape == (
        tiles["splits"],
        1,
        1000,
        8,
    )  # parts of the result


@pytest.mark.parametrize(
    ("codes", "unit", "m"), [("int4", 128, 1), ("codebook4", 64, 16)]
)
def test_one_launch(codes, unit, m):
    """x, codes and scales go into the kernel as they lie, and the result comes out."""
    p = problem(codes, m=m, group=unit, unit=unit)
    tiles = kernel.default_tiles(p, None) | {"splits": 1}
    program = lowered(kernel, p, tiles)
    operations = set(re.findall(r"= (stablehlo\.[a-z_]+)", program))
    assert operations <= {"stablehlo.custom_call", "stablehlo.reshape"}


def jaxpr_of(p):
    tiles = kernel.default_tiles(p, None)
    matmul = functools.partial(kernel.matmul, problem=p, tiles=tiles)
    return str(jax.make_jaxpr(matmul)(*for_kernel(kernel, specs(p))))


def waits_of(p):
    """How many products may still run at each wait. Versions of jax print it unlike."""
    return re.findall(r"wgmma_wait(?: |\[n=)(\d+)", jaxpr_of(p))


def reads_of(p):
    """How many products may still run when the sums are read."""
    return re.findall(r"accumulator_deref(?:_p)?\[wait_n=(\w+)\]", jaxpr_of(p))


@pytest.mark.parametrize(
    ("codes", "group", "m"), [("int4", 128, 64), ("codebook4", 64, 64), ("int8", K, 8)]
)
def test_a_chunk_is_decoded_while_another_is_multiplied(codes, group, m):
    """One product may still run after each chunk. The result waits for all of them."""
    p = problem(codes, m=m, k=1024 if group < K else K, group=group, unit=group)
    waits = waits_of(p)
    assert len(waits) >= 2
    assert set(waits) == {"1"}
    assert reads_of(p) == ["0"]


def test_a_step_of_one_chunk_waits_for_its_product():
    """Else the next step would decode into registers that the matrix unit reads."""
    p = problem("int4", m=128, group=128, unit=128)
    assert waits_of(p) == ["0"]


@pytest.mark.parametrize(
    ("m", "n", "shared"), [(16, 4096, False), (64, 4096, True), (64, 64, False)]
)
def test_two_blocks_read_x_together(m, n, shared):
    """From 64 rows on, if there are two blocks of columns."""
    p = problem("int4", m=m, n=n, unit=128)
    assert ("axis_name=cluster" in jaxpr_of(p)) == shared


@pytest.mark.parametrize(
    ("codes", "m", "n", "rows"),
    [
        ("int4", 256, 14336, 256),
        ("int4", 300, 14336, 128),  # 512 rows would compute more than 384
        ("int4", 256, 4096, 128),  # too few blocks, so k is split
        ("codebook4", 256, 14336, 128),  # the table leaves no memory
    ],
)
def test_256_rows_only_where_nothing_is_lost(codes, m, n, rows):
    p = problem(codes, m=m, n=n, unit=128)
    assert kernel.default_tiles(p, None)["bm"] == rows


@pytest.mark.parametrize("unit", [32, 64, 128, 256])
def test_units(unit):
    """Codes in HALVES units that a chunk has whole, and in units that are longer."""
    p = problem("int4", m=3, k=K, n=64, group=max(unit, 128), unit=unit)
    assert run(p, bk=128) < 5e-3


@pytest.mark.parametrize("codes", CODES)
def test_default_tiles_fit_in_shared_memory(codes):
    """The tiles of every size of x. Tiles that do not fit do not compile."""
    for m, group, scale in itertools.product(
        (1, 16, 32, 64, 256, 300), (32, 64, 128, 4096), ("float32", "bfloat16")
    ):
        p = problem(codes, m=m, group=group, unit=group, scale_dtype=scale)
        tiles = kernel.default_tiles(p, None)
        assert tiles["stages"] >= 2
        assert kernel._shared_bytes(p, tiles) <= kernel._SHARED_BYTES


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": "columns"}, "columns"),
        ({"x_dtype": "float32"}, "float32"),
        ({"x_dtype": "int8"}, "no int8 x"),
        ({"scale_dtype": None}, "no int8 x"),
        ({"bits": 8, "codebook": True}, "codebook8"),
        ({"group": 16}, "not 16"),
        ({"n": 1001}, "1001"),
        ({"k": 96, "group": 96}, "96"),
        ({"m": 0}, "empty"),
    ],
)
def test_why_not_names_the_reason(change, reason):
    p = problem("int4", m=8, group=64)
    assert kernel.why_not(p, None) is None
    assert reason in kernel.why_not(dataclasses.replace(p, **change), None)


def test_is_only_for_hopper():
    p = problem("int4", m=8, group=64)
    assert "A100" in kernel.why_not(p, "NVIDIA A100-SXM4-40GB")
    assert kernel.why_not(p, "NVIDIA H100 80GB HBM3") is None
    with pytest.raises(ValueError, match="cannot run with tiles"):
        kernel.matmul(
            *operands(p)[0], problem=p, tiles=kernel.default_tiles(p, None) | {"bk": 96}
        )
