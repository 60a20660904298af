"""Block-wise quantized matmul on Hopper GPUs, as one Pallas (Mosaic GPU) kernel.

Weights of 4 and 8 bits are decoded in registers, just before wgmma, the matrix
instruction of a warp group. A decode step reads every weight once for a few tokens. So
its time is the time of reading the weights. Reading 4 bits takes a quarter of the time
of 16 bits, if decoding is fast enough. There is time for three to four instructions per
weight. This decides the design:

    y.T[n, m] = sum over groups g:  scale[g, n] * (codes[n, g] @ x[m, g].T)

- The product is transposed. The left operand of wgmma may come from registers, and the
  weights are this operand. They go from shared memory to registers as bytes, become
  16-bit numbers there, and are never written back. The right operand is x, 8 to 256
  rows wide.
- Codes are multiplied without their scales, and the sum of each group is scaled in
  float32. Codes minus zero points are exact in 16 bits. Only the entries of a codebook
  are rounded. If there is one scale per column, the matrix unit adds all groups, and
  the result is scaled.
- A group with its own scale costs an operation for each row of x. From `group / 2` rows
  of x in bfloat16 on, multiplying the weights by their scales costs no more, because
  one operation multiplies two weights. This rounds scales and weights to bfloat16. The
  matrix unit then adds all groups. If x is made of float8 codes, sums are scaled for
  any number of rows, so that nothing is rounded.
- When the matrix unit adds all groups, it multiplies one chunk of weights while the
  next chunk is decoded, also from one step to the next.
- With 64 or more rows, reading x takes longer than reading the weights. Two blocks that
  are neighbours along n then form a cluster. Each reads half of x for both.
- Shifts and masks turn a 32-bit word of codes into pairs of 16-bit numbers. A code
  becomes the last mantissa bits of the number 128 (bfloat16) or 1024 (float16). The
  number is then 128 or 1024 plus the code. One `lop3` masks a pair and sets its
  exponents.
- The entries of a codebook are looked up in shared memory, two at a time. The table has
  a copy for each lane of a warp, so that lanes never wait for each other.
- x, codes and scales are read as they lie in memory. Nothing runs before the kernel.
  `_words` says how a thread finds the codes that belong to its columns of x. If 4-bit
  codes are not in HALVES packing, or if their units are longer than a step, XLA first
  brings the columns of x into another order.
- Scales lie as `[n, groups]`. TMA reads at least 16 bytes of a row, so neighbouring
  steps load the same scales again, mostly from the cache.
- One more warp group loads `stages` tiles of x, codes and scales ahead through TMA. TMA
  reads zeros beyond an edge, so weights are never padded or copied.
- With few rows of x there are too few blocks to occupy all SMs. Then `splits` blocks
  each compute the sums over a part of k, and XLA adds these sums.

Shared memory, at most 227 KB: see `_shared_bytes`. Registers of a thread, at most 240:
bn * chunk / 256 for the weights of a chunk, two chunks at a time, and bn * bm / 128 for
the sums. If the sums of chunks are scaled, twice as many for the sums.

Supported: layout "rows"; x in bfloat16 or float16; codes of 4 bits (signed, unsigned,
codebook) or 8 bits; scales in any float dtype; zero points; groups of 32 or of a
multiple of 64 codes, or one scale per column; a last group that is not full; any e and
m; n a multiple of 8; k a multiple of 64.

The kernel has run in the interpreter (all of it except wgmma itself) and has been
compiled for an H200. It has not been timed on a device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from jaxq.kernels import _words
from jaxq.kernels._problem import Problem

# How 64 rows are distributed over the registers of a warp group.
_WEIGHTS = plgpu.Layout.WGMMA  # sums have this layout too
_ROWS = plgpu.Layout.WGMMA.reduce(1)

# Shared memory of a block on Hopper.
_SHARED_BYTES = 227 * 1024
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def why_not(problem: Problem, device_kind: str | None) -> str | None:
    """Returns why this kernel cannot compute a problem, or None if it can.

    Args:
      problem: the product.
      device_kind: `jax.Device.device_kind`. None skips the check of the device.
    """
    p = problem
    if device_kind is not None and not any(name in device_kind for name in _HOPPER):
        return f"it is for Hopper GPUs, not for {device_kind}"
    if p.layout != "rows":
        return (
            'it reads codes in layout "rows", not "columns"; use '
            'jaxq.relayout(weight, "rows")'
        )
    if p.x_dtype == "int8" or p.scale_dtype is None:
        return "it takes no int8 x"
    if p.x_dtype not in _words.BASE:
        return f"it takes x in bfloat16 or float16, not in {p.x_dtype}"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return (
            "it decodes codes of 4 or 8 bits and codebooks of 16 numbers, not "
            f"{p.codes}"
        )
    if p.is_empty:
        return "the product is empty"
    if p.num_groups > 1 and p.group != 32 and p.group % 64:
        return f"the group size must be 32 or a multiple of 64 codes, not {p.group}"
    if p.n % 8 or p.k % 64:
        return (
            "the weight must have a multiple of 8 rows and of 64 codes per row, not "
            f"{p.n} rows of {p.k} codes"
        )
    return None


def default_tiles(problem: Problem, device_kind: str | None) -> dict:
    """Returns tiles for a problem that the table does not know.

    The tiles are estimated from the shapes. They have not been measured.
    """
    del device_kind
    p = problem
    bm = next((size for size in (8, 16, 32, 64) if p.m <= size), 128)
    tiles = {"bm": bm, "bn": 64, "bk": _default_step(p, bm), "warpgroups": 2}
    tiles["splits"] = _default_splits(p, tiles)
    tiles["stages"] = _default_stages(p, tiles)
    return _twice_as_high(p, tiles) or tiles


def _twice_as_high(p: Problem, tiles: dict) -> dict | None:
    """The tiles with 256 rows of x, or None if these tiles are better.

    256 rows halve the instructions that decode, for the same product. The time of the
    matrix unit stays the same. So the blocks must be as full as with 128 rows, and k
    must not be split. Shared memory must hold two long steps of x, codes and the table
    of a codebook. With codebooks and with 8-bit codes it does not.
    """
    higher = tiles | {"bm": 256, "stages": 2}
    rows = [pl.cdiv(p.m, bm) * bm for bm in (128, 256)]
    is_as_full = tiles["bm"] == 128 and rows[0] == rows[1]
    sizes = _block_sizes(p, higher)
    is_whole = sizes.writes_y and _default_splits(p, higher) == 1
    # Scaled sums of chunks would not fit in the registers of a thread.
    has_registers = sizes.scaling != "sums"
    is_long = tiles["bk"] == 128
    if is_as_full and is_whole and has_registers and is_long and _fits(p, higher):
        return higher
    return None


def _default_splits(p: Problem, tiles: Mapping[str, int]) -> int:
    """Number of parts of k: more while blocks are few and a part has 4 steps."""
    columns = tiles["bn"] * tiles["warpgroups"]
    num_blocks = p.e * pl.cdiv(p.n, columns) * pl.cdiv(p.m, tiles["bm"])
    splits = 1
    while (
        splits < 16
        and 2 * splits * num_blocks <= 160
        and p.k >= 8 * splits * tiles["bk"]
    ):
        splits *= 2
    return splits


def _default_stages(p: Problem, tiles: dict) -> int:
    """Number of steps to load ahead: as many as fit in shared memory, 2 to 6."""
    stages = 6
    while stages > 2 and not _fits(p, tiles | {"stages": stages}):
        stages -= 1
    return stages


def _default_step(p: Problem, bm: int) -> int:
    """Codes of a row in one step: many, so that a step's fixed cost is spread."""
    tiles = {"bm": bm, "bn": 64, "warpgroups": 2, "splits": 2}
    for bk in (256, 128):
        # A step must have whole groups, or be a part of one group.
        is_whole = p.num_groups == 1 or p.group % bk == 0 or p.group in (32, 64, 128)
        # With more rows of x, the sums leave no registers for long steps.
        has_registers = bk == 128 or bm <= 64
        if not (is_whole and has_registers and p.k % bk == 0):
            continue
        # One step is multiplied while another is decoded and a third is loaded. Two
        # stages are enough if a shorter step would cut the units of 128 codes.
        stages = 2 if (bk, p.unit) == (128, 128) else 3
        if _fits(p, tiles | {"bk": bk, "stages": stages}):
            return bk
    return 64


def _fits(p: Problem, tiles: Mapping[str, int]) -> bool:
    return _shared_bytes(p, tiles) <= _SHARED_BYTES


def _shared_bytes(p: Problem, tiles: Mapping[str, int]) -> int:
    """Bytes of shared memory that a block needs."""
    sizes = _block_sizes(p, tiles)
    itemsizes = [jnp.dtype(p.scale_dtype).itemsize, *([1] if p.zero_point else [])]
    boxes = [(_ScaleBoxes(p, sizes, size).shape, size) for size in itemsizes]
    step = 2 * sizes.bm * sizes.bk + sizes.columns * sizes.row_bytes
    step += sum(rows * width * size for (rows, width), size in boxes)
    # The result has 2 or 4 bytes. Barriers and the alignment of buffers need the rest.
    result = (2 if sizes.writes_y else 4) * sizes.columns * sizes.bm
    table = 4 * math.prod(_words.TABLE_SHAPE) if p.codebook else 0
    return sizes.stages * step + result + table + 4096


def matmul(
    x: jax.Array,
    data: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    codebook: jax.Array | None,
    *,
    problem: Problem,
    tiles: Mapping[str, int | str],
    index: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `x @ decode(data)` as `Problem` states it.

    Args:
      x: `[e, m, k]`. If `problem.unit` is None, its columns have the order of the codes
        in memory.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, n, num_groups]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: six sizes by name. A warp group computes "bm" rows by "bn" columns of the
        result. A block has "warpgroups" of these warp groups side by side. A step along
        k has "bk" codes, a multiple or a divisor of the group. "stages" is the number
        of steps that are loaded ahead. "splits" is the number of blocks that share the
        sum over k.
      index: int32 `[e]`, the matrix of `data` that each product reads. `data` then has
        any number of matrices. None means that product e reads matrix e.
      interpret: True to run on a CPU. Register layouts and wgmma exist only on the
        device, so they are replaced by plain operations with the same result.

    Returns:
      `[e, m, n]` in `problem.out_dtype`.

    Raises:
      ValueError: The tiles do not fit the problem.
    """
    p = problem
    sizes = _block_sizes(p, tiles)
    sizes = dataclasses.replace(sizes, cluster=1) if interpret else sizes
    bm, bn, warpgroups = sizes.bm, sizes.bn, sizes.warpgroups
    padded_m = sizes.m_blocks * bm

    # Shared memory has tiles of 8 rows. Mosaic cuts an array into whole tiles, or into
    # one tile that may be smaller.
    m, n = p.m if p.m <= 8 else pl.cdiv(p.m, 8) * 8, p.n
    if m != p.m:
        x = jnp.pad(x, ((0, 0), (0, m - p.m), (0, 0)))
    inputs = [_in_unit_order(x, p, sizes.unit), data, _rows_of_scales(scale, p)]
    if zero_point is not None:
        inputs.append(_rows_of_scales(zero_point, p))
    # TMA writes nothing beyond an edge. The interpreter may drop the whole block, so
    # the interpreter gets a padded result. It also has no clusters.
    if interpret:
        m, n = padded_m, sizes.n_blocks * sizes.columns
    if sizes.writes_y:
        out = jax.ShapeDtypeStruct((1, p.e, m, n), jnp.dtype(p.out_dtype))
        transforms = _swizzled(64, 16)
        staging = plgpu.SMEM((warpgroups, bm, bn), out.dtype, transforms=transforms)
    else:
        out = jax.ShapeDtypeStruct((sizes.splits, p.e, n, padded_m), jnp.float32)
        staging = plgpu.SMEM((warpgroups, bn, bm), out.dtype)
    scratch: list[Any] = [staging]
    if p.codebook and not interpret:
        scratch.append(plgpu.SMEM(_words.TABLE_SHAPE, jnp.uint32))
        scratch.append(plgpu.Barrier(num_arrivals=warpgroups))

    if codebook is not None:
        inputs.append(codebook)
    first = [] if index is None else [index]

    def kernel(*refs):
        index_ref = refs[0] if first else None
        _block(p, sizes, out.dtype, interpret, index_ref, *refs[len(first) :])

    # The last block of a cluster may lie beyond n. It reads zeros and writes nothing.
    n_clusters = pl.cdiv(sizes.n_blocks, sizes.cluster)
    # In the interpreter too, reads beyond an edge give zeros, as they do with TMA.
    interpreter = InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    y = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=(p.e, sizes.splits, n_clusters, sizes.m_blocks),
        grid_names=("e", "s", "n", "m"),
        cluster=(sizes.cluster,) if sizes.cluster > 1 else (),
        cluster_names=_cluster_names(sizes),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter if interpret else None,
    )(*first, *inputs)
    if sizes.writes_y:
        return y[0][:, : p.m, : p.n]
    # [splits, e, n, m] as [e, m, n]
    y = jnp.swapaxes(y.sum(0), 1, 2).astype(p.out_dtype)
    return y[:, : p.m, : p.n]


@dataclasses.dataclass(frozen=True)
class _BlockSizes:
    """The sizes that the kernel works with.

    Attributes:
      bm: rows of x of a block.
      bn: columns of the result of a warp group.
      bk: codes of a row in one step.
      warpgroups: warp groups of a block that compute.
      stages: steps that are loaded ahead.
      splits: number of blocks that share the sum over k.
      chunk: codes of a row whose sum is multiplied by one scale.
      unit: number of codes in a HALVES unit, as the kernel decodes them. It is the
        stored unit if each chunk has whole units. Otherwise XLA brings the columns of x
        into the order of other units.
      columns: columns of the result of a block.
      row_bytes: bytes of a row in one step.
      m_blocks: number of blocks along m.
      n_blocks: number of blocks along n.
      cluster: number of blocks along n that read x together.
      steps: steps of each part of k.
      scaling: what is multiplied by the scales. "weights" means the weights before the
        product, "sums" the sum of each chunk, and "result" the sum of all chunks, if
        there is one scale per column.
      overlaps: True if the next chunk is decoded while the matrix unit multiplies one.
      writes_y: True if the kernel writes the result `[m, n]`. False if it writes
        float32 sums `[n, m]`. XLA then adds the parts and transposes the sum.
    """

    bm: int
    bn: int
    bk: int
    warpgroups: int
    stages: int
    splits: int
    chunk: int
    unit: int
    columns: int
    row_bytes: int
    m_blocks: int
    n_blocks: int
    cluster: int
    steps: int
    scaling: str
    overlaps: bool
    writes_y: bool


def _block_sizes(p: Problem, tiles: Mapping[str, int | str]) -> _BlockSizes:
    """The sizes that follow from a problem and its tiles.

    Raises:
      ValueError: The tiles do not fit the problem.
    """
    names = ("bm", "bn", "bk", "warpgroups", "stages", "splits")
    sizes = {name: int(tiles[name]) for name in names}
    bm, bn, bk = sizes["bm"], sizes["bn"], sizes["bk"]
    chunk = _chunk(p, bk)
    # A swizzled row of codes has at most 128 bytes, 1024 / bits codes.
    cuts_row = p.k % min(bk, 1024 // p.bits)
    cuts_group = p.num_groups > 1 and p.group % chunk
    # The groups of a step lie in one box of scales.
    cuts_box = (bk // chunk).bit_count() != 1
    wrong_sizes = bn % 64 or bm % 8 or chunk % 32 or bk % chunk
    if wrong_sizes or cuts_row or cuts_group or cuts_box:
        raise ValueError(
            f"quantized_matmul: the Mosaic GPU kernel cannot run with tiles "
            f"{dict(tiles)} for groups of {p.group} in rows of {p.k} codes. bn must be "
            "a multiple of 64, bm of 8 and bk of 32. k must be a multiple of the "
            f"smaller of bk and {1024 // p.bits}. bk must divide the group, or be "
            "the group times a power of two."
        )
    columns = sizes["warpgroups"] * bn
    scaling = _scaling(p, bm, chunk)
    # A result of 16 bits that is not split is transposed when it is stored, in tiles of
    # 64 columns.
    is_whole = sizes["splits"] == 1 and p.n % 64 == 0
    return _BlockSizes(
        **sizes,
        chunk=chunk,
        unit=_unit(p, chunk),
        columns=columns,
        row_bytes=bk * p.bits // 8,
        m_blocks=pl.cdiv(p.m, bm),
        n_blocks=pl.cdiv(p.n, columns),
        # For 64 rows a block reads twice as many bytes of x as of 4-bit codes.
        cluster=2 if bm >= 64 and p.n > columns else 1,
        steps=pl.cdiv(p.k, bk * sizes["splits"]),
        scaling=scaling,
        # A step has two chunks or more, so that a chunk is never decoded into registers
        # that the matrix unit still reads. A third stage is loaded meanwhile.
        overlaps=scaling != "sums" and bk > chunk and sizes["stages"] >= 3,
        writes_y=is_whole and jnp.dtype(p.out_dtype).itemsize == 2,
    )


def _chunk(p: Problem, bk: int) -> int:
    """Codes of a row that are decoded and multiplied at once, of a step of bk codes."""
    if p.num_groups > 1:
        return min(bk, p.group)
    # With two chunks, one is decoded while the other is multiplied.
    half = bk // 2
    return half if half % 32 == 0 and _has_whole_units(p, half) else bk


def _has_whole_units(p: Problem, chunk: int) -> bool:
    return p.bits == 8 or p.unit is None or chunk % p.unit == 0


def _scaling(p: Problem, bm: int, chunk: int) -> str:
    """Where the scales are multiplied. See `_BlockSizes.scaling`."""
    if p.num_groups == 1:
        return "result"
    # A thread has bn * bm / 128 sums of a chunk, in float32. It has bn * chunk / 128
    # weights, and multiplies two of them at a time. If both ways need the same number
    # of instructions, weights are multiplied: their products need no separate sums, so
    # the matrix unit can run while the next chunk is decoded. float16 may not hold
    # scales.
    if p.x_dtype == "bfloat16" and 2 * bm >= chunk and not p.is_exact:
        return "weights"
    return "sums"


def _unit(p: Problem, chunk: int) -> int:
    """The HALVES unit that the kernel decodes, for chunks of this many codes."""
    # The kernel decodes units of one size only.
    if p.unit is not None and p.k % p.unit == 0 and chunk % p.unit == 0:
        return p.unit
    is_even = chunk % 64 == 0 and (p.unit is None or p.unit % 64 == 0)
    return 64 if is_even else 32


def _block(
    p: Problem, sizes: _BlockSizes, out_dtype, interpret: bool, index_ref, *refs
) -> None:
    """One block (e, s, n, m): sums `[columns, bm]` over part s of k.

    `index_ref` has the index `[e]`, or is None. `refs` are x, the codes, the scales,
    the zero points if there are any, the codebook if there is one, then the result and
    its staging buffer in shared memory.
    """
    num_sources = 3 + p.zero_point + p.codebook
    sources, (out_ref, out_smem, *scratch) = refs[:num_sources], refs[num_sources:]
    bm, bn, bk, chunk = sizes.bm, sizes.bn, sizes.bk, sizes.chunk
    columns, steps = sizes.columns, sizes.steps
    e, s, j, i = (lax.axis_index(name) for name in ("e", "s", "n", "m"))
    if sizes.cluster > 1:
        j = j * sizes.cluster + lax.axis_index("cluster")
    # Where the operands of this product are. Only the codes may be a stack.
    matrix = e if index_ref is None else index_ref[e]
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * bn, bn)  # this warp group's rows of the weight
    # The codebook is read once by `compute` and is not part of the pipeline.
    inputs = sources[:-1] if p.codebook else sources
    places = (e, matrix, *(e for _ in inputs[2:]))
    scales = [_ScaleBoxes(p, sizes, ref.dtype.itemsize) for ref in inputs[2:]]

    def step(indices, x_smem, data_smem, *rest):
        """Adds one step along k: x [bm, bk], data [columns, row_bytes]."""
        *group_smem, carry = rest
        first_group = scales[0].first_group(s * steps + indices[0])
        table = None
        if p.codebook:
            table = sources[-1][e] if interpret else scratch[0]

        def operands(c: int) -> tuple:
            """Weights `[bn, chunk]`, their scales `[bn]` and x `[bm, chunk]`."""
            scale, *zero = (
                boxes.read(boxes.part(ref, rows), first_group, c, interpret)
                for boxes, ref in zip(scales, group_smem, strict=True)
            )
            codes = _Codes(data_smem.at[rows], c, table)
            weights = _decode(codes, zero, p, sizes, interpret)
            x_chunk = x_smem.at[:, pl.ds(c * chunk, chunk)]
            return weights, scale.astype(jnp.float32), x_chunk

        chunks = (operands(c) for c in range(bk // chunk))
        if sizes.scaling == "sums":
            return _add_scaled_sums(carry, chunks, interpret)
        return _accumulate(carry, chunks, sizes, interpret)

    def compute(pipeline):
        """Runs all steps in a computing warp group, then stores the result."""
        if p.codebook and not interpret:
            table, barrier = scratch
            codebook = sources[-1].at[e]
            _fill_table(table, barrier, codebook, sizes.warpgroups, p.x_dtype)
        sums = _run_pipeline(pipeline, sizes, interpret)
        n_rows = pl.ds(j * columns + warpgroup * bn, bn)
        m_rows = pl.ds(i * bm, bm)
        if sizes.writes_y:
            y = sums.astype(out_dtype)
            _store_transposed(out_smem.at[warpgroup], y, interpret)
            target = out_ref.at[s, e, m_rows, n_rows]
        else:
            out_smem[warpgroup] = sums
            target = out_ref.at[s, e, n_rows, m_rows]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], target)
        plgpu.wait_smem_to_gmem(0)

    plgpu.emit_pipeline_warp_specialized(
        step,  # pyright: ignore[reportArgumentType]
        grid=(steps,),
        memory_registers=40,
        in_specs=_input_specs(sizes, scales, s * steps, i, j),
        wg_axis="warpgroup",
        num_compute_wgs=sizes.warpgroups,
        max_concurrent_steps=sizes.stages,
        compute_context=compute,
    )(*(ref.at[place] for ref, place in zip(inputs, places, strict=True)))


def _input_specs(
    sizes: _BlockSizes, scales: list[_ScaleBoxes], first_step, i, j
) -> list:
    """How the pipeline reads x, the codes, the scales and the zero points.

    `first_step` is the first step along k of this block. `i` and `j` are the block's
    places along m and n.
    """
    # While a product is running, x of its step must stay in shared memory.
    delay = int(sizes.overlaps)
    x_spec = plgpu.BlockSpec(
        (sizes.bm, sizes.bk),
        lambda t: (i, first_step + t),
        transforms=_swizzled(min(sizes.chunk, 64), 16),
        delay_release=delay,
        collective_axes=_cluster_names(sizes),
    )
    data_spec = plgpu.BlockSpec(
        (sizes.columns, sizes.row_bytes),
        lambda t: (j, first_step + t),
        transforms=_swizzled(sizes.row_bytes, 8),
        delay_release=delay,
    )
    scale_specs = [
        plgpu.BlockSpec(
            boxes.shape,
            lambda t, boxes=boxes: boxes.place(first_step + t, j),
            delay_release=delay,
        )
        for boxes in scales
    ]
    return [x_spec, data_spec, *scale_specs]


def _cluster_names(sizes: _BlockSizes) -> tuple[str, ...]:
    """The axis of the blocks that read x together, or no axis."""
    return ("cluster",) if sizes.cluster > 1 else ()


class _ScaleBoxes:
    """The boxes of scales or zero points that the steps along k load.

    Scales lie as `[n, groups]` in memory. TMA reads at least 16 bytes of a row, so a
    box has the scales of several groups, and several steps may load the same box. If
    there is one group, the scales are one row `[1, n]`.

    Attributes:
      shape: shape of a box.
    """

    def __init__(self, p: Problem, sizes: _BlockSizes, itemsize: int):
        self._p, self._bk, self._columns = p, sizes.bk, sizes.columns
        self._width = max(16 // itemsize, sizes.bk // sizes.chunk)
        self.shape = (self._columns, self._width)
        if p.num_groups == 1:
            self.shape = (1, self._columns)

    def first_group(self, step: Any) -> Any:
        """The first group of a step along k."""
        if self._p.group < self._bk:
            return step * (self._bk // self._p.group)
        return step * self._bk // self._p.group

    def place(self, step: Any, block: Any) -> tuple[Any, Any]:
        """The index of the box of a step, for one block of columns of the result."""
        first = self.first_group(step)
        if self._p.num_groups == 1:
            # Steps beyond k read the scales too. They are those of the result.
            return jnp.minimum(first, 0), block
        return block, first // self._width

    def part(self, ref: Any, rows: Any) -> Any:
        """The part of a box that has some rows of the weight."""
        return ref.at[:, rows] if self._p.num_groups == 1 else ref.at[rows]

    def read(self, ref: Any, first_group: Any, number: int, interpret: bool) -> Any:
        """The scales `[bn]` of a group of a step, for the rows of a warp group.

        Args:
          ref: the box, or the part of it that has these rows.
          first_group: the first group of the step.
          number: which group of the step.
          interpret: as in `matmul`.
        """
        if self._p.num_groups == 1:
            return _layout(ref[0], _ROWS, interpret)
        column = first_group % self._width + number
        return ref[:, column] if interpret else _column(ref, column)


def _column(ref: Any, column: Any) -> Any:
    """One column of a matrix in shared memory, as registers in the layout `_ROWS`.

    Mosaic has no loads of columns in every version of jax that we support.
    """
    (rows, width), dtype = ref.shape, jnp.dtype(ref.dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((rows,), dtype, layout=_ROWS),
    )
    def load(_, *operands):
        matrix, index = operands
        index = index.registers.item()  # a scalar has one register
        registers = _words.column_registers(matrix, index, rows, width, dtype)
        layout = _ROWS.to_mgpu()
        signed = None
        if jnp.issubdtype(dtype, jnp.integer):
            signed = jnp.issubdtype(dtype, jnp.signedinteger)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape((rows,))),
            _layout=layout,
            _is_signed=signed,
        )

    return load(ref, column)


def _in_unit_order(x: jax.Array, p: Problem, unit: int) -> jax.Array:
    """Orders the columns of x as `unit` codes in HALVES packing would be.

    Returns x itself if the codes are stored in this order, as they are by default. Else
    XLA moves the columns of x before the kernel starts.
    """
    if p.bits == 8 or p.unit == unit:
        return x
    half = unit // 2
    if p.unit is None:
        # Byte j has codes 2 * j and 2 * j + 1.
        parts = x.reshape(*x.shape[:2], -1, half, 2)
        return jnp.swapaxes(parts, 3, 4).reshape(x.shape)
    whole = p.k // p.unit * p.unit
    ordered = _cut_units(x[..., :whole], p.unit, unit)
    if whole == p.k:
        return ordered
    # The codes beyond the last whole unit are a shorter unit.
    last = _cut_units(x[..., whole:], p.k - whole, unit)
    return jnp.concatenate([ordered, last], axis=-1)


def _cut_units(x: jax.Array, stored_unit: int, unit: int) -> jax.Array:
    """Orders columns of stored units as columns of units of `unit` codes."""
    # Byte j of a stored unit has codes j and j + stored_unit / 2.
    parts = x.reshape(*x.shape[:2], -1, 2, stored_unit // unit, unit // 2)
    return jnp.swapaxes(parts, 3, 4).reshape(x.shape)


def _rows_of_scales(a: jax.Array, p: Problem) -> jax.Array:
    """Scales as the kernel reads them: `[e, n, groups]`, or `[e, 1, n]` for one group.

    TMA needs rows that start at a multiple of 16 bytes. If the groups of a row do not
    fill that, XLA pads a copy.
    """
    if p.num_groups == 1:
        a = a.reshape(p.e, 1, p.n)
    padding = -a.shape[2] % (16 // a.dtype.itemsize)
    return jnp.pad(a, ((0, 0), (0, 0), (0, padding))) if padding else a


class _Codes(NamedTuple):
    """The codes of one chunk of one warp group.

    Attributes:
      ref: bytes `[bn, row_bytes]` of a step, in shared memory.
      chunk: which chunk of the step.
      table: the codebook `[16]` in the interpreter, the table of pairs in shared memory
        on the device, or None.
    """

    ref: Any
    chunk: int
    table: Any


def _decode(codes: _Codes, zero: list, p: Problem, sizes: _BlockSizes, interpret: bool):
    """Decodes the codes of a chunk to weights without their scales.

    Args:
      codes: the codes.
      zero: empty, or a list with the zero points `[bn]`.
      p: the problem.
      sizes: the sizes of the block.
      interpret: as in `matmul`.

    Returns:
      `[bn, chunk]` in the dtype of x.
    """
    dtype = jnp.dtype(p.x_dtype)
    decode = _decode_arrays if interpret else _decode_registers
    weights, *subtracted = decode(codes, p, sizes)
    for part in subtracted:
        weights = weights - part
    # Subtracting offset * sum(x) from a product would save one instruction for two
    # weights. But in a simulation with normal x, int4 codes and groups of 128, the
    # error of the float32 sums was 10 to 20 times as large.
    offset = 0 if p.codebook else _words.offset(p.bits, p.signed, p.x_dtype)
    if zero:
        total = (zero[0].astype(jnp.float32) + np.float32(offset)).astype(dtype)
        return weights - lax.broadcast_in_dim(total, weights.shape, (0,))
    return weights - np.asarray(offset, dtype) if offset else weights


def _word_pairs(operations, word, table, p: Problem) -> list[list]:
    """The pairs of numbers of one word, and pairs to subtract from them if needed."""
    if p.codebook:
        return [_words.look_up_pairs(operations, word, table)]
    return _words.decode_pairs(operations, word, p.bits, p.signed, p.x_dtype)


def _decode_arrays(codes: _Codes, p: Problem, sizes: _BlockSizes) -> list:
    """`_decode_registers` in the interpreter, in operations of jax."""
    dtype = jnp.dtype(p.x_dtype)
    num_bytes = sizes.chunk * p.bits // 8
    data = codes.ref[:, pl.ds(codes.chunk * num_bytes, num_bytes)]
    table = None if codes.table is None else _words.pair_table(codes.table, dtype)
    words = _words.gather_array(data, together=p.codebook)
    return [
        _words.numbers_array(pairs, p.bits, sizes.unit, dtype)
        for pairs in _word_pairs(_words.Arrays, words, table, p)
    ]


def _decode_registers(codes: _Codes, p: Problem, sizes: _BlockSizes) -> list:
    """Decodes bytes in registers, all in one piece of inline code.

    The compiler cannot pass the result of one piece of inline code to another.

    Returns:
      One array, or two arrays of which the second must be subtracted from the first.
    """
    dtype = jnp.dtype(p.x_dtype)
    shape = (sizes.bn, sizes.chunk)
    num_bytes = sizes.chunk * p.bits // 8
    blocks = _words.column_blocks(num_bytes, p.bits, sizes.unit)
    num_parts = 2 if _words.has_sign_part(p.bits, p.x_dtype) else 1
    transforms = _swizzled(sizes.row_bytes, 8)
    references = [codes.ref] if codes.table is None else [codes.ref, codes.table]
    types = [plgpu.RefType(transforms), plgpu.RefType()]
    weights = plgpu.ShapeDtypeStruct(shape, dtype, layout=_WEIGHTS)

    @plgpu.inline_mgpu(
        arg_types=tuple(types[: len(references)]), return_type=[weights] * num_parts
    )
    def decode(_, data, *table_ref):
        table = _words.PairTable(table_ref[0]) if table_ref else None
        tile_bytes = min(128, sizes.row_bytes)
        memory = _words.CodeMemory(data, sizes.row_bytes, tile_bytes)
        # [parts, rows / 64, blocks of columns, halves of 16 rows]
        targets = np.empty((num_parts, sizes.bn // 64, blocks.size, 2), dtype=object)
        for row, number, half in np.ndindex(sizes.bn // 64, len(blocks), 2):
            piece = codes.chunk * len(blocks) + number
            word = memory.word(row, half, piece, together=p.codebook)
            parts = _word_pairs(_words.Registers, word, table, p)
            for target, pairs in zip(targets, parts, strict=True):
                target[row, blocks[number], half] = pairs
        return [_fragmented(target, shape, dtype) for target in targets]

    return decode(*references)


def _fragmented(registers: np.ndarray, shape: tuple[int, int], dtype):
    """An array in registers, of words with a pair of 16-bit numbers each.

    Args:
      registers: `[rows / 64, columns / 8, halves of 16 rows]`.
      shape: rows and columns.
      dtype: dtype of the numbers.
    """
    kind = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype)))
    layout = _WEIGHTS.to_mgpu()
    out = np.empty(registers.shape, dtype=object)
    for index, register in np.ndenumerate(registers):
        out[index] = mgpu_utils.bitcast(register, kind)
    out = out.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)


def _fill_table(table, barrier, codebook, warpgroups: int, dtype: str) -> None:
    """Fills the table of pairs in shared memory, and waits until all threads have."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def fill(_, *references):
        table, codebook = references
        _words.PairTable(table).fill(codebook, 128 * warpgroups, dtype)

    fill(table, codebook)
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _run_pipeline(pipeline, sizes: _BlockSizes, interpret: bool):
    """Runs all steps of a pipeline. Returns the sums `[bn, bm]` with their scales."""
    shape = (sizes.bn, sizes.bm)
    zeros = _layout(jnp.zeros(shape, jnp.float32), _WEIGHTS, interpret)
    if sizes.scaling == "sums":
        return pipeline(zeros)
    scale = None
    if sizes.scaling == "result":
        scale = _layout(jnp.zeros(sizes.bn, jnp.float32), _ROWS, interpret)
    if interpret:
        sums, scale = pipeline((zeros, scale))
    else:

        def run(accumulator):
            _, last_scale = pipeline((accumulator, scale))
            return accumulator[...], last_scale  # waits for the matrix unit

        accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
        sums, scale = pl.run_scoped(run, accumulator)
    if scale is None:
        return sums
    return sums * lax.broadcast_in_dim(scale, shape, (0,))


def _add_scaled_sums(sums, chunks: Iterable, interpret: bool):
    """Adds the products of chunks, each times its scales, to the sums `[bn, bm]`."""
    for weights, scale, x_chunk in chunks:
        product = _wgmma(weights, x_chunk, interpret)  # [bn, bm]
        sums = sums + product * lax.broadcast_in_dim(scale, sums.shape, (0,))
    return sums


def _accumulate(carry: tuple, chunks: Iterable, sizes: _BlockSizes, interpret: bool):
    """Lets the matrix unit add the products of chunks to the sums `[bn, bm]`.

    Args:
      carry: the sums, which are an accumulator of the matrix unit on the device, and
        the scales `[bn]` of the result, or None if weights are scaled.
      chunks: weights `[bn, chunk]`, scales `[bn]` and x `[bm, chunk]` of each chunk.
      sizes: the sizes of the block.
      interpret: as in `matmul`.

    Returns:
      The next carry.
    """
    sums, last_scale = carry
    for weights, scale, x_chunk in chunks:
        if sizes.scaling == "weights":
            factor = scale.astype(weights.dtype)
            weights = weights * lax.broadcast_in_dim(factor, weights.shape, (0,))
        else:
            last_scale = scale
        if interpret:
            sums = sums + _wgmma(weights, x_chunk, interpret)
        else:
            plgpu.wgmma(sums, weights, x_chunk.T)
            plgpu.wgmma_wait(1 if sizes.overlaps else 0)
    return sums, last_scale


def _wgmma(weights, x_smem, interpret: bool):
    """`weights [bn, chunk] @ x.T [chunk, bm]`, float32 `[bn, bm]`."""
    if interpret:
        return lax.dot_general(
            weights,
            x_smem[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def multiply(sums):
        plgpu.wgmma(sums, weights, x_smem.T)
        return sums[...]

    shape = (weights.shape[0], x_smem.shape[0])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _store_transposed(target, value, interpret: bool) -> None:
    """Writes the transpose of registers to shared memory."""
    if interpret:
        target[...] = value.T
    else:
        target.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _layout(value, layout, interpret: bool):
    """Gives a value a register layout. Does nothing in the interpreter."""
    return value if interpret else plgpu.layout_cast(value, layout)


def _swizzled(row: int, bits: int) -> tuple:
    """Transforms for a tile in shared memory with `row` numbers of `bits` bits a row.

    The transforms put the numbers that a load reads into different memory banks.
    """
    swizzle = min(128, row * bits // 8)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)
