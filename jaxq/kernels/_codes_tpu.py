"""Products of codes with scales in groups on TPU, as one Pallas (Mosaic) kernel.

It serves float8 weights in blocks of 128 x 128 with activations in groups of 128
(DeepSeek-V3, 2024, section 3.3), and int8 codes in groups. Each grid step (e, m, n, k)
has `bk` codes of bm rows of a and of bn rows of b, and adds for each group:

    total[m, n] += (a[m, group] @ b[n, group].T) * (a_scale[m] * b_scale[n])

The matrix unit sums a group, in float32 or int32. Partial sums stay in VMEM. TPUs
before v7x have no float8 units: there the compiler converts tiles to bfloat16.

Numbers beyond m and n are computed but not written. bk divides k.

The kernel has run in the interpreter and has been compiled for TPU v5e, v6e and v7x. It
has not been timed on a device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels._codes_problem import CodesProblem

_LANES = 128
_BYTE_ROWS = 32
# Codes of a step along k, if the groups can be divided so. A step needs 8 scales.
_STEP_GROUPS = (16, 8)
# Bytes of tiles in VMEM. A kernel gets 16 MB on v5e.
_VMEM_BYTES = 12 * 2**20
_FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")


def why_not(problem: CodesProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can."""
    del device_kind
    p = problem
    if p.codes not in _FORMATS:
        return f"the TPU kernel reads {', '.join(_FORMATS)}, not {p.codes}"
    if p.group % _LANES:
        return (
            f"the TPU kernel needs groups of a multiple of {_LANES} codes, not of "
            f"{p.group}"
        )
    bk = default_tiles(p)["bk"]
    if _tile_bytes(p, _BYTE_ROWS, _LANES, bk) > _VMEM_BYTES:
        return f"tiles of {bk} codes do not fit into VMEM"
    return None


def default_tiles(problem: CodesProblem) -> dict[str, int]:
    """Returns "bm", "bn" and "bk". They are estimated, not measured."""
    p = problem
    per_step = next((c for c in _STEP_GROUPS if p.num_groups % c == 0), p.num_groups)
    bk = per_step * p.group
    bm = min(pl.cdiv(p.m, _BYTE_ROWS) * _BYTE_ROWS, 256)
    bn = min(pl.cdiv(p.n, _LANES) * _LANES, 512)
    while _tile_bytes(p, bm, bn, bk) > _VMEM_BYTES:
        if bn > max(bm, _LANES):
            bn = pl.cdiv(bn // 2, _LANES) * _LANES
        elif bm > _BYTE_ROWS:
            bm = pl.cdiv(bm // 2, _BYTE_ROWS) * _BYTE_ROWS
        elif bn > _LANES:
            bn = pl.cdiv(bn // 2, _LANES) * _LANES
        else:
            break
    return {"bm": bm, "bn": bn, "bk": bk}


def matmul(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    *,
    problem: CodesProblem,
    tiles: dict[str, int],
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes the product as `CodesProblem` states it.

    Args:
      a: codes `[e, m, k]`, int8 or the bytes of float8.
      a_scale: `[e, m, a_groups]`.
      b: codes `[e, n, k]`, or `[e, n, k / 2]` if two codes share a byte. Then the
        columns of a have the order of the codes in memory.
      b_scale: `[e, n, b_groups]`.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: "bm", "bn" and "bk", as `default_tiles` returns them.
      interpret: True, or parameters of the interpreter, to run on a CPU.

    Returns:
      float32 `[e, m, n]`.
    """
    p, bm, bn, bk = problem, tiles["bm"], tiles["bn"], tiles["bk"]
    per_step, steps = bk // p.group, p.k // bk
    b_bytes = bk // 2 if p.is_packed else bk
    # Scales of b lie along lanes, as the columns of the result.
    b_scale = jnp.swapaxes(_to_native(b_scale), 1, 2)  # [e, b_groups, n]
    if p.b_groups == 1:
        b_scale_spec = pl.BlockSpec((None, 1, bn), lambda e, m, n, k: (e, 0, n))
    else:
        tile = (None, per_step, bn)
        b_scale_spec = pl.BlockSpec(tile, lambda e, m, n, k: (e, k, n))
    return pl.pallas_call(
        functools.partial(_step, p, per_step, steps),
        grid=(p.e, pl.cdiv(p.m, bm), pl.cdiv(p.n, bn), steps),
        in_specs=[
            pl.BlockSpec((None, bm, bk), lambda e, m, n, k: (e, m, k)),
            pl.BlockSpec((None, bm, p.a_groups), lambda e, m, n, k: (e, m, 0)),
            pl.BlockSpec((None, bn, b_bytes), lambda e, m, n, k: (e, n, k)),
            b_scale_spec,
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda e, m, n, k: (e, m, n)),
        out_shape=jax.ShapeDtypeStruct(
            (p.e, p.m, p.n),
            jnp.float32,
            manual_axis_type=jax.typeof(a).manual_axis_type,
        ),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * p.e * p.m * p.k * p.n,
            bytes_accessed=p.e * (p.m * p.k + p.n * p.k + 4 * p.m * p.n),
            transcendentals=0,
        ),
        interpret=interpret,
        name="jaxq_codes_matmul",
    )(a, _to_native(a_scale), b, b_scale)


def _step(
    p: CodesProblem, per_step: int, steps: int, a_ref, a_scale, b_ref, b_scale, y, total
) -> None:
    """One grid step. It adds the products of `per_step` groups to `total`."""
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    a_scales = a_scale[...].astype(jnp.float32)  # [bm, a_groups]
    b_scales = b_scale[...].astype(jnp.float32)  # [per_step or 1, bn]
    index = lax.broadcasted_iota(jnp.int32, a_scales.shape, 1)
    sums = total[...]
    # Reading a byte as two numbers along sublanes keeps them in order.
    unpacked = _unpacked(b_ref[...], p) if p.is_packed else None  # [bk, bn]
    for j in range(per_step):
        at = slice(j * p.group, (j + 1) * p.group)
        a = _codes(a_ref[:, at], p)
        if unpacked is None:
            part = _product(a, _codes(b_ref[:, at], p), p, 1)
        else:
            part = _product(a, unpacked[at], p, 0)
        a_column = a_scales
        if p.a_groups > 1:
            # A column of lanes at a place that only the step knows.
            own = jnp.where(index == step * per_step + j, a_scales, 0.0)
            a_column = jnp.sum(own, axis=1, keepdims=True)
        b_row = b_scales if p.b_groups == 1 else b_scales[j : j + 1]
        sums += part * (a_column * b_row)
    total[...] = sums

    @pl.when(step == steps - 1)
    def _():
        y[...] = total[...]


def _codes(data: jax.Array, p: CodesProblem) -> jax.Array:
    return data if p.is_integer else pltpu.bitcast(data, jnp.dtype(p.codes))


def _unpacked(data: jax.Array, p: CodesProblem) -> jax.Array:
    """The int4 codes of bytes `[bn, bk / 2]` as `[bk, bn]`, in int8 or float8."""
    return pltpu.bitcast(data.T, jnp.int4).astype(p.codes)


def _product(a: jax.Array, b: jax.Array, p: CodesProblem, axis: int) -> jax.Array:
    """The float32 product over axis 1 of a and `axis` of b."""
    accumulate = jnp.int32 if p.is_integer else jnp.float32
    dims = (((1,), (axis,)), ((), ()))
    product = lax.dot_general(a, b, dims, preferred_element_type=accumulate)
    return product.astype(jnp.float32)


def _to_native(scale: jax.Array) -> jax.Array:
    """TPUs have no float16."""
    return scale.astype(jnp.float32) if scale.dtype == jnp.float16 else scale


def _tile_bytes(p: CodesProblem, bm: int, bn: int, bk: int) -> int:
    # Two tiles of each operand and of y, and one tile of the total and of a product. If
    # two codes share a byte, also one tile of the unpacked codes.
    operand_bytes = 2 * (bm + bn) * bk
    sum_bytes = 4 * 4 * bm * bn
    return operand_bytes + sum_bytes + 8 * bm * max(p.a_groups, _LANES)
