"""The Hopper kernel: arithmetic in the interpreter, and the lowering of every case."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from jaxq.kernels import _mosaic_gpu as kernel
from tests.kernels.problems import CODES, error, lowered, operands, problem
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
]


@pytest.mark.parametrize(
    ("codes", "facts", "tiles"),
    thinned(EDGES, EDGES[:1]),
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
    zero = np.arange(-128, 128)[None, None, :]
    x = (
        jnp.zeros((1, 8, K), jnp.bfloat16)
        .at[0, np.arange(8), np.arange(0, K, 32)]
        .set(1)
    )
    ones = jnp.ones((1, 1, 256), jnp.float32)
    tiles = kernel.default_tiles(p, None)
    integers = [jnp.asarray(a, jnp.int8) for a in (codes, zero)]
    y = kernel.matmul(
        x, integers[0], ones, integers[1], None, problem=p, tiles=tiles, interpret=True
    )
    np.testing.assert_array_equal(y[0], codes[0, :, ::32].T - zero[0])


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


def places(layout, shape):
    """The number of an array that each register of each thread holds.

    Returns:
      Flat indices `[warp, lane, *registers, vector]`.
    """
    layout = layout.to_mgpu()
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        split = index.ndim - len(tile)
        pairs = [
            (size // t, t) for size, t in zip(index.shape[split:], tile, strict=True)
        ]
        index = index.reshape(
            *index.shape[:split], *(size for pair in pairs for size in pair)
        )
        outer, inner = range(split, index.ndim, 2), range(split + 1, index.ndim, 2)
        index = index.transpose(*range(split), *outer, *inner)
    (warp,), lanes = layout.warp_dims, layout.lane_dims
    moved = [index.ndim + dim for dim in (warp, *lanes, layout.vector_dim)]
    registers = [dim for dim in range(index.ndim) if dim not in moved]
    index = index.transpose(*moved[:-1], *registers, moved[-1])
    return index.reshape(
        4,
        32,
        index.shape[3],
        *(size for size in index.shape[4:-1] if size > 1),
        index.shape[-1],
    )


def test_a_word_is_in_the_place_of_its_bytes():
    words, data = places(kernel._WORDS, (64, 8)), places(kernel._BYTES, (64, 32))
    np.testing.assert_array_equal(data, 4 * words + np.arange(4))


@pytest.mark.parametrize("num_pairs", [2, 4])
def test_registers_and_interpreter_agree_on_columns(num_pairs):
    """wgmma gets the same number from a register as the interpreter has in a column."""
    words = places(kernel._WORDS, (64, 8))[..., 0]
    first = [
        2 * (np.arange(512) + 512 * pair).reshape(64, 8) for pair in range(num_pairs)
    ]  # numbers 2 i and 2 i + 1
    pairs = [
        jnp.asarray(numbers | (numbers + 1) << 16, jnp.uint32) for numbers in first
    ]
    expected = np.asarray(kernel._as_weights(pairs, jnp.uint16, True)).ravel()
    columns = places(kernel._WEIGHTS, (64, 16 * num_pairs))
    for warp, lane in ((0, 0), (0, 7), (1, 18), (3, 31)):
        words_of_thread = words[warp, lane].reshape(
            1, 2, 2
        )  # [rows / 64, units, halves of 16 rows]
        registers = kernel._by_unit(
            [numbers.ravel()[words_of_thread] for numbers in first]
        )
        numbers_of_thread = np.stack([registers, registers + 1], axis=-1)
        np.testing.assert_array_equal(
            expected[columns[warp, lane]].ravel(), numbers_of_thread.ravel()
        )


def test_weights_are_not_copied():
    """Only the kernel reads the codes: no pad, no change of dtype, no transpose."""
    p = problem("int4", m=3, group=64, k=4160, n=1000)
    tiles = kernel.default_tiles(p, None)
    jaxpr = jax.make_jaxpr(functools.partial(kernel.matmul, problem=p, tiles=tiles))(
        *(a if a is None else jnp.zeros(a.shape, a.dtype) for a in operands(p)[0])
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
    ("change", "reason"),
    [
        ({"layout": "columns"}, "columns"),
        ({"x_dtype": "float32"}, "float32"),
        ({"x_dtype": "int8"}, "int8 product"),
        ({"scale_dtype": None}, "int8 product"),
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
