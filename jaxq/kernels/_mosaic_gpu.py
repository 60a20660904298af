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
  float32. Codes minus zero points are exact in 16 bits. A scale costs m operations per
  group instead of 2 * group. Only the entries of a codebook are rounded.
- Shifts and masks turn a 32-bit word of codes into pairs of 16-bit numbers. A code
  becomes the last mantissa bits of the number 128 (bfloat16) or 1024 (float16). The
  number is then 128 or 1024 plus the code. The entries of a codebook are looked up a
  byte at a time by `prmt`. One `prmt` looks up four codes in eight bytes, so a weight
  needs two instructions.
- Decoding changes the order of the codes, and threads do not exchange codes. So x is
  brought into the same order before the kernel. A unit of columns has four lanes, and
  each lane holds one word. Number c of pair i of lane t is column 8 * i + 2 * t + c of
  the left operand.
- One more warp group loads `stages` tiles of x, codes and scales ahead through TMA. TMA
  reads zeros beyond an edge, so weights are never padded or copied.
- With few rows of x there are too few blocks to occupy all SMs. Then `splits` blocks
  each compute the sums over a part of k, and XLA adds these sums.

Shared memory, at most 227 KB: stages * (2 * bm * bk + warpgroups * bn * (bk * bits / 8
+ size of scales * bk / group)) bytes, and warpgroups * bn * bm * 4 bytes for the
result. Registers of a thread, at most 240: bn * bm / 64 for the sums and bn * bk / 256
for the weights.

Supported: layout "rows"; x in bfloat16 or float16; codes of 4 bits (signed, unsigned,
codebook) or 8 bits; scales in any float dtype; zero points; groups of 32 or of a
multiple of 64 codes, or one scale per column; any e and m; n a multiple of 8; k a
multiple of 64.

The kernel has run in the interpreter (all of it except wgmma itself) and has been
compiled for an H200. It has not been timed on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from jaxlib.mlir.dialects import arith, vector

from jaxq.kernels._problem import Problem

# How 64 rows are distributed over the registers of a warp group. A 32-bit word is in
# the same place as its four bytes.
_BYTES = plgpu.Layout.WGMMA_8BIT
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_WEIGHTS = plgpu.Layout.WGMMA  # sums have this layout too
_ROWS = plgpu.Layout.WGMMA.reduce(1)

# For each dtype, the number whose last mantissa bit has the value 1: its bits, and its
# value.
_BASE = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}
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
        return "it takes no int8 x; XLA has its own int8 product"
    if p.x_dtype not in _BASE:
        return f"it takes x in bfloat16 or float16, not in {p.x_dtype}"
    if p.bits not in (4, 8) or (p.codebook and p.bits != 4):
        return (
            "it decodes codes of 4 or 8 bits and codebooks of 16 numbers, not "
            f"{p.codes}"
        )
    if 0 in (p.e, p.m, p.n, p.k):
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
    # A step must have whole groups, or be a part of one group.
    short_steps = p.k % 128 or (p.group % 128 and p.group > 64)
    bk = 64 if bm == 128 or short_steps else 128
    num_blocks = p.e * pl.cdiv(p.n, 128) * pl.cdiv(p.m, bm)
    # Split k while blocks are few and each part has at least 4 steps.
    splits = 1
    while splits < 16 and 2 * splits * num_blocks <= 160 and p.k >= 8 * splits * bk:
        splits *= 2
    return {
        "bm": bm,
        "bn": 64,
        "bk": bk,
        "warpgroups": 2,
        "stages": 4 if bm == 128 else 6,
        "splits": splits,
    }


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
    """Computes `x @ decode(data)` as `Problem` states it.

    Args:
      x: `[e, m, k]`.
      data: `[e, n, k * bits / 8]`.
      scale: `[e, k / group, n]`.
      zero_point: integers with the shape of scale, or None.
      codebook: float32 `[e, 16]`, or None.
      problem: static facts of the arrays. `why_not` must accept it.
      tiles: six sizes by name. A warp group computes "bm" rows by "bn" columns of the
        result. A block has "warpgroups" of these warp groups side by side. A step along
        k has "bk" codes, a multiple or a divisor of the group. "stages" is the number
        of steps that are loaded ahead. "splits" is the number of blocks that share the
        sum over k.
      interpret: True to run on a CPU. Register layouts and wgmma exist only on the
        device, so they are replaced by plain operations with the same result.

    Returns:
      `[e, m, n]` in `problem.out_dtype`.

    Raises:
      ValueError: The tiles do not fit the problem.
    """
    p = problem
    sizes = _block_sizes(p, tiles)
    bm, bn, warpgroups = sizes.bm, sizes.bn, sizes.warpgroups
    padded_m = sizes.m_blocks * bm

    x = jnp.pad(_in_decoded_order(x, p), ((0, 0), (0, padded_m - p.m), (0, 0)))
    inputs = [x, data, _align(scale)]
    if zero_point is not None:
        inputs.append(_align(zero_point))
    # TMA writes nothing beyond an edge. The interpreter may drop the whole block, so
    # the interpreter gets a padded result.
    m, n = pl.cdiv(p.m, 8) * 8, p.n
    if interpret:
        m, n = padded_m, sizes.n_blocks * sizes.columns
    if sizes.writes_y:
        out = jax.ShapeDtypeStruct((1, p.e, m, n), jnp.dtype(p.out_dtype))
        transforms = _swizzled(64, 16)
        staging = plgpu.SMEM((warpgroups, bm, bn), out.dtype, transforms=transforms)
    else:
        out = jax.ShapeDtypeStruct((sizes.splits, p.e, n, padded_m), jnp.float32)
        staging = plgpu.SMEM((warpgroups, bn, bm), out.dtype)

    def kernel(*refs):
        _block(p, sizes, out.dtype, interpret, *refs)

    # In the interpreter too, reads beyond an edge give zeros, as they do with TMA.
    interpreter = InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    y = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[staging],
        grid=(p.e, sizes.splits, sizes.n_blocks, sizes.m_blocks),
        grid_names=("e", "s", "n", "m"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter if interpret else None,
    )(*inputs, *(() if codebook is None else (codebook,)))
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
      columns: columns of the result of a block.
      row_bytes: bytes of a row in one step.
      m_blocks: number of blocks along m.
      n_blocks: number of blocks along n.
      steps: steps of each part of k.
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
    columns: int
    row_bytes: int
    m_blocks: int
    n_blocks: int
    steps: int
    writes_y: bool


def _block_sizes(p: Problem, tiles: Mapping[str, int | str]) -> _BlockSizes:
    """The sizes that follow from a problem and its tiles.

    Raises:
      ValueError: The tiles do not fit the problem.
    """
    names = ("bm", "bn", "bk", "warpgroups", "stages", "splits")
    sizes = {name: int(tiles[name]) for name in names}
    bm, bn, bk = sizes["bm"], sizes["bn"], sizes["bk"]
    chunk = bk if p.num_groups == 1 else min(bk, p.group)
    # A swizzled row of codes has at most 128 bytes, 1024 / bits codes.
    cuts_row = p.k % min(bk, 1024 // p.bits)
    cuts_group = p.num_groups > 1 and p.group % chunk
    if bn % 64 or bm % 8 or chunk % 32 or bk % chunk or cuts_row or cuts_group:
        raise ValueError(
            f"quantized_matmul: the Mosaic GPU kernel cannot run with tiles "
            f"{dict(tiles)} for groups of {p.group} in rows of {p.k} codes. bn must be "
            "a multiple of 64, bm of 8 and bk of 32. k must be a multiple of the "
            f"smaller of bk and {1024 // p.bits}. bk must be a multiple of the group "
            "or divide it."
        )
    columns = sizes["warpgroups"] * bn
    # A result of 16 bits that is not split is transposed when it is stored, in tiles of
    # 64 columns.
    is_whole = sizes["splits"] == 1 and p.n % 64 == 0
    return _BlockSizes(
        **sizes,
        chunk=chunk,
        columns=columns,
        row_bytes=bk * p.bits // 8,
        m_blocks=pl.cdiv(p.m, bm),
        n_blocks=pl.cdiv(p.n, columns),
        steps=pl.cdiv(p.k, bk * sizes["splits"]),
        writes_y=is_whole and jnp.dtype(p.out_dtype).itemsize == 2,
    )


def _block(p: Problem, sizes: _BlockSizes, out_dtype, interpret: bool, *refs) -> None:
    """One block (e, s, n, m): sums `[columns, bm]` over part s of k.

    `refs` are x, the codes, the scales, the zero points if there are any, the codebook
    if there is one, then the result and its staging buffer in shared memory.
    """
    *sources, out_ref, out_smem = refs
    bm, bn, bk, chunk = sizes.bm, sizes.bn, sizes.bk, sizes.chunk
    columns, steps = sizes.columns, sizes.steps
    e, s, j, i = (lax.axis_index(name) for name in ("e", "s", "n", "m"))
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * bn, bn)  # this warp group's rows of the weight

    def step(_, x_smem, data_smem, *rest):
        """Adds one step along k: x [bm, bk], data [columns, row_bytes]."""
        scale_smem, *zero_smem, (sums, table) = rest
        data = _layout(data_smem[rows, :], _BYTES, interpret)
        words = _as_words(data, interpret)  # [bn, row_bytes / 4]
        words_per_chunk = chunk * p.bits // 32
        for c in range(bk // chunk):
            part = words[:, c * words_per_chunk : (c + 1) * words_per_chunk]
            zero = [_layout(ref[c, rows], _ROWS, interpret) for ref in zero_smem]
            weights = _decode_words(part, table, zero, p, interpret)  # [bn, chunk]
            x_chunk = x_smem.at[:, pl.ds(c * chunk, chunk)]  # [bm, chunk]
            scale = _layout(scale_smem[c, rows], _ROWS, interpret)
            scale = scale.astype(jnp.float32)  # [bn]
            product = _wgmma(weights, x_chunk, interpret)  # [bn, bm]
            sums = sums + product * lax.broadcast_in_dim(scale, sums.shape, (0,))
        return sums, table

    def compute(pipeline):
        """Runs all steps in a computing warp group, then stores the result."""
        table = ()
        if p.codebook:
            table = tuple(sources[-1][e, index] for index in range(16))
        sums = _layout(jnp.zeros((bn, bm), jnp.float32), _WEIGHTS, interpret)
        sums, _ = pipeline((sums, table))
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

    groups = bk // chunk
    # If a group is longer than a step, several steps load the same scales.
    codes_per_load = max(chunk, p.group) * groups
    group_spec = plgpu.BlockSpec(
        (groups, columns),
        lambda t: ((s * steps + t) * bk // codes_per_load, j),
    )
    x_spec = plgpu.BlockSpec(
        (bm, bk),
        lambda t: (i, s * steps + t),
        transforms=_swizzled(min(chunk, 64), 16),
    )
    data_spec = plgpu.BlockSpec(
        (columns, sizes.row_bytes),
        lambda t: (j, s * steps + t),
        transforms=_swizzled(sizes.row_bytes, 8),
    )
    # The codebook is read once by `compute` and is not part of the pipeline.
    inputs = sources[:-1] if p.codebook else sources
    plgpu.emit_pipeline_warp_specialized(
        step,  # pyright: ignore[reportArgumentType]
        grid=(steps,),
        memory_registers=40,
        in_specs=[x_spec, data_spec, *[group_spec] * (len(inputs) - 2)],
        wg_axis="warpgroup",
        num_compute_wgs=sizes.warpgroups,
        max_concurrent_steps=sizes.stages,
        compute_context=compute,
    )(*(ref.at[e] for ref in inputs))


def _in_decoded_order(x: jax.Array, p: Problem) -> jax.Array:
    """Orders the columns of x as `_decode_words` orders the weights.

    A unit is 4 words of codes, one for each of 4 lanes. A word has `num_pairs` pairs of
    codes. With masks the two codes of a pair are `num_pairs` places apart in the word.
    With a codebook they are neighbours.
    """
    num_pairs = 16 // p.bits
    in_word = (num_pairs, 2) if p.codebook else (2, num_pairs)
    units = x.reshape(p.e, p.m, -1, 4, *in_word)  # [e, m, units, lanes, ...]
    pair, number = (4, 5) if p.codebook else (5, 4)
    return units.transpose(0, 1, 2, pair, 3, number).reshape(x.shape)


def _decode_words(words, table, zero: list, p: Problem, interpret: bool):
    """Decodes words of codes to weights without their scales.

    Args:
      words: uint32 `[r, w]`. Each row has units of 4 words, one for each of 4 lanes.
      table: 16 scalars for a codebook, else empty.
      zero: empty, or a list with the zero points `[r]`.
      p: the problem.
      interpret: as in `matmul`.

    Returns:
      `[r, w * 32 / bits]` in the dtype of x.
    """
    dtype = jnp.dtype(p.x_dtype)
    if p.codebook:
        table_words = _table_words(table, words.shape, dtype, interpret)
        return _look_up_words(words, table_words, dtype, interpret)
    if p.bits == 4 or dtype == jnp.float16:
        weights, offset = _decode_by_mask(words, p, interpret)
    else:
        weights, offset = _decode_bfloat16_bytes(words, p, interpret)
    for z in zero:
        total = (z.astype(jnp.float32) + np.float32(offset)).astype(dtype)
        return weights - lax.broadcast_in_dim(total, weights.shape, (0,))
    return weights - np.asarray(offset, dtype) if offset else weights


# A factor that writes a 16-bit pattern into both halves of a word.
_TWICE = np.uint32(0x00010001)


def _decode_by_mask(words, p: Problem, interpret: bool) -> tuple[Any, int]:
    """Returns (weights + offset, offset) for codes that fit in the mantissa."""
    bits, base = _BASE[p.x_dtype]
    shifted = [words >> np.uint32(p.bits * pair) for pair in range(16 // p.bits)]
    # A signed code plus 2^(bits - 1) is not negative. In two's complement that is the
    # same pattern with its sign bit flipped.
    low = -(1 << (p.bits - 1)) if p.signed else 0
    mask = _TWICE * np.uint32((1 << p.bits) - 1)
    flip = _TWICE * np.uint32(bits - low)
    pairs = [(word & mask) ^ flip for word in shifted]
    return _as_weights(pairs, jnp.dtype(p.x_dtype), interpret), base - low


def _decode_bfloat16_bytes(words, p: Problem, interpret: bool) -> tuple[Any, int]:
    """Returns (weights + offset, offset) for 8-bit codes in bfloat16.

    Only seven bits fit in the mantissa of 128. The eighth bit, which is the sign of
    signed codes, goes into a second number: 128, or 256 if the bit is set. The second
    number is subtracted from the first. For unsigned codes the eighth bit is flipped.
    """
    bits, _ = _BASE[p.x_dtype]
    shifted = [words >> np.uint32(p.bits * pair) for pair in range(16 // p.bits)]
    flip = np.uint32(0 if p.signed else 0x80)
    low_bits = [
        (word & (_TWICE * np.uint32(0x7F))) ^ (_TWICE * np.uint32(bits))
        for word in shifted
    ]
    sign_bits = [
        (word & (_TWICE * np.uint32(0x80))) ^ (_TWICE * (np.uint32(bits) ^ flip))
        for word in shifted
    ]
    dtype = jnp.dtype(p.x_dtype)
    low_numbers = _as_weights(low_bits, dtype, interpret)
    sign_numbers = _as_weights(sign_bits, dtype, interpret)
    return low_numbers - sign_numbers, 0 if p.signed else -128


def _table_words(entries, shape: tuple[int, int], dtype, interpret: bool) -> list:
    """The 16 numbers of a table as 8 words. Each word is an array of equal entries.

    Each of the first four words has the low bytes of four numbers. Each of the last
    four words has the high bytes. The work is scalar, and the compiler moves it out of
    the loop over steps.
    """
    numbers = [
        _layout(jnp.full(shape, entry), _WORDS, interpret).astype(dtype)
        for entry in entries
    ]
    patterns = [
        lax.bitcast_convert_type(number, jnp.uint16).astype(jnp.uint32)
        for number in numbers
    ]
    words = []
    for shift in (0, 8):
        for first in range(0, 16, 4):
            word = jnp.zeros(shape, jnp.uint32)
            for place in range(4):
                byte = (patterns[first + place] >> np.uint32(shift)) & np.uint32(0xFF)
                word = word | (byte << np.uint32(8 * place))
            words.append(word)
    return words


def _look_up_words(words, table: list, dtype, interpret: bool):
    """Looks up the table entries of words of codes.

    Pair i of a word has the entries of the word's codes 2 * i and 2 * i + 1.

    Args:
      words: uint32 `[r, w]`, 8 codes in each word.
      table: the 8 words of `_table_words`.
      dtype: dtype of the entries, 16 bits.
      interpret: as in `matmul`.
    """
    # `prmt` selects one of 8 bytes by 3 bits of a code. So each half of the table has a
    # `prmt` of its own. Another `prmt` selects the half by the fourth bit: byte b comes
    # from the first word (selector b) or from the second word (selector b + 4).
    place = words & np.uint32(0x77777777)
    half = ((words & np.uint32(0x88888888)) >> np.uint32(1)) | np.uint32(0x32103210)
    # One `prmt` looks up the four codes in the low 16 bits.
    arrays = [place, half, place >> np.uint32(16), half >> np.uint32(16), *table]

    def fetch(permute, place, half, later_place, later_half, *table):
        pairs = []
        for codes, halves in ((place, half), (later_place, later_half)):
            low_bytes, high_bytes = (
                permute(permute(a, b, codes), permute(c, d, codes), halves)
                for a, b, c, d in (table[:4], table[4:])
            )
            # Interleave: low byte and high byte of each of two entries.
            pairs.append(permute(low_bytes, high_bytes, 0x5140))
            pairs.append(permute(low_bytes, high_bytes, 0x7362))
        return pairs

    if interpret:
        return _as_weights(fetch(_permute_bytes, *arrays), dtype, interpret)

    # All `prmt` are in one piece of inline code. The compiler cannot pass the result of
    # one piece to another.
    @plgpu.inline_mgpu(
        arg_types=(_WORDS,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(
            (words.shape[0], 8 * words.shape[1]), dtype, layout=_WEIGHTS
        ),
    )
    def fetch_registers(_, *arrays):
        i32 = ir.IntegerType.get_signless(32)
        pair_type = ir.VectorType.get((1,), i32)

        def permute(low, high, selector):
            if isinstance(selector, int):
                selector = arith.constant(i32, selector)
            return mgpu_utils.prmt(low, high, selector)

        registers = [np.empty_like(arrays[0].registers) for _ in range(4)]
        for index in np.ndindex(registers[0].shape):
            operands = [
                mgpu_utils.bitcast(array.registers[index], i32) for array in arrays
            ]
            pairs = fetch(permute, *operands)
            for register, pair in zip(registers, pairs, strict=True):
                register[index] = mgpu_utils.bitcast(pair, pair_type)
        return _rename(registers, _WEIGHTS, dtype, 2)

    return fetch_registers(*arrays)


def _permute_bytes(low, high, selector):
    """What `prmt` does, in plain jax.

    `low` and `high` have eight bytes. Nibble b of the selector says which of these
    bytes is byte b of the result.
    """
    if isinstance(selector, int):
        selector = jnp.full_like(low, selector)
    out = jnp.zeros_like(low)
    for byte in range(4):
        place = (selector >> np.uint32(4 * byte)) & np.uint32(7)
        shift = np.uint32(8) * (place & np.uint32(3))
        source = jnp.where(place < 4, low, high) >> shift
        out = out | ((source & np.uint32(0xFF)) << np.uint32(8 * byte))
    return out


def _wgmma(weights, x_smem, interpret: bool):
    """`weights [bn, chunk] @ x.T [chunk, bm]`, float32 `[bn, bm]`."""
    if interpret:
        return lax.dot_general(
            weights,
            x_smem[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def accumulate(sums):
        plgpu.wgmma(sums, weights, x_smem.T)
        return sums[...]

    shape = (weights.shape[0], x_smem.shape[0])
    return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _store_transposed(target, value, interpret: bool) -> None:
    """Writes the transpose of registers to shared memory."""
    if interpret:
        target[...] = value.T
    else:
        target.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _layout(value, layout, interpret: bool):
    """Gives a value a register layout. Does nothing in the interpreter."""
    return value if interpret else plgpu.layout_cast(value, layout)


def _as_words(data, interpret: bool):
    """Bytes `[r, 4 * w]` as uint32 `[r, w]`."""
    shape = (data.shape[0], data.shape[1] // 4)
    if interpret:
        return lax.bitcast_convert_type(data.reshape(*shape, 4), jnp.uint32)

    @plgpu.inline_mgpu(
        arg_types=(_BYTES,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=_WORDS),
    )
    def rename(_, *arrays):
        return _rename([array.registers for array in arrays], _WORDS, jnp.uint32, 1)

    return rename(data)


def _as_weights(pairs: list, dtype, interpret: bool):
    """Pairs of 16-bit numbers, uint32 `[r, w]`, as one array `[r, 2 * w * len(pairs)]`.

    A unit is 4 words, one for each lane. In a unit, the numbers of the first pair of
    all lanes come first, then the numbers of the second pair, and so on.
    """
    rows, width = pairs[0].shape
    shape = (rows, 2 * len(pairs) * width)
    if interpret:
        units = [pair.reshape(rows, width // 4, 4) for pair in pairs]
        stacked = jnp.stack(units, axis=2)  # [r, units, pairs, lanes]
        return lax.bitcast_convert_type(stacked, dtype).reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(_WORDS,) * len(pairs),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=_WEIGHTS),
    )
    def rename(_, *pairs):
        return _rename([pair.registers for pair in pairs], _WEIGHTS, dtype, 2)

    return rename(*pairs)


def _rename(parts: list, layout, dtype, length: int):
    """Makes one array of the registers of several arrays.

    No data moves. Each register of the result is a register of one of the arrays, read
    as another type.

    Args:
      parts: registers of each array.
      layout: layout of the result.
      dtype: dtype of the result.
      length: numbers in each register of the result.
    """
    kind = ir.VectorType.get((length,), mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype)))
    registers = _by_unit(parts)
    out = np.empty(registers.shape, dtype=object)
    for index, register in np.ndenumerate(registers):
        out[index] = vector.bitcast(kind, register)
    signed = False if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
    return mgpu.FragmentedArray(
        _registers=out, _layout=layout.to_mgpu(), _is_signed=signed
    )


def _by_unit(parts: list) -> np.ndarray:
    """Stacks one thread's registers of several arrays: `[rows / 64, units, ...]`.

    The registers that belong to the same unit of columns are next to each other.
    """
    registers = np.stack(parts, axis=2)
    return registers.reshape(registers.shape[0], -1, *registers.shape[3:])


def _swizzled(row: int, bits: int) -> tuple:
    """Transforms for a tile in shared memory with `row` numbers of `bits` bits a row.

    The transforms put the numbers that a load reads into different memory banks.
    """
    swizzle = min(128, row * bits // 8)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


def _align(a: jax.Array) -> jax.Array:
    """Pads columns so that each row starts at a multiple of 16 bytes, as TMA needs."""
    return jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % (16 // a.dtype.itemsize))))
