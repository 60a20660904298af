"""Offsets of Triton programs into arrays of 2 to 4 GiB, which 32 bits cannot hold.

No test allocates such an array.
"""

import contextlib
import dataclasses
import io
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import jaxq
from jaxq import kernels
from jaxq.kernels._activation_problem import activation_problem
from jaxq.kernels._attention_problem import AttentionProblem
from jaxq.kernels._codes_problem import CodesProblem
from jaxq.kernels._registry import kernel_module
from jaxq.ops import scan_in_place
from tests.kernels.activation_cases import activation_call
from tests.kernels.problems import problem
from tests.kernels.products import lowered_for

GIB = 2**30


def stacked(name, num_bytes):
    """A product whose matrices have 2^25 bytes together, out of a stack."""
    bits = 8 if name == "triton_int8" else 4
    codes, n = f"int{bits}", 8192 * 4 // bits
    x_dtype = "int8" if name == "triton_int8" else "float32"
    p = problem(codes, n=n, k=8192, group=128, x_dtype=x_dtype)
    return dataclasses.replace(p, stack=num_bytes // (p.n * p.k * bits // 8))


def many_products(name, num_bytes):
    """A product of many matrices, as a problem of experts has them."""
    del name
    return problem("int8", e=num_bytes // 2**26, n=8192, k=8192, x_dtype="float32")


def zero_points(name, num_bytes):
    del name
    return problem("uint8", e=num_bytes // 2**20, n=2**15, k=1024, group=32)


def codes(stack, rows=16):
    return CodesProblem(1, rows, 16384, 8192, 128, "int8", 64, 64, "int4", stack)


def activation(num_bytes):
    shape = (num_bytes // 4096, 4096)
    call = activation_call(shape, "int8", None)
    return activation_problem(shape, "bfloat16", call.spec, call.geometry)


def attention(num_bytes):
    groups = num_bytes // (64 * 8 * 32 * 128)
    return AttentionProblem(64, 8, 1, 128, groups, 64, 4, "bfloat16", 1.0, None)


# The kernel, and a problem in which one array of bytes has a given size.
PROBLEMS = {
    "triton": ("triton", stacked),
    "triton_transposed": ("triton_transposed", stacked),
    "triton_int8": ("triton_int8", stacked),
    "ragged_triton": ("ragged_triton", many_products),
    "codes of b": ("codes_triton", lambda _, size: codes(size // 2**26)),
    "codes of a": ("codes_triton", lambda _, size: codes(None, size // 8192)),
    "activation": ("activation_triton", lambda _, size: activation(size)),
    "attention": ("attention_triton", lambda _, size: attention(size)),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_kernel_refuses_sizes_between_32_and_64_bits(case):
    name, make = PROBLEMS[case]

    def reason(num_bytes):
        return kernel_module(name).why_not(make(name, num_bytes), "NVIDIA H200")

    for gibibytes in (1, 2, 5):
        assert reason(gibibytes * GIB) is None
    for gibibytes in (2.25, 3, 4):
        size = int(gibibytes * GIB)
        assert f"{gibibytes:.2f} GiB, and the offsets" in reason(size)


def test_zero_points_count():
    p = zero_points("triton", 3 * GIB)
    assert "3.00 GiB" in kernel_module("triton").why_not(p, None)
    p = dataclasses.replace(p, zero_point=False)
    assert kernel_module("triton").why_not(p, None) is None


def offset_bits(num_bytes: int) -> int:
    """Bits of the offsets of a program that reads an array of bytes."""

    def program(x_ref, y_ref):
        y_ref[...] = plt.load(x_ref.at[pl.ds(pl.program_id(0), 16)])

    def read(x):
        out = jax.ShapeDtypeStruct((16,), jnp.int8)
        return pl.pallas_call(
            program,
            out_shape=out,
            grid=(1,),
            compiler_params=plt.CompilerParams(),
            debug=True,
        )(x)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        lowered_for("cuda", read, jax.ShapeDtypeStruct((num_bytes,), jnp.int8))
    lines = printed.getvalue().splitlines()
    load = next(line for line in lines if "tt.addptr" in line)
    return 64 if "16xi64" in load else 32


def test_pallas_computes_offsets_in_64_bits_only_beyond_4_gib():
    """If this fails, the kernels may take other sizes: see `why_not_offsets`."""
    assert offset_bits(2 * GIB) == 32
    assert offset_bits(4 * GIB) == 32
    assert offset_bits(4 * GIB + 1) == 64


@pytest.mark.parametrize(("num_layers", "runs"), [(24, True), (40, False), (80, True)])
def test_a_scan_over_a_large_stack(num_layers, runs):
    """A kernel reads the whole stack, so the size of the stack decides."""
    w = jax.ShapeDtypeStruct((num_layers, 8192, 16384), jnp.float32)
    quantize = jaxq.quantize
    stack = jax.eval_shape(lambda w: quantize(w, "int4", contracting=-2, batch=0), w)
    x = jax.ShapeDtypeStruct((16, 8192), jnp.float32)

    def layers(x, stack):
        def layer(x, weight):
            return (x @ weight)[:, :8192], None

        return jax.lax.scan(layer, x, stack)[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = lowered_for("cuda", scan_in_place(layers), x, stack)
    messages = [str(w.message) for w in caught if w.category is kernels.FallbackWarning]
    assert ("jaxq_triton_matmul" in text) == runs
    assert any("2.50 GiB, and the offsets" in m for m in messages) == (not runs)
