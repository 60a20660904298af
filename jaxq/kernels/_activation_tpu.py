"""Quantization of rows on TPU, as one Pallas (Mosaic) kernel.

Each grid step has a tile of whole rows `[bm, k]` in VMEM. It reads 32 rows at a time,
in chunks of lanes that fit into registers:

    one scale a row     a first loop finds the largest magnitude, a second loop
                        computes codes
    groups              one loop: a chunk has one group, or several short groups

Magnitudes are compared as integers: bit patterns without the sign have the order of the
magnitudes, infinity is above all numbers, and NaN is above infinity.

VMEM holds two tiles of x and of the codes, because the next tiles are moved during a
step. TPUs have no float16: float16 rows are converted to float32 before the kernel.

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

from jaxq.kernels._activation_problem import ActivationProblem
from jaxq.qtensor import row_codes, row_quotients, row_scale

_LANES = 128
# Rows of a tile of bytes.
_BYTE_ROWS = 32
# Bytes of two tiles of x and of codes in VMEM. A kernel gets 16 MB on v5e.
_VMEM_BYTES = 12 * 2**20
_MAGNITUDE = 0x7FFFFFFF


def why_not(problem: ActivationProblem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot quantize the rows, or None if it can."""
    del device_kind
    p = problem
    if p.k % _LANES:
        return f"the TPU kernel reads rows of a multiple of {_LANES} numbers, not {p.k}"
    if p.group % _LANES and _LANES % p.group:
        return (
            f"the TPU kernel reads groups that divide {_LANES} or are a multiple of "
            f"it, not groups of {p.group}"
        )
    if p.scale_dtype == "float16":
        return "a TPU has no float16, and the scales are float16"
    least_rows = min(p.m, _BYTE_ROWS)
    if _tile_bytes(p, least_rows) > _VMEM_BYTES:
        return f"rows of {p.k} numbers in {p.x_dtype} do not fit into VMEM"
    return None


def default_tiles(problem: ActivationProblem) -> dict[str, int]:
    """Returns the number of rows of a tile, "bm", and the lanes of a chunk, "chunk"."""
    p = problem
    bm = min(p.m, _BYTE_ROWS)
    # A tile of 1 MB or more is long enough to hide the start of a transfer.
    while 2 * bm <= min(p.m, 256) and _tile_bytes(p, 2 * bm) <= 4 * 2**20:
        bm *= 2
    # A chunk of 32 rows and 256 lanes fills 8 registers in float32.
    chunk = 2 * _LANES if p.k % (2 * _LANES) == 0 else _LANES
    if p.num_groups > 1:
        chunk = max(p.group, _LANES)
    return {"bm": bm, "chunk": chunk}


def quantize_activation(
    x: jax.Array,
    *,
    problem: ActivationProblem,
    tiles: dict[str, int],
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes rows.

    Args:
      x: `[m, k]`.
      problem: static facts of the rows. `why_not` must accept it.
      tiles: "bm" and "chunk", as `default_tiles` returns them.
      interpret: True, or parameters of the interpreter, to run on a CPU.

    Returns:
      (codes, scales): `[m, k]` in the code dtype of the format, and `[m, num_groups]`
      in the dtype of the scales.
    """
    p, bm = problem, tiles["bm"]
    if x.dtype == jnp.float16:
        x = x.astype(jnp.float32)
    axes = jax.typeof(x).manual_axis_type
    codes, scales = pl.pallas_call(
        functools.partial(_tile, p, tiles["chunk"]),
        grid=(pl.cdiv(p.m, bm),),
        in_specs=[pl.BlockSpec((bm, p.k), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((bm, p.k), lambda i: (i, 0)),
            pl.BlockSpec((bm, p.num_groups), lambda i: (i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((p.m, p.k), p.codes_dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct(
                (p.m, p.num_groups), p.scale_dtype, manual_axis_type=axes
            ),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="jaxq_quantize_activation",
    )(x)
    return codes, scales


def _tile_bytes(p: ActivationProblem, bm: int) -> int:
    x_bytes = 2 if p.x_dtype == "bfloat16" else 4
    return 2 * bm * p.k * (x_bytes + 1)


def _tile(p: ActivationProblem, chunk: int, x_ref, codes_ref, scale_ref) -> None:
    """One grid step. It quantizes a tile of rows, a block of 32 rows at a time."""
    bm = x_ref.shape[0]
    block = min(bm, _BYTE_ROWS)
    quantize_block = _one_scale if p.num_groups == 1 else _groups

    def step(i: jax.Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(i * block, block), block)
        quantize_block(p, chunk, rows, x_ref, codes_ref, scale_ref)
        return carry

    if block == bm:
        quantize_block(p, chunk, slice(None), x_ref, codes_ref, scale_ref)
    else:
        lax.fori_loop(0, bm // block, step, None)


def _one_scale(
    p: ActivationProblem, chunk: int, rows, x_ref, codes_ref, scale_ref
) -> None:
    """Quantizes a block of rows with one scale each."""
    num_chunks, block = p.k // chunk, min(x_ref.shape[0], _BYTE_ROWS)

    def find(i: jax.Array, top: jax.Array) -> jax.Array:
        return jnp.maximum(top, _patterns(x_ref[rows, _lanes(i, chunk)]))

    top = lax.fori_loop(0, num_chunks, find, jnp.zeros((block, chunk), jnp.int32))
    scale = row_scale(_largest(top), p.spec, p.geometry)  # [block, 1]
    scale_ref[rows, :] = scale

    def write(i: jax.Array, carry: None) -> None:
        at = _lanes(i, chunk)
        quotients = row_quotients(x_ref[rows, at].astype(jnp.float32), scale)
        codes_ref[rows, at] = row_codes(quotients, p.spec)
        return carry

    lax.fori_loop(0, num_chunks, write, None)


def _groups(
    p: ActivationProblem, chunk: int, rows, x_ref, codes_ref, scale_ref
) -> None:
    """Quantizes a block of rows with a scale for each group."""
    block, per_chunk = min(x_ref.shape[0], _BYTE_ROWS), chunk // p.group
    # A group that divides the lanes is a power of two.
    group_of_lane = lax.broadcasted_iota(jnp.int32, (block, chunk), 1) >> (
        p.group.bit_length() - 1
    )
    index = lax.broadcasted_iota(jnp.int32, (block, p.num_groups), 1)

    def write(i: jax.Array, scales: jax.Array) -> jax.Array:
        at = _lanes(i, chunk)
        x = x_ref[rows, at].astype(jnp.float32)
        patterns = _patterns(x)
        scale_of_lane = jnp.zeros((block, 1), jnp.float32)
        for j in range(per_chunk):
            inside = group_of_lane == j
            own = patterns if per_chunk == 1 else jnp.where(inside, patterns, 0)
            scale = row_scale(_largest(own), p.spec, p.geometry).astype(jnp.float32)
            scales = jnp.where(index == i * per_chunk + j, scale, scales)
            if per_chunk == 1:
                scale_of_lane = scale
            else:
                scale_of_lane = jnp.where(inside, scale, scale_of_lane)
        codes_ref[rows, at] = row_codes(row_quotients(x, scale_of_lane), p.spec)
        return scales

    scales = jnp.zeros((block, p.num_groups), jnp.float32)
    scales = lax.fori_loop(0, p.k // chunk, write, scales)
    # The conversion is exact: the numbers are numbers of the scale's dtype.
    scale_ref[rows, :] = scales.astype(scale_ref.dtype)


def _lanes(i: jax.Array, chunk: int):
    return pl.ds(pl.multiple_of(i * chunk, _LANES), chunk)


def _patterns(x: jax.Array) -> jax.Array:
    """The bit patterns of float32 numbers without the sign, int32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits & jnp.int32(_MAGNITUDE)


def _largest(patterns: jax.Array) -> jax.Array:
    """The largest magnitude of each row, float32 `[bm, 1]`."""
    largest = jnp.max(patterns, axis=1, keepdims=True)
    return lax.bitcast_convert_type(largest, jnp.float32)
