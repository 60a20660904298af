"""Block-wise quantized matmul through Triton: for GPUs other than Hopper, and for float32 x.

Each program keeps the sums of bm tokens by bn columns and walks along k, a chunk of one group at a time:

    sums[m, n] += scale[n] * (x[m, chunk] @ (codes[n, chunk] - zero_point[n]).T)

Codes meet x as they are, exact in any float dtype, and the scale joins the sum of a chunk in float32. The two codes of
a byte are not interleaved: x comes with its even and odd columns apart, and each half of the bytes has a product of its
own. A codebook is a tree of fifteen selects on the bits of the code. Edges in m, n and k are masked, nothing is padded.
Few tokens need `splits` of k to occupy all SMs; XLA adds up the parts.

Registers of a program, in 32-bit words: bm * bn for the sums, about as many for a chunk's product, bn * chunk for its
codes. Shared memory: stages * chunk * (bm * size of x + bn * bits / 8), which Triton pads and arranges as it likes.

Served: layout "rows"; x in bfloat16, float16 or float32 (in full precision, not as tf32); codes of 4 bits (signed,
unsigned, codebook) or 8 bits; scales in any float dtype; zero points; groups of a multiple of 32, one scale a column;
any e, m, n.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxq.kernels._problem import Problem


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Why this kernel does not serve a problem, or None if it does."""
    del device_kind  # Triton knows its devices
    p = problem
    if p.layout != "rows":
        return 'it reads codes as "rows", with k along them, not as "columns": relayout the weight'
    if p.x_dtype == "int8" or p.scale_dtype is None:
        return "XLA's own int8 product serves int8 x"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return f"it decodes codes of 4 or 8 bits and codebooks of 16 numbers, not {p.codes}"
    if 0 in (p.e, p.m, p.n, p.k):
        return "the product is empty"
    if p.num_groups > 1 and p.group % 32:
        return f"groups have a multiple of 32 codes, not {p.group}"
    if p.k * p.bits % 8:
        return f"rows of {p.k} codes do not fill whole bytes"
    return None


def default_tiles(problem: Problem, device_kind: str | None) -> dict:
    """Tiles from shapes alone, for what no table holds."""
    del device_kind
    p = problem
    bm = next((b for b in (16, 32, 64) if p.m <= b), 64)
    bn = 64
    programs, splits = p.e * pl.cdiv(p.m, bm) * pl.cdiv(p.n, bn), 1
    while splits < 16 and 2 * splits * programs <= 512 and p.k >= 1024 * splits:
        splits *= 2
    return {"bm": bm, "bn": bn, "splits": splits, "warps": 4, "stages": 3}


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    interpret: bool = False,
) -> jax.Array:
    """`y[e, m, n]`; see `Problem` for the arrays.

    Args:
      x: `[e, m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, k / group, n]`.
      zero_point: like scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts; `why_not` has none to object to.
      tiles: bm tokens by bn columns a program, both powers of two from 16 on; `splits` programs share one k; warps a
        program, and stages of Triton's pipeline.
      interpret: run on CPU.
    """
    p = problem
    halves = 8 // p.bits
    # [e, 2, m, k / 2] at 4 bits: x of the first codes of all bytes, then of the second ones.
    x = jnp.moveaxis(x.reshape(p.e, p.m, p.k // halves, halves), 3, 1)
    operands = [a for a in (x, data, scale, zero_point, codebook) if a is not None]
    call = functools.partial(
        _parts, problem=p, tiles=tuple(sorted(tiles.items())), interpret=interpret
    )
    parts = call(*operands) if interpret else _parts_p.bind(*operands, call=call)
    return parts.sum(0).astype(p.out_dtype)


def _parts(
    *operands: jax.Array, problem: Problem, tiles: tuple, interpret: bool
) -> jax.Array:
    """Sums over each part of k, float32 `[splits, e, m, n]`."""
    p, options = problem, {name: int(size) for name, size in tiles}
    bm, bn, splits = (options[name] for name in ("bm", "bn", "splits"))
    halves = 8 // p.bits
    # Triton wants powers of two, and at least 16 of them for a product.
    chunk = 128 if p.num_groups == 1 else min(128, math.gcd(p.group, 128))
    size = chunk // halves  # bytes of a row
    steps = pl.cdiv(pl.cdiv(p.k, chunk), splits)
    precision = lax.Precision.HIGHEST if p.x_dtype == "float32" else None

    def kernel(x_ref, data_ref, scale_ref, *rest):
        *extra, out_ref = rest
        zero_ref = extra[0] if p.zero_point else None
        e, s = pl.program_id(2) // splits, pl.program_id(2) % splits
        m_rows, n_rows = (
            pl.ds(pl.program_id(0) * bm, bm),
            pl.ds(pl.program_id(1) * bn, bn),
        )
        m_mask = pl.program_id(0) * bm + jnp.arange(bm) < p.m
        n_mask = pl.program_id(1) * bn + jnp.arange(bn) < p.n
        table = [extra[-1][e, i] for i in range(16)] if p.codebook else []

        def step(t, sums):
            t = s * steps + t
            inside = t * size + jnp.arange(size) < p.k // halves
            taken = pl.ds(t * size, size)
            group = jnp.minimum(
                t * chunk // p.group, p.num_groups - 1
            )  # the last part may end beyond k
            packed = plt.load(
                data_ref.at[e, n_rows, taken], mask=_both(n_mask, inside), other=0
            ).astype(jnp.int32)
            factor = plt.load(
                scale_ref.at[e, group, n_rows], mask=n_mask, other=0
            ).astype(jnp.float32)
            zero = None
            if zero_ref is not None:
                zero = plt.load(
                    zero_ref.at[e, group, n_rows], mask=n_mask, other=0
                ).astype(jnp.int32)
            product = jnp.zeros((bm, bn), jnp.float32)
            for half in range(halves):
                part = plt.load(
                    x_ref.at[e, jnp.int32(half), m_rows, taken],
                    mask=_both(m_mask, inside),
                    other=0,
                )
                weights = _decode(packed, half, table, zero, p).astype(part.dtype)
                dims = (((1,), (1,)), ((), ()))
                product += lax.dot_general(
                    part,
                    weights,
                    dims,
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
            return sums + product * lax.broadcast_in_dim(factor, (bm, bn), (1,))

        sums = lax.fori_loop(0, steps, step, jnp.zeros((bm, bn), jnp.float32))
        plt.store(out_ref.at[s, e, m_rows, n_rows], sums, mask=_both(m_mask, n_mask))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            (splits, p.e, p.m, p.n),
            jnp.float32,
            manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
        ),
        grid=(pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), p.e * splits),
        compiler_params=plt.CompilerParams(
            num_warps=options["warps"], num_stages=options["stages"]
        ),
        interpret=interpret,
        name="jaxq_triton_matmul",
    )(*operands)


def _decode(packed, half: int, table: list, zero, p: Problem):
    """Weights without their scales, `[bn, bytes]`, from int32 `packed` bytes."""
    codes = packed
    if p.bits == 4:
        codes = (packed >> np.int32(4 * half)) & np.int32(15)
        if p.signed and not p.codebook:
            codes = (codes ^ np.int32(8)) - np.int32(8)
    if not p.codebook:
        return (
            codes
            if zero is None
            else codes - lax.broadcast_in_dim(zero, codes.shape, (0,))
        )
    values = [jnp.full(codes.shape, number) for number in table]
    for bit in range(4):  # neighbours differ in the lowest bit that is left
        is_set = (codes & np.int32(1 << bit)) != 0
        values = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def _both(rows, columns):
    shape = (rows.shape[0], columns.shape[0])
    return lax.broadcast_in_dim(rows, shape, (0,)) & lax.broadcast_in_dim(
        columns, shape, (1,)
    )


# Newer jax calls Triton deprecated whenever it lowers such a kernel, which may be long after `matmul` has returned. It
# is what there is for these GPUs, and nobody who multiplies by a QTensor can do anything about it: a lowering of its
# own is where the warning can be held back, and with it nothing else.
_parts_p = Primitive("jaxq_triton_parts")


def _lower_quietly(ctx, *operands, call):
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(call, multiple_results=False)(ctx, *operands)


def _abstract(x, data, *_, call):
    splits = dict(call.keywords["tiles"])["splits"]
    shape = (splits, x.shape[0], x.shape[2], data.shape[1])
    return x.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)


_parts_p.def_impl(
    lambda *operands, call: jax.jit(functools.partial(_parts_p.bind, call=call))(
        *operands
    )
)
_parts_p.def_abstract_eval(_abstract)
mlir.register_lowering(_parts_p, _lower_quietly)
