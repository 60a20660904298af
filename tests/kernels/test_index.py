"""Codes that lie in a stack: each kernel reads them in place, at an index."""

import dataclasses
import functools
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.problems import CODES, for_kernel, operands, problem
from tests.tables import thinned

# Product 0 reads matrix 4, and so on. Matrices are read twice, and some never.
INDEX = (4, 0, 4)
NUM_MATRICES = 6
KERNELS = ("tpu", "mosaic_gpu", "triton", "tpu_transposed", "triton_transposed")


@pytest.mark.parametrize(
    ("name", "codes", "facts"),
    thinned(
        [
            (name, codes, facts)
            for name in KERNELS
            for codes in CODES
            for facts in ("e=1", "e=3", "columns")
            if facts != "columns" or name.startswith("tpu")
        ],
        [
            ("tpu", "codebook4", "e=3"),
            ("tpu", "uint4", "columns"),
            ("mosaic_gpu", "int4", "e=3"),
            ("triton", "uint8", "e=3"),
            ("tpu_transposed", "int4", "e=3"),
            ("triton_transposed", "codebook4", "e=1"),
        ],
    ),
)
def test_the_result_is_that_of_the_copied_matrices(name, codes, facts):
    """Bit for bit. The other matrices hold other codes, so a wrong index shows."""
    kernel = importlib.import_module(f"jaxq.kernels._{name}")
    e = 1 if facts == "e=1" else len(INDEX)
    index = jnp.asarray(INDEX[:e], jnp.int32)
    layout = "columns" if facts == "columns" else "rows"
    facts = {"layout": layout, "transposed": name.endswith("_transposed")}
    p = problem(codes, m=5, k=256, n=136, group=64, e=NUM_MATRICES, **facts)
    stack = operands(p)[0][1]
    p = dataclasses.replace(p, e=e)
    x, _, *others = for_kernel(kernel, operands(p, seed=1)[0])
    multiply = functools.partial(
        kernel.matmul,
        problem=p,
        tiles=kernel.default_tiles(p, None),
        interpret=True,
    )
    actual = multiply(x, stack, *others, index=index)
    np.testing.assert_array_equal(actual, multiply(x, stack[index], *others))
    assert not np.array_equal(actual, multiply(x, stack[:e], *others))
